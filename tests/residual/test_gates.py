"""The gates: circuits run alone against the model's own forward pass, plain hooks and hand-written sums."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    NAMED,
    SmallFolder,
    SmallModel,
    hf_model,
    native_logits,
    random_edges,
    random_pairs,
    relative_gap,
    views,
)
from oracles import patching
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from kc_lib.circuits.run import run_circuit
from kc_lib.errors import ModelError
from kc_lib.models.load import load_model
from kc_lib.models.smollm2 import cached_smollm2
from kc_lib.residual.activations import INTERVENTIONS, NO_PREFIX, ablation, shared_prefix, writer_outputs
from kc_lib.residual.decoder import Decoder, frozen
from kc_lib.residual.logits import full_logits, reference_means
from kc_lib.residual.patch import clean_run, patch_edges
from kc_lib.tasks.batches import Batch, TokenPair, make_batch
from kc_lib.tasks.task import load_task

# --- full and empty ----------------------------------------------------------------------------------------------


@views
@pytest.mark.parametrize("full_answer", [False, True], ids=["first_token", "full_answer"])
def test_the_full_mask_is_the_model_and_the_empty_mask_the_corrupted_prompt(
    small_model: SmallModel, kind: str, grouped: bool, full_answer: bool
) -> None:
    model = small_model(kind)
    decoder = model.residual
    graph = decoder.graph(grouped)
    batch = make_batch(random_pairs(), full_answer)
    clean, corrupted = native_logits(model, batch.clean, batch), native_logits(model, batch.corrupted, batch)
    assert relative_gap(clean, corrupted) > 0.05  # or the test could not tell one from the other
    prefix = shared_prefix(decoder, batch, "patching")
    assert prefix.start == 2
    for used in (NO_PREFIX, prefix):
        ablated = ablation(decoder, "patching", batch, prefix=used)
        assert relative_gap(run_circuit(decoder, graph, graph.edges, batch, ablated, used), clean) <= 1e-5
        assert (
            relative_gap(run_circuit(decoder, graph, torch.zeros_like(graph.edges), batch, ablated, used), corrupted) <= 1e-5
        )
        assert relative_gap(full_logits(decoder, batch, used), clean) <= 1e-5


@views
@pytest.mark.parametrize("intervention", ["zero", "mean", "positional_mean"])
def test_the_full_mask_is_the_model_under_every_intervention(
    small_model: SmallModel, kind: str, grouped: bool, intervention: str
) -> None:
    model, pairs = small_model(kind), random_pairs()
    decoder = model.residual
    graph = decoder.graph(grouped)
    batch = make_batch(pairs)
    prefix = shared_prefix(decoder, batch, intervention)
    assert prefix is NO_PREFIX
    ablated = ablation(decoder, intervention, batch, reference_means(decoder, intervention, pairs, 3))
    clean = native_logits(model, batch.clean, batch)
    assert relative_gap(run_circuit(decoder, graph, graph.edges, batch, ablated), clean) <= 1e-5


@pytest.mark.parametrize("kind", NAMED)
def test_the_context_ends_where_prompts_differ_or_the_answer_is_read(small_model: SmallModel, kind: str) -> None:
    decoder = small_model(kind).residual
    graph = decoder.graph()
    first = TokenPair((1, 5, 6, 7), (1, 9, 6, 7), (8,), 10, {}, {})
    late = TokenPair((1, 5, 6, 7, 11), (1, 5, 6, 9, 11), (8,), 10, {}, {})
    same = TokenPair((1, 5, 6, 7), (1, 5, 6, 7), (8,), 10, {}, {})
    at_bos = TokenPair((4, 5, 6, 7), (1, 5, 6, 7), (8,), 10, {}, {})
    for pairs, start in (([first, late], 1), ([late], 3), ([same], 3), ([late, same], 3), ([at_bos, late], 0)):
        batch = make_batch(pairs)
        prefix = shared_prefix(decoder, batch, "patching")
        assert prefix.start == start
        ablated = ablation(decoder, "patching", batch, prefix=prefix)
        for mask, tokens in ((graph.edges, batch.clean), (torch.zeros_like(graph.edges), batch.corrupted)):
            logits = run_circuit(decoder, graph, mask, batch, ablated, prefix)
            assert relative_gap(logits, native_logits(small_model(kind), tokens, batch)) <= 1e-5


# --- edges -------------------------------------------------------------------------------------------------------


@views
def test_one_removed_edge_is_that_edge_patched_with_hooks(
    small_model: SmallModel, small_folder: SmallFolder, kind: str, grouped: bool
) -> None:
    decoder, hf = small_model(kind).residual, hf_model(small_folder(kind))
    check_single_edges(decoder, hf, grouped, make_batch(random_pairs()), random_edges(decoder.graph(grouped), 3))


def check_single_edges(
    decoder: Decoder, hf: PreTrainedModel, grouped: bool, batch: Batch, edges: list[tuple[int, int]]
) -> None:
    """A circuit without one edge, a restarted run and the oracle's hooks give the same logits."""
    graph = decoder.graph(grouped)
    clean = full_logits(decoder, batch)
    last = batch.answer_positions[:, 0]
    contexts = [NO_PREFIX, shared_prefix(decoder, batch, "patching")]
    ablations = [ablation(decoder, "patching", batch, prefix=prefix) for prefix in contexts]
    runs = [clean_run(decoder, graph, batch, prefix) for prefix in contexts]
    largest_change = 0.0
    for row, column in edges:
        reader = graph.readers[column]
        names = graph.writers[row], reader.name
        expected = patching.oracle_patch_edge(hf, batch.clean, batch.corrupted, last, *names, ungrouped=not grouped)
        change = (expected - clean[:, 0]).abs().max().item()
        largest_change = max(largest_change, change)
        tolerance = max(1e-4 * change, 1e-5 * clean.abs().max().item())
        mask = graph.edges.clone()
        mask[row, column] = False
        for prefix, ablated, run in zip(contexts, ablations, runs, strict=True):
            removed = run_circuit(decoder, graph, mask, batch, ablated, prefix)[:, 0]
            restarted = patch_edges(decoder, graph, run, ablated, reader, [row])[0, :, 0]
            assert (removed - expected).abs().max() <= tolerance, names
            assert (restarted - expected).abs().max() <= tolerance, names
    assert largest_change > 1e-2 * clean.abs().max()  # or the edges would say nothing


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
@pytest.mark.parametrize("intervention", ["zero", "mean", "positional_mean"])
def test_one_edge_ablated_by_other_values(
    small_model: SmallModel, small_folder: SmallFolder, kind: str, intervention: str
) -> None:
    decoder, hf, pairs = small_model(kind).residual, hf_model(small_folder(kind)), random_pairs()
    graph, batch = decoder.graph(), make_batch(pairs)
    means = reference_means(decoder, intervention, pairs, 2)
    ablated = ablation(decoder, intervention, batch, means)
    values = ablated.outputs.expand(-1, *batch.clean.shape, -1)
    clean, run = full_logits(decoder, batch), clean_run(decoder, graph, batch)
    for row, column in random_edges(graph, 3, seed=1):
        reader = graph.readers[column]
        expected = patching.oracle_patch_edge(
            hf,
            batch.clean,
            batch.corrupted,
            batch.answer_positions[:, 0],
            graph.writers[row],
            reader.name,
            ablation="zero" if intervention == "zero" else values,
        )
        tolerance = max(1e-4 * (expected - clean[:, 0]).abs().max(), 1e-5 * clean.abs().max())
        restarted = patch_edges(decoder, graph, run, ablated, reader, [row])[0, :, 0]
        assert (restarted - expected).abs().max() <= tolerance


