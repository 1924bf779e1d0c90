"""From scores to a circuit: which edges to keep, always pruned to those on a path from the input to the logits.

- ``absolute``: the n edges with the largest |score| (EAP-IG's ``apply_topn``); ``signed``: the largest scores.
- ``threshold``: every edge with |score| >= threshold.
- ``greedy``: best-first from the logits, so that each kept edge leads on from one already kept (EAP-IG's
  ``apply_greedy``, by |score|).
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kc_lib.checks import checked
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit, Graph
from kc_lib.methods.attribution import EdgeScores

SELECTIONS = ("absolute", "signed", "threshold", "greedy")


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

    Raises:
        MethodError: unknown selection, a size or threshold out of range, or one too small for any path.
    """
    check_selection(selection, size, threshold)
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


def check_selection(selection: str, size: int | float = 0.005, threshold: float | None = None) -> None:
    """Refuse what ``select`` would refuse, before anything is computed.

    Raises:
        MethodError: unknown selection, or a size or threshold out of range.
    """
    if selection not in SELECTIONS:
        raise MethodError(f"unknown selection {selection!r}: use one of {', '.join(SELECTIONS)}")
    if selection == "threshold" and not (isinstance(threshold, (int, float)) and 0 <= threshold < math.inf):
        raise MethodError(f"selection 'threshold' needs a threshold >= 0, not {threshold}")
    is_number = isinstance(size, (int, float)) and not isinstance(size, bool) and math.isfinite(size)
    if not is_number or size < 0 or (size > 1 and size != int(size)):
        raise MethodError(f"size {size!r}: give a whole number of edges, or a share between 0.0 and 1.0")


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


def random_circuit(graph: Graph, n_edges: int, seed: int) -> Circuit:
    """A connected circuit of ``n_edges`` random edges, the null for a circuit of that size.

    Edges are drawn uniformly from the graph, and each is joined to the circuit by random walks, down to the input and up
    to the logits, until they meet a node that is already in it. So every edge lies on a path from the input to the
    logits; edges drawn independently would be pruned to almost nothing, a null that is too easy. Its profile over
    layers is close to the graph's. Where the last edges do not fit, a few are missing.
    """
    generator = random.Random(seed)
    possible = graph.edges.nonzero().tolist()
    readers_of = [graph.serves[row].nonzero()[:, 0].tolist() for row in range(len(graph.writers))]
    owners_of = [graph.serves[:, column].nonzero()[:, 0].tolist() for column in range(len(graph.readers))]
    last = len(graph.readers) - 1
    mask = torch.zeros_like(graph.edges)
    nodes, count = {0}, 0
    for _ in range(1000 * max(n_edges, 1)):
        if count == n_edges:
            break
        row, column = generator.choice(possible)
        walk, fresh = [(row, column)], set()
        while row not in nodes:  # down to the input
            fresh.add(row)
            reader = generator.choice(readers_of[row])
            row = generator.randrange(graph.readers[reader].n_writers)
            walk.append((row, reader))
        while column != last:  # up to the logits
            owner = generator.choice(owners_of[column])
            if owner in nodes:
                break
            fresh.add(owner)
            column = generator.choice(graph.edges[owner].nonzero()[:, 0].tolist())
            walk.append((owner, column))
        new = {edge for edge in walk if not mask[edge]}
        if count + len(new) > n_edges:
            continue
        for edge in new:
            mask[edge] = True
        count += len(new)
        nodes |= fresh
    return Circuit(graph, mask, None, {"selection": "random", "size": n_edges, "seed": seed})


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
