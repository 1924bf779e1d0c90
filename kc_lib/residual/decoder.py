"""A decoder as writers and readers of one residual stream, run from its parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from kc_lib.errors import ModelError
from kc_lib.graph import Graph
from kc_lib.residual.backward_rules import NATIVE, BackwardRules
from kc_lib.residual.parts import Block, Mlp, Norm


@dataclass(frozen=True)
class Decoder:
    """A decoder as writers and readers of one residual stream; see the head of ``kc_lib.residual``."""

    bridge: TransformerBridge
    blocks: list[Block]
    final_norm: Norm
    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"]
    logit_soft_cap: float | None

    causal = True

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
            return self.bridge(tokens.to(self.device), stop_at_layer=0).clone()

    def token_embedding(self, tokens: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        """Rows of the embedding matrix: no positions, and none of the scaling some models apply to them."""
        return self.bridge.embed.W_E.detach()[tokens.to(self.device)]

    def token_part(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """What the tokens alone put into the stream before block 0, scaled as the model scales it: ``embed`` less positions.

        Raises:
            ModelError: the same token has another part at another position, so positions are mixed in by more than a sum.
        """
        same = tokens[:1, :1].expand(1, 2)
        first, second = (self.embed(same) - self._positions(2))[0]
        # a difference of two sums of sizes W_E and W_pos: equal up to what float addition rounds
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-2 * float(first.abs().max())):
            raise ModelError(
                f"{getattr(self.bridge.cfg, 'architecture', 'the model')} does not add learned positions to embeddings: "
                "the tokens' own part of its stream is not known"
            )
        return self.embed(tokens) - self._positions(tokens.shape[1])

    def _positions(self, n_pos: int) -> Float[Tensor, "pos d_model"]:
        """Learned positions as they are added to the stream, zero where the model has none."""
        if not hasattr(self.bridge, "pos_embed"):
            return self.W_U.new_zeros(n_pos, self.W_U.shape[0])
        return self.bridge.pos_embed.W_pos[:n_pos].detach()

    def unembed(
        self,
        resid: Float[Tensor, "*batch d_model"],
        rules: BackwardRules = NATIVE,
        tokens: Int[Tensor, " token"] | None = None,
    ) -> Float[Tensor, "*batch vocab"]:
        """Logits from the final residual stream, at the given vectors only; of all tokens or of some."""
        W_U, b_U = (self.W_U, self.b_U) if tokens is None else (self.W_U[:, tokens], self.b_U[tokens])
        logits = F.linear(self.final_norm(resid, rules), W_U.T, b_U)
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
        after_attention = self.run_attention(layer, resid, past)
        return self.after_mlp(layer, after_attention, self.blocks[layer].mlp(self.mlp_input(layer, resid, after_attention)))

    def run_attention(
        self,
        layer: int,
        resid: Float[Tensor, "batch pos d_model"],
        past: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream after a block's attention, from the stream before the block."""
        attention = self.blocks[layer].attention
        return resid + attention.output(attention.attend(*attention.projections(resid), past))

    def keys_values(self, layer: int, resid: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor]:
        """A block's keys and values from the stream before it: the ``past`` of positions that follow."""
        x = self.blocks[layer].attention.norm(resid)
        return self.blocks[layer].attention.project("k", x), self.blocks[layer].attention.project("v", x)

    def mlp_input(
        self, layer: int, resid: Float[Tensor, "batch pos d_model"], after_attention: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What a block's MLP reads, from the stream before the block and after its attention."""
        block = self.blocks[layer]
        return block.mlp_norm(resid if block.parallel else after_attention)

    def parts(self, layer: int) -> Mlp:
        """The MLP of a block in parts."""
        return self.blocks[layer].mlp_parts

    def after_mlp(
        self, layer: int, after_attention: Float[Tensor, "batch pos d_model"], write: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream after a block, from what the MLP wrote before the norm on it that it may have."""
        return after_attention + self.blocks[layer].mlp_contribution(write)

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
