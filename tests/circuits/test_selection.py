"""Which edges a ranking keeps, by hand on tiny graphs and against naive loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from kc_lib.circuits.baselines import layer_matched, random_circuit
from kc_lib.circuits.scores import EdgeScores, FactScores
from kc_lib.circuits.selection import number_of_edges, select, select_bootstrap, top_edges
from kc_lib.errors import MethodError
from kc_lib.graph import Graph, edge_frame

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
        ({"size": -1}, "size is -1"),
        ({"size": -0.1}, "size is -0.1"),
        ({"size": 2.5}, "size is 2.5"),
        ({"size": 10**6}, "the graph has"),
        ({"size": 0}, "too few"),
        ({"size": True}, "size is True"),
        ({"size": "ten"}, "size is 'ten'"),
        ({"size": float("nan")}, "size is nan"),
        ({"size": float("inf")}, "size is inf"),
        ({"selection": "best"}, "unknown selection 'best'"),
        ({"selection": "bootstrap"}, "scores of each fact: select_bootstrap"),
        ({"selection": "faithful"}, "runs the model: smallest_faithful"),
        ({"selection": "threshold"}, "needs a threshold"),
        ({"selection": "threshold", "threshold": -1.0}, "threshold is -1.0; it must be a number, at least 0"),
        ({"selection": "threshold", "threshold": float("nan")}, "threshold is nan; it must be a number, at least 0"),
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


# --- the circuit with its heads exchanged ------------------------------------------------------------------------

PROFILED = [*GRAPHS, Graph(3, 4, 1, 8), Graph(2, 6, 3, 8, parallel=True), Graph(2, 3, 3, 8)]


def cells(graph: Graph, mask: Tensor) -> dict[tuple[str, str], int]:
    """How many edges run from each layer and type of writer to each layer and type of reader."""
    counts: dict[tuple[str, str], int] = {}
    for name in names(graph, mask):
        writer, reader = name.split("->")
        kind = reader.split("<")[1] if "<" in reader else ""
        cell = (writer.split(".")[0], f"{reader.split('.')[0]}<{kind}")
        counts[cell] = counts.get(cell, 0) + 1
    return counts


def renamed(graph: Graph, name: str, heads: dict[int, list[int]]) -> str:
    """An edge after layer l's head i moved to place heads[l][i]; a shared key or value reader goes with its group."""

    def moved(node: str) -> str:
        if not node.startswith("a"):
            return node
        layer, head, kind = int(node[1:].split(".")[0]), int(node.split(".h")[1].split("<")[0]), node.partition("<")[1:]
        group = graph.n_heads // graph.n_kv_readers if node[-3:] in ("<k>", "<v>") else 1
        return f"a{layer}.h{heads[layer][head * group] // group}{''.join(kind)}"

    writer, reader = name.split("->")
    return f"{moved(writer)}->{moved(reader)}"


