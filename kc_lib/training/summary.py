"""What a training's figures say over time: circuits that stay or change, and the figures that a run is remembered by.

Overlap of circuits is Jaccard's, of edges and of nodes, and weighted: sum of the smaller over sum of the larger |score| of
every edge, an edge outside a circuit having none (Tigges et al. 2024, arXiv:2407.10827, section 4). Only draws of one seed
are compared over time. Their exponentially weighted mean is 0.5 times the new value plus 0.5 times the old mean. Where a
checkpoint has no circuit there is no overlap, and the next one has none with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from kc_lib.errors import MethodError
from kc_lib.training.result import CIRCUIT_FIGURES, FROM_ZERO, TrainingResult, emergence, over_draws, shown
from kc_lib.training.swaps import strongest_swaps

ALPHA = 0.5
SIMILARITIES = ("edge_jaccard", "node_jaccard", "weighted_jaccard")
NAMED = 4  # heads named in the headline


def similarities(result: TrainingResult, alpha: float = ALPHA) -> pd.DataFrame:
    """Overlap of every circuit with that of the checkpoint before, of the last checkpoint, and of other draws.

    One row per task, seed, step, against ("previous", "last", "other draws"; the last checkpoint is not held against itself)
    and quantity (``SIMILARITIES``): tokens, value, ewma (by step, of those that are defined; NaN for other draws).

    Raises:
        MethodError: alpha out of range, or a result without circuits.
    """
    if not 0 < alpha <= 1:
        raise MethodError(f"alpha is {alpha!r}; it must be above 0 and at most 1")
    rows = result.of("circuit")
    if rows.empty:
        raise MethodError("the result has no circuits to compare: measure 'circuit' as well")
    circuits = _circuits(rows)
    tokens = rows.groupby("step")["tokens"].first().to_dict()
    steps = result.steps
    overlaps = []
    seeds = rows["seed"].unique().tolist()
    for task, seed, (place, step) in product(rows["task"].unique().tolist(), seeds, enumerate(steps)):
        here = circuits.get((task, seed, step))
        others = {"previous": [circuits.get((task, seed, steps[place - 1]))] if place else []}
        others["last"] = [circuits.get((task, seed, steps[-1]))] if step != steps[-1] else []
        others["other draws"] = [circuits.get((task, other, step)) for other in seeds if other != seed]
        for against, compared in others.items():
            row = {"task": task, "seed": seed, "step": step, "tokens": tokens[step], "against": against}
            means = pd.DataFrame([_overlaps(here, other) for other in compared], columns=SIMILARITIES, dtype=float).mean()
            overlaps += [row | {"quantity": name, "value": mean} for name, mean in means.items()]
    frame = pd.DataFrame(overlaps)
    smoothed = frame.groupby(["task", "seed", "against", "quantity"], sort=False)["value"].transform(
        lambda values: values.ewm(alpha=alpha, adjust=False, ignore_na=True).mean().where(values.notna())
    )
    return frame.assign(ewma=smoothed.where(frame["against"] != "other draws"))


def circuit_table(result: TrainingResult) -> pd.DataFrame:
    """Size and faithfulness of the circuits, means over draws: a row per task and step; empty without circuits."""
    averages = over_draws(result.of("circuit", *CIRCUIT_FIGURES))
    return averages.pivot(index=["task", "step"], columns="quantity", values="value").reindex(columns=CIRCUIT_FIGURES)


def algorithm_table(result: TrainingResult) -> pd.DataFrame:
    """The shares of the steps of the published IOI algorithm at the last checkpoint: a row per step; empty without them."""
    rows = result.of("consistency")
    averages = over_draws(rows[rows["step"] == rows["step"].max()])
    return averages.pivot(index="part", columns="quantity", values="value")


def training_headline(result: TrainingResult) -> dict[str, str]:
    """The figures that matter: per task when the behaviour appears, the last circuit, and how much circuits change."""
    appeared = emergence(result)
    figures = {
        f"{row['task']} appears": f"step {_step_text(row)} ({shown(row['quantity'])})"
        for row in _behaviours(appeared).to_dict("records")
    }
    figures |= _circuit_headline(result)
    for task, heads in appeared[appeared["measure"] == "direct"].groupby("task", sort=False):
        (row,) = heads.sort_values("maximum", ascending=False).head(1).to_dict("records")
        figures[f"strongest head of {task}"] = f"{row['part']} at {_step_text(row)}"
    for score, heads in appeared[appeared["measure"] == "heads"].groupby("quantity", sort=False):
        passing = heads[heads["passes"]].sort_values("maximum", ascending=False)
        named = ", ".join(f"{row['part']} at {_step_text(row)}" for row in passing.head(NAMED).to_dict("records"))
        figures[f"{score} heads"] = named or "none passes"
    best = strongest_swaps(result).sort_values("change").drop_duplicates("task", keep="last")
    for row in best.to_dict("records"):
        figures[f"best swap for {row['task']}"] = (
            f"{row['part']} into step {row['step']}: {row['change']:+.2f} [{row['change_low']:.2f}, "
            f"{row['change_high']:.2f}], others there {row['null']:+.2f}; host {row['host']:.2f}, donor {row['donor']:.2f}"
        )
    return figures


def _circuit_headline(result: TrainingResult) -> dict[str, str]:
    """At how many checkpoints a circuit is defined, and what the last one is like."""
    figures = {}
    averages = over_draws(result.of("circuit", "effect", "n_edges", "faithfulness", "null_faithfulness"))
    for task, rows in averages.groupby("task", sort=False):
        defined = rows[(rows["quantity"] == "n_edges") & (rows["n"] > 0)]
        figures[f"circuits of {task}"] = f"defined at {len(defined)} of {rows['step'].nunique()} checkpoints"
        if len(defined):
            last = rows[rows["step"] == defined["step"].max()].set_index("quantity")
            figures[f"last circuit of {task}"] = (
                f"{last.loc['n_edges', 'value']:.0f} edges, faithfulness {_band(last.loc['faithfulness'])}, random "
                f"{_band(last.loc['null_faithfulness'])}"
            )
    return figures


def _behaviours(appeared: pd.DataFrame) -> pd.DataFrame:
    """One behaviour of each task: the logit difference where it rises, else the probability difference."""
    rows = appeared[(appeared["measure"] == "behaviour") & appeared["step"].notna()]
    return rows.sort_values("quantity", key=lambda names: names.map(FROM_ZERO.index), kind="stable").drop_duplicates("task")


def _circuits(rows: pd.DataFrame) -> dict[Any, dict[Any, pd.Series]]:
    """|score| of the edges, and 1 for each node, by task, seed and step, and "edge" or "node"."""
    parts = rows[rows["quantity"].isin(["edge", "node"])].assign(value=rows["value"].abs())
    by_circuit = parts.groupby(["task", "seed", "step"])
    return {
        circuit: {quantity: own.set_index("part")["value"] for quantity, own in group.groupby("quantity")}
        for circuit, group in by_circuit
    }


def _overlaps(a: Mapping[Any, pd.Series] | None, b: Mapping[Any, pd.Series] | None) -> Mapping[str, float]:
    if a is None or b is None:
        return {}
    edges, nodes = (pd.concat([a[part], b[part]], axis=1) for part in ("edge", "node"))  # NaN in the circuit without it
    edge_jaccard, node_jaccard = (parts.notna().all(axis=1).mean() for parts in (edges, nodes))
    larger, smaller = edges.max(axis=1).sum(), edges.fillna(0.0).min(axis=1).sum()
    weighted = smaller / larger if larger else float("nan")
    return dict(zip(SIMILARITIES, (edge_jaccard, node_jaccard, weighted), strict=True))


def _step_text(row: Mapping[Any, Any]) -> str:
    low, high, step = (float(row[name]) for name in ("step_low", "step_high", "step"))
    return f"{step:.0f}" if low == high == step or np.isnan(low) else f"{step:.0f} [{low:.0f}, {high:.0f}]"


def _band(row: Mapping[Any, Any] | pd.Series) -> str:
    return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
