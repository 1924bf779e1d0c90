"""From scores to a circuit: which edges to keep, always pruned to those on a path from the input to the logits.

- ``absolute``: the n edges with the largest |score| (EAP-IG's ``apply_topn``); ``signed``: the largest scores.
- ``threshold``: every edge with |score| >= threshold.
- ``greedy``: best-first from the logits, so that each kept edge leads on from one already kept (EAP-IG's
  ``apply_greedy``, by |score|).
- ``bootstrap``: every edge whose mean score's interval over resamples of the facts excludes 0; needs the scores of each
  fact and has a function of its own, ``select_bootstrap``.
- ``faithful``: the smallest circuit of the ``absolute`` ranking that is faithful enough; it runs the model and is
  ``smallest_faithful``.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from kc_lib.circuits.options import SelectOptions
from kc_lib.circuits.scores import EdgeScores, FactScores
from kc_lib.errors import MethodError, checked
from kc_lib.graph import Circuit, Graph

ELSEWHERE = {  # selections that need more than scores
    "bootstrap": "needs the scores of each fact: select_bootstrap(score_edges(..., per='fact'))",
    "faithful": "runs the model: smallest_faithful(model, scores, pairs)",
}


def select(
    scores: EdgeScores,
    selection: str = "absolute",
    size: int | float = 0.005,
    threshold: float | None = None,
    fill: bool = True,
) -> Circuit:
    """The circuit of a given size (a number of edges, or as a float up to 1.0 a share of the graph), or above a threshold.

    Args:
        fill: size counts the edges left after pruning: as many are ranked as give a pruned circuit of at most that size.
            False prunes the top n, as EAP-IG does, which leaves fewer than n.

    Example:
        >>> circuit = kc.select(scores, size=0.005)
        >>> circuit.save("circuit.json")

    Raises:
        MethodError: unknown selection, one that needs the scores of each fact, a size or threshold out of range, or one
            too small for any path.
    """
    SelectOptions(selection=selection, size=size, threshold=threshold, fill=fill)
    if selection in ELSEWHERE:
        raise MethodError(f"selection {selection!r} {ELSEWHERE[selection]}")
    graph = scores.graph
    ranking = scores.scores if selection == "signed" else scores.scores.abs()
    if threshold is not None and selection == "threshold":
        mask = graph.prune(graph.edges & (ranking >= threshold))
    else:
        n = number_of_edges(graph, size)
        draw = _greedy if selection == "greedy" else top_edges
        mask = _filled(graph, ranking, n, draw) if fill else graph.prune(draw(graph, ranking, n))
        if fill and not mask.any():
            raise MethodError(f"size {size!r} is {n} of {graph.n_edges} edges, too few for a path from input to logits")
    provenance = {**scores.provenance, "selection": selection, "size": size, "threshold": threshold, "fill": fill}
    return Circuit(graph, mask, scores.scores, provenance)


def select_bootstrap(
    fact_scores: FactScores,
    n_resamples: int = 10,
    seed: int = 0,
    confidence: float = 0.95,
    size: int | float | None = None,
) -> Circuit:
    """Every edge whose mean score over facts differs from 0 by a bootstrap interval, pruned; or the strongest ``size``.

    After Nikankin et al. 2025 (arXiv:2510.25786), who keep the edges that agree over 10 resamples of the examples. Ten
    draws hold no 2.5th percentile: their whole range is expected to cover only 9/11 = 82% of further draws. The
    interval is therefore Student's: mean over all facts +- t(n_resamples - 1) times the standard deviation of the
    resampled means (for 10 resamples t = 2.26, and that standard deviation is itself known to about 24%). It is an
    interval per edge, not corrected for their number: of edges without any effect, 5% pass.

    Args:
        size: keep of those edges the strongest by |score|, a number of edges or a share of the graph, counted after
            pruning; None keeps all.

    Raises:
        MethodError: fewer than two facts or resamples, a confidence out of range, or no path among the edges that pass.
    """
    n_facts, graph = len(fact_scores.scores), fact_scores.graph
    if n_facts < 2 or n_resamples < 2:
        raise MethodError(f"bootstrap needs at least 2 facts and 2 resamples, not {n_facts} and {n_resamples}")
    if not 0 < confidence < 1:
        raise MethodError(f"confidence is {confidence!r}; it must lie between 0 and 1, as 0.95")
    SelectOptions(size=1.0 if size is None else size)
    scores = fact_scores.mean()
    facts = np.random.default_rng(seed).integers(0, n_facts, (n_resamples, n_facts))
    means = torch.stack([fact_scores.mean(draw.tolist()).scores for draw in facts])
    half_width = means.std(0) * float(stats.t.ppf((1 + confidence) / 2, n_resamples - 1))
    passing = graph.edges & (scores.scores.abs() > half_width)
    n = graph.n_edges if size is None else number_of_edges(graph, size)
    mask = _filled(graph, scores.scores.abs(), n, lambda g, ranking, k: top_edges(g, ranking, k) & passing)
    if not mask.any():
        raise MethodError(
            f"no path from input to logits among the {int(passing.sum())} edges whose interval excludes 0, within size "
            f"{size!r}: give more facts or a lower confidence"
        )
    provenance = {**scores.provenance, "selection": "bootstrap", "size": size, "confidence": confidence}
    return Circuit(graph, mask, scores.scores, provenance | {"n_resamples": n_resamples, "seed": seed})


def number_of_edges(graph: Graph, size: int | float) -> int:
    """Edges meant by a size: a whole number of them, or, as a float up to 1.0, a share of the graph."""
    share = isinstance(size, float) and size <= 1.0
    n = int(size * graph.n_edges) if share else int(size)
    if not 0 <= n <= graph.n_edges:
        raise MethodError(f"size {size!r}: the graph has {graph.n_edges} edges; give a number up to that or a share")
    return n


def _filled(
    graph: Graph,
    ranking: Float[Tensor, "writer reader"],
    n: int,
    draw: Callable[[Graph, Tensor, int], Tensor],
) -> Bool[Tensor, "writer reader"]:
    """The largest pruned top-k circuit of at most n edges; its size grows with k, so k is found by bisection."""
    low, high = n, graph.n_edges
    while low < high:
        middle = (low + high + 1) // 2
        if int(graph.prune(draw(graph, ranking, middle)).sum()) <= n:
            low = middle
        else:
            high = middle - 1
    return graph.prune(draw(graph, ranking, low))


@checked
def top_edges(graph: Graph, ranking: Float[Tensor, "writer reader"], n: int) -> Bool[Tensor, "writer reader"]:
    """The n highest-ranked edges, unpruned; ties go to the earlier writer and reader."""
    order = ranking.masked_fill(~graph.edges, -float("inf")).flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(graph.edges.numel(), dtype=torch.bool)
    mask[order[:n]] = True
    return mask.view_as(graph.edges)


def _greedy(graph: Graph, ranking: Float[Tensor, "writer reader"], n: int) -> Bool[Tensor, "writer reader"]:
    mask = torch.zeros_like(graph.edges)
    reached = torch.zeros(len(graph.readers), dtype=torch.bool)
    frontier: list[tuple[float, int, int]] = []

    def reach(column: int) -> None:
        if not reached[column]:
            reached[column] = True
            for row in range(graph.readers[column].n_writers):
                heapq.heappush(frontier, (-float(ranking[row, column]), row, column))

    reach(len(graph.readers) - 1)
    while frontier and n > 0:
        _, row, column = heapq.heappop(frontier)
        mask[row, column] = True
        n -= 1
        for feeding in graph.serves[row].nonzero()[:, 0].tolist():
            reach(feeding)
    return mask
