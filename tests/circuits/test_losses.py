"""Losses from the final stream against the metric of the logits, and packed products against plain ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import SmallModel, random_pairs

from kc_lib.circuits.acdc.losses import stream_losses
from kc_lib.circuits.acdc.products import edge_sums, packed_linear, packed_mlp
from kc_lib.metrics import METRICS, Metric
from kc_lib.tasks.batches import make_batch


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("full_answer", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "gemma2"])
@pytest.mark.parametrize("metric", list(METRICS))
def test_losses_are_the_metric_of_the_logits(small_model: SmallModel, kind: str, metric: str, full_answer: bool) -> None:
    decoder, batch, of = small_model(kind).residual, make_batch(random_pairs(), full_answer), METRICS[metric]
    if kind == "neox":  # none of the models has a bias there
        decoder = replace(decoder, b_U=drawn(decoder.W_U.shape[1], seed=2))
    reference = decoder.unembed(drawn(*batch.answers.shape, decoder.W_U.shape[0]))
    weights = torch.tensor([1.0, 0.5, 2.0, 0.25])
    streams = 3 * drawn(90, *batch.answers.shape, decoder.W_U.shape[0], seed=1)  # more than are unembedded together
    expected = [(of.loss(decoder.unembed(stream), batch, reference) * weights).mean() for stream in streams]
    found = list(stream_losses(decoder, of, batch, reference, weights)(streams))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [-200.0, 200.0])  # of all logits: their exponentials are no float32
def test_losses_do_not_depend_on_the_level_of_the_logits(small_model: SmallModel, offset: float) -> None:
    decoder, batch, of = small_model("llama").residual, make_batch(random_pairs()), METRICS["match_nll"]
    streams = drawn(2, 4, 1, decoder.W_U.shape[0], seed=1)
    found = {}
    for level in (0.0, offset):
        raised = replace(decoder, b_U=decoder.b_U + level)
        reference = raised.unembed(drawn(4, 1, decoder.W_U.shape[0]))
        found[level] = torch.stack(list(stream_losses(raised, of, batch, reference, torch.ones(4))(streams)))
    torch.testing.assert_close(found[offset], found[0.0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric", [metric for metric in METRICS.values() if metric.target], ids=lambda metric: metric.name)
@pytest.mark.parametrize("full_answer", [False, True])
def test_a_target_gives_the_loss_but_for_a_constant(metric: Metric, full_answer: bool) -> None:
    batch = make_batch(random_pairs(), full_answer)
    reference = drawn(*batch.answers.shape, 200)
    assert metric.target is not None
    target = metric.target(batch, reference)
    constants = []
    for seed in (1, 2):
        logits = 5 * drawn(*batch.answers.shape, 200, seed=seed)
        entropies = -(target * logits.log_softmax(-1)).sum(-1)
        mean = torch.stack([row[real].mean() for row, real in zip(entropies, batch.answer_mask, strict=True)])
        constants.append(metric.loss(logits, batch, reference) - mean)
    torch.testing.assert_close(*constants, rtol=1e-5, atol=1e-5)


def test_losses_have_the_gradient_of_the_metric(small_model: SmallModel) -> None:
    decoder, batch, of = small_model("llama").residual, make_batch(random_pairs()), METRICS["match_nll"]
    reference = decoder.unembed(drawn(4, 1, decoder.W_U.shape[0]))
    stream = drawn(1, 4, 1, decoder.W_U.shape[0], seed=1).requires_grad_()
    (found,) = torch.autograd.grad(next(stream_losses(decoder, of, batch, reference, torch.ones(4))(stream)), stream)
    (expected,) = torch.autograd.grad(of.loss(decoder.unembed(stream[0]), batch, reference).mean(), stream)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_products_are_products(biased: bool, dtype: torch.dtype) -> None:
    weight, x = drawn(30, 20).to(dtype), drawn(3, 5, 20, seed=1).to(dtype).requires_grad_()
    bias = drawn(30, seed=2).to(dtype) if biased else torch.zeros(30, dtype=dtype)
    product = packed_linear(weight, bias)
    expected = torch.einsum("...i,oi->...o", x, weight) + bias
    with torch.no_grad():
        torch.testing.assert_close(product(x), expected, rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(product(x).square().sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "gemma2"])
def test_packed_mlps_are_the_models(small_model: SmallModel, kind: str) -> None:
    block = small_model(kind).residual.blocks[1]
    x = drawn(7, 50, small_model(kind).cfg.d_model)  # more rows than are run together
    with torch.no_grad():
        torch.testing.assert_close(packed_mlp(block)(x), block.mlp(block.mlp_norm(x)), rtol=1e-4, atol=1e-5)


def test_an_mlp_with_a_hook_runs_as_the_module(small_model: SmallModel) -> None:
    model = small_model("gpt2")
    x = drawn(2, 3, model.cfg.d_model)
    block = model.residual.blocks[0]
    plain = block.mlp(block.mlp_norm(x))
    with model.bridge.hooks([("blocks.0.mlp.hook_out", lambda value, hook: 2 * value)]), torch.no_grad():
        hooked = packed_mlp(model.residual.blocks[0])(x)
    torch.testing.assert_close(hooked, 2 * plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_outputs_are_summed_over_edges(share: float) -> None:
    outputs = drawn(20, 7, 3, 5)
    edges = torch.rand(20, 12, generator=torch.Generator().manual_seed(0)) < share
    edges[:3] = edges[17:] = edges[:, 4] = False  # some writers have no edge, and one reader none
    sums = edge_sums(edges, 4, outputs)
    torch.testing.assert_close(sums.of(outputs), torch.einsum("vr,vnkd->rnkd", edges.float(), outputs)[:, :4])


@pytest.mark.parametrize("readers", [1, 3])
def test_no_edges_sum_to_nothing(readers: int) -> None:
    outputs = drawn(20, 7, 3, 5)
    assert not edge_sums(torch.zeros(20, readers, dtype=torch.bool), 4, outputs).of(outputs).any()
