"""From scores to a circuit: which edges to keep, always pruned to those on a path from the input to the logits.

- ``absolute``: the n edges with the largest |score| (EAP-IG's ``apply_topn``); ``signed``: the largest scores.
- ``threshold``: every edge with |score| >= threshold.
- ``greedy``: best-first from the logits, so that each kept edge leads on from one already kept (EAP-IG's
  ``apply_greedy``, by |score|).
"""

from __future__ import annotations

import heapq
import random

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kc_lib.errors import MethodError
from kc_lib.graph import Circuit, Graph
from kc_lib.methods.attribution import EdgeScores

SELECTIONS = ("absolute", "signed", "threshold", "greedy")


def select(
    scores: EdgeScores, selection: str = "absolute", size: int | float = 0.005, threshold: float | None = None
) -> Circuit:
    """The circuit of a given size (a number of edges, or below 1 a share of the graph), or above a threshold.

    Pruning may leave fewer edges than asked for.

    Raises:
        MethodError: unknown selection, or a size or threshold out of range.
    """
    graph = scores.graph
    if selection not in SELECTIONS:
        raise MethodError(f"unknown selection {selection!r}: use one of {', '.join(SELECTIONS)}")
    if selection == "threshold":
        if threshold is None or threshold < 0:
            raise MethodError(f"selection 'threshold' needs a threshold >= 0, not {threshold}")
        mask = graph.edges & (scores.scores.abs() >= threshold)
    else:
        n = number_of_edges(graph, size)
        if selection == "greedy":
            mask = _greedy(graph, scores.scores.abs(), n)
        else:
            mask = top_edges(graph, scores.scores.abs() if selection == "absolute" else scores.scores, n)
    provenance = {**scores.provenance, "selection": selection, "size": size, "threshold": threshold}
    return Circuit(graph, graph.prune(mask), scores.scores, provenance)


def number_of_edges(graph: Graph, size: int | float) -> int:
    """Edges meant by a size: a whole number of them, or a share of the graph below 1 (1.0 is all of it)."""
    share = isinstance(size, float) and size <= 1.0
    n = round(size * graph.n_edges) if share else size
    if isinstance(size, bool) or n != int(n) or not 0 <= n <= graph.n_edges:
        raise MethodError(f"size {size!r}: give a number of edges up to {graph.n_edges}, or a share between 0.0 and 1.0")
    return int(n)


def top_edges(graph: Graph, ranking: Float[Tensor, "writer reader"], n: int) -> Bool[Tensor, "writer reader"]:
    """The n highest-ranked edges, unpruned; ties go to the earlier writer and reader."""
    order = ranking.masked_fill(~graph.edges, -float("inf")).flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(graph.edges.numel(), dtype=torch.bool)
    mask[order[:n]] = True
    return mask.view_as(graph.edges)


def random_circuit(graph: Graph, n_edges: int, seed: int) -> Circuit:
    """A connected circuit of ``n_edges`` random edges, the null for a circuit of that size.

    It grows from the logits by random walks: from a random reader of a node already in it to a random earlier writer,
    on through that writer's own readers, until the input or a node already in it. Every edge so lies on a path from the
    input to the logits; n edges drawn independently would be pruned to almost nothing, a null that is too easy.
    """
    generator = random.Random(seed)
    mask = torch.zeros_like(graph.edges)
    feeds = [graph.serves[row].nonzero()[:, 0].tolist() for row in range(len(graph.writers))]
    nodes, readers, count = {0}, [len(graph.readers) - 1], 0  # row 0 is the input, the last column the logits
    for _ in range(100 * max(n_edges, 1)):
        if count == n_edges:
            break
        column, walk, fresh = generator.choice(readers), [], []
        while True:
            row = generator.randrange(graph.readers[column].n_writers)
            walk.append((row, column))
            if row in nodes:
                break
            fresh.append(row)
            column = generator.choice(feeds[row])
        new = [edge for edge in walk if not mask[edge]]
        if count + len(new) > n_edges:
            continue
        for edge in new:
            mask[edge] = True
        count += len(new)
        for row in fresh:
            nodes.add(row)
            readers += feeds[row]
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
