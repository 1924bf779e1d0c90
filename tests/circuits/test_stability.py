"""Overlap of circuits, and what is known of a known circuit, against sets and loops."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ground_truth.known_circuit import edge_auroc, recovery

from kc_lib.circuits.baselines import random_circuit
from kc_lib.circuits.criteria import Stability, jaccard, jaccard_matrix, resampled_circuits, stability
from kc_lib.circuits.scores import EdgeScores, FactScores
from kc_lib.circuits.selection import select, select_bootstrap
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit, Graph

GRAPH = Graph(2, 4, 2, 8)
NOTHING = Circuit(GRAPH, torch.zeros_like(GRAPH.edges))


def fact_scores(n: int = 12, noise: float = 1.0, seed: int = 0) -> FactScores:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(GRAPH.edges.shape, generator=generator)
    own = torch.randn(n, *GRAPH.edges.shape, generator=generator)
    return FactScores(GRAPH, (shared + noise * own) * GRAPH.edges, {"method": "eap", "n_pairs": n})


def edge_set(circuit: Circuit) -> set[tuple[int, int]]:
    return {(row, column) for row, column in circuit.mask.nonzero().tolist()}


def test_overlap_by_sets() -> None:
    circuits = {f"c{seed}": random_circuit(GRAPH, 30 + 5 * seed, seed) for seed in range(4)}
    matrix = jaccard_matrix(circuits)
    assert list(matrix.index) == list(matrix.columns) == list(circuits)
    for a in circuits:
        for b in circuits:
            sets = edge_set(circuits[a]), edge_set(circuits[b])
            expected = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
            assert jaccard(circuits[a], circuits[b]) == matrix.loc[a, b] == expected
    assert matrix.loc["c0", "c0"] == 1.0
    assert jaccard(circuits["c0"], NOTHING) == 0.0
    assert np.isnan(jaccard(NOTHING, NOTHING))


def test_circuits_of_different_graphs_do_not_overlap() -> None:
    other = random_circuit(Graph(2, 4, 2, 8, grouped=False), 10, 0)
    for compare in (jaccard, recovery):
        with pytest.raises(MethodError, match=r"different graphs|another graph"):
            compare(random_circuit(GRAPH, 10, 0), other)
    with pytest.raises(MethodError, match="another graph"):
        edge_auroc(fact_scores().mean(), other)


def test_resamples_are_selected_from_means_over_drawn_facts() -> None:
    scores = fact_scores()
    found = resampled_circuits(scores, n=3, seed=4, selection="signed", size=20)
    assert list(found) == ["resample #1", "resample #2", "resample #3"]
    generator = np.random.default_rng(4)
    for circuit in found.values():
        facts = generator.integers(0, 12, 12)
        mean = EdgeScores(GRAPH, torch.stack([scores.scores[fact] for fact in facts]).mean(0))
        assert torch.equal(circuit.mask, select(mean, "signed", 20).mask)
    by_threshold = resampled_circuits(scores, n=2, selection="threshold", threshold=1.0)
    assert all((circuit.scores.abs()[circuit.mask] >= 1.0).all() for circuit in by_threshold.values())
    unpruned = resampled_circuits(scores, n=2, size=20, fill=False)
    assert all(circuit.provenance["fill"] is False for circuit in unpruned.values())


def test_resamples_of_a_bootstrap_selection() -> None:
    scores = fact_scores(noise=0.3)
    found = resampled_circuits(scores, n=2, seed=4, selection="bootstrap", size=None)
    facts = np.random.default_rng(4).integers(0, 12, 12)
    again = FactScores(GRAPH, scores.scores[facts])
    assert torch.equal(found["resample #1"].mask, select_bootstrap(again, seed=5).mask)
    with pytest.raises(MethodError, match="needs a size"):
        resampled_circuits(scores, n=2, size=None)


def test_stability_by_pairs() -> None:
    scores = fact_scores()
    circuit = select(scores.mean(), size=30)
    resampled = resampled_circuits(scores, n=5, size=30)
    found = stability(resampled, circuit)
    assert found.n_facts == 12
    pairs = [jaccard(resampled[a], resampled[b]) for a, b in combinations(resampled, 2)]
    against = [jaccard(other, circuit) for other in resampled.values()]
    assert found.pairs["jaccard"].tolist() == pairs + against
    assert found.pairs["against"].tolist() == ["each other"] * 10 + ["reference"] * 5
    expected = [("each other", 10, pairs), ("reference", 5, against)]
    for (_, row), (name, n, values) in zip(found.summary().iterrows(), expected, strict=True):
        assert (row["against"], row["n_pairs"]) == (name, n)
        assert row["jaccard"] == pytest.approx(np.mean(values))
        assert [row["jaccard_low"], row["jaccard_high"]] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist())


def test_facts_that_agree_give_one_circuit() -> None:
    scores = fact_scores(noise=0.0)
    found = stability(resampled_circuits(scores, size=30), select(scores.mean(), size=30))
    assert found.summary()["jaccard"].tolist() == [1.0, 1.0]
    noisy = [
        stability(resampled_circuits(fact_scores(noise=noise), size=30)).summary()["jaccard"][0] for noise in (0.3, 3.0)
    ]
    assert 1.0 > noisy[0] > noisy[1]


def test_stability_over_methods_knows_no_number_of_facts_where_they_differ() -> None:
    circuits = {f"n={n}": select(fact_scores(n).mean(), size=30) for n in (4, 8)}
    assert stability(circuits).n_facts is None
    assert stability({"a": random_circuit(GRAPH, 9, 0), "b": random_circuit(GRAPH, 9, 1)}).n_facts is None
    with pytest.raises(MethodError, match="at least two"):
        stability({"a": random_circuit(GRAPH, 9, 0)})


def test_stability_survives_a_file(tmp_path: Path) -> None:
    for reference in (None, random_circuit(GRAPH, 20, 0)):
        found = stability(resampled_circuits(fact_scores(), n=3, size=20), reference)
        loaded = Stability.load(found.save(tmp_path / "stability.parquet"))
        pd.testing.assert_frame_equal(loaded.pairs, found.pairs)
        assert loaded.n_facts == found.n_facts


# --- against a known circuit -------------------------------------------------------------------------------------


def auroc_by_pairs(scores: EdgeScores, truth: Circuit, absolute: bool) -> float:
    inside, outside = [], []
    for row, column in scores.graph.edges.nonzero().tolist():
        value = scores.scores[row, column].item()
        (inside if truth.mask[row, column] else outside).append(abs(value) if absolute else value)
    wins = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    return sum(wins) / len(wins)


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("ties", [True, False])
def test_auroc_by_pairs_of_edges(absolute: bool, ties: bool) -> None:
    for seed in range(3):
        truth, scores = random_circuit(GRAPH, 15, seed), fact_scores(seed=seed).mean()
        if ties:
            scores = EdgeScores(GRAPH, scores.scores.round())
        scores.scores[~GRAPH.edges] = 99.0  # no edge, no score
        assert edge_auroc(scores, truth, absolute) == pytest.approx(auroc_by_pairs(scores, truth, absolute))


def test_auroc_of_perfect_useless_and_undefined_scores() -> None:
    truth = random_circuit(GRAPH, 15, 0)
    perfect = torch.where(truth.mask, -2.0, 1.0) * GRAPH.edges
    assert edge_auroc(EdgeScores(GRAPH, perfect), truth) == 1.0
    assert edge_auroc(EdgeScores(GRAPH, perfect), truth, absolute=False) == 0.0
    assert edge_auroc(EdgeScores(GRAPH, torch.zeros_like(perfect)), truth) == 0.5
    assert np.isnan(edge_auroc(EdgeScores(GRAPH, perfect), NOTHING))
    assert np.isnan(edge_auroc(EdgeScores(GRAPH, perfect), Circuit(GRAPH, GRAPH.edges)))


def test_recovery_by_sets() -> None:
    truth, found = random_circuit(GRAPH, 15, 0), random_circuit(GRAPH, 40, 1)
    common = len(edge_set(truth) & edge_set(found))
    assert common
    assert recovery(found, truth) == (common / 40, common / 15, False)
    assert recovery(truth, truth) == (1.0, 1.0, True)
    assert recovery(Circuit(GRAPH, GRAPH.edges), truth) == (15 / GRAPH.n_edges, 1.0, False)
    missed = recovery(NOTHING, truth)
    assert np.isnan(missed.precision)
    assert (missed.recall, missed.exact) == (0.0, False)
    assert np.isnan(recovery(truth, NOTHING).recall)
    assert recovery(NOTHING, NOTHING).exact
