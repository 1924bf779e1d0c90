"""Circuits of a ranking over all sizes: how good the ranking is, and the smallest of its circuits that suffices.

How good a *ranking* is, whatever size one picks, is an area under faithfulness over the share of edges kept:

- ``cpr``: area under faithfulness (Circuit Performance Ratio: higher is better, above 1 where edges that work against the
  answer are left out), meant for signed selection;
- ``cmd``: area of |1 - faithfulness| (Circuit-Model Distance: 0 is best), meant for absolute selection. Both as in MIB
  (Mueller et al. 2025, arXiv:2504.13151, section 3): trapezoids, linear in the share, over ``SHARES``;
- ``log_area``: area under faithfulness over log10(share) divided by the range, so a mean of faithfulness. Sizes up to 5%,
  where circuits are looked for, weigh 7% in CPR and CMD and 62% here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid

from kc_lib.circuits.baselines import LABELS
from kc_lib.circuits.evaluate import Evaluation, estimated, faithfulness_of, metric_values
from kc_lib.circuits.options import EvaluateOptions, SmallestOptions
from kc_lib.circuits.scores import EdgeScores
from kc_lib.circuits.selection import select
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit
from kc_lib.models.model import Model
from kc_lib.tasks.batches import TokenPair

NOISE = 1e-5  # the whole graph gives 1 but for float error
CURVE = ["ranking", "kind", "draw"]  # what circuits on one curve have in common


def curves(evaluation: Evaluation) -> pd.DataFrame:
    """Rows of the evaluation's table by size, of every ranking and of its random baselines, draw by draw.

    All edges are the model itself, so every curve ends at size 1 with the row of the full model, if it was not run there.

    Raises:
        MethodError: no ranking was run below size 1.
    """
    table = evaluation.table
    below = table[table["size"] < 1]
    if below.empty:
        raise MethodError("no ranking was evaluated at several sizes: give evaluate what circuits_by_size returns")
    names = below[CURVE].drop_duplicates()
    full = table[table["kind"] == "full"].drop(columns=list(LABELS)).merge(names, how="cross").assign(size=1.0)
    points = pd.concat([table[table["size"].notna()].merge(names), full])
    return points.drop_duplicates([*CURVE, "split", "size"]).sort_values("size", kind="stable", ignore_index=True)


def areas(evaluation: Evaluation, seed: int = 0) -> pd.DataFrame:
    """CPR, CMD and log area of every ranking that was run at several sizes (``circuits_by_size``), by split.

    Random circuits that do nothing have a CPR of 0.25. Figures compare with published ones where the smallest share is
    0.001. An interval of cmd leans upwards, because noise adds to a distance.

    Returns:
        Columns ranking, kind ("ranking", or "random baseline" of one, with its draw), draw, split, n (facts), n_sizes,
        smallest (share), and each area with its 95% interval (``cpr``, ``cpr_low``, ``cpr_high`` ...): a resample of the
        facts serves all sizes.

    Raises:
        MethodError: no ranking was run below size 1.
    """
    points, rows = curves(evaluation), []
    names = evaluation.table[CURVE].drop_duplicates().merge(points[CURVE].drop_duplicates())  # in the order of the table
    for split in evaluation.splits:
        values = evaluation.values(split)
        faithfulness = faithfulness_of(values, seed)
        for name in names.to_dict("records"):
            curve = points[(points[CURVE] == name).all(axis=1) & (points["split"] == split)]
            shares, heights = curve["size"].to_numpy(), faithfulness[curve["circuit"]].to_numpy()
            logs = np.log10(shares)
            measured = {
                "cpr": trapezoid(heights, shares),
                "cmd": trapezoid(np.abs(1 - heights), shares),
                "log_area": trapezoid(heights, logs) / (logs[-1] - logs[0]),
            }
            row: dict[Any, Any] = name | {"split": split, "n": len(values), "n_sizes": len(shares), "smallest": shares[0]}
            for area, drawn in measured.items():
                row |= estimated(area, drawn)
            rows.append(row)
    return pd.DataFrame(rows)


def smallest_faithful(
    model: Model,
    scores: EdgeScores,
    pairs: Sequence[TokenPair],
    faithfulness: float = 0.8,
    *,
    progress: bool = False,
    **options: Any,
) -> tuple[Circuit, pd.DataFrame]:
    """Search over sizes for the smallest circuit with at least this faithfulness on ``pairs`` (those of discovery).

    Sizes, counted before pruning as in MIB, are tried ``at_once`` evenly on a log scale, first up to the whole graph,
    then again between the smallest that suffices and the next smaller one tried, until the two circuits differ by at
    most ``resolution`` of the edges. Faithfulness need not grow with size: edges that work against the answer may come
    later. With ``stable`` a circuit suffices only if the next larger one tried suffices as well, so that a lucky one is
    passed over. What is returned is the smallest circuit *among those tried* that suffices; the next smaller one tried does
    not, but a still smaller one that was never tried might. The curve shows how far faithfulness is from monotone.

    Args:
        options: other fields of ``SmallestOptions``.

    Returns:
        The circuit, and the curve by size: size (before pruning), n_edges, n (facts), faithfulness with its 95% interval
        over facts. The circuit was chosen on these facts: evaluate it on held-out ones.

    Raises:
        MethodError: an option out of range, no size tried that suffices (the message names the best), or an undefined
            faithfulness.
    """
    asked = SmallestOptions.of({"faithfulness": faithfulness, **options})
    running = {name: asked[name] for name in EvaluateOptions.declared()}
    tried: dict[int, dict[str, float]] = {0: {"n_edges": 0, "faithfulness": 0.0}}
    above = scores.graph.n_edges
    sizes = [*_between(0, above, asked.at_once), above]
    while sizes:
        circuits = {size: select(scores, asked.selection, size, fill=False) for size in sizes}
        # circuits of one ranking contain each other, so those with as many edges are the same
        known = {int(row["n_edges"]): row for row in tried.values() if "n" in row}
        fresh = {str(circuit.n_edges): circuit for circuit in circuits.values() if circuit.n_edges not in known}
        if fresh:
            values = metric_values(model, fresh, pairs, reference=pairs, progress=progress, **running)
            measured = faithfulness_of(values, asked.seed)
            for name, circuit in fresh.items():
                row = {"n_edges": circuit.n_edges, "n": len(pairs)}
                known[circuit.n_edges] = row | estimated("faithfulness", measured[name])
        tried |= {size: known[circuit.n_edges] for size, circuit in circuits.items()}
        suffices = {row["n_edges"]: row["faithfulness"] >= faithfulness - NOISE for row in tried.values()}
        lucky = {n for n, larger in pairwise(sorted(suffices)) if asked.stable and not suffices[larger]}
        enough = [size for size, row in tried.items() if suffices[row["n_edges"]] and row["n_edges"] not in lucky]
        above = min(enough, default=0)
        below = max((size for size in tried if size < above), default=0)
        gap = tried[above]["n_edges"] - tried[below]["n_edges"]
        is_fine = gap <= max(1, asked.resolution * tried[above]["n_edges"])
        sizes = [] if is_fine else _between(below, above, asked.at_once)
    curve = pd.DataFrame([{"size": size, **tried[size]} for size in sorted(tried) if size])
    _check_reached(curve, faithfulness)
    circuit = select(scores, asked.selection, above, fill=False)
    return replace(circuit, provenance={**circuit.provenance, "smallest_faithful": faithfulness}), curve


def _between(below: int, above: int, n: int) -> list[int]:
    """Up to ``n`` whole numbers strictly between two, evenly on a log scale."""
    points = np.geomspace(max(below, 1), above, n + 2)[1:-1].round().astype(int)
    inner = sorted({int(point) for point in points if below < point < above})
    return inner or list(range(below + 1, above))[:n]


def _check_reached(curve: pd.DataFrame, faithfulness: float) -> None:
    if curve["faithfulness"].isna().all():
        raise MethodError(
            "faithfulness is undefined: the full model's effect is next to nothing on these pairs; choose another task, "
            "metric or intervention"
        )
    best, n_edges = curve["faithfulness"].max(), curve["n_edges"].iloc[curve["faithfulness"].argmax()]
    if best < faithfulness - NOISE:
        raise MethodError(
            f"none of the {len(curve)} sizes tried keeps a faithfulness of {faithfulness:g}: the best is {best:.3f} with "
            f"{n_edges} edges; ask for less, or choose another selection"
        )
