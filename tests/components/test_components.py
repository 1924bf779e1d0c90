"""What layers, heads, MLPs and neurons read and write, against the Hugging Face model and sums that must come out."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import KINDS, NAMED, SmallFolder, SmallModel, facts, hf_model, random_pairs, relative_gap
from oracles import eap, patching
from torch import Tensor
from transformers import PreTrainedModel

from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.baselines import random_circuit
from kc_lib.circuits.evaluate import metric_values
from kc_lib.circuits.selection import select
from kc_lib.components.attention import SOURCES, attention_pattern, attention_sources, sources_frame, sources_of
from kc_lib.components.circuit_table import CircuitTable, ablated_values, circuit_table
from kc_lib.components.direct import BIASES, DirectAttribution, constant_contribution, direct_attribution, promoted_tokens
from kc_lib.components.lens import LogitLens, logit_lens
from kc_lib.components.neuron_readout import neuron_contributions, top_neurons
from kc_lib.errors import MethodError, ModelError
from kc_lib.graph import Circuit
from kc_lib.heads.ablation import HeadAblation, ablate_heads, random_heads
from kc_lib.tasks.batches import make_batch

every_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in NAMED else pytest.mark.slow) for kind in KINDS]
)


def final_parts(hf: PreTrainedModel, stream: Tensor, part: Tensor) -> Tensor:
    """What a part of a final stream adds to the logits before the cap, at the norm's scale for the whole stream."""
    decoder = eap.read_decoder(hf)
    if hf.config.model_type not in ("gpt2", "gpt_neox", "gptj", "phi"):  # those with a norm that centres
        return (part * decoder.final_norm(stream) / stream) @ decoder.w_u.T
    bias = decoder.final_norm(torch.zeros_like(stream))
    factor = (decoder.final_norm(stream) - bias) / (stream - stream.mean(-1, keepdim=True))
    return ((part - part.mean(-1, keepdim=True)) * factor) @ decoder.w_u.T


# --- logit lens --------------------------------------------------------------------------------------------------


@every_kind
def test_the_lens_reads_the_hidden_states_of_hugging_face(
    small_model: SmallModel, small_folder: SmallFolder, kind: str
) -> None:
    model, hf, pairs = small_model(kind), hf_model(small_folder(kind)), facts()
    decoder = eap.read_decoder(hf)
    read = {
        norm: logit_lens(model, pairs, norm, batch_size=3).facts.set_index(["fact", "point"]) for norm in ("own", "final")
    }
    for i, pair in enumerate(pairs):
        with torch.no_grad():
            run = hf(torch.tensor([pair.clean]), output_hidden_states=True)
        # the last hidden state of Hugging Face models is after the final norm
        for layer, hidden in enumerate(run.hidden_states[:-1]):
            point = "blocks.0.hook_resid_pre" if layer == 0 else f"blocks.{layer - 1}.hook_resid_post"
            logits = eap.unembed(decoder, hidden)[0]
            own = read["own"].loc[(i, point)]
            expected = logits[-1].softmax(-1)[pair.answer[0]].item()
            assert own["answer_probability"] == pytest.approx(expected, rel=1e-3, abs=1e-7)
            assert own["answer_rank"] == 1 + (logits[-1] > logits[-1, pair.answer[0]]).sum().item()
            subject = list(pair.positions["subject"])
            ranks = [1 + (logits[p] > logits[p, pair.answer[0]]).sum().item() for p in subject]
            assert own["answer_rank_at_subject"] == min(ranks)
            of_subject = logits[-1].softmax(-1)[pair.clean[subject[-1]]].item()
            assert own["subject_probability"] == pytest.approx(of_subject, rel=1e-3, abs=1e-7)
        last = f"blocks.{len(decoder.layers) - 1}.hook_resid_post"
        expected = run.logits[0, -1].softmax(-1)[pair.answer[0]].item()
        for norm in ("own", "final"):
            assert read[norm].loc[(i, last)]["answer_probability"] == pytest.approx(expected, rel=1e-3, abs=1e-7)
    frames = [frame.drop(last, level="point")["answer_probability"] for frame in read.values()]
    assert not frames[0].equals(frames[1])


