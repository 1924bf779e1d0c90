"""The parts of a block as plain tensors and functions: norms, attention, MLPs, the block itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from kc_lib.errors import ModelError
from kc_lib.residual.backward_rules import NATIVE, BackwardRules, shared


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
        return torch.addcmul(size.new_full((), self.eps), size, size, value=1 / x.shape[-1]).rsqrt().to(x.dtype)

    def centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.kind == "layer" else x

    def normalised(self, x: Tensor) -> Tensor:
        """The vectors at unit scale, before weight and bias."""
        return self.centre(x) * self.scale(x)

    def weighted(self, x: Tensor) -> Tensor:
        return x if self.weight is None else x * self.weight

    def folded(
        self, weight: Float[Tensor, "*many d_model d_out"], bias: Float[Tensor, "*many d_out"]
    ) -> tuple[Float[Tensor, "*many d_model d_out"], Float[Tensor, "*many d_out"]]:
        """``(M, c)`` with which the normed x times weight, plus bias, is ``scale(x) * (x M) + c``."""
        inner = weight if self.weight is None else self.weight[:, None] * weight
        if self.kind == "layer":
            inner = inner - inner.mean(-2, keepdim=True)
        return inner, bias if self.bias is None else bias + torch.einsum("d,...do->...o", self.bias, weight)

    def vjp(
        self, x: Float[Tensor, "... d_model"], gradient: Float[Tensor, "... d_model"], rules: BackwardRules = NATIVE
    ) -> Tensor:
        """The gradient at the input from the gradient at the output, where the input was ``x``."""
        upstream = self.weighted(gradient)
        if self.kind == "none":
            return upstream
        if rules.freeze_norms:
            return self.scale(x) * self.centre(upstream)
        normalised = self.normalised(x)
        along = normalised * (normalised * upstream).mean(-1, keepdim=True)
        return self.scale(x) * (self.centre(upstream) - along)

    def __call__(self, x: Float[Tensor, "... d_model"], rules: BackwardRules = NATIVE) -> Float[Tensor, "... d_model"]:
        y = self.weighted(self.centre(x) * self.scale(x.detach() if rules.freeze_norms else x))
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
    rope: Callable[[int], tuple[Tensor, Tensor]] | None  # from length to cos and sin, see ``_rotate``
    adjacent_pairs: bool
    scale: float
    soft_cap: float | None
    window: int | None
    post_norm: Norm | None
    causal: bool = True
    q_norm_parts: Norm | None = None  # the same norms in closed form, where they are of a form that is known
    k_norm_parts: Norm | None = None

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
        flat = F.linear(x, rearrange(weight, "head d_model d_head -> (head d_head) d_model"), bias.flatten())
        return rearrange(flat, "b p (head d_head) -> b p head d_head", head=weight.shape[0])

    def projections(
        self, resid: Float[Tensor, "batch pos d_model"], rules: BackwardRules = NATIVE
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads from the stream before the layer."""
        x = self.norm(resid, rules)
        return self.project("q", x), self.project("k", x), self.project("v", x)

    def attend(
        self,
        q: Float[Tensor, "batch query head d_head"],
        k: Float[Tensor, "batch new kv d_head"],
        v: Float[Tensor, "batch new kv d_head"],
        past: tuple[Float[Tensor, "rows past kv d_head"], Float[Tensor, "rows past kv d_head"]] | None = None,
        rules: BackwardRules = NATIVE,
    ) -> Float[Tensor, "batch query head d_head"]:
        """Head outputs z from queries, keys and values; keys and values may come per group or per query head.

        ``past`` holds keys and values of the positions before these (``rows`` divides ``batch``, and repeats over it).
        """
        if self.soft_cap is None and not torch.is_grad_enabled():  # no gradient to bend: scores and mixing in one
            q, k, visible = self._placed(q, k, None if past is None else past[0], rules)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v if past is None else _after(past[1], v)))
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.scale, enable_gqa=True)
            return z.transpose(1, 2)
        pattern = self.pattern(q, k, None if past is None else past[0], rules)
        v = shared(v, rules.v_share)
        return self.mix(pattern, v if past is None else _after(past[1], v))

    def pattern(
        self,
        q: Float[Tensor, "batch query head d_head"],
        k: Float[Tensor, "batch new kv d_head"],
        past_keys: Float[Tensor, "rows past kv d_head"] | None = None,
        rules: BackwardRules = NATIVE,
    ) -> Float[Tensor, "batch head query key"]:
        """Every head's attention from these positions to all keys; arguments as in ``attend``."""
        q, k, visible = self._placed(q, k, past_keys, rules)
        # query heads that share keys and values are one matrix product with them, not one each with a copy
        q = rearrange(q, "b q (kv group) d -> b q kv group d", kv=k.shape[2])
        scores = torch.einsum("bqhgd,bkhd->bhgqk", q, k) * self.scale
        if self.soft_cap is not None:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        return rules.softmax(scores).to(q.dtype).flatten(1, 2)

    def _placed(
        self,
        q: Float[Tensor, "batch query head d_head"],
        k: Float[Tensor, "batch new kv d_head"],
        past_keys: Float[Tensor, "rows past kv d_head"] | None,
        rules: BackwardRules,
    ) -> tuple[
        Float[Tensor, "batch query head d_head"], Float[Tensor, "batch key kv d_head"], Bool[Tensor, "query key"] | None
    ]:
        """Queries and keys of all positions as scores are made of them, normed and rotated, and what may attend to what."""
        n_new = q.shape[1]
        q, k = shared(q, rules.qk_share), shared(k, rules.qk_share)
        if past_keys is not None:
            k = _after(past_keys, k)
        n_pos = k.shape[1]
        q = _head_norm(self.q_norm, self.q_norm_parts, q, rules)
        k = _head_norm(self.k_norm, self.k_norm_parts, k, rules)
        if self.rope is not None:
            cos, sin = self.rope(n_pos)
            q = _rotate(q, cos[-n_new:], sin[-n_new:], self.adjacent_pairs)
            k = _rotate(k, cos, sin, self.adjacent_pairs)
        if not self.causal:
            return q, k, None
        return q, k, _causal_mask(n_pos, self.window, q.device)[-n_new:]

    def mix(
        self, pattern: Float[Tensor, "batch head query key"], v: Float[Tensor, "batch key kv d_head"]
    ) -> Float[Tensor, "batch query head d_head"]:
        """Head outputs z from patterns and values; values may come per group or per query head."""
        grouped = rearrange(pattern, "b (kv group) q k -> b kv group q k", kv=v.shape[2])
        return torch.einsum("bhgqk,bkhd->bqhgd", grouped, v).flatten(2, 3)

    def head_outputs(self, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "head batch pos d_model"]:
        """Every head's own write ``z_h W_O[h]``, without the bias, which belongs to no head."""
        return torch.einsum("bphd,hde->hbpe", z, self.W_O)

    def output(
        self, z: Float[Tensor, "batch pos head d_head"], rules: BackwardRules = NATIVE
    ) -> Float[Tensor, "batch pos d_model"]:
        """The layer's write to the stream: all heads, the bias, and the norm on the output where there is one."""
        flat = rearrange(z, "b p head d_head -> b p (head d_head)")
        out = F.linear(flat, rearrange(self.W_O, "head d_head d_model -> d_model (head d_head)"), self.b_O)
        return out if self.post_norm is None else self.post_norm(out, rules)

    def contributions(self, heads: Float[Tensor, "head batch pos d_model"]) -> Float[Tensor, "head batch pos d_model"]:
        """What each head adds to the stream: its write, times the output norm's scale in this run."""
        if self.post_norm is None:
            return heads
        return self.post_norm.weighted(heads * self.post_norm.scale(heads.sum(0)))


