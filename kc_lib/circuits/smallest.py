"""The smallest circuit of a ranking that keeps a given faithfulness, with the curve that the search saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd

from kc_lib.circuits.evaluate import metric_values
from kc_lib.circuits.faithfulness import faithfulness_of
from kc_lib.circuits.scores import EdgeScores
from kc_lib.circuits.selection import select
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit
from kc_lib.metrics import Metric
from kc_lib.models.model import Model
from kc_lib.stats import with_interval
from kc_lib.tasks.batches import TokenPair

RANKINGS = ("absolute", "signed", "greedy")
NOISE = 1e-5  # the whole graph gives 1 but for float error


def smallest_faithful(
    model: Model,
    scores: EdgeScores,
    pairs: Sequence[TokenPair],
    faithfulness: float = 0.8,
    *,
    selection: str = "absolute",
    resolution: float = 0.02,
    at_once: int = 8,
    stable: bool = False,
    metric: str | Metric = "logit_difference",
    intervention: str = "patching",
    full_answer: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Circuit, pd.DataFrame]:
    """Search over sizes for the smallest circuit with at least this faithfulness on ``pairs`` (those of discovery).

    Sizes, counted before pruning as in MIB, are tried ``at_once`` evenly on a log scale, first up to the whole graph,
    then again between the smallest that suffices and the next smaller one tried, until the two circuits differ by at
    most ``resolution`` of the edges. Faithfulness need not grow with size: edges that work against the answer may come
    later. With ``stable`` a circuit suffices only if the next larger one tried suffices as well, so that a lucky one is
    passed over. What is returned is the smallest circuit *among those tried* that suffices; the next smaller one tried does
    not, but a still smaller one that was never tried might. The curve shows how far faithfulness is from monotone.

    Returns:
        The circuit, and the curve by size: size (before pruning), n_edges, n (facts), faithfulness with its 95% interval
        over facts. The circuit was chosen on these facts: judge it on held-out ones.

    Raises:
        MethodError: another selection, no faithfulness above 0 to reach, no size tried that suffices (the message names the
            best), or an undefined faithfulness.
    """
    if selection not in RANKINGS or at_once < 1:
        raise MethodError(
            f"selection {selection!r}, {at_once} at once: use one of {', '.join(RANKINGS)}, at least 1 at once"
        )
    if not 0 < faithfulness < np.inf:
        raise MethodError(f"faithfulness {faithfulness!r} to keep: give a number above 0, as 0.8")
    n_edges = scores.graph.n_edges
    tried: dict[int, dict[str, float]] = {0: {"n_edges": 0, "faithfulness": 0.0}}
    above, sizes = n_edges, [*_between(0, n_edges, at_once), n_edges]
    while sizes:
        circuits = {size: select(scores, selection, size, fill=False) for size in sizes}
        # circuits of one ranking contain each other, so those with as many edges are the same
        known = {int(row["n_edges"]): row for row in tried.values() if "n" in row}
        fresh = {str(circuit.n_edges): circuit for circuit in circuits.values() if circuit.n_edges not in known}
        if fresh:
            values = metric_values(
                model,
                fresh,
                pairs,
                metric=metric,
                intervention=intervention,
                reference=pairs,
                full_answer=full_answer,
                batch_size=batch_size,
                progress=progress,
            )
            found = faithfulness_of(values, seed)
            for name, circuit in fresh.items():
                (estimate,), draws = found.of(name)
                row = {"n_edges": circuit.n_edges, "n": len(pairs)}
                known[circuit.n_edges] = row | with_interval("faithfulness", estimate, draws[:, 0])
        tried |= {size: known[circuit.n_edges] for size, circuit in circuits.items()}
        suffices = {row["n_edges"]: row["faithfulness"] >= faithfulness - NOISE for row in tried.values()}
        lucky = {n for n, larger in pairwise(sorted(suffices)) if stable and not suffices[larger]}
        enough = [size for size, row in tried.items() if suffices[row["n_edges"]] and row["n_edges"] not in lucky]
        above = min(enough, default=0)
        below = max((size for size in tried if size < above), default=0)
        gap = tried[above]["n_edges"] - tried[below]["n_edges"]
        sizes = _between(below, above, at_once) if gap > max(1, resolution * tried[above]["n_edges"]) else []
    curve = pd.DataFrame([{"size": size, **tried[size]} for size in sorted(tried) if size])
    _check_reached(curve, faithfulness)
    circuit = select(scores, selection, above, fill=False)
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