def test_the_final_norm_reading_uses_the_final_scale(small_model: SmallModel, small_folder: SmallFolder) -> None:
    model, hf, (pair, *_) = small_model("gpt2"), hf_model(small_folder("gpt2")), facts()
    with torch.no_grad():
        hidden = hf(torch.tensor([pair.clean]), output_hidden_states=True).hidden_states[1][0, -1]
    decoder = model.residual
    final = decoder.run(decoder.embed(torch.tensor([pair.clean])))[0, -1]
    logits = final_parts(hf, final, hidden) + constant_contribution(decoder, torch.arange(200))
    found = logit_lens(model, [pair], "final").facts.set_index("point").loc["blocks.0.hook_resid_post"]
    assert found["answer_probability"] == pytest.approx(logits.softmax(-1)[pair.answer[0]].item(), rel=1e-3)


def test_the_lens_of_parallel_blocks_has_no_middle(small_model: SmallModel, tmp_path: Path) -> None:
    found = logit_lens(small_model("neox"), facts())
    assert found.facts["point"].nunique() == 1 + 3
    assert logit_lens(small_model("gpt2"), facts()).facts["point"].nunique() == 1 + 2 * 3
    assert found.summary()["layer"].tolist() == [0.0, 1.0, 2.0, 3.0]
    again = LogitLens.load(found.save(tmp_path / "lens.parquet"))
    pd.testing.assert_frame_equal(again.facts, found.facts)
    assert again.provenance == found.provenance


def test_a_lens_without_subjects_leaves_their_columns_empty(small_model: SmallModel) -> None:
    found = logit_lens(small_model("llama"), random_pairs())
    assert found.facts["answer_rank_at_subject"].isna().all()
    assert found.facts["answer_rank"].notna().all()
    assert "subject_probability" not in found.summary()


# --- direct attribution ------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("direction", ["answer", "difference"])
def test_direct_contributions_sum_to_the_logits(
    small_model: SmallModel, small_folder: SmallFolder, kind: str, direction: str
) -> None:
    model, hf, pairs = small_model(kind), hf_model(small_folder(kind)), facts()
    found = direct_attribution(model, pairs, direction, batch_size=2)
    cap = getattr(hf.config, "final_logit_softcapping", None)
    for pair, total in zip(pairs, found.totals, strict=True):
        with torch.no_grad():
            logits = hf(torch.tensor([pair.clean])).logits[0, -1].double()
        if cap:
            logits = cap * torch.atanh(logits / cap)
        expected = logits[pair.answer[0]] - (logits[pair.distractor] if direction == "difference" else 0.0)
        assert total.item() == pytest.approx(expected.item(), abs=1e-3)
    assert found.components == [*eap.writer_names(hf), *BIASES]


@every_kind
def test_direct_contributions_are_those_of_the_hand_written_model(
    small_model: SmallModel, small_folder: SmallFolder, kind: str
) -> None:
    model, hf, pairs = small_model(kind), hf_model(small_folder(kind)), facts()
    found = direct_attribution(model, pairs)
    decoder = model.residual
    for i, pair in enumerate(pairs):
        outputs = patching.writer_outputs(hf, torch.tensor([pair.clean]))[:, 0, -1]
        stream = outputs.sum(0) + decoder.bias_before[-1]
        expected = torch.stack([final_parts(hf, stream, output)[pair.answer[0]] for output in outputs])
        assert relative_gap(found.values[i, : len(outputs)], expected) <= 1e-4


