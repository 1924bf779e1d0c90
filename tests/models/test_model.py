"""The one model object: what it wraps, and what it keeps until weights or hooks change."""

from __future__ import annotations

import pytest
import torch
from helpers import SmallFolder, SmallModel, hf_model
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from kc_lib.errors import ModelError
from kc_lib.models.load import load_model
from kc_lib.models.model import Model

TOKENS = torch.tensor([[1, 5, 6, 7]])
KINDS = ("gpt2", "neox", "llama", "qwen3", "gemma2", "phi")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_memory_is_the_model_of_its_folder(small_folder: SmallFolder, small_model: SmallModel, kind: str) -> None:
    folder = small_folder(kind)
    inside, loaded = hf_model(folder), small_model(kind)
    n_parameters = sum(parameter.numel() for parameter in inside.parameters())  # before the bridge adds parts of its own
    model = Model.from_hf(inside, AutoTokenizer.from_pretrained(folder), name="mine")
    assert model.name == "mine"
    assert model.hash == loaded.hash
    assert model.n_parameters == loaded.n_parameters == n_parameters
    with torch.no_grad():
        expected = inside(TOKENS).logits
        for logits in (model.bridge(TOKENS), model.residual.unembed(model.residual.run(model.residual.embed(TOKENS)))):
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_bridge_is_wrapped_as_it_is(small_folder: SmallFolder, small_model: SmallModel) -> None:
    bridge = TransformerBridge.boot_transformers(str(small_folder("llama")), device="cpu")
    model = Model(bridge.train())
    assert not bridge.training
    assert model.bridge is bridge
    assert model.hash == small_model("llama").hash
    assert "parameters" in repr(model)
    assert str(model.device) == "cpu"
    assert model.dtype == torch.float32


def test_the_residual_is_kept_until_weights_or_hooks_change(small_folder: SmallFolder) -> None:
    model = load_model(str(small_folder("llama")), device="cpu")
    first, digest = model.residual, model.hash
    assert model.residual is first
    weight = model.bridge.blocks[0].attn.q.weight
    with torch.no_grad():
        weight[0, 0] += 1.0
    assert model.residual is not first
    assert model.hash != digest
    second = model.residual
    handle = model.bridge.blocks[1].attn.o.original_component.register_forward_hook(lambda _m, _a, output: 1.1 * output)
    with pytest.raises(ModelError, match="differ by"):
        _ = model.residual
    handle.remove()
    assert model.residual is second


def test_a_masked_model_has_no_residual_but_mlps(small_model: SmallModel) -> None:
    bert = small_model("bert")
    assert not bert.is_causal
    with pytest.raises(ModelError, match="both directions"):
        _ = bert.residual
    assert bert.mlp_residual.n_layers == 2
    assert small_model("llama").mlp_residual is small_model("llama").residual
