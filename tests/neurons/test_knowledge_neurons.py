"""Attributions of facts in paraphrases: what is stored, answers of several tokens, resuming, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers as tf
from oracles import neurons as oracle

from kc_lib.errors import MethodError, TaskError
from kc_lib.models.model import Model
from kc_lib.neurons import attribute as attribution
from kc_lib.neurons.attribute import NeuronAttributions, knowledge_neurons
from kc_lib.neurons.cloze import ClozeFact, cloze_prompt, load_cloze
from kc_lib.neurons.integrate import quadrature
from kc_lib.neurons.refine import refine_neurons
from kc_lib.tasks.tokens import tokenizer_of

SmallModel = Callable[[str], Model]
SENTENCES = (
    "w7 w20 w6 [MASK].",
    "w8 w9 w20 w6 [MASK].",
    "w20 w11 w33 [MASK].",
    "w61 w62 w20 w63 w64 [MASK].",
)


def fact(model: Model, subject: str, answer: str, n: int = 4) -> ClozeFact:
    prompts = [cloze_prompt(tokenizer_of(model), text.replace("w20", subject), answer) for text in SENTENCES[:n]]
    return ClozeFact("relation", subject, answer, tuple(prompt for prompt in prompts if prompt is not None), ())


def facts_of(model: Model) -> list[ClozeFact]:
    answers = ("w100", "w101", "w102", "w103", "w104 w105")
    return [fact(model, f"w{40 + i}", answer) for i, answer in enumerate(answers)]


def plain_scores(folder: Path, model_fact: ClozeFact, prompt: int, kind: str, steps: int) -> list[torch.Tensor]:
    """Attributions per layer, one cloze, layer and point after the other."""
    plain = tf.AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    clozes = model_fact.prompts[prompt].clozes
    points, weights = quadrature(steps, "trapezoid")
    n_layers = plain.config.num_hidden_layers
    return [
        torch.stack(
            [
                oracle.attribution(
                    plain, kind, c.tokens, c.position, c.target, layer, points, weights, log_probability=len(clozes) > 1
                )
                for c in clozes
            ]
        ).sum(0)
        for layer in range(n_layers)
    ]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_is_stored_equals_a_plain_loop(kind: str, small_model: SmallModel, small_folder: Callable[[str], Path]) -> None:
    model = small_model(kind)
    facts = facts_of(model)
    found = knowledge_neurons(model, facts, rule="trapezoid", steps=3, kept=0.1)
    assert list(found.facts["n_prompts"]) == [4] * 5
    for number, prompt in ((0, 0), (2, 3), (4, 1)):  # the last answer is of two tokens
        expected = torch.stack(plain_scores(small_folder(kind), facts[number], prompt, kind, 3))
        rows = found.frame.query("fact == @number and prompt == @prompt and method == 'knowledge'")
        stored = {(layer, neuron): value for layer, neuron, value in rows[["layer", "neuron", "value"]].to_numpy()}
        most = float(expected.max())
        large = {tuple(place): float(expected[tuple(place)]) for place in (expected >= 0.1001 * most).nonzero().tolist()}
        assert len(large) > 3
        assert set(large) <= set(stored)
        assert min(stored.values()) >= 0.0999 * most
        for place, value in large.items():
            assert stored[place] == pytest.approx(value, rel=1e-3, abs=1e-4 * most)
        total = found.prompts.query("fact == @number and prompt == @prompt")["total"].item()
        assert total == pytest.approx(float(expected.sum()), rel=1e-3, abs=1e-4 * most)


def test_an_answer_of_several_tokens_is_joint(small_model: SmallModel) -> None:
    model = small_model("neox")
    facts = facts_of(model)
    found = knowledge_neurons(model, facts)
    for number in (0, 4):
        for prompt, asked in enumerate(facts[number].prompts):
            p, tops = 1.0, ""
            for cloze in asked.clozes:
                with torch.no_grad():
                    logits = model.bridge(torch.tensor([cloze.tokens]))[0, -1]
                p *= float(logits.softmax(-1)[cloze.target])
                tops += model.tokenizer.decode([int(logits.argmax())])
            row = found.prompts[(found.prompts["fact"] == number) & (found.prompts["prompt"] == prompt)].iloc[0]
            assert row["p"] == pytest.approx(p, rel=1e-4)
            assert row["predicted"] == tops


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_base_is_the_neurons_value(kind: str, small_model: SmallModel, small_folder: Callable[[str], Path]) -> None:
    model = small_model(kind)
    facts = [_as_masked(one) if kind == "bert" else one for one in facts_of(small_model("gpt2"))[:2]]
    found = knowledge_neurons(model, facts)
    auto = tf.AutoModelForMaskedLM if kind == "bert" else tf.AutoModelForCausalLM
    plain = auto.from_pretrained(small_folder(kind)).eval()
    cloze = facts[1].prompts[2].clozes[0]
    values = torch.stack(
        [
            oracle.neurons_of(plain, kind, cloze.tokens, cloze.position, layer)
            for layer in range(plain.config.num_hidden_layers)
        ]
    )
    rows = found.frame.query("fact == 1 and prompt == 2 and method == 'base'")
    assert len(rows) == int((values >= 0.1 * values.max()).sum())
    for layer, neuron, value in rows[["layer", "neuron", "value"]].to_numpy():
        assert values[int(layer), int(neuron)] == pytest.approx(value, rel=1e-4)


def _as_masked(causal: ClozeFact) -> ClozeFact:
    """The same tokens, read in the middle: the small masked model's tokenizer has no mask."""
    return replace(
        causal,
        prompts=tuple(replace(p, clozes=tuple(replace(c, position=1) for c in p.clozes)) for p in causal.prompts),
    )