def test_direct_tables_add_up(small_model: SmallModel, tmp_path: Path) -> None:
    found = direct_attribution(small_model("gpt2"), facts(), "difference")
    frame = found.summary()
    mean = found.totals.mean().item()
    assert frame["contribution"].sum() == pytest.approx(mean, rel=1e-5)
    assert frame["share"].sum() == pytest.approx(1.0)
    assert (frame["contribution_low"] <= frame["contribution"]).all()
    layers = found.by_layer()
    assert layers["accumulated"].iloc[-1] == pytest.approx(mean, rel=1e-5)
    heads = frame[(frame["kind"] == "head") & (frame["layer"] == 1)]["contribution"].sum()
    of_layer = layers[(layers["kind"] == "attention") & (layers["layer"] == 1)]["contribution"].item()
    assert of_layer == pytest.approx(heads, rel=1e-5)
    again = DirectAttribution.load(found.save(tmp_path / "direct.parquet"))
    assert torch.equal(again.values, found.values)
    assert (again.components, again.provenance) == (found.components, found.provenance)


@pytest.mark.parametrize("kind", NAMED)
def test_promoted_tokens_are_those_of_the_mean_write(small_model: SmallModel, small_folder: SmallFolder, kind: str) -> None:
    model, hf, pairs = small_model(kind), hf_model(small_folder(kind)), facts()
    decoder = model.residual
    logits = torch.zeros(200)
    for pair in pairs:
        outputs = patching.writer_outputs(hf, torch.tensor([pair.clean]))[:, 0, -1]
        stream = outputs.sum(0) + decoder.bias_before[-1]
        logits += final_parts(hf, stream, outputs[decoder.graph().writer_index["a1.h2"]]) / len(pairs)
    found = promoted_tokens(model, pairs, ["a1.h2"], k=4, batch_size=2)
    for end, sign in (("top", 1), ("bottom", -1)):
        values, ids = (sign * logits).topk(4)
        own = found[found["end"] == end]
        assert own["id"].tolist() == ids.tolist()
        assert own["value"].tolist() == pytest.approx((sign * values).tolist(), rel=1e-3)
    assert found["token"].tolist() == [model.tokenizer.decode([token]) for token in found["id"]]


# --- attention ---------------------------------------------------------------------------------------------------


@every_kind
def test_attention_by_source_is_that_of_hugging_face(small_model: SmallModel, small_folder: SmallFolder, kind: str) -> None:
    model, hf, pairs = small_model(kind), hf_model(small_folder(kind)), facts()
    found = attention_sources(model, pairs, batch_size=2)
    for i, pair in enumerate(pairs):
        with torch.no_grad():
            patterns = torch.stack(hf(torch.tensor([pair.clean]), output_attentions=True).attentions)[:, 0]
        for source, positions in sources_of(pair).items():
            expected = patterns[:, :, -1, list(positions)].sum(-1)
            assert (found[SOURCES.index(source), :, :, i] - expected).abs().max() <= 1e-5
        tokens, whole = attention_pattern(model, pair, [(1, 3), (0, 2)])
        assert len(tokens) == len(pair.clean)
        assert (whole - torch.stack([patterns[1, 3], patterns[0, 2]])).abs().max() <= 1e-5
    assert (found.sum(0) <= 1 + 1e-5).all()


def test_weighted_attention_is_what_each_token_sends(small_model: SmallModel, small_folder: SmallFolder) -> None:
    model, hf, (pair, *_) = small_model("llama"), hf_model(small_folder("llama")), facts()
    with torch.no_grad():
        run = hf(torch.tensor([pair.clean]), output_attentions=True, output_hidden_states=True)
    layer = hf.model.layers[0]
    x = layer.input_layernorm(run.hidden_states[0])[0]
    group, head = 1, 3  # of two key-value heads, for four query heads
    v = (x @ layer.self_attn.v_proj.weight.T)[:, 8 * group : 8 * group + 8]
    sent = v @ layer.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8].T
    sizes = run.attentions[0][0, head, -1] * sent.norm(dim=-1)
    expected = (sizes / sizes.sum())[list(pair.positions["subject"])].sum().item()
    found = attention_sources(model, [pair], weighted=True)[SOURCES.index("subject"), 0, head, 0].item()
    assert found == pytest.approx(expected, rel=1e-4)


