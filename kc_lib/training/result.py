"""What measures over a training give: rows of one table, their averages over draws, and what appears when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pandas as pd

from kc_lib.errors import MethodError
from kc_lib.results import Result
from kc_lib.training.drawn import DrawnTask

MEASURED = ("task", "seed", "quantity", "of", "part", "value", "low", "high", "passes", "note")
COLUMNS = ("checkpoint", "step", "tokens", "measure", *MEASURED)
TYPES = {
    **dict.fromkeys(("checkpoint", "measure", "task", "quantity", "of", "part", "note"), "str"),
    **dict.fromkeys(("step", "seed"), "int64"),
    **dict.fromkeys(("value", "low", "high"), "float64"),
    "tokens": "Int64",
    "passes": "boolean",
}
CIRCUIT_FIGURES = ("effect", "n_edges", "n_nodes", "faithfulness", "null_faithfulness", "noising", "kl", "resampled_jaccard")
SHARE = 0.33  # of its maximum, at which a thing has appeared (Tigges et al. 2024, section 3.3)
FROM_ZERO = ("logit_difference", "probability_difference")  # behaviours that are 0 where the model knows nothing


@dataclass(frozen=True)
class TrainingResult(Result):
    """What every measure gave at every checkpoint, one figure a row.

    Columns of ``frame``: checkpoint, step, tokens (NA where not known), measure, task ("" where it is of none), seed (of
    the draw of prompts), quantity, of (what a swap's quantity is of: a metric, or accuracy; else ""), part (a head, edge or
    node of the graph; "" for the whole), value, low and high (its interval, NaN where it has none), passes (of a head's
    score: whether it counts as high), note (why a value is undefined).

    Example:
        >>> result = kc.over_training(checkpoints, tasks, training_measures(["behaviour", "heads"]))
        >>> result.summary()
    """

    columns = tuple(name for name in COLUMNS if name != "of")  # which files before 0.2 do not have
    frame: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, about: Mapping[str, Any]) -> Self:
        frame = frame if "of" in frame else frame.assign(of="")
        return super().from_frame(frame[list(COLUMNS)].astype(TYPES), about)

    def of(self, measure: str, *quantities: str) -> pd.DataFrame:
        """The rows of a measure, or of some of its quantities, in the order of training."""
        rows = self.frame[self.frame["measure"] == measure]
        return rows[rows["quantity"].isin(quantities)] if quantities else rows

    @property
    def steps(self) -> list[int]:
        return sorted(self.frame["step"].unique().tolist())

    def summary(self, strongest: int = 2) -> pd.DataFrame:
        """What appears when: the ``strongest`` rows of ``emergence`` of every measure, task and quantity."""
        appeared = emergence(self).sort_values("maximum", ascending=False)
        highest = appeared.groupby(["measure", "task", "quantity"], sort=False).head(strongest)
        return highest.sort_values(["measure", "task", "quantity"], kind="stable", ignore_index=True)


def measured_row(
    draw: DrawnTask,
    quantity: str,
    value: float = float("nan"),
    low: float = float("nan"),
    high: float = float("nan"),
    part: str = "",
    **more: str,
) -> dict[str, Any]:
    """One figure of a draw; ``more`` are its columns ``note`` and ``of``."""
    where = {"task": draw.name, "seed": draw.seed, "quantity": quantity, "part": part}
    return where | {"value": float(value), "low": float(low), "high": float(high)} | more


def measured_rows(rows: Sequence[Mapping[Any, Any]]) -> pd.DataFrame:
    """A table with all columns of ``MEASURED``: no value or interval is NaN, no text is empty."""
    frame = pd.DataFrame(rows).reindex(columns=list(MEASURED))
    words = {name: frame[name].astype(object).fillna("") for name in ("of", "part", "note")}
    return frame.assign(**words)


def over_draws(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean over draws of every figure, and its lowest and highest draw.

    One row per task, quantity, part and step: tokens, value, low, high, n (draws in which it is defined). Undefined in all:
    NaN, n 0. Intervals within draws are left out.
    """
    by = ["task", "quantity", "part", "step"]
    groups = frame.groupby(by, sort=False)
    averages = groups["value"].agg(value="mean", low="min", high="max", n="count")
    return averages.join(groups["tokens"].first()).reset_index().sort_values(by, kind="stable", ignore_index=True)


def emergence(result: TrainingResult, share: float = SHARE) -> pd.DataFrame:
    """When things appear: the first checkpoint at which a figure reaches a share of its maximum over the training.

    Of heads every score and the direct effects, of behaviours ``FROM_ZERO``. One row per measure, task, quantity and part:
    maximum and step (of the mean over draws), tokens, step_low and step_high (of single draws), passes (a head's score ever
    counts as high, in any draw). What never rises above 0 has no step.

    Raises:
        MethodError: a share out of range.
    """
    if not 0 < share <= 1:
        raise MethodError(f"share is {share!r}; it must be above 0 and at most 1")
    rows = pd.concat([result.of("behaviour", *FROM_ZERO), result.of("direct"), result.of("heads")])
    by = ["measure", "task", "quantity", "part"]
    appeared = []
    for key, figures in rows[rows["value"].notna()].groupby(by, sort=False):
        by_seed = figures.pivot(index="step", columns="seed", values="value").sort_index()
        mean = by_seed.mean(axis=1)
        step = _first(mean, share)
        seed_steps = [at for seed in by_seed if pd.notna(at := _first(by_seed[seed].dropna(), share))]
        tokens = figures.set_index("step")["tokens"]
        appeared.append(
            dict(zip(by, key, strict=True))
            | {
                "maximum": float(mean.max()),
                "step": step,
                "tokens": tokens[tokens.index == step].iloc[0] if pd.notna(step) else pd.NA,
                "step_low": min(seed_steps, default=np.nan),
                "step_high": max(seed_steps, default=np.nan),
                "passes": bool(figures["passes"].fillna(False).any()),
            }
        )
    return pd.DataFrame(appeared, columns=[*by, "maximum", "step", "tokens", "step_low", "step_high", "passes"])


def _first(values: pd.Series, share: float) -> float:
    """The first step at which values by step reach a share of their maximum; NaN where that is not above 0."""
    if values.empty or not values.max() > 0:
        return float("nan")
    return float(values.index[(values >= share * values.max()).to_numpy()][0])


def shown(name: object) -> str:
    """A measure's or quantity's name in a sentence."""
    return str(name).replace("_", " ")
