"""Taking a booted ``TransformerBridge`` apart, and checking the parts against the model's own logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers.activations import ACT2FN

from kc_lib.errors import ModelError, first_line
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.encoder import Encoder, EncoderBlock, Residual
from kc_lib.residual.parts import Attention, Block, Mlp, Norm

RELATIVE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.02}


def decoder_of(model: TransformerBridge) -> Decoder:
    """Take a booted decoder apart into writers and readers, and check the parts against the model's own logits.

    Raises:
        ModelError: the architecture has a part that is not a sum over the residual stream, or one not known here.
    """
    name = str(getattr(model.cfg, "architecture", type(model).__name__))
    if not hasattr(model, "blocks") or not hasattr(model, "unembed") or getattr(model.cfg, "is_stateful", False):
        raise ModelError(f"{name} is no decoder with attention and MLP blocks: circuits are not defined for it")
    if not is_causal(model):
        raise ModelError(
            f"{name} attends in both directions and normalises the residual stream itself: its stream is no sum of "
            "writers, so circuits are not defined for it; use a causal model"
        )
    try:
        decoder = Decoder(
            bridge=model,
            blocks=[_block(model, layer, name) for layer in range(len(model.blocks))],
            final_norm=_norm(model.ln_final, model.cfg),
            W_U=model.unembed.W_U.detach(),
            b_U=_bias(model.unembed.b_U, model.unembed.W_U, (model.unembed.W_U.shape[1],)),
            logit_soft_cap=_positive(getattr(model.cfg, "output_logits_soft_cap", None)),
        )
    except (AttributeError, RuntimeError, ValueError) as error:
        raise ModelError(f"{name} has a part the residual-stream decoder does not know ({error})") from error
    _check_against_model(decoder, lambda tokens: decoder.unembed(decoder.run(decoder.embed(tokens))), name)
    return decoder


def is_causal(model: TransformerBridge) -> bool:
    """Whether positions see only what is left of them; masked language models see both sides."""
    return bool(getattr(model.cfg, "attention_dir", "causal") == "causal")


def encoder_of(model: TransformerBridge) -> Encoder:
    """Take a masked language model of the BERT kind apart as far as methods about MLP neurons need it.

    Raises:
        ModelError: another kind of model.
    """
    name, cfg = str(getattr(model.cfg, "architecture", type(model).__name__)), model.cfg
    try:
        ln_final, activation = _norm(model.ln_final, cfg), ACT2FN[cfg.act_fn]
        original: Any = model.original_model
        decoder = Encoder(
            bridge=model,
            blocks=[
                EncoderBlock(
                    attention=_attention(model, layer, Norm("none"), name),
                    attention_norm=_norm(block.ln1, cfg),
                    mlp=_mlp(block.mlp, cfg),
                    mlp_norm=_norm(block.ln2, cfg),
                )
                for layer, block in enumerate(model.blocks)
            ],
            embeddings=original.base_model.embeddings,
            head=lambda resid: ln_final(activation(model.mlm_head(resid))),
            W_U=model.unembed.W_U.detach(),
            b_U=_bias(model.unembed.b_U, model.unembed.W_U, (model.unembed.W_U.shape[1],)),
        )
        _check_against_model(decoder, lambda tokens: _encoded(decoder, tokens), name)
    except (AttributeError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{name} is no masked language model of the BERT kind ({first_line(error)}): use BERT or a causal model"
        ) from error
    return decoder


def _encoded(decoder: Encoder, tokens: Tensor) -> Tensor:
    resid = decoder.embed(tokens)
    for layer in range(decoder.n_layers):
        resid = decoder.run_block(layer, resid)
    return decoder.unembed(resid)


def _block(model: TransformerBridge, layer: int, name: str) -> Block:
    block, cfg = model.blocks[layer], model.cfg
    if not hasattr(block, "attn") or not hasattr(block, "mlp"):
        raise ModelError(f"{name}: block {layer} has no attention or no MLP: circuits are not defined for it")
    parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
    pre_norm = _norm(getattr(block, "ln1", None), cfg)
    shared = parallel and not hasattr(block, "ln2")
    # HookPoints fire in the model's own MLP, so hooks a user has set there still act
    return Block(
        attention=_attention(model, layer, pre_norm, name),
        mlp_norm=pre_norm if shared else _norm(getattr(block, "ln2", None), cfg),
        mlp=block.mlp,
        mlp_post_norm=_norm(block.ln2_post, cfg) if hasattr(block, "ln2_post") else None,
        parallel=parallel,
        mlp_in_parts=partial(_checked_mlp, block.mlp, cfg, f"{name}: the MLP of layer {layer}"),
    )


def _checked_mlp(mlp: nn.Module, cfg: Any, which: str) -> Mlp:
    """The MLP in parts, checked against the module on random input.

    Done on demand: a model with experts, or with hooks set in its MLPs, loses only the methods that need these parts.
    """
    advice = "use a method that scores edges by native gradients"
    try:
        parts = _mlp(mlp, cfg)
        x = torch.randn(1, 3, parts.W_in.shape[0], generator=torch.Generator().manual_seed(0)).to(parts.W_in)
        with torch.no_grad():
            gap = _gap(parts(x), mlp(x))
    except (AttributeError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{which} is not of the form act(x W_in) W_out, with or without a gate ({first_line(error)}): {advice}"
        ) from error
    if not gap <= RELATIVE_TOLERANCE.get(x.dtype, 1e-3):
        raise ModelError(f"{which} is not its weights and activation alone (they differ by {gap:.1e}, relative): {advice}")
    return parts


def _mlp(mlp: Any, cfg: Any) -> Mlp:
    inner: Any = mlp.original_component
    W_in, W_out = mlp.W_in.detach(), mlp.W_out.detach()
    W_gate = None if mlp.W_gate is None else mlp.W_gate.detach()
    named = (getattr(inner, name, None) for name in ("act_fn", "act", "activation_fn", "activation"))
    activation = next((function for function in named if callable(function)), None)
    return Mlp(
        W_in=W_in,
        W_gate=W_gate,
        W_out=W_out,
        b_in=_bias(mlp.b_in, W_in, W_in.shape[1:]),
        b_gate=_bias(mlp.b_gate if W_gate is not None else None, W_in, W_in.shape[1:]),
        b_out=_bias(mlp.b_out, W_out, W_out.shape[1:]),
        activation=ACT2FN[cfg.act_fn] if activation is None else activation,
    )


def _gap(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return (expected - actual).abs().max().item() / max(expected.abs().max().item(), 1e-6)


def _attention(model: TransformerBridge, layer: int, norm: Norm, name: str) -> Attention:
    attn, cfg = model.blocks[layer].attn, model.cfg
    inner: Any = attn.original_component
    d_head = attn.W_Q.shape[-1]
    if getattr(inner, "sinks", None) is not None:
        raise ModelError(f"{name}: layer {layer} has attention sinks, which the residual-stream decoder does not know")
    for which in ("q_norm", "k_norm"):
        weight = getattr(getattr(attn, which, None), "weight", None)
        if weight is not None and tuple(weight.shape) != (d_head,):
            raise ModelError(
                f"{name}: layer {layer} has a {which} over all heads at once, which couples them: a head's reader "
                "cannot be changed alone"
            )
    W_Q, W_K, W_V, W_O = (getattr(attn, f"W_{which}").detach() for which in "QKVO")
    has_post_norm = hasattr(model.blocks[layer], "ln1_post")
    b_O = _bias(getattr(getattr(attn, "o", None), "bias", None), W_O, (W_O.shape[-1],))
    if has_post_norm and b_O.any():
        raise ModelError(f"{name}: layer {layer} normalises an attention output that has a bias, which no head owns")
    scale = getattr(inner, "scaling", None)
    if scale is None:
        scale = 1.0 / float(getattr(inner, "scale_attn", math.sqrt(d_head)))
    sliding = getattr(inner, "layer_type", "sliding_attention") == "sliding_attention"
    rope, adjacent = _rope(model, layer, inner)
    q_norm, k_norm = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
    return Attention(
        norm=norm,
        W_Q=W_Q,
        W_K=W_K,
        W_V=W_V,
        W_O=W_O,
        b_Q=_bias(attn.b_Q, W_Q, (W_Q.shape[0], d_head)),
        b_K=_bias(attn.b_K, W_K, (W_K.shape[0], d_head)),
        b_V=_bias(attn.b_V, W_V, (W_V.shape[0], d_head)),
        b_O=b_O,
        q_norm=q_norm,
        k_norm=k_norm,
        rope=rope,
        adjacent_pairs=adjacent,
        scale=float(scale),
        soft_cap=_positive(getattr(cfg, "attn_scores_soft_cap", None)),
        window=getattr(inner, "sliding_window", None) if sliding else None,
        post_norm=_norm(model.blocks[layer].ln1_post, cfg) if has_post_norm else None,
        causal=is_causal(model),
        q_norm_parts=_head_norm_parts(q_norm, cfg, W_Q),
        k_norm_parts=_head_norm_parts(k_norm, cfg, W_K),
    )


def _head_norm_parts(norm: nn.Module | None, cfg: Any, W: Tensor) -> Norm | None:
    """A norm on queries or keys in closed form, if that equals the module on random input."""
    if norm is None:
        return None
    x = torch.randn(1, 3, *W.shape[::2], generator=torch.Generator().manual_seed(0)).to(W)
    try:
        parts = _norm(norm, cfg)
        with torch.no_grad():
            gap = _gap(parts(x), norm(x))
    except (AttributeError, RuntimeError, ValueError, TypeError):
        return None
    return parts if gap <= RELATIVE_TOLERANCE.get(x.dtype, 1e-3) else None


def _norm(bridge: nn.Module | None, cfg: Any) -> Norm:
    if bridge is None:
        return Norm("none")
    inner: Any = bridge.original_component
    weight = getattr(inner, "weight", None)
    weight = None if weight is None else weight.detach()
    if not getattr(cfg, "uses_rms_norm", False):
        bias = getattr(inner, "bias", None)
        return Norm("layer", weight, None if bias is None else bias.detach(), float(inner.eps))
    eps = getattr(inner, "variance_epsilon", getattr(inner, "eps", None))
    if weight is not None and getattr(cfg, "rmsnorm_uses_offset", False):
        weight = weight + 1.0
    return Norm("rms", weight, None, float(cfg.eps if eps is None else eps))


def _rope(model: TransformerBridge, layer: int, inner: Any) -> tuple[Callable[[int], tuple[Tensor, Tensor]] | None, bool]:
    """A function from length to the rotation's ``(cos, sin)`` for ``Attention``, and the pairing."""
    cfg = model.cfg
    if getattr(cfg, "positional_embedding_type", "") != "rotary":
        return None, False
    if hasattr(model, "rotary_emb"):
        module = model.rotary_emb.original_component
        by_type = getattr(inner, "layer_type", None) if _takes_layer_type(module) else None
        reference = torch.zeros(1, device=model.unembed.W_U.device)  # the module reads its device and dtype only
        adjacent = bool(getattr(cfg, "rotary_adjacent_pairs", False))

        def from_module(n_pos: int) -> tuple[Tensor, Tensor]:
            positions = torch.arange(n_pos, device=reference.device)[None]
            extra = () if by_type is None else (by_type,)
            with torch.no_grad():
                cos, sin = module(reference, positions, *extra)
            interleaved = getattr(cfg, "rotary_interleaved_cos_sin", False)
            of_pairs = slice(None, None, 2) if interleaved else slice(cos.shape[-1] // 2)
            return _of_coordinates(cos[0, :, of_pairs], sin[0, :, of_pairs], adjacent)

        return lru_cache(from_module), adjacent
    rotary_dim = int(getattr(inner, "rotary_dim", 0) or 0)
    if not rotary_dim:
        raise ModelError(f"{cfg.architecture}: layer {layer} has rotary positions of an unknown kind")

    def from_formula(n_pos: int) -> tuple[Tensor, Tensor]:  # GPT-J keeps its sinusoids inside attention
        device = model.unembed.W_U.device
        rates = 10000.0 ** (-torch.arange(0, rotary_dim, 2, device=device) / rotary_dim)
        angles = torch.arange(n_pos, device=device)[:, None] * rates
        return _of_coordinates(angles.cos(), angles.sin(), adjacent=True)

    return from_formula, True


def _of_coordinates(
    cos: Float[Tensor, "pos pair"], sin: Float[Tensor, "pos pair"], adjacent: bool
) -> tuple[Float[Tensor, "pos turned"], Float[Tensor, "pos turned"]]:
    """The rotation of each coordinate, not each pair: what it keeps of itself, and what it takes of its partner."""
    dim = -1 if adjacent else -2
    return torch.stack([cos, cos], dim).flatten(-2), torch.stack([-sin, sin], dim).flatten(-2)


def _takes_layer_type(module: nn.Module) -> bool:
    return "layer_type" in module.forward.__code__.co_varnames or hasattr(module, "layer_types")


def _bias(bias: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    if bias is None:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    return bias.detach().reshape(shape)


def _positive(value: float | None) -> float | None:
    return float(value) if value is not None and value > 0 else None


def _check_against_model(decoder: Residual, logits_of: Callable[[Tensor], Tensor], name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, decoder.W_U.shape[1], (1, 7), generator=generator).to(decoder.device)
    with torch.no_grad():
        expected = decoder.bridge(tokens)
        actual = logits_of(tokens)
    gap = _gap(actual, expected)
    if not gap <= RELATIVE_TOLERANCE.get(expected.dtype, 1e-3):
        raise ModelError(
            f"{name} has a part the residual-stream decoder does not know: its logits differ by {gap:.1e} (relative) from "
            "those of its parts; results would be wrong, so the model is refused"
        )