def test_sources_tell_tokens_apart(small_model: SmallModel) -> None:
    pair = facts()[0]
    assert sources_of(pair) == {"subject": (1, 2), "relation": (3,), "first": (0,), "last": (4,)}
    frame = sources_frame(attention_sources(small_model("gpt2"), facts()))
    assert list(frame.columns) == ["layer", "head", *SOURCES]
    assert len(frame) == 12
    with pytest.raises(MethodError, match="names no subject"):
        attention_sources(small_model("gpt2"), random_pairs())
    with pytest.raises(MethodError, match=r"no head \(0, 4\): layers are 0 to 2, heads 0 to 3"):
        attention_pattern(small_model("gpt2"), pair, [(0, 4)])


# --- neurons -----------------------------------------------------------------------------------------------------


@every_kind
def test_neurons_and_the_output_bias_sum_to_their_mlp(small_model: SmallModel, kind: str) -> None:
    model, pairs = small_model(kind), facts()
    decoder, batch = model.residual, make_batch(pairs)
    found = neuron_contributions(decoder, batch, batch.answers[:, 0], batch.distractors)
    direct = direct_attribution(model, pairs, "difference")
    final = decoder.run(decoder.embed(batch.clean))[torch.arange(len(batch)), batch.answer_positions[:, 0]]
    norm, direction = decoder.final_norm, (decoder.W_U[:, batch.answers[:, 0]] - decoder.W_U[:, batch.distractors]).T
    for layer, block in enumerate(decoder.blocks):
        bias = norm.weighted(norm.centre(block.mlp_parts.b_out) * norm.scale(final))
        mlp = direct.values[:, direct.components.index(f"m{layer}")]
        assert relative_gap(found.contributions[layer].sum(-1) + (bias * direction).sum(-1), mlp) <= 1e-4


def test_top_neurons_are_the_largest(small_model: SmallModel) -> None:
    model, pairs = small_model("llama"), facts()
    batch = make_batch(pairs)
    every = neuron_contributions(model.residual, batch, batch.answers[:, 0])
    mean = every.contributions.mean(1)
    found = top_neurons(model, pairs, n=5, k=3, batch_size=2)
    assert found["contribution"].tolist() == pytest.approx(mean.flatten().topk(5).values.tolist(), rel=1e-4)
    first = found.iloc[0]
    vector = model.residual.blocks[first["layer"]].mlp_parts.W_out[first["neuron"]]
    held = every.values[first["layer"], :, first["neuron"]].mean()
    assert first["value"] == pytest.approx(held.item(), rel=1e-4)
    norm, W_U = model.residual.final_norm, model.residual.W_U
    ids = (torch.sign(held) * (norm.weighted(vector) @ W_U)).topk(3).indices.tolist()
    assert first["tokens"] == " ".join(repr(model.tokenizer.decode([token])) for token in ids)


# --- ablation of nodes -------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("intervention", ["patching", "zero", "mean", "positional_mean"])
def test_ablated_nodes_are_the_circuit_without_their_edges(small_model: SmallModel, kind: str, intervention: str) -> None:
    model, pairs = small_model(kind), facts()
    graph = model.residual.graph()
    sets = {"heads": ["a0.h1", "a2.h3"], "all kinds": ["a1.h0", "a1.h2", "m1"], "input": ["input", "m2"], "late": ["m2"]}
    circuits = {}
    for name, nodes in sets.items():
        mask = graph.edges.clone()
        mask[[graph.writer_index[node] for node in nodes]] = False
        circuits[name] = Circuit(graph, mask)
    usual = {"metric": "log_probability", "intervention": intervention, "reference": pairs}
    found = ablated_values(model, sets, pairs, batch_size=2, **usual)
    expected = metric_values(model, circuits, pairs, **usual)
    for name in ("full", *sets):
        assert relative_gap(torch.tensor(found[name]), torch.tensor(expected[name])) <= 1e-5, name


