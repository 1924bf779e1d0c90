"""Value vectors edited in place: seen by the model and its parts, put back to the bit; facts updated, relations erased."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import inner
from neuron_facts import made_facts, made_sets, stored_fact
from oracles import neurons as oracle
from torch import Tensor

from kc_lib.errors import MethodError, ModelError
from kc_lib.models.model import Model
from kc_lib.neurons.cloze import Cloze
from kc_lib.neurons.erase import RelationErasure, erase_relation
from kc_lib.neurons.integrate import answer_states
from kc_lib.neurons.options import EditOptions
from kc_lib.neurons.sets import sets_of_facts
from kc_lib.neurons.update import FactUpdates, update_answers, update_facts
from kc_lib.neurons.values import edited_answers, edited_values, mean_activations, updated_values, value_vectors
from kc_lib.residual.encoder import Encoder, Residual

KINDS = ["gpt2", "neox", "llama", "gemma2", "bert"]
Load = Callable[[str], Model]
Values = Mapping[tuple[int, int], Tensor]


def plainly_edited(folder: Path, kind: str, values: Values) -> torch.nn.Module:
    """A fresh Hugging Face model with these value vectors."""
    plain = inner(folder, kind)
    for (layer, neuron), vector in values.items():
        weight = oracle.output_layer(plain, kind, layer).weight
        if kind == "gpt2":  # Conv1D stores its weight [in, out]
            weight[neuron] = vector
        else:
            weight[:, neuron] = vector
    return plain


def plain_log_p(plain: torch.nn.Module, cloze: Cloze) -> Tensor:
    with torch.no_grad():
        return plain(torch.tensor([cloze.tokens])).logits[0, cloze.position].log_softmax(-1)


def bits(model: Model) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().view(torch.int32) for name, tensor in model.bridge.named_parameters()}


def assert_same_bits(model: Model, before: Mapping[str, Tensor]) -> None:
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())


def some_values(decoder: Residual) -> dict[tuple[int, int], Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {neuron: 2 * torch.randn(decoder.W_U.shape[0], generator=generator) for neuron in [(0, 3), (1, 5), (1, 2)]}


@pytest.mark.parametrize("kind", KINDS)
def test_model_and_parts_see_an_edit(kind: str, small_folder: Callable[[str], Path], small_model: Load) -> None:
    model, facts = small_model(kind), made_facts(kind)
    decoder, before = model.mlp_residual, bits(model)
    values = some_values(decoder)
    plain, unedited = plainly_edited(small_folder(kind), kind, values), inner(small_folder(kind), kind)
    clozes = [prompt.clozes[0] for fact in facts[:3] for prompt in fact.prompts]
    tokens = torch.tensor([[cloze.target, 77] for cloze in clozes])
    first, low, none = edited_answers(decoder, clozes, tokens, [values, {(1, 5): values[1, 5]}, {}], batch_size=4)
    one = plainly_edited(small_folder(kind), kind, {(1, 5): values[1, 5]})
    moved = 0.0
    with edited_values(decoder, values):
        for i, cloze in enumerate(clozes):
            expected = plain_log_p(plain, cloze)
            seen = model.bridge(torch.tensor([cloze.tokens]))[0, cloze.position].log_softmax(-1)
            torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-3)
            states = answer_states(decoder, torch.tensor([cloze.tokens]), torch.tensor([cloze.position]))
            torch.testing.assert_close(states.logits[0].log_softmax(-1), expected, rtol=1e-3, atol=1e-3)
            for answers, by in ((first, expected), (low, plain_log_p(one, cloze)), (none, plain_log_p(unedited, cloze))):
                torch.testing.assert_close(answers.log_p[i], by[tokens[i]], rtol=1e-3, atol=1e-3)
                ranks = [1 + int((by > by[token] + 1e-4).sum()) for token in tokens[i]]
                assert answers.rank[i].tolist() == ranks
                assert int(answers.predicted[i]) == int(by.argmax())
            moved = max(moved, float((expected - plain_log_p(unedited, cloze)).abs().max()))
    assert moved > 0.1
    assert_same_bits(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_put_back_to_the_bit(kind: str, small_model: Load) -> None:
    model = small_model(kind)
    decoder, before = model.mlp_residual, bits(model)
    values = some_values(decoder)
    with edited_values(decoder, values):
        changed = [name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])]
        assert len(changed) == 2  # of two layers, and nothing but the output matrices
    assert_same_bits(model, before)
    with pytest.raises(KeyError), edited_values(decoder, values), edited_values(decoder, {(1, 5): -values[0, 3]}):
        raise KeyError("inside")
    assert_same_bits(model, before)


def test_refuses_what_would_not_reach_the_model(small_model: Load) -> None:
    decoder = small_model("bert").mlp_residual
    assert isinstance(decoder, Encoder)
    blocks = [replace(block, mlp=replace(block.mlp, W_out=block.mlp.W_out.clone())) for block in decoder.blocks]
    with (
        pytest.raises(ModelError, match="copy of the model's weights"),
        edited_values(replace(decoder, blocks=blocks), some_values(decoder)),
    ):
        pass
    with pytest.raises(MethodError, match="no neuron 999 in layer 0"), edited_values(decoder, {(0, 999): decoder.W_U[:, 0]}):
        pass
    cloze, no_number = made_facts("bert")[0].prompts[0].clozes[0], {(0, 0): decoder.W_U[:, 0] * float("nan")}
    with pytest.raises(MethodError, match="no finite numbers"):
        edited_answers(decoder, [cloze], torch.tensor([[5]]), [no_number])
    with pytest.raises(MethodError, match=r"shape \(3,\)"), edited_values(decoder, {(0, 0): torch.zeros(3)}):
        pass


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_update_by_hand(kind: str, small_folder: Callable[[str], Path], small_model: Load) -> None:
    decoder, plain = small_model(kind).mlp_residual, inner(small_folder(kind), kind)
    weight = oracle.output_layer(plain, kind, 1).weight
    v = weight[5] if kind == "gpt2" else weight[:, 5]
    for embedding, table in (
        ("output", plain.get_output_embeddings().weight),
        ("input", plain.get_input_embeddings().weight),
    ):
        old, new = table[50], table[61]
        expected = {
            "paper": v - 0.5 * old + 3.0 * new,
            "code": v - 0.5 * old * v.norm() / old.norm() + 3.0 * new * v.norm() / new.norm(),
        }
        for scale, vector in expected.items():
            how = EditOptions(l1=0.5, l2=3.0, scale=scale, embedding=embedding)
            found = updated_values(decoder, [(1, 5)], 50, 61, how=how)
            torch.testing.assert_close(found[1, 5], vector, rtol=1e-5, atol=1e-6)
    with pytest.raises(MethodError, match="unknown scale 'both': use one of code, paper"):
        EditOptions(scale="both")
    with pytest.raises(MethodError, match="unknown embedding 'tied': use one of output, input"):
        EditOptions(embedding="tied")
    with pytest.raises(MethodError, match="l2 is nan; it must be a number, at least 0"):
        EditOptions(l2=float("nan"))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_changes_have_the_sign_of_the_activation(kind: str, small_folder: Callable[[str], Path], small_model: Load) -> None:
    """What a neuron of -4 writes moves by 4 (l2 e_new - l1 e_old), scaled; as published it moves the other way."""
    decoder, plain = small_model(kind).mlp_residual, inner(small_folder(kind), kind)
    weight = oracle.output_layer(plain, kind, 1).weight
    neurons, fired = [(1, 5), (1, 6), (1, 7)], torch.tensor([-4.0, 0.5, 0.0])
    table = plain.get_output_embeddings().weight
    old, new = table[50], table[61]
    ways: dict[tuple[str, bool], list[float]] = {  # by what the published change is multiplied
        ("code", False): [1.0, 1.0, 1.0],
        ("code", True): [-1.0, 1.0, 1.0],
        ("paper", True): [-1.0, 1.0, 1.0],
    }
    for (scale, orient), factors in ways.items():
        how = EditOptions(l1=0.5, l2=3.0, scale=scale, orient=orient)
        found = updated_values(decoder, neurons, 50, 61, fired, how)
        for (_, neuron), factor in zip(neurons, factors, strict=True):
            v = weight[neuron] if kind == "gpt2" else weight[:, neuron]
            lengths = (1.0, 1.0) if scale == "paper" else (v.norm() / old.norm(), v.norm() / new.norm())
            change = factor * (3.0 * new * lengths[1] - 0.5 * old * lengths[0])
            torch.testing.assert_close(found[1, neuron], v + change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_activations_where_the_answer_is_predicted(
    kind: str, small_folder: Callable[[str], Path], small_model: Load
) -> None:
    decoder, plain = small_model(kind).mlp_residual, inner(small_folder(kind), kind)
    clozes = [prompt.clozes[0] for fact in made_facts(kind)[:2] for prompt in fact.prompts]
    found = mean_activations(decoder, clozes, [(1, 5), (0, 3)], batch_size=2)
    seen: dict[int, Tensor] = {}
    hooks = [
        oracle.output_layer(plain, kind, layer).register_forward_pre_hook(
            lambda _, given, layer=layer: seen.update({layer: given[0]})
        )
        for layer in (0, 1)
    ]
    expected = torch.zeros(2)
    for cloze in clozes:
        with torch.no_grad():
            plain(torch.tensor([cloze.tokens]))
        expected += torch.stack([seen[1][0, cloze.position, 5], seen[0][0, cloze.position, 3]])
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, expected / len(clozes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_updates_equal_a_plain_model(
    kind: str, small_folder: Callable[[str], Path], small_model: Load, tmp_path: Path
) -> None:
    """One fact, one kind of neurons and one prompt at a time, on a fresh model with the new weights."""
    model, facts = small_model(kind), made_facts(kind)
    before = bits(model)
    # (1, 20) is of two of the relation's three facts: common, and not to be changed
    knowledge = {0: [(1, 5), (0, 3), (1, 20)], 1: [(1, 7), (1, 20)], 4: [(0, 3)], 5: [(0, 1)]}
    sets = made_sets(facts, knowledge, {0: [(0, 9)]})
    found = update_facts(model, facts, sets, l2=3.0, n_other=4, n_random=1, batch_size=3)
    assert_same_bits(model, before)
    assert found.frame.query("kind == 'knowledge'").groupby("fact")["n_neurons"].first().to_dict() == {0: 2, 1: 1, 4: 1}
    assert found.provenance["left_out"] == {"answer of several tokens": 1}
    assert found.provenance["empty"] == {"knowledge": 2, "base": 4}
    assert found.facts["fact"].tolist() == [0, 1, 2, 3, 4]
    decoder = model.mlp_residual
    chosen = sets_of_facts(sets, decoder.parts(0).W_out.shape[0], 1, common=False)
    new = {row["fact"]: int(row["new_answer"]) for row in found.facts.to_dict("records")}
    unedited = inner(small_folder(kind), kind)
    for fact, variants in list(enumerate(chosen))[:5]:
        assert new[fact] != int(facts[fact].answer)
        for (of, draw), neurons in variants.items():
            fired = mean_activations(decoder, [prompt.clozes[0] for prompt in facts[fact].prompts], neurons)
            values = updated_values(decoder, neurons, int(facts[fact].answer), new[fact], fired, EditOptions(l2=3.0))
            plain = plainly_edited(small_folder(kind), kind, values)
            rows = found.frame[(found.frame["fact"] == fact) & (found.frame["kind"] == of) & (found.frame["draw"] == draw)]
            assert rows["on"].tolist() == ["own"] * 3 + ["held_out"]
            for row in rows.to_dict("records"):
                (cloze,) = (*facts[fact].prompts, *facts[fact].held_out)[row["prompt"]].clozes
                old_p, new_p = plain_log_p(unedited, cloze), plain_log_p(plain, cloze)
                assert row["p_before"] == pytest.approx(math.exp(old_p[new[fact]]), rel=1e-3)
                assert row["p"] == pytest.approx(math.exp(new_p[new[fact]]), rel=1e-3)
                assert row["p_gold_before"] == pytest.approx(math.exp(old_p[cloze.target]), rel=1e-3)
                assert row["p_gold"] == pytest.approx(math.exp(new_p[cloze.target]), rel=1e-3)
                assert row["rank_before"] == 1 + int((old_p > old_p[new[fact]]).sum())
                assert row["rank"] == 1 + int((new_p > new_p[new[fact]]).sum())
                assert row["changed"] == (int(old_p.argmax()) != int(new_p.argmax()))
    sides = found.others.to_dict("records")
    assert {row["n_prompts"] for row in sides} == {4}
    loaded = FactUpdates.load(found.save(tmp_path / "fact_updates.parquet"))
    pd.testing.assert_frame_equal(loaded.frame, found.frame)
    pd.testing.assert_frame_equal(loaded.others, found.others)
    pd.testing.assert_frame_equal(loaded.with_facts(), found.with_facts())


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_perplexity_of_other_facts(kind: str, small_folder: Callable[[str], Path], small_model: Load) -> None:
    """With a sample that is no sample: all prompts of all other facts, answers of two tokens among them."""
    model, facts = small_model(kind), made_facts(kind)
    sets = made_sets(facts, {0: [(1, 5), (0, 3)]})
    found = update_facts(model, facts, sets, n_other=100, n_random=0)
    new = int(found.facts["new_answer"][0])
    fired = mean_activations(model.mlp_residual, [prompt.clozes[0] for prompt in facts[0].prompts], [(0, 3), (1, 5)])
    values = updated_values(model.mlp_residual, sets.of("knowledge", 0), 50, new, activations=fired)
    models = {"nll_before": inner(small_folder(kind), kind), "nll": plainly_edited(small_folder(kind), kind, values)}
    for on, others in (("intra", facts[1:3]), ("inter", facts[3:])):
        (row,) = found.others[found.others["on"] == on].to_dict("records")
        assert row["n_prompts"] == sum(len(fact.prompts) for fact in others)
        for name, plain in models.items():
            losses = [
                -sum(float(plain_log_p(plain, cloze)[cloze.target]) for cloze in prompt.clozes) / len(prompt.clozes)
                for fact in others
                for prompt in fact.prompts
            ]
            assert row[name] == pytest.approx(sum(losses) / len(losses), rel=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_one_update_in_detail_is_that_of_all(kind: str, small_model: Load) -> None:
    model, facts = small_model(kind), made_facts(kind)
    before = bits(model)
    sets = made_sets(facts, {0: [(1, 5), (0, 3)], 5: [(0, 1)]})
    found = update_answers(model, facts, sets, 0, l2=3.0, n_answers=300)
    updates = update_facts(model, facts, sets, l2=3.0, n_random=0)
    new = str(updates.facts["new_answer"][0])
    assert_same_bits(model, before)
    assert found.groupby(["edited", "on"])["prompt"].nunique().to_dict() == {
        (edited, on): n for edited in (False, True) for on, n in (("own", 3), ("held_out", 1))
    }
    word = model.tokenizer.decode([int(new)])
    for row in updates.frame.to_dict("records"):
        of_prompt = found[(found["prompt"] == row["prompt"]) & (found["token"] == word)]
        for edited, suffix in ((False, "_before"), (True, "")):
            (told,) = of_prompt[of_prompt["edited"] == edited].to_dict("records")
            assert told["rank"] == row[f"rank{suffix}"]
            assert told["p"] == pytest.approx(row[f"p{suffix}"], rel=1e-4)
    assert not update_answers(model, facts, sets, 1)["edited"].any()  # no neurons
    assert update_answers(model, facts, sets, 5).empty  # an answer of several tokens
    with pytest.raises(MethodError, match="there is no fact 6"):
        update_answers(model, facts, sets, 6)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_a_stored_fact_is_updated_and_erased(kind: str, small_model: Load, tmp_path: Path) -> None:
    model, facts = small_model(kind), made_facts(kind)
    decoder = model.mlp_residual
    neuron, stores = stored_fact(decoder, facts[0], 200.0)
    sets = made_sets(facts, {0: [neuron]}, relations={"capital": [neuron]})
    with edited_values(decoder, stores):
        before = bits(model)
        update = update_facts(model, facts, sets, n_random=4)
        erased = erase_relation(model, facts, sets, "capital", n_random=4)
        other = erase_relation(model, facts, sets, "colour")
        assert_same_bits(model, before)
    by_kind = update.frame.groupby("kind")
    assert by_kind.get_group("knowledge")["changed"].all()
    if kind != "bert":  # whose head is not linear: an unembedding written to the stream need not raise its token
        assert (by_kind.get_group("knowledge")["rank"] == 1).all()  # on held-out prompts as well
    assert (by_kind.get_group("random")["rank"] == 1).mean() < 0.5
    own = erased.frame[erased.frame["fact"] == 0].groupby("kind")
    assert own.get_group("knowledge")["right_before"].all()
    assert own.get_group("knowledge")["right"].mean() <= 0.25  # by chance, without the neuron
    assert own.get_group("random")["right"].mean() > 0.5
    assert (own.get_group("knowledge")["nll"] > own.get_group("knowledge")["nll_before"] + 1).all()
    assert erased.provenance["n_found"] == {"knowledge": 1, "base": 1}
    assert other.frame.empty
    assert other.neurons.empty
    loaded = RelationErasure.load(erased.save(tmp_path / "e.parquet"))
    pd.testing.assert_frame_equal(loaded.frame, erased.frame)
    pd.testing.assert_frame_equal(loaded.neurons, erased.neurons)


@pytest.mark.parametrize("kind", KINDS)
def test_erasing_equals_a_plain_model(kind: str, small_folder: Callable[[str], Path], small_model: Load) -> None:
    model, facts = small_model(kind), made_facts(kind)
    decoder = model.mlp_residual
    neurons = [(1, 5), (0, 3), (1, 7)]
    sets = made_sets(facts, {}, relations={"colour": neurons})
    found = erase_relation(model, facts, sets, "colour", n_neurons=2, n_other=5, n_random=1, batch_size=4)
    frame = found.frame
    assert found.neurons.groupby("kind").size().to_dict() == {"knowledge": 2, "base": 2, "random": 2}
    assert frame[frame["kind"] == "knowledge"].groupby("relation").size().to_dict() == {"capital": 5, "colour": 12}
    unedited = inner(small_folder(kind), kind)
    for of, rows in frame.groupby("kind"):
        zeroed = found.neurons[found.neurons["kind"] == of]
        own = list(zip(zeroed["layer"], zeroed["neuron"], strict=True))
        plain = plainly_edited(small_folder(kind), kind, dict.fromkeys(own, torch.zeros(decoder.W_U.shape[0])))
        for row in rows.to_dict("records"):
            fact = facts[row["fact"]]
            clozes = (*fact.prompts, *fact.held_out)[row["prompt"]].clozes
            assert row["held_out"] == (row["prompt"] == 3)
            for suffix, model_of in (("_before", unedited), ("", plain)):
                log_p = [plain_log_p(model_of, cloze) for cloze in clozes]
                nll = -sum(float(p[cloze.target]) for p, cloze in zip(log_p, clozes, strict=True)) / len(clozes)
                assert row[f"nll{suffix}"] == pytest.approx(nll, rel=1e-3, abs=1e-4)
                right = all(int(p.argmax()) == cloze.target for p, cloze in zip(log_p, clozes, strict=True))
                assert row[f"right{suffix}"] == right


def test_nothing_to_edit_is_reported(small_model: Load, tmp_path: Path) -> None:
    facts = made_facts("gpt2")
    model, sets = small_model("gpt2"), made_sets(facts, {})
    found = update_facts(model, facts, sets)
    assert found.frame.empty
    assert found.others.empty
    assert found.provenance["empty"] == {"knowledge": 5, "base": 5}
    assert FactUpdates.load(found.save(tmp_path / "none.parquet")).frame.empty
    with pytest.raises(MethodError, match="no fact of the relation 'food'"):
        erase_relation(model, facts, sets, "food")
    with pytest.raises(MethodError, match="n_neurons is 0"):
        erase_relation(model, facts, sets, "colour", n_neurons=0)
    assert value_vectors(model.mlp_residual, []).shape == (0, 32)
