"""What a training's figures say over time: circuits that stay or change, and the figures that a run is remembered by.

Overlap of circuits is Jaccard's, of edges and of nodes, and weighted: sum of the smaller over sum of the larger |score| of
every edge, an edge outside a circuit having none (Tigges et al. 2024, arXiv:2407.10827, section 4). Only draws of one seed
are compared over time. Their exponentially weighted mean is 0.5 times the new value plus 0.5 times the old mean. Where a
checkpoint has no circuit there is no overlap, and the next one has none with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from kc_lib.errors import MethodError
from kc_lib.training.result import FROM_ZERO, TrainingResult, emergence, over_draws, shown
from kc_lib.training.swaps import strongest_swaps

ALPHA = 0.5
SIMILARITIES = ("edge_jaccard", "node_jaccard", "weighted_jaccard")
CIRCUIT_FIGURES = ("effect", "n_edges", "n_nodes", "faithfulness", "null_faithfulness", "noising", "kl", "resampled_jaccard")
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
    for task in rows["task"].unique().tolist():
        for seed in seeds:
            for place, step in enumerate(steps):
                here = circuits.get((task, seed, step))
                others = {"previous": [circuits.get((task, seed, steps[place - 1]))] if place else []}
                others["last"] = [circuits.get((task, seed, steps[-1]))] if step != steps[-1] else []
                others["other draws"] = [circuits.get((task, other, step)) for other in seeds if other != seed]
                for against, compared in others.items():
                    row = {"task": task, "seed": seed, "step": step, "tokens": tokens[step], "against": against}
                    with_each = [_overlaps(here, other) for other in compared]
                    for name in SIMILARITIES:
                        overlaps.append(row | {"quantity": name, "value": _mean([values[name] for values in with_each])})
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


def _circuits(rows: pd.DataFrame) -> dict[tuple[str, int, int], tuple[dict[str, float], set[str]]]:
    """Edges with |score|, and nodes, by task, seed and step."""
    parts = rows[rows["quantity"].isin(["edge", "node"])]
    circuits: dict[tuple[str, int, int], tuple[dict[str, float], set[str]]] = {}
    columns = ["task", "seed", "step", "quantity", "part", "value"]
    for task, seed, step, quantity, part, value in parts[columns].itertuples(index=False):
        edges, nodes = circuits.setdefault((task, seed, step), ({}, set()))
        if quantity == "edge":
            edges[part] = abs(value)
        else:
            nodes.add(part)
    return circuits


def _overlaps(
    a: tuple[dict[str, float], set[str]] | None, b: tuple[dict[str, float], set[str]] | None
) -> Mapping[str, float]:
    if a is None or b is None:
        return dict.fromkeys(SIMILARITIES, float("nan"))
    (edges, nodes), (other_edges, other_nodes) = a, b
    either = edges.keys() | other_edges.keys()
    pairs = np.array([[edges.get(edge, 0.0), other_edges.get(edge, 0.0)] for edge in either])
    larger = pairs.max(1).sum()
    return {
        "edge_jaccard": len(edges.keys() & other_edges.keys()) / len(either),
        "node_jaccard": len(nodes & other_nodes) / len(nodes | other_nodes),
        "weighted_jaccard": float(pairs.min(1).sum() / larger) if larger else float("nan"),
    }


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _step_text(row: Mapping[Any, Any]) -> str:
    low, high, step = (float(row[name]) for name in ("step_low", "step_high", "step"))
    return f"{step:.0f}" if low == high == step or np.isnan(low) else f"{step:.0f} [{low:.0f}, {high:.0f}]"


def _band(row: Mapping[Any, Any] | pd.Series) -> str:
    return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