# --- ablation of heads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_ablated_heads_write_their_mean(small_model: SmallModel, kind: str) -> None:
    """Against the model's own hooks: z of the heads set to its mean over all positions of the reference prompts."""
    model, pairs = small_model(kind), facts()
    heads = [(0, 1), (2, 3), (2, 0)]
    found = ablate_heads(model, heads, pairs, pairs, metric="log_probability", n_random=2, batch_size=2)
    means = {}
    for layer, head in heads:
        z = []
        for pair in pairs:
            _, cache = model.bridge.run_with_cache(torch.tensor([pair.clean]))
            z.append(cache[f"blocks.{layer}.attn.hook_z"][0].reshape(len(pair.clean), 4, 8)[:, head])
        means[layer, head] = torch.cat(z).mean(0)

    def hook_of(layer: int) -> object:
        def hook(z: Tensor, hook: object) -> Tensor:
            apart = z.reshape(*z.shape[:2], 4, 8).clone()
            for own, head in heads:
                if own == layer:
                    apart[:, :, head] = means[own, head]
            return apart.reshape(z.shape)

        return hook

    for i, pair in enumerate(pairs):
        hooks = [(f"blocks.{layer}.attn.hook_z", hook_of(layer)) for layer in (0, 2)]
        logits = model.bridge.run_with_hooks(torch.tensor([pair.clean]), fwd_hooks=hooks)[0, -1]
        expected = logits.log_softmax(-1)[pair.answer[0]].item()
        assert found.values["heads"][i] == pytest.approx(expected, abs=1e-4)


def test_random_heads_are_others_of_the_same_layers(small_model: SmallModel, tmp_path: Path) -> None:
    graph = small_model("gpt2").residual.graph()
    heads = [(0, 1), (2, 3), (2, 0)]
    draws = [random_heads(graph, heads, seed) for seed in range(20)]
    for drawn in draws:
        assert [layer for layer, _ in drawn] == [0, 2, 2]
        assert not set(drawn) & set(heads)
        assert len(set(drawn)) == 3
    assert len({tuple(sorted(drawn)) for drawn in draws}) > 2
    assert len(random_heads(graph, [(1, 0), (1, 1), (1, 2)], 0)) == 1
    assert len(random_heads(graph, [*((1, head) for head in range(4)), (2, 0)], 0)) == 1
    with pytest.raises(MethodError, match="takes every head of its layers"):
        random_heads(graph, [(1, head) for head in range(4)], 0)
    with pytest.raises(MethodError, match="the class is empty"):
        ablate_heads(small_model("gpt2"), [], facts(), facts())
    with pytest.raises(MethodError, match=r"no head \(3, 0\): layers are 0 to 2"):
        ablate_heads(small_model("gpt2"), [(3, 0)], facts(), facts())
    found = ablate_heads(small_model("gpt2"), heads, facts(), facts(), n_random=4)
    summary = found.summary().set_index("ablated")
    values = found.values
    assert summary.loc["heads", "drop"] == pytest.approx((values["full"] - values["heads"]).mean())
    null = [(values["full"] - values[f"random #{i}"]).mean() for i in (1, 2, 3, 4)]
    assert summary.loc["heads", "p"] == (1 + sum(drop >= summary.loc["heads", "drop"] for drop in null)) / 5
    assert summary.loc["more", "drop"] == pytest.approx(summary.loc["heads", "drop"] - sum(null) / 4)
    again = HeadAblation.load(found.save(tmp_path / "ablation.parquet"))
    pd.testing.assert_frame_equal(again.values, found.values)
    assert (again.n_heads, again.metric) == (3, "probability")