@dataclass(frozen=True)
class Mlp:
    """An MLP in parts: ``post = act(x W_gate + b_gate) * (x W_in + b_in)``, or ``act(x W_in + b_in)`` without a gate."""

    W_in: Float[Tensor, "d_model d_mlp"]
    W_gate: Float[Tensor, "d_model d_mlp"] | None
    W_out: Float[Tensor, "d_mlp d_model"]
    b_in: Float[Tensor, " d_mlp"]
    b_gate: Float[Tensor, " d_mlp"]
    b_out: Float[Tensor, " d_model"]
    activation: Callable[[Tensor], Tensor]

    def neurons(self, normed: Float[Tensor, "... d_model"], rules: BackwardRules = NATIVE) -> Float[Tensor, "... d_mlp"]:
        """What every neuron hands to its output direction: after the activation and, where there is one, the gate."""
        up = normed @ self.W_in + self.b_in
        if self.W_gate is None:
            return rules.activation(self.activation, up)
        return rules.product(rules.activation(self.activation, normed @ self.W_gate + self.b_gate), up)

    def __call__(self, normed: Float[Tensor, "... d_model"], rules: BackwardRules = NATIVE) -> Float[Tensor, "... d_model"]:
        return self.write(self.neurons(normed, rules))

    def write(self, neurons: Float[Tensor, "... d_mlp"]) -> Float[Tensor, "... d_model"]:
        """The output from the neurons."""
        return neurons @ self.W_out + self.b_out


