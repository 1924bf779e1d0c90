"""RelP and GIM: local rules in the place of derivatives, against backward passes written out one by one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import KINDS, NAMED, SmallFolder, SmallModel, hf_model, random_pairs, relative_gap, views
from oracles import eap, rules
from torch import Tensor

from kc_lib.circuits.scoring.edges import edge_scores
from kc_lib.circuits.scoring.prepared import Prepared
from kc_lib.errors import ModelError
from kc_lib.metrics import METRICS
from kc_lib.residual.activations import ablation, shared_prefix
from kc_lib.residual.backward_rules import GIM, NATIVE, RELP, BackwardRules
from kc_lib.tasks.batches import TokenPair, make_batch

RULES = {"relp": RELP, "relp_ah": replace(RELP, freeze_pattern=True), "gim": GIM}


def oracle(folder: Path, pairs: list[TokenPair], method: str, grouped: bool) -> Tensor:
    hf, batch = copy.deepcopy(hf_model(folder)).double(), make_batch(pairs)
    last, answers = batch.answer_positions[:, 0], batch.answers[:, 0]
    return eap.oracle_edge_scores(
        hf,
        batch.clean,
        batch.corrupted,
        last,
        answers,
        batch.distractors,
        ungrouped=not grouped,
        decoder=rules.with_rules(hf, method),
    ).float()


def kernel(model: object, pairs: list[TokenPair], using: BackwardRules, grouped: bool = True) -> Tensor:
    decoder, batch = model.residual, make_batch(pairs)
    prefix = shared_prefix(decoder, batch, "patching")
    ablated = ablation(decoder, "patching", batch, prefix=prefix)
    prepared = Prepared(batch, METRICS["logit_difference"], ablated, prefix=prefix)
    (scores,) = edge_scores(decoder, decoder.graph(grouped), prepared, [1.0], rules=using)
    return scores / len(pairs)


@views
@pytest.mark.parametrize("method", RULES)
def test_scores_are_the_oracles(
    small_model: SmallModel, small_folder: SmallFolder, kind: str, grouped: bool, method: str
) -> None:
    pairs = random_pairs(seed=21)
    expected = oracle(small_folder(kind), pairs, method, grouped)
    found = kernel(small_model(kind), pairs, RULES[method], grouped)
    assert relative_gap(found, expected) <= 1e-4
    assert relative_gap(found, kernel(small_model(kind), pairs, NATIVE, grouped)) > 0.1


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize(
    "change",
    [
        {"freeze_norms": True},
        {"secant_activations": True},
        {"product_share": 0.5},
        {"softmax_temperature": 2.0},
        {"qk_share": 0.25},
        {"v_share": 0.5},
        {"freeze_pattern": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_rules_change_gradients_and_no_value(small_model: SmallModel, kind: str, change: dict) -> None:
    decoder, using = small_model(kind).residual, BackwardRules(**change)
    tokens = make_batch(random_pairs(seed=22)).clean
    resid = decoder.embed(tokens)
    for layer, block in enumerate(decoder.blocks):
        attention, x = block.attention, block.attention.norm(resid, using)
        assert torch.equal(x, block.attention.norm(resid))
        q, k, v = (attention.project(part, x) for part in "qkv")
        z = attention.attend(q, k, v, rules=using)
        assert relative_gap(attention.output(z, using), attention.output(attention.attend(q, k, v))) <= 1e-6
        assert relative_gap(block.mlp_output(x, using), block.mlp_output(x)) <= 1e-5
        resid = decoder.run_block(layer, resid)
    assert torch.equal(decoder.unembed(resid, using), decoder.unembed(resid))
    gated = decoder.blocks[0].mlp_parts.W_gate is not None
    gap = relative_gap(
        kernel(small_model(kind), random_pairs(seed=22), using), kernel(small_model(kind), random_pairs(seed=22), NATIVE)
    )
    assert (gap > 0.01) == (gated or "product_share" not in change)


def test_the_secant_of_an_activation_at_zero_is_zero() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    y = RELP.activation(torch.nn.functional.gelu, x)
    assert torch.equal(y, torch.nn.functional.gelu(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.tensor([y[0].item() / -1.0, 0.0, y[2].item() / 2.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_mlps_in_parts_are_the_modules(small_model: SmallModel, kind: str) -> None:
    decoder = small_model(kind).residual
    x = torch.randn(2, 5, decoder.W_U.shape[0], generator=torch.Generator().manual_seed(0))
    for block in decoder.blocks:
        parts = block.mlp_parts
        assert relative_gap(parts(x), block.mlp(x)) <= 1e-6
        assert relative_gap(parts.neurons(x) @ parts.W_out + parts.b_out, block.mlp(x)) <= 1e-6


def test_an_mlp_that_is_more_than_its_parts_is_refused(small_model: SmallModel) -> None:
    """As one with experts is, or one in which a user's hook acts; native methods go on."""
    model, pairs = small_model("llama"), random_pairs(seed=23)
    native = kernel(model, pairs, NATIVE)
    with model.bridge.hooks(fwd_hooks=[("blocks.1.mlp.hook_out", lambda value, hook: 2 * value)]):
        assert relative_gap(kernel(model, pairs, NATIVE), native) > 0.01
        for using in (RELP, GIM):
            with pytest.raises(ModelError, match=r"MLP of layer 1 is not its weights and activation alone.*native"):
                kernel(model, pairs, using)
        kernel(model, pairs, replace(GIM, product_share=1.0))
