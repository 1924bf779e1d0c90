"""Edge scores under modified backward passes, the obvious way: autograd functions whose backward is written out.

RelP is Jafari et al. 2025 (arXiv:2508.21258), GIM is Edin et al. 2025 (arXiv:2505.17630). The forward pass, the copies of
the residual stream and the contraction are those of `oracles.eap`, which takes the decoder made here: each part in which
a rule acts has a `torch.autograd.Function` with the formula of its backward pass. Give a model in float64: frozen scales
are read off as quotients.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from oracles import eap


class SecantActivation(torch.autograd.Function):
    """Gradient times act(x) / x, or times 0 where x is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        value = function(x)
        ctx.save_for_backward(x, value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, value = ctx.saved_tensors
        return torch.where(x == 0, torch.zeros_like(x), gradient * value / x), None


class HalfProduct(torch.autograd.Function):
    """a b, each factor with half of what the product rule gives it."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return gradient * b / 2, gradient * a / 2


class TemperedSoftmax(torch.autograd.Function):
    """Softmax whose Jacobian is diag(p) - p p^T with p the softmax of the scores over the temperature."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward((scores / temperature).softmax(-1))
        return scores.softmax(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        return p * gradient - p * (p * gradient).sum(-1, keepdim=True), None


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def frozen_norm(norm: eap.Map, centred: bool) -> eap.Map:
    """A norm as the affine map it is at a constant scale.

    The Jacobian of that map is found by evaluating the native norm: y = w (x - mean) s + b, so with s constant y is linear
    in x, and s w is read off as (y - b) / (x - mean).
    """

    def apply(x: Tensor) -> Tensor:
        with torch.no_grad():
            y, bias = norm(x), norm(torch.zeros_like(x))
            centre = x - x.mean(-1, keepdim=True) if centred else x
            factor = torch.where(centre == 0, 0, (y - bias) / centre)  # pads may embed to exact zeros
        return factor * (x - x.mean(-1, keepdim=True) if centred else x) + bias

    return apply


def mlp_parts(hf_model: Any, index: int) -> tuple[eap.Map | None, eap.Map, eap.Map, eap.Map]:
    """Gate (or None), up, down and activation of one layer's MLP."""
    family = hf_model.config.model_type
    if family in eap.LLAMA_LIKE:
        mlp = hf_model.model.layers[index].mlp
        return mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn
    if family == "gpt2":
        mlp = hf_model.transformer.h[index].mlp
        return None, mlp.c_fc, mlp.c_proj, mlp.act
    if family == "gptj":
        mlp = hf_model.transformer.h[index].mlp
        return None, mlp.fc_in, mlp.fc_out, mlp.act
    if family == "gpt_neox":
        mlp = hf_model.gpt_neox.layers[index].mlp
        return None, mlp.dense_h_to_4h, mlp.dense_4h_to_h, mlp.act
    mlp = hf_model.model.layers[index].mlp  # Phi
    return None, mlp.fc1, mlp.fc2, mlp.activation_fn


def with_rules(hf_model: Any, method: str) -> eap.Decoder:
    """The decoder of `oracles.eap`, with the rules of "relp", "relp_ah" (attention constant too) or "gim" in it."""
    decoder = eap.read_decoder(hf_model)
    centred = hf_model.config.model_type in ("gpt2", "gpt_neox", "gptj", "phi")
    layers = []
    for index, layer in enumerate(decoder.layers):
        gate, up, down, activation = mlp_parts(hf_model, index)

        def act(x: Tensor, activation: eap.Map = activation) -> Tensor:
            return activation(x) if method == "gim" else SecantActivation.apply(x, activation)

        def mlp(x: Tensor, gate: Any = gate, up: Any = up, down: Any = down, act: Any = act) -> Tensor:
            return down(act(up(x)) if gate is None else HalfProduct.apply(act(gate(x)), up(x)))

        def head_norm(norm: eap.Map, share: float) -> eap.Map:
            norm = norm if norm is eap.identity else frozen_norm(norm, centred)
            return lambda x: norm(ScaledGradient.apply(x, share))

        def softmax(scores: Tensor) -> Tensor:
            pattern = TemperedSoftmax.apply(scores, 2.0 if method == "gim" else 1.0)
            return pattern.detach() if method == "relp_ah" else pattern

        factor = layer.post_attention_factor
        qk_share, v_share = (0.25, 0.5) if method == "gim" else (1.0, 1.0)
        layers.append(
            replace(
                layer,
                pre_attention=frozen_norm(layer.pre_attention, centred),
                pre_mlp=frozen_norm(layer.pre_mlp, centred),
                query_norm=head_norm(layer.query_norm, qk_share),
                key_norm=head_norm(layer.key_norm, qk_share),
                value_norm=head_norm(eap.identity, v_share),
                softmax=softmax,
                mlp=mlp,
                post_attention_factor=None if factor is None else (lambda x, factor=factor: factor(x).detach()),
                post_mlp=layer.post_mlp if layer.post_mlp is eap.identity else frozen_norm(layer.post_mlp, False),
            )
        )
    return replace(decoder, layers=layers, final_norm=frozen_norm(decoder.final_norm, centred))
