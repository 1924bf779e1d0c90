"""Scores below and above edges: of each fact, of groups of positions, of nodes and of neurons."""

from __future__ import annotations

import pytest
import torch
from conftest import NAMED
from test_gates import SmallModel, random_pairs, relative_gap, views

from kc_lib.errors import MethodError
from kc_lib.methods.attribution import attribute_edges, attribute_facts

LENGTHS = (5, 9, 9, 7, 4)

# --- facts -------------------------------------------------------------------------------------------------------


@views
@pytest.mark.parametrize("intervention", ["patching", "zero"])
def test_a_facts_scores_are_those_of_the_fact_alone(
    small_model: SmallModel, kind: str, grouped: bool, intervention: str
) -> None:
    model, pairs = small_model(kind), random_pairs(LENGTHS, seed=11)
    options = {"steps": 2, "grouped": grouped, "intervention": intervention}
    found = attribute_facts(model, pairs, "eap_ig", batch_size=3, **options)
    alone = [attribute_edges(model, [pair], "eap_ig", **options).scores for pair in pairs]
    assert relative_gap(found.scores, torch.stack(alone)) <= 1e-5
    edges = attribute_edges(model, pairs, "eap_ig", batch_size=3, **options)
    assert relative_gap(found.mean().scores, edges.scores) <= 1e-5
    assert found.mean().provenance == edges.provenance
    assert found.graph == edges.graph


@pytest.mark.parametrize("kind", NAMED)
def test_facts_with_answers_of_several_tokens(small_model: SmallModel, kind: str) -> None:
    model, pairs = small_model(kind), random_pairs(LENGTHS, seed=12)
    options = {"steps": 2, "metric": "log_probability", "full_answer": True}
    found = attribute_facts(model, pairs, **options)
    alone = [attribute_edges(model, [pair], **options).scores for pair in pairs]
    assert relative_gap(found.scores, torch.stack(alone)) <= 1e-5


def test_facts_of_methods_without_gradients(small_model: SmallModel) -> None:
    pairs = random_pairs((4, 5), seed=13)
    found = attribute_facts(small_model("neox"), pairs, "exact")
    assert relative_gap(found.mean().scores, attribute_edges(small_model("neox"), pairs, "exact").scores) <= 1e-5
    assert relative_gap(found.scores[0], found.scores[1]) > 0.1


def test_means_over_chosen_facts_count_repetitions(small_model: SmallModel) -> None:
    pairs = random_pairs(LENGTHS, seed=14)
    found = attribute_facts(small_model("gpt2"), pairs, "eap")
    resample = [3, 0, 3, 3, 1]
    chosen = found.mean(resample)
    assert (
        relative_gap(chosen.scores, attribute_edges(small_model("gpt2"), [pairs[i] for i in resample], "eap").scores) <= 1e-5
    )
    assert chosen.provenance["facts"] == resample
    for wrong in ([], [5], [-1, 0]):
        with pytest.raises(MethodError, match="indices from 0 to 4"):
            found.mean(wrong)
