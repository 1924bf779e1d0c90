"""Refining by hand: attributions made so that coarse, refined and relation sets are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import pytest

from kc_lib.errors import MethodError
from kc_lib.neurons.attribute import NeuronAttributions
from kc_lib.neurons.refine import coarse_neurons, refine_neurons
from kc_lib.neurons.sets import NeuronSets, random_neurons

Neuron = tuple[int, int]
Scores = Mapping[Neuron, float]


def attributions(
    knowledge: Sequence[Sequence[Scores]],
    base: Sequence[Sequence[Scores]] | None = None,
    relations: Sequence[str] = (),
    model: str = "small",
) -> NeuronAttributions:
    """From the scores of every prompt of every fact."""
    rows = [
        (fact, prompt, method, layer, neuron, value)
        for method, facts in (("knowledge", knowledge), ("base", base or [[{}] * len(own) for own in knowledge]))
        for fact, prompts in enumerate(facts)
        for prompt, scores in enumerate(prompts)
        for (layer, neuron), value in scores.items()
    ]
    names = relations or ["r"] * len(knowledge)
    about = [(i, names[i], f"s{i}", f"a{i}", len(prompts)) for i, prompts in enumerate(knowledge)]
    return NeuronAttributions(
        pd.DataFrame(rows, columns=["fact", "prompt", "method", "layer", "neuron", "value"]),
        pd.DataFrame({"fact": [], "prompt": []}),
        pd.DataFrame(about, columns=["fact", "relation", "subject", "answer", "n_prompts"]),
        {"model": model, "n_layers": 4, "d_mlp": 50, "kept": 0.1},
    )


A, B, C, D, E, F = (0, 1), (1, 2), (1, 3), (2, 4), (3, 5), (3, 6)


def test_coarse_sets_by_every_criterion() -> None:
    found = attributions([[{A: 10.0, B: 2.0, C: 1.9, D: 1.0}, {A: 1.0, B: 0.19}]])

    def of(threshold: float, criterion: str = "share of maximum") -> list[set[Neuron]]:
        rows = coarse_neurons(found, "knowledge", threshold, criterion)
        return [set(zip(own["layer"], own["neuron"], strict=True)) for own in (rows[rows["prompt"] == i] for i in range(2))]

    assert of(0.2) == [{A, B}, {A}]
    assert of(0.19) == [{A, B, C}, {A, B}]
    assert of(1.0, "absolute") == [{A, B, C, D}, {A}]
    assert of(50, "percentile") == [{A, B}, {A}]
    assert of(100, "percentile") == [{A}, {A}]
    with pytest.raises(MethodError, match=r"below the stored share 0\.1"):
        of(0.05)


def test_refined_base_and_relation_sets_by_hand() -> None:
    """Five prompts, a share of 0.7: four of them (3.5 rounded up) must have found a neuron."""
    weak = {A: 1.0, B: 0.5}
    first = [{A: 1.0, B: 0.3, C: 0.3}] * 3 + [{A: 1.0, B: 0.3, C: 0.1}, {A: 1.0, B: 0.1, C: 0.1, D: 0.9}]
    second = [{A: 1.0, E: 0.21}] * 5
    base = [[weak] * 5, [{E: 1.0, A: 0.49}] * 5]
    sets = refine_neurons(attributions([first, second], base), adapt=False)
    assert sets.of("knowledge", 0) == (A, B)  # B four times, C three times, D once
    assert sets.of("knowledge", 1) == (A, E)
    assert sets.of("base", 0) == (A, B)  # 0.5 of the maximum and more
    assert sets.of("base", 1) == (E,)
    assert sets.frame.query("method == 'knowledge' and fact == 0")["prompts"].tolist() == [5, 4]
    assert sets.of_relation("knowledge", "r") == (A, B, E)  # two facts, then one
    assert sets.without_common("knowledge", 0) == (B,)
    at_most = refine_neurons(attributions([first, second], base), adapt=False, relation_share=0.6)
    assert at_most.of_relation("knowledge", "r") == (A,)


def test_three_prompts_at_least_and_whole_shares() -> None:
    prompts: list[Scores] = [{A: 1.0, B: 1.0, C: 1.0}] * 2 + [{A: 1.0, B: 1.0}] * 1 + [{A: 1.0}]
    sets = refine_neurons(attributions([prompts]), adapt=False, share=0.25)
    assert sets.of("knowledge", 0) == (A, B)  # one prompt of four would do by the share alone
    many: list[Scores] = [{A: 1.0, B: 1.0}] * 7 + [{A: 1.0, C: 1.0}] * 6 + [{A: 1.0}] * 12
    assert 0.28 * 25 > 7  # as floating point has it
    assert refine_neurons(attributions([many]), adapt=False, share=0.28).of("knowledge", 0) == (A, B)


def rising(n: int) -> list[Scores]:
    """Ten prompts; neurons 0 and 1 are found by all of them, 2 and 3 by nine, and so on."""
    return [{A: 1.0} | {(2, i): 0.5 for i in range(n) if prompt < 10 - i // 2} for prompt in range(10)]


def test_the_share_adapts_both_ways() -> None:
    too_few = [{A: 1.0} | ({B: 0.5} if i < 6 else {}) for i in range(10)]  # B needs a share of 0.6
    sets = refine_neurons(attributions([too_few]))
    assert sets.of("knowledge", 0) == (A, B)
    assert sets.provenance["shares"]["knowledge"]["r"] == pytest.approx(0.6)
    crowd = [{A: 1.0} | {(2, i): 0.5 for i in range(8) if prompt < 8} for prompt in range(10)]  # nine up to a share of 0.8
    sets = refine_neurons(attributions([[*crowd]], [[{A: 1.0, B: 1.0}] * 10]))
    assert sets.of("knowledge", 0) == (A,)  # above 0.8 the crowd goes, and with it falls below two: the share turns back
    used = sets.provenance["shares"]
    assert used["knowledge"]["r"] == pytest.approx(0.85)
    assert used["base"]["r"] == pytest.approx(0.7)
    gradual = refine_neurons(attributions([rising(8)]))  # nine at 0.7, seven at 0.75 and 0.8, five at 0.85
    assert len(gradual.of("knowledge", 0)) == 5
    assert gradual.provenance["shares"]["knowledge"]["r"] == pytest.approx(0.85)


def test_the_share_is_of_a_relation_and_moves_six_times_at_most() -> None:
    many = [{(2, i): 1.0 for i in range(9)}] * 10
    two = [{A: 1.0, B: 1.0}] * 10
    sets = refine_neurons(attributions([many, two], relations=["many", "two"]))
    shares = sets.provenance["shares"]["knowledge"]
    assert shares["two"] == pytest.approx(0.7)
    assert 0.9 < shares["many"] <= 1.0  # six looks, five moves or as many as there is room for
    assert len(sets.of("knowledge", 0)) == 9
    assert sets.of_relation("knowledge", "two") == (A, B)


def test_negatives_are_dropped() -> None:
    found = attributions([[{A: 1.0, B: 1.0, C: 1.0}] * 4])
    unrelated = attributions([[{A: 1.0}] * 4, [{B: 1.0}] * 2 + [{F: 1.0}] * 2])
    sets = refine_neurons(found, negatives=unrelated, adapt=False)
    assert sets.of("knowledge", 0) == (B, C)  # half of the other fact's prompts are too few to drop B
    assert sets.of_relation("knowledge", "r") == (B, C)
    with pytest.raises(MethodError, match="another model"):
        refine_neurons(found, negatives=attributions([[{A: 1.0}] * 4], model="other"))


def test_empty_sets_and_files(tmp_path: Path) -> None:
    different: list[Scores] = [{(0, i): 1.0} for i in range(5)]
    sets = refine_neurons(attributions([different]))
    assert sets.of("knowledge", 0) == ()
    assert sets.of_relation("knowledge", "r") == ()
    loaded = NeuronSets.load(sets.save(tmp_path / "neurons.parquet"))
    assert loaded.of("knowledge", 0) == ()
    assert loaded.facts.equals(sets.facts)
    full = refine_neurons(attributions([[{A: 1.0, B: 1.0}] * 3]))
    loaded = NeuronSets.load(full.save(tmp_path / "neurons.parquet"))
    assert loaded.of("knowledge", 0) == (A, B)
    pd.testing.assert_frame_equal(loaded.with_facts(), full.with_facts())


def test_bad_input() -> None:
    found = attributions([[{A: 1.0}] * 3])
    for arguments, message in (
        ({"criterion": "rank"}, "unknown criterion 'rank'"),
        ({"share": 0.0}, "share is 0.0"),
        ({"threshold": "low"}, "threshold is 'low'; it must be a number"),
        ({"thresholds": {"knowledge": 0.2}}, "unknown option 'thresholds': use some of threshold, base_threshold"),
        ({"relation_share": 2.0}, "relation_share is 2.0"),
    ):
        with pytest.raises(MethodError, match=message):
            refine_neurons(found, **arguments)
    with pytest.raises(MethodError, match="has 2 paraphrases; refining needs at least 3"):
        refine_neurons(attributions([[{A: 1.0}] * 2]))


def test_random_neurons_keep_the_layers() -> None:
    neurons = [(0, 1), (2, 3), (2, 4), (2, 5)]
    drawn = random_neurons(neurons, 6, seed=1)
    assert [layer for layer, _ in drawn] == [0, 2, 2, 2]
    assert not set(drawn) & set(neurons)
    assert set(drawn[1:]) == {(2, 0), (2, 1), (2, 2)}  # the only others
    assert random_neurons(neurons, 60, seed=1) == random_neurons(neurons, 60, seed=1)
    assert random_neurons(neurons, 60, seed=1) != random_neurons(neurons, 60, seed=2)
    with pytest.raises(MethodError, match="layer 2 has 2 other neurons"):
        random_neurons([(2, 2), (2, 3), (2, 4)], 5)
