"""The part of a batch's prompts that no run can change, computed once.

Under causal attention a position depends on nothing to its right. Where the ablated values are those of the corrupted
prompts, every position left of the first token in which clean and corrupted prompt differ is the same in the clean, the
corrupted and every interpolated or patched run: its differences are zero and add nothing to any score. What later
positions need of it are its keys and values. In a prompt like "The capital city of France is" that is most of the work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kc_lib.residual.decoder import Decoder
from kc_lib.tasks.batches import Batch


@dataclass(frozen=True)
class Context:
    """Keys and values, per layer, of the first ``start`` positions of each prompt; kernels run the positions after them."""

    start: int = 0
    past: tuple[tuple[Float[Tensor, "batch past kv d_head"], Float[Tensor, "batch past kv d_head"]], ...] = ()

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor] | None:
        return self.past[layer] if self.past else None

    def of_heads(self, layer: int, kv_heads: Int[Tensor, " head"]) -> tuple[Tensor, Tensor] | None:
        """Keys and values of these key-value heads, one for each query head."""
        return (self.past[layer][0][:, :, kv_heads], self.past[layer][1][:, :, kv_heads]) if self.past else None


EMPTY = Context()


@torch.no_grad()
def shared_context(decoder: Decoder, batch: Batch, intervention: str) -> Context:
    """The context of a batch: what its clean and corrupted prompts share from the left, in every row.

    Empty for interventions other than patching, which change every position.
    """
    if intervention != "patching":
        return EMPTY
    differs = (batch.clean != batch.corrupted).any(0)
    shared = int(differs.nonzero()[0]) if differs.any() else batch.clean.shape[1]
    start = min(shared, int(batch.answer_positions.min()))  # the answer is always read from positions that are run
    if start == 0:
        return EMPTY
    prefixes, row_of = batch.clean[:, :start].unique(dim=0, return_inverse=True)
    context = context_of(decoder, prefixes)
    return Context(start, tuple((k[row_of], v[row_of]) for k, v in context.past))


@torch.no_grad()
def context_of(decoder: Decoder, tokens: Int[Tensor, "batch past"]) -> Context:
    """The context that these tokens are to whatever follows them."""
    if not tokens.shape[1]:
        return EMPTY
    resid = decoder.embed(tokens)
    past = []
    for layer in range(decoder.n_layers):
        past.append(decoder.keys_values(layer, resid))
        resid = decoder.run_block(layer, resid)
    return Context(tokens.shape[1], tuple(past))
