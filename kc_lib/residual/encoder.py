"""Masked language models of the BERT kind, in parts: attention in both directions, and norms on the stream itself.

Every block normalises the residual stream after attention and again after the MLP, so no sum of writers equals it, and
circuits are not defined for these models. What is defined is each MLP's neurons, what they read, and what follows from
them. ``Encoder`` has just that, under the names a ``Decoder`` has: a block of either is
``after = run_attention(layer, resid)``, ``neurons = parts(layer).neurons(mlp_input(layer, resid, after))``,
``resid = after_mlp(layer, after, parts(layer).write(neurons))``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from kc_lib.residual.decoder import Decoder
from kc_lib.residual.parts import Attention, Mlp, Norm


@dataclass(frozen=True)
class EncoderBlock:
    """One block: ``after = attention_norm(resid + attention)``, then ``mlp_norm(after + mlp)``."""

    attention: Attention
    attention_norm: Norm
    mlp: Mlp
    mlp_norm: Norm


@dataclass(frozen=True)
class Encoder:
    """A masked language model run from its parts; prompts of a batch are of one length, there are no pads."""

    bridge: TransformerBridge
    blocks: list[EncoderBlock]
    embeddings: Callable[[Tensor], Tensor]  # the model's own module: words, positions, segment 0, and the norm on them
    head: Callable[[Tensor], Tensor]  # the transform before the unembedding
    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"]

    causal = False

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return self.W_U.device

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The stream before block 0."""
        with torch.no_grad():
            return self.embeddings(tokens.to(self.device)).clone()

    def keys_values(self, layer: int, resid: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor]:
        """A block's keys and values from the stream before it."""
        attention = self.blocks[layer].attention
        return attention.project("k", resid), attention.project("v", resid)

    def run_attention(
        self, layer: int, resid: Float[Tensor, "batch pos d_model"], past: tuple[Tensor, Tensor] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream after a block's attention and its norm; every position sees every other, so nothing is ever past."""
        block = self.blocks[layer]
        q, k, v = (block.attention.project(kind, resid) for kind in "qkv")
        return block.attention_norm(resid + block.attention.output(block.attention.attend(q, k, v)))

    def mlp_input(
        self, layer: int, resid: Float[Tensor, "batch pos d_model"], after_attention: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        return after_attention

    def parts(self, layer: int) -> Mlp:
        return self.blocks[layer].mlp

    def after_mlp(
        self, layer: int, after_attention: Float[Tensor, "batch pos d_model"], write: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream after a block, from what the MLP wrote."""
        return self.blocks[layer].mlp_norm(after_attention + write)

    def run_block(
        self, layer: int, resid: Float[Tensor, "batch pos d_model"], past: tuple[Tensor, Tensor] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream after a block, from the stream before it."""
        after = self.run_attention(layer, resid, past)
        return self.after_mlp(layer, after, self.parts(layer)(self.mlp_input(layer, resid, after)))

    def unembed(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Logits from the stream after the last block."""
        return F.linear(self.head(resid), self.W_U.T, self.b_U)


Residual = Decoder | Encoder  # what methods about MLP neurons take