@dataclass(frozen=True)
class Block:
    """One transformer block; ``parallel`` means the MLP does not read the block's own attention.

    ``mlp`` is the model's own module, in which hooks of the user's act; ``mlp_in_parts`` takes it apart when somebody asks.
    """

    attention: Attention
    mlp_norm: Norm
    mlp: Callable[[Tensor], Tensor]
    mlp_post_norm: Norm | None
    parallel: bool
    mlp_in_parts: Callable[[], Mlp]

    @cached_property
    def mlp_parts(self) -> Mlp:
        """The MLP in parts, which were seen to equal the module.

        Raises:
            ModelError: it is not of the form that ``Mlp`` describes.
        """
        return self.mlp_in_parts()

    def mlp_write(
        self, normed: Float[Tensor, "... pos d_model"], rules: BackwardRules = NATIVE
    ) -> Float[Tensor, "... pos d_model"]:
        """The MLP's output from its normed input, before the norm on it where there is one."""
        return self.mlp_parts(normed, rules) if rules.of_mlps else self.mlp(normed)

    def mlp_output(
        self, normed: Float[Tensor, "... pos d_model"], rules: BackwardRules = NATIVE
    ) -> Float[Tensor, "... pos d_model"]:
        """The MLP's write to the stream from its normed input."""
        return self.mlp_contribution(self.mlp_write(normed, rules), rules)

    def mlp_contribution(
        self, out: Float[Tensor, "... pos d_model"], rules: BackwardRules = NATIVE
    ) -> Float[Tensor, "... pos d_model"]:
        """What the MLP's output adds to the stream: itself, or its norm."""
        return out if self.mlp_post_norm is None else self.mlp_post_norm(out, rules)


def _after(past: Float[Tensor, "rows past kv d_head"], new: Float[Tensor, "batch pos kv d_head"]) -> Tensor:
    """Keys or values of all positions: those before these, repeated over the batch, and these."""
    return torch.cat([past.repeat(new.shape[0] // past.shape[0], 1, 1, 1), new], 1)


def _head_norm(norm: Callable[[Tensor], Tensor] | None, parts: Norm | None, x: Tensor, rules: BackwardRules) -> Tensor:
    """Queries or keys after the norm they may have, by the model's own module unless its derivative is to change."""
    if norm is None:
        return x
    if not rules.freeze_norms:
        return norm(x)
    if parts is None:
        raise ModelError(
            "the norm on queries and keys is of no form whose scale can be frozen: use a method with native gradients"
        )
    return parts(x, rules)


def _rotate(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "pos turned"],
    sin: Float[Tensor, "pos turned"],
    adjacent: bool,
) -> Float[Tensor, "batch pos head d_head"]:
    """Rotate pairs of coordinates by position: pairs (i, i + n/2) or, adjacent, (2i, 2i + 1) of the first n.

    ``cos`` is what each coordinate keeps of itself, ``sin``, with its sign, what it takes of its partner.
    """
    n = cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    turned, passed = x[..., :n], x[..., n:]
    pairs, partner = ((n // 2, 2), -1) if adjacent else ((2, n // 2), -2)
    turned = torch.addcmul(turned * cos, turned.unflatten(-1, pairs).flip(partner).flatten(-2), sin)
    return torch.cat([turned, passed], -1) if passed.shape[-1] else turned


def _causal_mask(n_pos: int, window: int | None, device: torch.device) -> Tensor:
    positions = torch.arange(n_pos, device=device)
    distance = positions[:, None] - positions[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
