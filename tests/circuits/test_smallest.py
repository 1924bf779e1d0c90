"""The smallest circuit that keeps a faithfulness, against running every size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import FOUND, SmallModel, faithful, resamples, single_values

from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.scores import EdgeScores
from kc_lib.circuits.selection import select
from kc_lib.circuits.smallest import smallest_faithful
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit

PAIRS = FOUND[:3]


@pytest.fixture(scope="module")
def scores(small_model: SmallModel) -> EdgeScores:
    return score_edges(small_model("llama"), PAIRS, steps=2)


@pytest.fixture(scope="module")
def every_size(small_model: SmallModel, scores: EdgeScores) -> dict[int, tuple[Circuit, float]]:
    """Circuit and faithfulness by size before pruning, each run on its own."""
    circuits = {k: select(scores, size=k, fill=False) for k in range(1, scores.graph.n_edges + 1)}
    distinct = {str(circuit.n_edges): circuit for circuit in circuits.values()}
    values = single_values(small_model("llama"), distinct, PAIRS)
    return {k: (circuit, float(faithful(values, str(circuit.n_edges)))) for k, circuit in circuits.items()}


@pytest.mark.parametrize("at_once", [1, 4, 30])
@pytest.mark.parametrize("target", [0.3, 0.8, 1.0])
def test_what_is_found_suffices_and_the_next_smaller_tried_does_not(
    small_model: SmallModel,
    scores: EdgeScores,
    every_size: dict[int, tuple[Circuit, float]],
    target: float,
    at_once: int,
) -> None:
    circuit, curve = smallest_faithful(small_model("llama"), scores, PAIRS, target, at_once=at_once, resolution=0.0)
    for row in curve.itertuples():
        assert row.n_edges == every_size[row.size][0].n_edges
        assert row.faithfulness == pytest.approx(every_size[row.size][1], abs=1e-3)
    assert curve["size"].is_monotonic_increasing
    size = circuit.provenance["size"]
    assert torch.equal(circuit.mask, every_size[size][0].mask)
    tried = curve.set_index("size")["faithfulness"]
    enough = tried[tried >= target - 1e-5]
    assert size == enough.index.min()
    smaller = tried[tried.index < size]
    # nothing lies between it and the next smaller one tried, but circuits that pruning makes the same
    below = smaller.index.max() if len(smaller) else 0
    assert circuit.n_edges - (every_size[below][0].n_edges if below else 0) <= 1 or below == size - 1
    assert len(curve) < len(every_size)
    assert circuit.provenance["smallest_faithful"] == target


def test_where_one_size_parts_what_suffices_it_is_found(
    small_model: SmallModel, scores: EdgeScores, every_size: dict[int, tuple[Circuit, float]]
) -> None:
    """Targets that every size from one on meets and no smaller size does, as if faithfulness grew with size."""
    heights = np.array([height for _, height in every_size.values()])
    parted = [k for k in range(1, len(heights)) if heights[k:].min() > heights[:k].max() + 1e-3]
    assert len(parted) >= 3
    for k in (parted[0], parted[len(parted) // 2], parted[-1]):
        target = (heights[k:].min() + heights[:k].max()) / 2
        for at_once in (1, 7):
            circuit, _ = smallest_faithful(small_model("llama"), scores, PAIRS, target, at_once=at_once, resolution=0.0)
            assert circuit.n_edges == every_size[k + 1][0].n_edges


def test_a_coarser_search_runs_less_and_still_suffices(
    small_model: SmallModel, scores: EdgeScores, every_size: dict[int, tuple[Circuit, float]]
) -> None:
    fine, fine_curve = smallest_faithful(small_model("llama"), scores, PAIRS, 0.8, at_once=3, resolution=0.0)
    coarse, curve = smallest_faithful(small_model("llama"), scores, PAIRS, 0.8, at_once=3, resolution=0.5)
    assert len(curve) < len(fine_curve)
    assert coarse.n_edges >= fine.n_edges
    assert every_size[coarse.provenance["size"]][1] >= 0.8 - 1e-3


def test_the_curve_has_intervals_over_facts(small_model: SmallModel, scores: EdgeScores) -> None:
    _, curve = smallest_faithful(small_model("llama"), scores, PAIRS, 0.8, at_once=3, seed=2)
    row = curve[curve["faithfulness"] > 0].iloc[0]
    values = single_values(small_model("llama"), {"own": select(scores, size=int(row["size"]), fill=False)}, PAIRS)
    low, high = np.percentile(faithful(values, "own", resamples(3, seed=2)), [2.5, 97.5])
    assert row["n"] == 3
    assert [row["faithfulness_low"], row["faithfulness_high"]] == pytest.approx([low, high], rel=2e-3, abs=1e-3)


@pytest.mark.parametrize("selection", ["signed", "greedy"])
@pytest.mark.parametrize("intervention", ["zero", "mean"])
def test_other_rankings_and_interventions(
    small_model: SmallModel, scores: EdgeScores, selection: str, intervention: str
) -> None:
    circuit, curve = smallest_faithful(
        small_model("llama"), scores, PAIRS, 0.5, selection=selection, intervention=intervention, at_once=4
    )
    size = circuit.provenance["size"]
    assert torch.equal(circuit.mask, select(scores, selection, size, fill=False).mask)
    assert curve.set_index("size").loc[size, "faithfulness"] >= 0.5 - 1e-5
    assert curve["faithfulness"].iloc[-1] == pytest.approx(1.0, abs=1e-3)


def test_what_cannot_be_reached_names_the_best(small_model: SmallModel, scores: EdgeScores) -> None:
    with pytest.raises(MethodError, match=r"none of the \d+ sizes tried .* the best is \d+\.\d{3} with \d+ edges") as caught:
        smallest_faithful(small_model("llama"), scores, PAIRS, 50.0)
    assert "\n" not in str(caught.value)


def test_without_an_effect_there_is_no_faithfulness_to_keep(small_model: SmallModel, scores: EdgeScores) -> None:
    same = [type(pair)(pair.clean, pair.clean, pair.answer, pair.distractor, {}, {}) for pair in PAIRS]
    with pytest.raises(MethodError, match="undefined"):
        smallest_faithful(small_model("llama"), scores, same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "threshold"}, "unknown selection 'threshold'"),
        ({"selection": "bootstrap"}, "unknown selection 'bootstrap'"),
        ({"at_once": 0}, "at_once is 0"),
        ({"faithfulness": 0.0}, "faithfulness is 0.0; it must be a number, above 0"),
        ({"faithfulness": float("nan")}, "faithfulness is nan; it must be a number, above 0"),
        ({"metric": "accuracy"}, "unknown metric"),
    ],
)
def test_options_that_do_not_exist_are_refused(
    small_model: SmallModel, scores: EdgeScores, options: dict, message: str
) -> None:
    with pytest.raises(MethodError, match=message):
        smallest_faithful(small_model("llama"), scores, PAIRS, **options)