@pytest.mark.parametrize("graph", PROFILED, ids=str)
def test_a_layer_matched_baseline_keeps_the_profile_and_all_connections(graph: Graph) -> None:
    changed = 0
    for seed in range(6):
        circuit = random_circuit(graph, graph.n_edges // 6, seed)
        null = layer_matched(circuit, seed)
        assert null.n_edges == circuit.n_edges
        assert cells(graph, null.mask) == cells(graph, circuit.mask)
        assert torch.equal(graph.prune(null.mask), null.mask)
        assert sorted(null.mask.sum(0).tolist()) == sorted(circuit.mask.sum(0).tolist())
        assert sorted(null.mask.sum(1).tolist()) == sorted(circuit.mask.sum(1).tolist())
        fixed = [i for i, name in enumerate(graph.writers) if not name.startswith("a")]
        kept = [i for i, reader in enumerate(graph.readers) if reader.kind in ("mlp", "logits")]
        assert torch.equal(null.mask[fixed][:, kept], circuit.mask[fixed][:, kept])
        assert torch.equal(layer_matched(circuit, seed).mask, null.mask)
        changed += not torch.equal(null.mask, circuit.mask)
    assert changed >= 4


def orders(graph: Graph) -> list[list[int]]:
    """All places a layer's heads may take: any, as long as heads that share a key go on sharing one."""
    group = graph.n_heads // graph.n_kv_readers
    return [
        list(order)
        for order in itertools.permutations(range(graph.n_heads))
        if all(order[i] // group == order[j] // group for i in range(graph.n_heads) for j in range(i // group * group, i))
    ]


@pytest.mark.parametrize(("graph", "n_orders"), [(Graph(2, 4, 2, 8), 8), (Graph(2, 4, 2, 8, grouped=False), 24)], ids=str)
def test_layer_matched_baselines_are_all_exchanges_of_heads_and_no_others(graph: Graph, n_orders: int) -> None:
    circuit = random_circuit(graph, 60, 0)
    allowed = orders(graph)
    assert len(allowed) == n_orders
    exchanged = {
        frozenset(renamed(graph, name, {0: first, 1: second}) for name in names(graph, circuit.mask)): (i, j)
        for i, first in enumerate(allowed)
        for j, second in enumerate(allowed)
    }
    assert len(exchanged) == n_orders**2  # no two exchanges give the same circuit
    drawn = [exchanged[frozenset(names(graph, layer_matched(circuit, seed).mask))] for seed in range(200)]
    assert {i for i, _ in drawn} == {j for _, j in drawn} == set(range(n_orders))


# --- edges that differ from zero ---------------------------------------------------------------------------------


def drawn_facts(graph: Graph, n: int, seed: int = 0) -> FactScores:
    generator = torch.Generator().manual_seed(seed)
    effect = 2 * torch.randn(graph.edges.shape, generator=generator).clamp(min=0.0)  # every other edge has none
    scores = (effect + torch.randn(n, *graph.edges.shape, generator=generator)) * graph.edges
    return FactScores(graph, scores, {"method": "eap", "n_pairs": n})


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_bootstrap_selection_by_hand(graph: Graph, confidence: float) -> None:
    facts = drawn_facts(graph, 15)
    generator = np.random.default_rng(3)
    means = []
    for _ in range(10):
        drawn = generator.integers(0, 15, 15)
        means.append(torch.stack([facts.scores[fact] for fact in drawn]).mean(0))
    mask = torch.zeros_like(graph.edges)
    for row, column in graph.edges.nonzero().tolist():
        resampled = [mean[row, column].item() for mean in means]
        error = np.std(resampled, ddof=1)
        low, high = scipy.stats.t.interval(confidence, 9, facts.scores[:, row, column].mean().item(), error)
        mask[row, column] = bool(low > 0 or high < 0)
    found = select_bootstrap(facts, seed=3, confidence=confidence)
    assert torch.equal(found.mask, graph.prune(mask))
    assert 0 < found.n_edges < graph.n_edges
    assert torch.equal(found.scores, facts.mean().scores)
    assert found.provenance == {
        "method": "eap",
        "n_pairs": 15,
        "selection": "bootstrap",
        "size": None,
        "confidence": confidence,
        "n_resamples": 10,
        "seed": 3,
    }


def test_many_resamples_are_the_standard_error() -> None:
    facts = drawn_facts(GRAPHS[0], 30)
    error = facts.scores.std(0, correction=0) / 30**0.5
    ratio = facts.mean().scores.abs() / error.clamp(min=1e-9)
    found = select_bootstrap(facts, n_resamples=4000)
    clear = GRAPHS[0].edges & ((ratio < 1.85) | (ratio > 2.1))
    expected = GRAPHS[0].prune(GRAPHS[0].edges & (ratio > 1.96))
    assert (found.mask == expected)[clear].float().mean() > 0.97


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_the_strongest_of_the_edges_that_pass(graph: Graph) -> None:
    facts = drawn_facts(graph, 15)
    passing = select_bootstrap(facts, seed=1)
    strongest = EdgeScores(graph, facts.mean().scores * passing.mask)
    for size in (10, 25, 0.1, 1.0, passing.n_edges):
        found = select_bootstrap(facts, seed=1, size=size)
        n = number_of_edges(graph, size)
        circuits = [select(strongest, size=k, fill=False).mask & passing.mask for k in range(1, passing.n_edges + 1)]
        sizes = [int(graph.prune(mask).sum()) for mask in circuits]
        assert found.n_edges == max(size for size in sizes if size <= n)
        assert not (found.mask & ~passing.mask).any()
        assert torch.equal(graph.prune(found.mask), found.mask)
        assert torch.equal(found.mask, passing.mask) == (n >= passing.n_edges)


@pytest.mark.parametrize(
    ("options", "n", "message"),
    [
        ({}, 1, "at least 2 facts"),
        ({"n_resamples": 1}, 5, "at least 2 facts and 2 resamples"),
        ({"confidence": 1.0}, 5, "confidence is 1.0"),
        ({"confidence": 95}, 5, "confidence is 95"),
        ({"size": -3}, 5, "size is -3"),
        ({"size": 10**6}, 5, "the graph has"),
        ({"size": 1}, 5, "no path from input to logits"),
        ({"confidence": 1 - 1e-12}, 3, "give more facts or a lower confidence"),
    ],
)
def test_bootstrap_selections_that_cannot_be(options: dict, n: int, message: str) -> None:
    facts = drawn_facts(GRAPHS[0], n)
    if options.get("size") == 1:  # then one edge is no path
        facts.scores[:, 0, -1] = 0.0
    with pytest.raises(MethodError, match=message):
        select_bootstrap(facts, **options)