def test_the_target_can_be_another_token(small_model: SmallModel) -> None:
    model = small_model("gpt2")
    facts = facts_of(model)[:2]
    predicted = knowledge_neurons(model, facts, target="predicted", rule="right", steps=5)
    token = int(predicted.prompts["predicted"].iloc[0].strip()[1:])  # "w17"
    by_id = knowledge_neurons(model, facts, target=token, rule="right", steps=5)
    pd.testing.assert_frame_equal(*(found.frame.query("fact == 0 and prompt == 0") for found in (predicted, by_id)))
    as_text = knowledge_neurons(model, facts, target=str(token), rule="right", steps=5)  # as the command line gives it
    pd.testing.assert_frame_equal(as_text.frame, by_id.frame)
    gold = knowledge_neurons(model, facts, rule="right", steps=5)
    assert not gold.frame["value"].equals(by_id.frame["value"])
    with pytest.raises(MethodError, match="can only be 'gold'"):
        knowledge_neurons(model, facts_of(model), target="predicted")
    with pytest.raises(MethodError, match="tokens 0 to 199"):
        knowledge_neurons(model, facts, target=200)


def test_batches_and_files_change_nothing(small_model: SmallModel, tmp_path: Path) -> None:
    model = small_model("llama")
    one, many = (knowledge_neurons(model, facts_of(model), batch_size=size) for size in (1, 16))
    pd.testing.assert_frame_equal(
        *(r.frame.sort_values(["fact", "prompt", "method", "layer", "neuron"], ignore_index=True) for r in (one, many)),
        rtol=1e-4,
    )
    back = NeuronAttributions.load(many.save(tmp_path / "attributions.parquet"))
    pd.testing.assert_frame_equal(back.frame, many.frame)
    pd.testing.assert_frame_equal(back.prompts, many.prompts)
    pd.testing.assert_frame_equal(back.facts, many.facts)
    assert back.provenance == many.provenance
    assert many.summary()["p"].tolist() == pytest.approx(many.prompts.groupby("fact")["p"].mean().tolist())
    assert many.of_prompts(2)["text"].tolist() == [prompt.text for prompt in facts_of(model)[2].prompts]
    assert set(many.with_facts()["answer"]) == {"w100", "w101", "w102", "w103", "w104 w105"}


def test_an_interrupted_run_goes_on(small_model: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = small_model("gpt2"), tmp_path / "partial.parquet"
    facts = facts_of(model)
    whole = knowledge_neurons(model, facts)
    plain, runs = attribution._attributed, []

    def counted(decoder: object, some: dict[int, ClozeFact], *rest: object) -> object:
        runs.append(len(some))
        if len(runs) == 2:
            raise KeyboardInterrupt
        return plain(decoder, some, *rest)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(attribution, "_attributed", counted)
    monkeypatch.setattr(attribution, "FACTS_AT_ONCE", 2)
    with pytest.raises(KeyboardInterrupt):
        knowledge_neurons(model, facts, checkpoint=file)
    assert len(NeuronAttributions.load(file).facts) == 2
    resumed = knowledge_neurons(model, facts, checkpoint=file)
    assert runs == [2, 2, 2, 1]
    pd.testing.assert_frame_equal(resumed.frame, whole.frame)
    assert resumed.provenance == whole.provenance
    with pytest.raises(MethodError, match="another model, task or set"):
        knowledge_neurons(model, facts, kept=0.2, checkpoint=file)
    file.write_text("no parquet")
    with pytest.raises(MethodError, match="delete it"):
        knowledge_neurons(model, facts, checkpoint=file)


def test_bad_input_is_one_line(small_model: SmallModel, tmp_path: Path) -> None:
    model = small_model("gpt2")
    facts = facts_of(model)
    for message, options in {
        "steps is 0": {"rule": "left", "steps": 0},
        "batch_size is 1.5": {"batch_size": 1.5},
        "unknown rule 'simpson'": {"rule": "simpson"},
        "tolerance is 0": {"tolerance": 0.0},
        "target is 'best'": {"target": "best"},
        "tolerance is 1": {"tolerance": 1.0},
        "unknown option 'step': use some of rule, steps": {"step": 3},
        "kept is 2": {"kept": 2.0},
    }.items():
        with pytest.raises(MethodError, match=message) as raised:
            knowledge_neurons(model, facts, **options)  # type: ignore[arg-type]  # wrong on purpose
        assert "\n" not in str(raised.value)
    with pytest.raises(TaskError, match="no facts"):
        knowledge_neurons(model, [])
    with pytest.raises(MethodError, match="needs at least 3"):
        refine_neurons(knowledge_neurons(model, [fact(model, "w40", "w100", 2)], rule="left", steps=1))
    with pytest.raises(MethodError, match="cannot be read"):
        NeuronAttributions.load(tmp_path / "nothing.parquet")


@pytest.mark.slow
def test_a_real_model_keeps_a_capital_in_few_neurons(smollm2: Model) -> None:
    task = load_cloze("country_capital", smollm2, n_prompts=3, max_facts=1)
    found = knowledge_neurons(smollm2, task.facts)
    neurons = refine_neurons(found, adapt=False, share=1.0).of("knowledge", 0)
    assert 1 <= len(neurons) <= 40
    for prompt in found.prompts.to_dict("records"):
        rows = found.frame.query("prompt == @prompt['prompt'] and method == 'knowledge'")
        assert rows["value"].max() > 0.01 * prompt["p"]
