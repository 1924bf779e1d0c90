"""Scores and circuits against a circuit that is known, as in models wired by hand."""

from __future__ import annotations

from typing import NamedTuple

from scipy.stats import rankdata

from kc_lib.circuits.scores import EdgeScores
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit, Graph


class Recovery(NamedTuple):
    """How much of a known circuit was found: shares of edges, and whether the two are the same set."""

    precision: float
    recall: float
    exact: bool


def edge_auroc(scores: EdgeScores, truth: Circuit, absolute: bool = True) -> float:
    """Probability that a random edge of the known circuit scores above a random other edge of the graph (ties count half).

    The area under the ROC curve as Mann and Whitney's U (Conmy et al. 2023, section 4, judge by it). ``absolute`` ranks by
    |score|. NaN where the circuit has no edges or all.

    Raises:
        MethodError: scores and circuit of different graphs.
    """
    _check_same(scores.graph, truth.graph)
    edges = truth.graph.edges
    values = scores.scores[edges].abs() if absolute else scores.scores[edges]
    inside = truth.mask[edges].numpy()
    n, others = int(inside.sum()), int((~inside).sum())
    if not n or not others:
        return float("nan")
    ranks = rankdata(values.double().numpy())
    return float((ranks[inside].sum() - n * (n + 1) / 2) / (n * others))


def recovery(circuit: Circuit, truth: Circuit) -> Recovery:
    """Share of the circuit's edges that are in the known one, share of the known ones found, and whether all agree.

    Precision is NaN for a circuit without edges, recall for a known one without.

    Raises:
        MethodError: circuits of different graphs.
    """
    _check_same(circuit.graph, truth.graph)
    both = int((circuit.mask & truth.mask).sum())
    precision = both / circuit.n_edges if circuit.n_edges else float("nan")
    recall = both / truth.n_edges if truth.n_edges else float("nan")
    return Recovery(precision, recall, both == circuit.n_edges == truth.n_edges)


def _check_same(own: Graph, known: Graph) -> None:
    if own != known:
        raise MethodError(f"the known circuit is one of another graph ({known}), not of this one ({own})")
