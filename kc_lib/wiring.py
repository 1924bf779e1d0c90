"""Who writes to and who reads from the residual stream: the only file that knows architectures.

A pre-norm decoder is a stream to which the embedding, every attention head and every MLP add their outputs, and from
which the queries, keys and values of every head, every MLP and the logits read through a norm. ``wiring_of`` takes a
``TransformerBridge`` apart into exactly that: per-head weights, norms whose vector-Jacobian product is known in closed
form, the model's own MLP modules, and what attention does between queries and head outputs. The kernels compute with
these parts and never look at the model again.

Covered: learned, rotary (full, partial, half-split or adjacent pairs) or no positions; grouped queries; biases; norms
on queries and keys per head; sliding windows; soft-capped scores and logits; parallel attention and MLP (NeoX, GPT-J,
Phi), with one norm or two; norms on outputs (Gemma-2/3), where a head's contribution is its output times the norm's
scale in that same run, so that contributions still sum to the stream. Masked language models of the BERT kind renormalise
the stream itself after every block, so no sum of writers equals it: they are refused.

``wiring_of`` ends by comparing its own logits with the model's on random tokens. A part of an architecture that is not
known here therefore shows as an error on load, never as a wrong number later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from kc_lib.errors import ModelError
from kc_lib.graph import Graph

RELATIVE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream: ``weight * normalised(x) + bias``; ``kind`` is "rms", "layer" or "none"."""

    kind: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0

    def scale(self, x: Tensor) -> Tensor:
        """1 / rms or 1 / standard deviation of each vector, ``[..., 1]``."""
        if self.kind == "none":
            return torch.ones_like(x[..., :1])
        wide = torch.promote_types(x.dtype, torch.float32)
        size = torch.linalg.vector_norm(self.centre(x), dim=-1, keepdim=True, dtype=wide)
        return (size.square() / x.shape[-1] + self.eps).rsqrt().to(x.dtype)

    def centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.kind == "layer" else x

    def normalised(self, x: Tensor) -> Tensor:
        """The vectors at unit scale, before weight and bias."""
        return self.centre(x) * self.scale(x)

    def weighted(self, x: Tensor) -> Tensor:
        return x if self.weight is None else x * self.weight

    def vjp(self, x: Float[Tensor, "... d_model"], gradient: Float[Tensor, "... d_model"]) -> Tensor:
        """The gradient at the input from the gradient at the output, where the input was ``x``."""
        upstream = self.weighted(gradient)
        if self.kind == "none":
            return upstream
        normalised = self.normalised(x)
        along = normalised * (normalised * upstream).mean(-1, keepdim=True)
        return self.scale(x) * (self.centre(upstream) - along)

    def __call__(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        y = self.weighted(self.normalised(x))
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Attention:
    """One attention layer: weights per head (W_K, W_V per key-value head) and what lies between them."""

    norm: Norm
    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "kv_head d_model d_head"]
    W_V: Float[Tensor, "kv_head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_Q: Float[Tensor, "head d_head"]
    b_K: Float[Tensor, "kv_head d_head"]
    b_V: Float[Tensor, "kv_head d_head"]
    b_O: Float[Tensor, " d_model"]
    q_norm: Callable[[Tensor], Tensor] | None
    k_norm: Callable[[Tensor], Tensor] | None
    rope: Callable[[int], tuple[Tensor, Tensor]] | None
    adjacent_pairs: bool
    scale: float
    soft_cap: float | None
    window: int | None
    post_norm: Norm | None

    @property
    def group_size(self) -> int:
        """Query heads that share one key-value head."""
        return self.W_Q.shape[0] // self.W_K.shape[0]

    def weights(self, kind: str) -> tuple[Tensor, Tensor]:
        """``(W, b)`` of a reader kind: "q", "k" or "v"."""
        return {"q": (self.W_Q, self.b_Q), "k": (self.W_K, self.b_K), "v": (self.W_V, self.b_V)}[kind]

    def project(self, kind: str, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos head d_head"]:
        """Queries, keys or values of all heads from one normed input."""
        weight, bias = self.weights(kind)
        flat = F.linear(x, rearrange(weight, "head d_model d_head -> (head d_head) d_model"))
        return rearrange(flat, "b p (head d_head) -> b p head d_head", head=weight.shape[0]) + bias

    def attend(
        self,
        q: Float[Tensor, "batch pos head d_head"],
        k: Float[Tensor, "batch pos kv d_head"],
        v: Float[Tensor, "batch pos kv d_head"],
        past: tuple[Float[Tensor, "rows past kv d_head"], Float[Tensor, "rows past kv d_head"]] | None = None,
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Head outputs z from queries, keys and values; keys and values may come per group or per query head.

        ``past`` holds keys and values of the positions before these (``rows`` divides ``batch``, and repeats over it).
        """
        n_new = q.shape[1]
        if past is not None:
            repeats = (k.shape[0] // past[0].shape[0], 1, 1, 1)
            k, v = torch.cat([past[0].repeat(repeats), k], 1), torch.cat([past[1].repeat(repeats), v], 1)
        n_pos = k.shape[1]
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        if self.rope is not None:
            cos, sin = self.rope(n_pos)
            q = _rotate(q, cos[-n_new:], sin[-n_new:], self.adjacent_pairs)
            k = _rotate(k, cos, sin, self.adjacent_pairs)
        repeat = q.shape[2] // k.shape[2]
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale
        if self.soft_cap is not None:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        scores = scores.masked_fill(~_causal_mask(n_pos, self.window, q.device)[-n_new:], float("-inf"))
        pattern = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return torch.einsum("bhqk,bkhd->bqhd", pattern, v)

    def head_outputs(self, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "head batch pos d_model"]:
        """Every head's own write ``z_h W_O[h]``, without the bias, which belongs to no head."""
        return torch.einsum("bphd,hde->hbpe", z, self.W_O)

    def output(self, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos d_model"]:
        """The layer's write to the stream: all heads, the bias, and the norm on the output where there is one."""
        flat = rearrange(z, "b p head d_head -> b p (head d_head)")
        out = flat @ rearrange(self.W_O, "head d_head d_model -> (head d_head) d_model") + self.b_O
        return out if self.post_norm is None else self.post_norm(out)

    def contributions(self, heads: Float[Tensor, "head batch pos d_model"]) -> Float[Tensor, "head batch pos d_model"]:
        """What each head adds to the stream: its write, times the output norm's scale in this run."""
        if self.post_norm is None:
            return heads
        return self.post_norm.weighted(heads * self.post_norm.scale(heads.sum(0)))


@dataclass(frozen=True)
class Block:
    """One transformer block; ``parallel`` means the MLP does not read the block's own attention."""

    attention: Attention
    mlp_norm: Norm
    mlp: Callable[[Tensor], Tensor]
    mlp_post_norm: Norm | None
    parallel: bool

    def mlp_output(self, normed: Float[Tensor, "... pos d_model"]) -> Float[Tensor, "... pos d_model"]:
        """The MLP's write to the stream from its normed input."""
        out = self.mlp(normed)
        return out if self.mlp_post_norm is None else self.mlp_post_norm(out)


@dataclass(frozen=True)
class Wiring:
    """A decoder as writers and readers of one residual stream; see the head of this file."""

    model: TransformerBridge
    blocks: list[Block]
    final_norm: Norm
    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"]
    logit_soft_cap: float | None

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def n_heads(self) -> int:
        return self.blocks[0].attention.W_Q.shape[0]

    @property
    def n_kv_heads(self) -> int:
        return self.blocks[0].attention.W_K.shape[0]

    @property
    def parallel(self) -> bool:
        return self.blocks[0].parallel

    @property
    def n_writers(self) -> int:
        """The input, and every layer's heads and MLP."""
        return 1 + self.n_layers * (self.n_heads + 1)

    @property
    def device(self) -> torch.device:
        return self.W_U.device

    def graph(self, grouped: bool = True) -> Graph:
        """The model's graph; ``grouped=False`` gives every query head keys and values of its own, as published code."""
        return Graph(self.n_layers, self.n_heads, self.n_kv_heads, self.W_U.shape[0], self.parallel, grouped)

    @cached_property
    def bias_before(self) -> Float[Tensor, "layer d_model"]:
        """Sum of the attention biases b_O below each layer, last row for the logits: the stream's constant part."""
        zero = torch.zeros_like(self.blocks[0].attention.b_O)
        return torch.stack([zero, *(block.attention.b_O for block in self.blocks)]).cumsum(0)

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The stream before block 0: token embedding and, where the model has them, learned positions."""
        with torch.no_grad():
            # a clone, so that no hook of the model can reach the kernels' copy
            return self.model(tokens.to(self.device), stop_at_layer=0).clone()

    def unembed(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Logits from the final residual stream, at the given vectors only."""
        logits = F.linear(self.final_norm(resid), self.W_U.T) + self.b_U
        if self.logit_soft_cap is not None:
            logits = self.logit_soft_cap * torch.tanh(logits / self.logit_soft_cap)
        return logits

    def run_block(
        self,
        layer: int,
        resid: Float[Tensor, "batch pos d_model"],
        past: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream after a block, from the stream before it; ``past`` as in ``Attention.attend``."""
        block = self.blocks[layer]
        attention = block.attention
        x = attention.norm(resid)
        q, k, v = (attention.project(kind, x) for kind in "qkv")
        z = attention.attend(q, k, v, past)
        after_attention = resid + attention.output(z)
        mlp_input = resid if block.parallel else after_attention
        return after_attention + block.mlp_output(block.mlp_norm(mlp_input))

    def run(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        first_layer: int = 0,
        past: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> Float[Tensor, "batch pos d_model"]:
        """The final residual stream, restarted from the stream before ``first_layer``; ``past`` has one entry per layer."""
        for layer in range(first_layer, self.n_layers):
            resid = self.run_block(layer, resid, past[layer] if past else None)
        return resid


@contextmanager
def frozen(model: TransformerBridge) -> Iterator[None]:
    """Parameters need no gradients inside; their flags are restored on exit."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def wiring_of(model: TransformerBridge) -> Wiring:
    """Take a booted decoder apart into writers and readers, and check the parts against the model's own logits.

    Raises:
        ModelError: the architecture has a part that is not a sum over the residual stream, or one not known here.
    """
    name = str(getattr(model.cfg, "architecture", type(model).__name__))
    if not hasattr(model, "blocks") or not hasattr(model, "unembed") or getattr(model.cfg, "is_stateful", False):
        raise ModelError(f"{name} is no decoder with attention and MLP blocks: circuits are not defined for it")
    if getattr(model.cfg, "attention_dir", "causal") != "causal":
        raise ModelError(
            f"{name} attends in both directions and normalises the residual stream itself: its stream is no sum of "
            "writers, so circuits are not defined for it; use a causal model"
        )
    try:
        wiring = Wiring(
            model=model,
            blocks=[_block(model, layer, name) for layer in range(len(model.blocks))],
            final_norm=_norm(model.ln_final, model.cfg),
            W_U=model.unembed.W_U.detach(),
            b_U=_bias(model.unembed.b_U, model.unembed.W_U, (model.unembed.W_U.shape[1],)),
            logit_soft_cap=_positive(getattr(model.cfg, "output_logits_soft_cap", None)),
        )
    except (AttributeError, RuntimeError, ValueError) as error:
        raise ModelError(f"{name} has a part the residual-stream wiring does not know ({error})") from error
    _check_against_model(wiring, name)
    return wiring


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
    )


def _attention(model: TransformerBridge, layer: int, norm: Norm, name: str) -> Attention:
    attn, cfg = model.blocks[layer].attn, model.cfg
    inner: Any = attn.original_component
    d_head = attn.W_Q.shape[-1]
    if getattr(inner, "sinks", None) is not None:
        raise ModelError(f"{name}: layer {layer} has attention sinks, which the residual-stream wiring does not know")
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
        q_norm=getattr(attn, "q_norm", None),
        k_norm=getattr(attn, "k_norm", None),
        rope=rope,
        adjacent_pairs=adjacent,
        scale=float(scale),
        soft_cap=_positive(getattr(cfg, "attn_scores_soft_cap", None)),
        window=getattr(inner, "sliding_window", None) if sliding else None,
        post_norm=_norm(model.blocks[layer].ln1_post, cfg) if has_post_norm else None,
    )


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
    """A function from length to the rotation's ``(cos, sin)``, one column per rotated pair, and the pairing."""
    cfg = model.cfg
    if getattr(cfg, "positional_embedding_type", "") != "rotary":
        return None, False
    if hasattr(model, "rotary_emb"):
        module = model.rotary_emb.original_component
        by_type = getattr(inner, "layer_type", None) if _takes_layer_type(module) else None
        reference = torch.zeros(1, device=model.unembed.W_U.device)  # the module reads its device and dtype only

        def from_module(n_pos: int) -> tuple[Tensor, Tensor]:
            positions = torch.arange(n_pos, device=reference.device)[None]
            extra = () if by_type is None else (by_type,)
            with torch.no_grad():
                cos, sin = module(reference, positions, *extra)
            if getattr(cfg, "rotary_interleaved_cos_sin", False):
                return cos[0, :, ::2], sin[0, :, ::2]
            half = cos.shape[-1] // 2
            return cos[0, :, :half], sin[0, :, :half]

        return from_module, bool(getattr(cfg, "rotary_adjacent_pairs", False))
    rotary_dim = int(getattr(inner, "rotary_dim", 0) or 0)
    if not rotary_dim:
        raise ModelError(f"{cfg.architecture}: layer {layer} has rotary positions of an unknown kind")

    def from_formula(n_pos: int) -> tuple[Tensor, Tensor]:  # GPT-J keeps its sinusoids inside attention
        device = model.unembed.W_U.device
        rates = 10000.0 ** (-torch.arange(0, rotary_dim, 2, device=device) / rotary_dim)
        angles = torch.arange(n_pos, device=device)[:, None] * rates
        return angles.cos(), angles.sin()

    return from_formula, True


def _takes_layer_type(module: nn.Module) -> bool:
    return "layer_type" in module.forward.__code__.co_varnames or hasattr(module, "layer_types")


def _rotate(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "pos pair"],
    sin: Float[Tensor, "pos pair"],
    adjacent: bool,
) -> Float[Tensor, "batch pos head d_head"]:
    """Rotate pairs of coordinates by position: pairs (i, i + n/2) or, adjacent, (2i, 2i + 1) of the first n."""
    n = 2 * cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    turned, passed = x[..., :n], x[..., n:]
    if adjacent:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, passed], -1) if passed.shape[-1] else turned


def _causal_mask(n_pos: int, window: int | None, device: torch.device) -> Tensor:
    positions = torch.arange(n_pos, device=device)
    distance = positions[:, None] - positions[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _bias(bias: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    if bias is None:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    return bias.detach().reshape(shape)


def _positive(value: float | None) -> float | None:
    return float(value) if value is not None and value > 0 else None


def _check_against_model(wiring: Wiring, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, wiring.W_U.shape[1], (1, 7), generator=generator).to(wiring.device)
    with torch.no_grad():
        expected = wiring.model(tokens)
        actual = wiring.unembed(wiring.run(wiring.embed(tokens)))
    gap = (expected - actual).abs().max().item() / max(expected.abs().max().item(), 1e-6)
    if not gap <= RELATIVE_TOLERANCE.get(expected.dtype, 1e-3):
        raise ModelError(
            f"{name} has a part the residual-stream wiring does not know: its logits differ by {gap:.1e} (relative) from "
            "the sum of writers; circuits would be wrong, so the model is refused"
        )