# --- the circuit table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [True, False])
def test_the_circuit_table_says_what_was_measured(
    small_model: SmallModel, small_folder: SmallFolder, grouped: bool, tmp_path: Path
) -> None:
    model, hf, pairs = small_model("llama"), hf_model(small_folder("llama")), facts((6, 6, 6))
    circuit = select(score_edges(model, pairs, "eap", grouped=grouped), "absolute", 40)
    found = circuit_table(model, circuit, pairs)
    frame = found.nodes.set_index("node")
    assert list(frame.index) == [node for node in circuit.nodes if node != "logits"]
    batch = make_batch(pairs)
    direct = direct_attribution(model, pairs, "difference").summary().set_index("component")
    assert frame["direct"].tolist() == pytest.approx(direct.loc[frame.index, "contribution"].tolist(), rel=1e-5)
    for node in list(frame.index)[:6]:
        mask = circuit.graph.edges.clone()
        mask[circuit.graph.writer_index[node]] = False
        clean, corrupted = batch.clean, batch.corrupted
        logits = patching.oracle_circuit_logits(hf, clean, corrupted, torch.full((3,), 5), mask, not grouped, "patching")
        full = hf(clean).logits[:, -1].detach()
        rows = torch.arange(3)
        drop = [x[rows, batch.answers[:, 0]] - x[rows, batch.distractors] for x in (full, logits)]
        assert frame.loc[node, "total"] == pytest.approx((drop[0] - drop[1]).mean().item(), abs=1e-3)
    edges = circuit.to_frame()
    for node in frame.index:
        assert frame.loc[node, "edges_out"] == (edges["writer"] == node).sum()
        # an edge into keys or values that heads share is an edge into each of them
        serves = circuit.graph.serves[circuit.graph.writer_index[node]]
        assert frame.loc[node, "edges_in"] == circuit.mask[:, serves].sum().item()
    first = edges[edges["writer"] == "input"].iloc[0]
    assert frame.loc["input", "strongest_out"].startswith(f"{first['reader']} ({first['score']:.3g})")
    assert frame.loc[[n for n in frame.index if n.startswith("a")], "sees_subject"].notna().all()
    assert frame.loc[[n for n in frame.index if not n.startswith("a")], "sees_subject"].isna().all()
    unclear = (frame["direct_low"] <= 0) & (frame["direct_high"] >= 0) & (frame.index != "input")
    assert (frame["class"] == "unexplained").eq(unclear).all()
    again = CircuitTable.load(found.save(tmp_path / "table.parquet"))
    pd.testing.assert_frame_equal(again.nodes, found.nodes)
    page = found.to_html("A <circuit>")
    assert "A &lt;circuit&gt;" in page
    assert page.count("<tr") == len(frame) + 1


def test_the_table_takes_classes_and_refuses_foreign_circuits(small_model: SmallModel) -> None:
    model, pairs = small_model("gpt2"), facts()
    graph = model.residual.graph()
    heads = pd.DataFrame({"layer": [0] * 4 + [1] * 4 + [2] * 4, "head": [*range(4)] * 3, "class": ["mover"] * 12})
    table = circuit_table(model, random_circuit(graph, 60, 0), pairs, heads)
    own = table.nodes[table.nodes["node"].str.startswith("a")]
    assert (own["class"] == "mover").all()
    assert (table.nodes.loc[table.nodes["node"] == "input", "class"] == "embedding").all()
    other = Circuit(small_model("llama").residual.graph(), small_model("llama").residual.graph().edges)
    with pytest.raises(MethodError, match="another model's graph"):
        circuit_table(model, other, pairs)
    without_subjects = circuit_table(model, random_circuit(graph, 60, 0), random_pairs())
    assert "sees_subject" not in without_subjects.nodes


# --- bad input ---------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line(small_model: SmallModel) -> None:
    model, pairs = small_model("gpt2"), facts()
    with pytest.raises(MethodError, match="unknown norm 'none'"):
        logit_lens(model, pairs, "none")
    with pytest.raises(MethodError, match="unknown direction 'up'"):
        direct_attribution(model, pairs, "up")
    with pytest.raises(MethodError, match=r"no component 'a9\.h0'.*a2\.h3"):
        promoted_tokens(model, pairs, ["a9.h0"])
    with pytest.raises(MethodError, match="k is 0"):
        promoted_tokens(model, pairs, ["a0.h0"], k=0)
    with pytest.raises(MethodError, match="n is 0"):
        top_neurons(model, pairs, n=0)
    with pytest.raises(MethodError, match="no node 'x'"):
        ablated_values(model, {"some": ["x"]}, pairs)
    with pytest.raises(MethodError, match="rename it"):
        ablated_values(model, {"full": ["m0"]}, pairs)
    with pytest.raises(ModelError):
        logit_lens(small_model("bert"), pairs)
