"""Path patching from heads to the queries of other heads (Wang et al. 2023, arXiv:2211.00593, section 3.1).

Three runs make one measurement. The *other* prompts give what the sender would write there. A run of the clean prompts, in
which every attention head is frozen at its clean output but the sender writes what it writes in the other prompts, gives the
receivers' queries: the change reaches them through the stream and, as published, through the MLPs on the way. A last run
of the clean prompts takes these queries for the receivers and is free everywhere else.

Senders are measured as one batch. Only the positions from ``start`` on are patched, so only they are run again: what
comes before is clean, and their keys and values are kept. Where outputs are normalised (Gemma), what a sender writes is its
contribution, scaled by the norm as in the run it comes from.

TransformerLens's ``get_act_patch_direct_path`` agrees to rounding wherever it accepts the model (tests). It has not what
S-inhibition asks for: several receivers at once, the last position alone, and MLPs on the way; and it runs the whole model
once for every pair of heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from kc_lib.components.attention import Head
from kc_lib.components.head_runs import run_layers
from kc_lib.errors import checked
from kc_lib.residual.decoder import Decoder

SENDERS_AT_ONCE = 64


@dataclass(frozen=True)
class Patched:
    """The last position's logits of some tokens, and the receivers' attention from there, for every sender."""

    logits: Float[Tensor, "sender batch token"]
    attention: Float[Tensor, "sender receiver batch key"]


@dataclass(frozen=True)
class Paths:
    """Heads that send, the heads whose queries receive, and the first position that is patched.

    ``through_mlps=False`` leaves only the edge from sender to receiver itself.
    """

    senders: Sequence[Head]
    receivers: Sequence[Head]
    start: int = 0
    through_mlps: bool = True


@torch.no_grad()
@checked
def patch_queries(
    decoder: Decoder,
    clean: Int[Tensor, "batch pos"],
    other: Int[Tensor, "batch pos"],
    paths: Paths,
    tokens: Int[Tensor, " token"],
) -> Patched:
    """Patch one sender -> queries of all receivers at a time.

    A sender that is not below a receiver changes nothing of it.
    """
    run = _clean_run(decoder, clean, paths.start)
    differences = _contributions(decoder, other, paths) - _contributions(decoder, clean, paths)
    parts = []
    for rows in torch.arange(len(paths.senders)).split(SENDERS_AT_ONCE):
        some = replace(paths, senders=[paths.senders[row] for row in rows])
        queries = _frozen_queries(decoder, run, some, differences[rows])
        parts.append(_free_run(decoder, run, queries, paths.receivers, tokens))
    return Patched(torch.cat([part.logits for part in parts]), torch.cat([part.attention for part in parts]))


@dataclass(frozen=True)
class _CleanRun:
    """Streams of the positions that are run again, and the keys and values of those before them."""

    resid_pre: list[Float[Tensor, "batch new d_model"]]
    after_attention: list[Float[Tensor, "batch new d_model"]]
    past: list[tuple[Tensor, Tensor]]


def _clean_run(decoder: Decoder, tokens: Int[Tensor, "batch pos"], start: int) -> _CleanRun:
    resid_pre, after, past = [], [], []
    for layer in run_layers(decoder, tokens):
        attention = decoder.blocks[layer.layer].attention
        resid_pre.append(layer.resid_pre[:, start:])
        after.append((layer.resid_pre + attention.output(layer.z))[:, start:])
        keys = attention.project("k", attention.norm(layer.resid_pre[:, :start]))
        past.append((keys, layer.values[:, :start]))
    return _CleanRun(resid_pre, after, past)


def _contributions(
    decoder: Decoder, tokens: Int[Tensor, "batch pos"], paths: Paths
) -> Float[Tensor, "head batch new d_model"]:
    """What the senders add to the stream from the first patched position on."""
    writes: dict[Head, Tensor] = {}
    for run in run_layers(decoder, tokens):
        attention = decoder.blocks[run.layer].attention
        wanted = [head for layer, head in paths.senders if layer == run.layer]
        if wanted:
            outputs = attention.contributions(attention.head_outputs(run.z[:, paths.start :]))
            writes |= {(run.layer, head): outputs[head] for head in wanted}
    return torch.stack([writes[head] for head in paths.senders])


def _frozen_queries(
    decoder: Decoder, run: _CleanRun, paths: Paths, differences: Float[Tensor, "sender batch new d_model"]
) -> list[Float[Tensor, "sender batch new d_head"]]:
    """The receivers' queries where all heads but the sender are frozen."""
    layer_of = torch.tensor([layer for layer, _ in paths.senders], device=differences.device)
    change = torch.zeros_like(differences)
    queries: dict[Head, Tensor] = {}
    for layer in range(1 + max(layer for layer, _ in paths.receivers)):
        block = decoder.blocks[layer]
        here = [head for at, head in paths.receivers if at == layer]
        if here:
            stream = rearrange(run.resid_pre[layer] + change, "s b p d -> (s b) p d")
            q = block.attention.project("q", block.attention.norm(stream))
            of_senders = rearrange(q, "(s b) p h e -> s b p h e", s=len(paths.senders))
            queries |= {(layer, head): of_senders[..., head, :] for head in here}
        before = change
        change = torch.where((layer_of == layer)[:, None, None, None], differences, change)
        if paths.through_mlps:
            mlp_input, seen = (run.resid_pre, before) if block.parallel else (run.after_attention, change)
            clean = mlp_input[layer]
            rows = (layer_of <= layer).nonzero()[:, 0]
            out = block.mlp_output(block.mlp_norm(rearrange(clean + seen[rows], "s b p d -> (s b) p d")))
            moved = rearrange(out, "(s b) p d -> s b p d", b=len(clean)) - block.mlp_output(block.mlp_norm(clean))
            change = change.index_add(0, rows, moved)
    return [queries[receiver] for receiver in paths.receivers]


def _free_run(
    decoder: Decoder,
    run: _CleanRun,
    queries: Sequence[Float[Tensor, "sender batch new d_head"]],
    receivers: Sequence[Head],
    tokens: Int[Tensor, " token"],
) -> Patched:
    """The clean prompts with the receivers' queries given, from the lowest receiver up."""
    n_senders = len(queries[0])
    first = min(layer for layer, _ in receivers)
    resid = run.resid_pre[first].repeat(n_senders, 1, 1)
    attention_of: dict[Head, Tensor] = {}
    for layer in range(first, decoder.n_layers):
        block = decoder.blocks[layer]
        attention = block.attention
        q, k, v = attention.projections(resid)
        here = [(i, head) for i, (at, head) in enumerate(receivers) if at == layer]
        for i, head in here:
            q[:, :, head] = rearrange(queries[i], "s b p e -> (s b) p e")
        after_attention = resid + attention.output(attention.attend(q, k, v, run.past[layer]))
        if here:
            pattern = rearrange(attention.pattern(q, k, run.past[layer][0])[:, :, -1], "(s b) h k -> s h b k", s=n_senders)
            attention_of |= {(layer, head): pattern[:, head] for _, head in here}
        resid = after_attention + block.mlp_output(decoder.mlp_input(layer, resid, after_attention))
    logits = decoder.unembed(resid[:, -1], tokens=tokens.to(resid.device)).float()
    return Patched(
        rearrange(logits, "(s b) t -> s b t", s=n_senders),
        torch.stack([attention_of[receiver] for receiver in receivers], 1).float(),
    )
