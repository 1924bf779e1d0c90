"""Products that run over and over: with the same weights, packed once, and sums of writers' outputs over edges.

On the processor torch's own product packs a weight matrix in each call, a third of the time where some hundred rows are
multiplied. oneDNN, which comes with torch, keeps it packed: the same sums in float32, up to rounding. Where it is not to be
had (another device or type, a torch without it) and where a gradient is asked for, the plain product runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.activations import SiLUActivation

from kc_lib.errors import ModelError
from kc_lib.residual.parts import Block, Mlp, Norm

Linear = Callable[[Float[Tensor, "*batch d_in"]], Float[Tensor, "*batch d_out"]]
Activation = Callable[[Tensor], Tensor]


def packed_linear(
    weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None, activation: Activation | None = None
) -> Linear:
    """``activation(x weight^T + bias)`` as a function of x; a second copy of the weights is kept.

    A bias of zeros is left out; SiLU, the activation of most gated MLPs, is part of the product.
    """
    if bias is not None and not bias.any():
        bias = None

    def plain(x: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        return y if activation is None else activation(y)

    if not can_pack(weight):
        return plain
    # these two operators are what torch's own compiler lowers a frozen linear layer to
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    fused = isinstance(activation, (SiLUActivation, torch.nn.SiLU))

    def product(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return plain(x)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "swish" if fused else "none", [], "")
        return y if activation is None or fused else activation(y)

    return product


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN is there for a weight's device and type."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return bool(there and weight.device.type == "cpu" and weight.dtype == torch.float32)


def packed_mlp(block: Block) -> Callable[[Float[Tensor, "*batch d_model"]], Float[Tensor, "*batch d_model"]]:
    """A block's MLP from the stream, the norm before it folded into its weights.

    Where it is not of the form that ``Mlp`` describes, the norm and the model's own module.
    """
    try:
        return _packed_parts(block.mlp_parts, block.mlp_norm)
    except ModelError:
        return lambda x: block.mlp(block.mlp_norm(x))


def _packed_parts(mlp: Mlp, norm: Norm) -> Callable[[Tensor], Tensor]:
    into = _after_norm(norm, mlp.W_in, mlp.b_in, mlp.activation if mlp.W_gate is None else None)
    gate = None if mlp.W_gate is None else _after_norm(norm, mlp.W_gate, mlp.b_gate, mlp.activation)
    out = packed_linear(mlp.W_out.T, mlp.b_out)

    def mlp_of(x: Tensor) -> Tensor:
        scaled = x * norm.scale(x)
        neurons = into(scaled)
        return out(neurons if gate is None else neurons.mul_(gate(scaled)))

    return mlp_of


def _after_norm(norm: Norm, weight: Tensor, bias: Tensor, activation: Activation | None) -> Linear:
    """A layer that reads what a norm gives, from the stream times the norm's scale."""
    folded, offset = norm.folded(weight, bias)
    return packed_linear(folded.T, offset, activation)


@dataclass(frozen=True)
class EdgeSums:
    """How readers' edges are summed: one by one, a bag of entries for each reader and row, and where each bag starts."""

    n_rows: int
    entries: Int[Tensor, " entry"]
    starts: Int[Tensor, " bag"]

    def of(self, outputs: Float[Tensor, "writer row trial d_model"]) -> Float[Tensor, "reader n_rows trial d_model"]:
        """The sums, at the first rows."""
        summed = F.embedding_bag(self.entries, outputs.flatten(2).flatten(0, 1), self.starts, mode="sum")
        return summed.view(-1, self.n_rows, *outputs.shape[2:])


def edge_sums(
    edges: Bool[Tensor, "writer reader"], n_rows: int, like: Float[Tensor, "writer row trial d_model"]
) -> EdgeSums:
    """Sums of writers' outputs, held by a tensor ``like`` this one, over each reader's edges."""
    n_edges = edges.sum(0)
    of_reader = [some * like.shape[1] for some in edges.T.nonzero()[:, 1].split(n_edges.tolist())]
    entries = torch.cat([(torch.arange(n_rows)[:, None] + some).flatten() for some in of_reader])
    sizes = n_edges.repeat_interleave(n_rows)
    return EdgeSums(n_rows, entries.to(like.device), (sizes.cumsum(0) - sizes).to(like.device))