@views
@pytest.mark.parametrize("intervention", INTERVENTIONS)
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_random_circuits_are_what_the_sums_written_out_give(
    small_model: SmallModel, small_folder: SmallFolder, kind: str, grouped: bool, intervention: str, share: float
) -> None:
    decoder, hf, pairs = small_model(kind).residual, hf_model(small_folder(kind)), random_pairs(seed=1)
    graph, batch = decoder.graph(grouped), make_batch(pairs)
    clean = full_logits(decoder, batch)
    generator = torch.Generator().manual_seed(2)
    mask = graph.edges & (torch.rand(graph.edges.shape, generator=generator) < share)
    prefix = shared_prefix(decoder, batch, intervention)
    means = reference_means(decoder, intervention, pairs, 3)
    values: str | Tensor = intervention
    if means is not None:
        outputs = ablation(decoder, intervention, batch, means).outputs
        values = outputs.expand(-1, *batch.clean.shape, -1)
    last = batch.answer_positions[:, 0]
    expected = patching.oracle_circuit_logits(hf, batch.clean, batch.corrupted, last, mask, not grouped, values)
    assert relative_gap(expected, clean[:, 0]) > 0.01
    for used in {NO_PREFIX.start: NO_PREFIX, prefix.start: prefix}.values():
        ablated = ablation(decoder, intervention, batch, means, used)
        actual = run_circuit(decoder, graph, mask, batch, ablated, used)[:, 0]
        assert relative_gap(actual, expected) <= 1e-5


