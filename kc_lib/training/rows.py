"""How measures over a training write their rows (``over_training.MEASURED``), and which metric a task has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from kc_lib.training.drawn import DrawnTask
from kc_lib.training.over_training import MEASURED

METRICS_OF_SETS = {True: "probability_difference", False: "logit_difference"}  # whether a task has sets of answers


def metric_of(draw: DrawnTask, metric: str | None) -> str:
    """The metric asked for, or the task's own."""
    return metric or METRICS_OF_SETS[any(pair.right for pair in draw.task.discovery)]


def measured_row(
    draw: DrawnTask,
    quantity: str,
    value: float = float("nan"),
    low: float = float("nan"),
    high: float = float("nan"),
    part: str = "",
    note: str = "",
) -> dict[str, Any]:
    """One figure of a draw."""
    about = {"task": draw.name, "seed": draw.seed, "quantity": quantity, "part": part}
    return about | {"value": float(value), "low": float(low), "high": float(high), "note": note}


def measured_rows(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A table with all columns of ``MEASURED``: no value or interval is NaN, no note is empty."""
    frame = pd.DataFrame(rows).reindex(columns=list(MEASURED))
    words = {name: frame[name].astype(object).fillna("") for name in ("part", "note")}
    return frame.assign(**words)
