"""Neurons suppressed, amplified and read, against plain hooks on the Hugging Face model, and on a fact that one stores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import inner
from neuron_facts import made_facts, made_sets, stored_fact
from oracles import neurons as oracle

from kc_lib.errors import MethodError
from kc_lib.models.model import Model
from kc_lib.neurons.activate import (
    NeuronActivations,
    TriggerSentences,
    activating_prompts,
    trigger_sentences,
    triggers_of_fact,
)
from kc_lib.neurons.cloze import ClozeFact, load_clozes
from kc_lib.neurons.sentences import ReadSentence, read_sentences, sentences_for
from kc_lib.neurons.sets import sets_of_facts
from kc_lib.neurons.suppress import NeuronChanges, change_neurons
from kc_lib.neurons.values import edited_values

KINDS = ["gpt2", "neox", "llama", "gemma2", "bert"]
KNOWLEDGE = {0: [(0, 3), (1, 5), (1, 7)], 1: [(1, 0)], 3: [(0, 1), (0, 2)], 5: [(1, 40)]}  # none for facts 2 and 4
BASE = {0: [(0, 9)], 2: [(1, 9), (1, 8)], 5: [(0, 9), (1, 9)]}
Load = Callable[[str], Model]


def joint(plain: torch.nn.Module, kind: str, fact: ClozeFact, number: int, neurons: list, factor: float) -> float:
    """Probability of an answer, one token and one hooked run after the other."""
    total = 0.0
    for cloze in fact.prompts[number].clozes:
        changes = {}
        for layer in {layer for layer, _ in neurons}:
            own = [neuron for at, neuron in neurons if at == layer]
            scale = torch.ones(oracle.neurons_of(plain, kind, cloze.tokens, cloze.position, layer).shape)
            scale[own] = factor
            changes[layer] = lambda x, scale=scale: x * scale
        with torch.no_grad():
            logits = oracle.logits_with(plain, kind, cloze.tokens, cloze.position, changes)
        total += float(logits.log_softmax(-1)[cloze.target])
    return math.exp(total)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_equal_hooks(kind: str, small_folder: Callable[[str], Path], small_model: Load) -> None:
    facts, plain = made_facts(kind), inner(small_folder(kind), kind)
    sets = made_sets(facts, KNOWLEDGE, BASE)
    model = small_model(kind)
    found = change_neurons(model, facts, sets, n_other=2, n_random=2, batch_size=5)
    d_mlp = model.mlp_residual.parts(0).W_out.shape[0]
    chosen = sets_of_facts(sets, d_mlp, 2)
    expected_rows = sum((3 + 2) * 2 * len(own) for own in chosen)
    assert len(found.frame) == expected_rows
    moved = 0
    for row in found.frame.to_dict("records"):
        neurons = list(chosen[row["fact"]][row["kind"], row["draw"]])
        assert len(neurons) == row["n_neurons"]
        about = (plain, kind, facts[row["of_fact"]], row["prompt"], neurons)
        assert row["p"] == pytest.approx(joint(*about, 1.0), rel=1e-3, abs=1e-9)
        assert row["p_changed"] == pytest.approx(joint(*about, row["factor"]), rel=1e-3, abs=1e-9)
        assert (facts[row["of_fact"]].relation == facts[row["fact"]].relation) == (row["on"] == "own")
        moved += abs(row["p_changed"] / row["p"] - 1) > 1e-2
    assert moved > expected_rows / 4
    assert found.provenance["empty"] == {"knowledge": 2, "base": 3}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_batches_and_seeds(kind: str, small_model: Load, tmp_path: Path) -> None:
    facts, model = made_facts(kind), small_model(kind)
    sets = made_sets(facts, KNOWLEDGE, BASE)
    some = change_neurons(model, facts, sets, n_other=3, batch_size=64)
    alone = change_neurons(model, facts, sets, n_other=3, batch_size=1)
    pd.testing.assert_frame_equal(some.frame, alone.frame, rtol=1e-3, atol=1e-9)
    other = change_neurons(model, facts, sets, n_other=3, seed=1)
    assert not some.frame["of_fact"].equals(other.frame["of_fact"])
    loaded = NeuronChanges.load(some.save(tmp_path / "neuron_changes.parquet"))
    pd.testing.assert_frame_equal(loaded.frame, some.frame)
    pd.testing.assert_frame_equal(loaded.with_facts(), some.with_facts())
    assert loaded.provenance == some.provenance


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_a_neuron_that_stores_a_fact(kind: str, small_model: Load) -> None:
    """Without it the answer is gone, with twice of it the answer is surer; random neurons have little to do with it."""
    facts, model = made_facts(kind), small_model(kind)
    neuron, stores = stored_fact(model.mlp_residual, facts[0], 60.0)
    with edited_values(model.mlp_residual, stores):
        found = change_neurons(model, facts, made_sets(facts, {0: [neuron]}), n_other=0, n_random=5)
    p = found.frame.groupby(["kind", "factor"])[["p", "p_changed"]].mean()
    before = p.loc[("knowledge", 0.0), "p"]
    assert p.loc[("knowledge", 0.0), "p_changed"] < 0.3 * before
    assert p.loc[("knowledge", 2.0), "p_changed"] > before
    assert abs(p.loc[("random", 0.0), "p_changed"] - before) < 0.3 * before


def test_no_neurons_are_reported(small_model: Load, tmp_path: Path) -> None:
    facts, model = made_facts("gpt2"), small_model("gpt2")
    found = change_neurons(model, facts, made_sets(facts, {}))
    assert found.frame.empty
    assert found.provenance["empty"] == {"knowledge": 6, "base": 6}
    assert NeuronChanges.load(found.save(tmp_path / "none.parquet")).frame.empty


def test_bad_input(small_model: Load) -> None:
    facts, model = made_facts("gpt2"), small_model("gpt2")
    sets = made_sets(facts, KNOWLEDGE)
    with pytest.raises(MethodError, match="not of these 5"):
        change_neurons(model, facts[:5], sets)
    with pytest.raises(MethodError, match="d_mlp 7"):
        change_neurons(model, facts, made_sets(facts, KNOWLEDGE, shape=(3, 7)))
    with pytest.raises(MethodError, match="n_other is -1"):
        change_neurons(model, facts, sets, n_other=-1)
    with pytest.raises(MethodError, match="no factors"):
        change_neurons(model, facts, sets, factors=())


def sentences(kind: str) -> list[ReadSentence]:
    words = [(1, 30, 41, 52), (1, 77, 8), (1, 30, 12, 90), (1, 15, 16, 17, 18)]
    return [
        ReadSentence(f"s{i}", tokens, 1 + i % 2 if kind == "bert" else len(tokens) - 1) for i, tokens in enumerate(words)
    ]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "bert"])
def test_activations_equal_hooks(kind: str, small_folder: Callable[[str], Path], small_model: Load, tmp_path: Path) -> None:
    facts, model, plain = made_facts(kind), small_model(kind), inner(small_folder(kind), kind)
    sets, read = made_sets(facts, KNOWLEDGE, BASE), sentences(kind)
    by_kind = {"T1": read[:1], "T2": read[1:2], "T3": read[2:]}
    found = activating_prompts(
        model, sets, {0: by_kind, 3: {"T1": read}, 2: {"T1": []}, 4: by_kind}, n_random=2, batch_size=2
    )
    chosen = sets_of_facts(sets, model.mlp_residual.parts(0).W_out.shape[0], 2)
    assert len(found.frame) == 4 * len(chosen[0]) + 4 * len(chosen[3])
    for row in found.frame.to_dict("records"):
        sentence = (by_kind[row["sentences"]] if row["fact"] == 0 else read)[row["sentence"]]
        values = [
            float(oracle.neurons_of(plain, kind, sentence.tokens, sentence.position, layer)[neuron])
            for layer, neuron in chosen[row["fact"]][row["kind"], row["draw"]]
        ]
        assert row["activation"] == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-5)
    assert found.provenance["without_sentences"] == 3
    loaded = NeuronActivations.load(found.save(tmp_path / "a.parquet"))
    pd.testing.assert_frame_equal(loaded.with_facts(), found.with_facts())
    with pytest.raises(MethodError, match="sentences of 'T4'"):
        activating_prompts(model, sets, {0: {"T4": read}})


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_triggers_equal_hooks(kind: str, small_folder: Callable[[str], Path], small_model: Load, tmp_path: Path) -> None:
    model, plain, neurons = small_model(kind), inner(small_folder(kind), kind), [(0, 3), (1, 7), (1, 9)]
    # some whose first token is no special one, and would have the largest sum
    read = [*sentences(kind), *(ReadSentence(f"first {i}", (i, 30, 41, 52), 3) for i in range(60, 70))]

    def summed(sentence: ReadSentence, position: int) -> float:
        return sum(float(oracle.neurons_of(plain, kind, sentence.tokens, position, layer)[n]) for layer, n in neurons)

    found = {at: trigger_sentences(model, neurons, read, at=at, batch_size=3) for at in ("read", "largest")}
    expected = {
        "read": {s.text: summed(s, s.position) for s in read},
        "largest": {s.text: max(summed(s, i) for i in range(1, len(s.tokens))) for s in read},
    }
    assert any(summed(s, 0) > expected["largest"][s.text] for s in read[4:])
    for at, result in found.items():
        assert result.frame["activation"].is_monotonic_decreasing
        for row in result.frame.to_dict("records"):
            assert row["activation"] == pytest.approx(expected[at][row["text"]], rel=1e-4, abs=1e-5)
        best = max(expected[at], key=lambda text: expected[at][text])
        assert result.top(1)["text"].tolist() == [best]
        assert result.bottom(len(read))["activation"].is_monotonic_increasing
        loaded = TriggerSentences.load(result.save(tmp_path / f"{at}.parquet"))
        assert loaded.provenance["at"] == at
        pd.testing.assert_frame_equal(loaded.frame, result.frame)
    with pytest.raises(MethodError, match="no neurons"):
        trigger_sentences(model, [], read)
    with pytest.raises(MethodError, match="no neuron 900"):
        trigger_sentences(model, [(0, 900)], read)
    with pytest.raises(MethodError, match="at is 'mean'"):
        trigger_sentences(model, neurons, read, at="mean")


def test_triggers_of_a_fact_are_of_all_sentences_and_the_corpus(small_model: Load, tmp_path: Path) -> None:
    relation, corpus = tmp_path / "letters.json", tmp_path / "corpus.txt"
    samples = [{"subject": f"w{30 + i}", "object": f"w{100 + i}"} for i in range(2)]
    relation.write_text(json.dumps({"prompt_templates": ["w5 {} w6", "w7 {} w8"], "samples": samples}))
    corpus.write_text("w9 w10 w11.\n\nw12 w13 w14 w15.")
    model = small_model("gpt2")
    task = load_clozes(str(relation), model, known_only=False, n_prompts=1, n_held_out=1)
    texts = sentences_for(task, model, corpus=str(corpus), seed=2)
    sets = made_sets(task.facts, {0: [(0, 3), (1, 7)]})
    found = triggers_of_fact(model, sets, 0, task, texts, corpus=str(corpus), seed=2)
    pool = ["w7 w30 w8 w100.", "w7 w31 w8 w101.", "w9 w10 w11.", "w12 w13 w14 w15."]
    expected = trigger_sentences(model, [(0, 3), (1, 7)], read_sentences(model, pool, seed=2), at="largest")
    assert set(found.frame["text"]) <= set(pool)
    pd.testing.assert_frame_equal(found.frame, expected.frame)
    assert found.summary(2)["activate"].tolist() == ["most"] * min(2, len(found.frame)) + ["least"]
    without = triggers_of_fact(model, sets, 1, task, texts)
    assert without.frame.empty
    assert TriggerSentences.load(without.save(tmp_path / "none.parquet")).summary().empty
