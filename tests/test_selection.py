"""Which edges a ranking keeps, by hand on tiny graphs and against naive loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kc_lib.errors import MethodError
from kc_lib.graph import Graph, edge_frame
from kc_lib.methods.attribution import EdgeScores
from kc_lib.methods.selection import number_of_edges, random_circuit, select, top_edges

TINY = Graph(1, 1, 1, 4)  # input, a0.h0, m0; edges into q, k, v: 1 each, m0: 2, logits: 3
GRAPHS = [Graph(2, 4, 2, 8), Graph(2, 4, 2, 8, grouped=False), Graph(3, 2, 2, 8, parallel=True)]


def tiny_scores(**scores: float) -> EdgeScores:
    """Scores by edge, written ``input_m0=1.0``, with ``h`` for the head."""
    matrix = torch.zeros(TINY.edges.shape)
    for edge, score in scores.items():
        writer, reader = (part.replace("h", "a0.h0") if part.startswith("h") else part for part in edge.split("_"))
        reader = f"a0.h0<{reader}>" if reader in ("q", "k", "v") else reader
        matrix[TINY.edge_positions(f"{writer}->{reader}")] = score
    return EdgeScores(TINY, matrix)


def names(graph: Graph, mask: Tensor) -> set[str]:
    frame = edge_frame(graph, None, mask)
    return set(frame["writer"] + "->" + frame["reader"])


def random_scores(graph: Graph, seed: int) -> EdgeScores:
    scores = torch.randn(graph.edges.shape, generator=torch.Generator().manual_seed(seed)) * graph.edges
    return EdgeScores(graph, scores, {"method": "eap"})


SCORES = tiny_scores(
    input_q=-0.3, input_k=0.1, input_v=4.0, input_m0=-5.0, h_m0=1.0, input_logits=0.2, h_logits=2.0, m0_logits=-3.0
)


@pytest.mark.parametrize(
    ("selection", "size", "fill", "expected"),
    [
        ("absolute", 1, False, set()),  # input->m0 leads nowhere without m0->logits
        ("absolute", 2, True, {"input->m0", "m0->logits"}),
        ("absolute", 3, False, {"input->m0", "m0->logits"}),
        ("absolute", 4, False, {"input->m0", "m0->logits", "input->a0.h0<v>", "a0.h0->logits"}),
        ("signed", 2, False, {"input->a0.h0<v>", "a0.h0->logits"}),
        ("signed", 3, False, {"input->a0.h0<v>", "a0.h0->logits"}),
        ("signed", 5, False, {"input->a0.h0<v>", "a0.h0->logits", "input->logits", "input->a0.h0<k>"}),
        ("signed", 4, True, {"input->a0.h0<v>", "a0.h0->logits", "input->logits", "input->a0.h0<k>"}),
        ("greedy", 2, False, {"m0->logits", "input->m0"}),
        ("greedy", 4, False, {"m0->logits", "input->m0", "a0.h0->logits", "input->a0.h0<v>"}),
        ("greedy", 1, False, set()),
        ("absolute", 0, False, set()),
        ("absolute", 1.0, True, names(TINY, TINY.edges)),
    ],
)
def test_selection_by_hand(selection: str, size: float, fill: bool, expected: set[str]) -> None:
    found = names(TINY, select(SCORES, selection, size, fill=fill).mask)
    assert found == expected


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (6.0, set()),
        (3.0, {"input->m0", "m0->logits"}),
        (2.0, {"input->m0", "m0->logits", "input->a0.h0<v>", "a0.h0->logits"}),
        (0.0, names(TINY, TINY.edges)),
    ],
)
def test_a_threshold_keeps_what_reaches_it(threshold: float, expected: set[str]) -> None:
    circuit = select(SCORES, "threshold", threshold=threshold)
    assert names(TINY, circuit.mask) == expected
    assert circuit.provenance["threshold"] == threshold


def test_ties_go_to_the_earlier_writer_and_reader() -> None:
    assert names(TINY, top_edges(TINY, torch.ones(TINY.edges.shape), 2)) == {"input->a0.h0<q>", "input->a0.h0<k>"}


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("selection", ["absolute", "signed"])
def test_top_n_is_a_sorted_list(graph: Graph, selection: str) -> None:
    scores = random_scores(graph, 0)
    frame = scores.to_frame()
    frame["by"] = frame["score"] if selection == "signed" else frame["score"].abs()
    for n in (1, 7, 40, graph.n_edges):
        best = frame.sort_values("by", ascending=False).head(n)
        mask = torch.zeros_like(graph.edges)
        for edge in best["writer"] + "->" + best["reader"]:
            mask[graph.edge_positions(edge)] = True
        assert torch.equal(select(scores, selection, n, fill=False).mask, graph.prune(mask))


def greedy_naively(graph: Graph, scores: Tensor, n: int) -> Tensor:
    """Add, n times, the best edge into the logits or into a reader of a node that already has an edge out."""
    mask = torch.zeros_like(graph.edges)
    for _ in range(n):
        nodes = {node for node, kept in zip(graph.writers, mask.any(1).tolist(), strict=True) if kept}
        best = None
        for column, reader in enumerate(graph.readers):
            serving = {graph.writers[row] for row in graph.serves[:, column].nonzero()[:, 0].tolist()}
            if reader.kind != "logits" and not serving & nodes:
                continue
            for row in range(reader.n_writers):
                if not mask[row, column] and (best is None or scores[row, column].abs() > scores[best].abs()):
                    best = (row, column)
        if best is not None:
            mask[best] = True
    return mask


@pytest.mark.parametrize("graph", GRAPHS[:2], ids=str)
def test_greedy_is_a_naive_loop(graph: Graph) -> None:
    scores = random_scores(graph, 1)
    for n in (1, 5, 20, 60):
        expected = graph.prune(greedy_naively(graph, scores.scores, n))
        assert torch.equal(select(scores, "greedy", n, fill=False).mask, expected)


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("selection", ["absolute", "signed", "greedy"])
def test_filling_gives_the_largest_circuit_up_to_the_size(graph: Graph, selection: str) -> None:
    scores = random_scores(graph, 2)
    sizes = [select(scores, selection, k, fill=False).n_edges for k in range(graph.n_edges + 1)]
    assert sizes == sorted(sizes)
    for n in (1, 5, 12, 30, graph.n_edges - 1):
        if not any(0 < size <= n for size in sizes):
            with pytest.raises(MethodError, match=f"size {n} .* too few"):
                select(scores, selection, n)
            continue
        filled = select(scores, selection, n)
        assert filled.n_edges == max(size for size in sizes if size <= n)
        assert torch.equal(graph.prune(filled.mask), filled.mask)
        assert filled.provenance == {
            "method": "eap",
            "selection": selection,
            "size": n,
            "threshold": None,
            "fill": True,
        }


def test_sizes_are_numbers_or_shares() -> None:
    graph = GRAPHS[0]
    assert number_of_edges(graph, 10) == 10
    assert number_of_edges(graph, 1) == 1
    assert number_of_edges(graph, 1.0) == graph.n_edges
    assert number_of_edges(graph, 0.5) == graph.n_edges // 2
    assert number_of_edges(graph, 10.0) == 10
    assert number_of_edges(graph, 0) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": -1}, "size -1"),
        ({"size": -0.1}, "size -0.1"),
        ({"size": 2.5}, "size 2.5"),
        ({"size": 10**6}, "the graph has"),
        ({"size": 0}, "too few"),
        ({"size": True}, "size True"),
        ({"size": "ten"}, "size 'ten'"),
        ({"size": float("nan")}, "size nan"),
        ({"size": float("inf")}, "size inf"),
        ({"selection": "best"}, "unknown selection 'best'"),
        ({"selection": "threshold"}, "needs a threshold"),
        ({"selection": "threshold", "threshold": -1.0}, "needs a threshold"),
        ({"selection": "threshold", "threshold": float("nan")}, "needs a threshold"),
    ],
)
def test_sizes_and_selections_that_do_not_exist(options: dict, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        select(SCORES, **options)


@pytest.mark.parametrize("graph", [*GRAPHS, Graph(4, 12, 12, 8)], ids=str)
def test_random_circuits_have_their_size_and_are_connected(graph: Graph) -> None:
    for n in (5, 20, graph.n_edges // 2):
        drawn = [random_circuit(graph, n, seed) for seed in (0, 0, 1)]
        for circuit in drawn:
            assert circuit.n_edges == n
            assert torch.equal(graph.prune(circuit.mask), circuit.mask)
        assert torch.equal(drawn[0].mask, drawn[1].mask)
        assert not torch.equal(drawn[0].mask, drawn[2].mask)


def test_random_circuits_from_no_edge_to_all() -> None:
    graph = GRAPHS[0]
    assert random_circuit(graph, 0, 0).n_edges == 0
    assert random_circuit(graph, 1, 0).n_edges == 1
    assert random_circuit(graph, graph.n_edges, 0).n_edges == graph.n_edges
