"""What heads do in a run, layer by layer, and what they would write where they attend to one vector alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kc_lib.errors import checked
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.parts import Attention


@dataclass(frozen=True)
class LayerRun:
    """One layer of a plain run: the stream before it, and its heads' attention, values and outputs."""

    layer: int
    resid_pre: Float[Tensor, "batch pos d_model"]
    pattern: Float[Tensor, "batch head pos key"]
    values: Float[Tensor, "batch pos kv_head d_head"]
    z: Float[Tensor, "batch pos head d_head"]


@torch.no_grad()
def run_layers(decoder: Decoder, tokens: Int[Tensor, "batch pos"]) -> Iterator[LayerRun]:
    """A plain run of the model, one layer at a time; only one layer's patterns are in memory."""
    resid = decoder.embed(tokens)
    for layer, block in enumerate(decoder.blocks):
        attention = block.attention
        q, k, v = attention.projections(resid)
        pattern = attention.pattern(q, k)
        z = attention.mix(pattern, v)
        yield LayerRun(layer, resid, pattern, v, z)
        after_attention = resid + attention.output(z)
        resid = after_attention + block.mlp_output(decoder.mlp_input(layer, resid, after_attention))


@torch.no_grad()
def value_weighted(decoder: Decoder, run: LayerRun) -> Float[Tensor, "batch head pos key"]:
    """The size of what each key position adds to the stream through a head, as a share of all of them.

    Value-weighted attention (Kobayashi et al. 2020, arXiv:2004.10102, section 3), with the output matrix included.
    """
    attention = decoder.blocks[run.layer].attention
    sent = torch.einsum("bkhd,hde->bhke", run.values.repeat_interleave(attention.group_size, 2), attention.W_O)
    sizes = run.pattern * sent.norm(dim=-1)[:, :, None]
    return sizes / sizes.sum(-1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)


@torch.no_grad()
@checked
def copied(attention: Attention, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "head row d_model"]:
    """What each head writes where it attends to one vector of the stream alone: through its norm, W_V and W_O.

    A head has the value matrix of its group. Where attention's output is normalised (Gemma), the norm's weight is applied
    and its scale, which is a positive number that depends on the other heads, is not.
    """
    values = attention.project("v", attention.norm(resid)[None])
    of_heads = values.repeat_interleave(attention.group_size, dim=2)
    written = rearrange(attention.head_outputs(of_heads), "head 1 row d_model -> head row d_model")
    return written if attention.post_norm is None else attention.post_norm.weighted(written)


@torch.no_grad()
@checked
def copies_in_top(
    decoder: Decoder, layer: int, resid: Float[Tensor, "row d_model"], tokens: Int[Tensor, " token"], top: int
) -> Bool[Tensor, "sign head row token"]:
    """Which tokens are among the ``top`` logits of what each head copies from a vector; sign 1 has W_O's sign flipped.

    The final norm takes a sign out to its bias, so both signs are read off one product with the unembedding. A soft cap
    keeps the order of logits and is left out. A tie for the last place counts for none, so that a head that writes nothing
    copies nothing.
    """
    norm = decoder.final_norm
    constant = decoder.b_U if norm.bias is None else decoder.b_U + norm.bias @ decoder.W_U
    heads = copied(decoder.blocks[layer].attention, resid)
    in_top = torch.empty(2, *heads.shape[:2], len(tokens), dtype=torch.bool, device=resid.device)
    logits = resid.new_empty(len(resid), len(constant))
    for head, written in enumerate(heads):
        torch.mm(norm.weighted(norm.normalised(written)), decoder.W_U, out=logits)
        for sign in (0, 1):
            signed = -logits if sign else logits
            signed = signed + constant if constant.any() else signed
            in_top[sign, head] = signed[:, tokens] > signed.topk(top + 1, dim=-1).values[:, -1:]
    return in_top


@torch.no_grad()
@checked
def mean_pattern_by_offset(
    decoder: Decoder, tokens: Int[Tensor, "batch pos"], first_query: int
) -> Float[Tensor, "layer head offset"]:
    """Mean attention from position q to q - offset, over batch and queries from ``first_query`` on.

    Offsets run from 0 to ``first_query``, the largest that every such query has.
    """
    queries = torch.arange(first_query, tokens.shape[1], device=decoder.device)
    keys = queries[:, None] - torch.arange(first_query + 1, device=decoder.device)
    return torch.stack(
        [run.pattern[:, :, queries[:, None], keys].float().mean((0, 2)) for run in run_layers(decoder, tokens)]
    )