@views
def test_a_mask_and_its_pruned_mask_give_the_same_when_patching(small_model: SmallModel, kind: str, grouped: bool) -> None:
    """With values from a real run an edge that is on no path carries nothing; sparse masks leave most nodes out."""
    decoder = small_model(kind).residual
    graph, batch = decoder.graph(grouped), make_batch(random_pairs(seed=3))
    ablated = ablation(decoder, "patching", batch)
    if kind.startswith("gemma"):
        pytest.skip("a norm on outputs ties the heads of a layer together: a pruned head still scales the others")
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        mask = graph.edges & (torch.rand(graph.edges.shape, generator=generator) < 0.1)
        whole = run_circuit(decoder, graph, mask, batch, ablated)
        assert relative_gap(run_circuit(decoder, graph, graph.prune(mask), batch, ablated), whole) <= 1e-5


# --- means and writers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMED)
def test_writer_outputs_are_the_oracles(small_model: SmallModel, small_folder: SmallFolder, kind: str) -> None:
    decoder, hf, batch = small_model(kind).residual, hf_model(small_folder(kind)), make_batch(random_pairs())
    actual = writer_outputs(decoder, batch.clean)
    assert relative_gap(actual, patching.writer_outputs(hf, batch.clean)) <= 1e-5
    for row in (0, 1, 4, len(actual) - 1):
        hooked = patching.hooked_writer_output(hf, batch.clean, decoder.graph().writers[row])
        assert relative_gap(actual[row], hooked) <= 1e-5


def test_means_leave_pads_out_and_count_every_token_once(small_model: SmallModel) -> None:
    decoder, pairs = small_model("gpt2").residual, random_pairs()
    each = [writer_outputs(decoder, torch.tensor([pair.clean]))[:, 0] for pair in pairs]
    means = reference_means(decoder, "mean", pairs, 3)
    assert means is not None
    assert relative_gap(means.outputs[:, 0, 0], torch.cat(each, 1).mean(1)) <= 1e-5
    positional = reference_means(decoder, "positional_mean", pairs, 3)
    assert positional is not None
    for position in range(9):
        seen = torch.stack([outputs[:, position] for outputs in each if outputs.shape[1] > position])
        assert relative_gap(positional.outputs[:, 0, position], seen.mean(0)) <= 1e-5


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "why"), [("bert", "both directions"), ("olmo2", "over all heads at once")])
def test_architectures_without_a_sum_of_writers_are_refused(small_folder: SmallFolder, kind: str, why: str) -> None:
    model = load_model(str(small_folder(kind)), device="cpu")
    with pytest.raises(ModelError, match=why) as caught:
        _ = model.residual
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["attention", "norm", "logits"])
def test_a_model_that_does_something_else_is_refused(small_folder: SmallFolder, part: str) -> None:
    """A forward pass whose weights do not tell what it does: its logits are not those of the sum of writers."""
    model = load_model(str(small_folder("llama")), device="cpu")
    _ = model.residual
    block = model.bridge.blocks[1]
    parts = {"attention": block.attn.o, "norm": block.ln2, "logits": model.bridge.unembed}
    handle = parts[part].original_component.register_forward_hook(lambda _module, _arguments, output: 1.1 * output)
    with pytest.raises(ModelError, match="differ by"):
        _ = model.residual
    handle.remove()
    _ = model.residual


def test_frozen_gives_gradient_flags_back_after_an_exception(small_folder: SmallFolder) -> None:
    model = load_model(str(small_folder("gpt2")), device="cpu")
    trained = list(model.bridge.parameters())[::2]
    for parameter in trained:
        parameter.requires_grad_(True)
    before = [parameter.requires_grad for parameter in model.bridge.parameters()]
    assert any(before)
    assert not all(before)

    def fail_inside() -> None:
        with frozen(model.bridge):
            assert not any(parameter.requires_grad for parameter in model.bridge.parameters())
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()
    assert [parameter.requires_grad for parameter in model.bridge.parameters()] == before


# --- the real model ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_passes_the_gates(smollm2: TransformerBridge) -> None:
    decoder, hf = smollm2.residual, hf_model(cached_smollm2())
    batch = make_batch(load_task("country_capital", smollm2, max_facts=6).discovery[:3])
    clean, corrupted = native_logits(smollm2, batch.clean, batch), native_logits(smollm2, batch.corrupted, batch)
    prefix = shared_prefix(decoder, batch, "patching")
    assert prefix.start > 0
    for grouped in (True, False):
        graph = decoder.graph(grouped)
        for used in (NO_PREFIX, prefix):
            ablated = ablation(decoder, "patching", batch, prefix=used)
            assert relative_gap(run_circuit(decoder, graph, graph.edges, batch, ablated, used), clean) <= 1e-5
            empty = run_circuit(decoder, graph, torch.zeros_like(graph.edges), batch, ablated, used)
            assert relative_gap(empty, corrupted) <= 1e-5
    graph = decoder.graph()
    edges = [graph.edge_positions(edge) for edge in ("input->m0", "m0->a20.h1<v>", "m25->logits")]
    check_single_edges(decoder, hf, True, batch, edges)
