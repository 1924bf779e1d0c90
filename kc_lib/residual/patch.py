"""Patching a run: change what a single reader sees, or what some writers write, and recompute only what lies above."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from kc_lib.errors import checked
from kc_lib.graph import Graph, Reader
from kc_lib.residual.activations import NO_PREFIX, Ablation, PrefixCache, writer_outputs
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.logits import logits_at_answers
from kc_lib.tasks.batches import Batch


@dataclass(frozen=True)
class CleanRun:
    """A plain run of a batch: its writer outputs, and the stream before each block, last the final one."""

    batch: Batch
    outputs: Float[Tensor, "writer batch pos d_model"]
    streams: Float[Tensor, "layer batch pos d_model"]
    prefix: PrefixCache


@torch.no_grad()
def clean_run(decoder: Decoder, graph: Graph, batch: Batch, prefix: PrefixCache = NO_PREFIX) -> CleanRun:
    """The clean prompts' writer outputs after the prefix, and the streams they sum to."""
    outputs = writer_outputs(decoder, batch.clean, prefix)
    streams = [
        outputs[: graph.writers_before(layer)].sum(0) + decoder.bias_before[layer] for layer in range(graph.n_layers + 1)
    ]
    return CleanRun(batch, outputs, torch.stack(streams), prefix)


@torch.no_grad()
@checked
def patch_edges(
    decoder: Decoder,
    graph: Graph,
    run: CleanRun,
    ablation: Ablation,
    reader: Reader,
    writers: Sequence[int],
) -> Float[Tensor, "edge batch answer vocab"]:
    """Logits with one edge writer -> ``reader`` ablated at a time, everything else as in the full model.

    All edges go through the blocks above the reader as one batch; nothing below it is computed again.
    """
    rows = list(writers)
    change = ablation.outputs[rows] - run.outputs[rows]
    n_edges = len(rows)

    def flat(x: Tensor) -> Tensor:
        return rearrange(x.expand(n_edges, *x.shape[-3:]), "e b p d -> (e b) p d")

    if reader.kind == "logits":
        final = flat(run.streams[-1] + change)
    else:
        layer = reader.layer
        block = decoder.blocks[layer]
        attention = block.attention
        before = flat(run.streams[layer])
        heads = run.outputs[graph.head_writers(layer)]
        after_attention = flat(run.streams[layer] + heads.sum(0) + attention.b_O)
        mlp_input = before if block.parallel else after_attention
        if reader.kind == "mlp":
            seen = mlp_input + flat(change)
        else:
            after_attention = before + _attention_with(decoder, graph, reader, before, flat(change), run.prefix)
            seen = before if block.parallel else after_attention
        final = decoder.run(after_attention + block.mlp_output(block.mlp_norm(seen)), layer + 1, run.prefix.past)
    return logits_at_answers(decoder, final.unflatten(0, (n_edges, -1)), run.batch, run.prefix)


@torch.no_grad()
@checked
def patch_writers(
    decoder: Decoder, graph: Graph, batch: Batch, run: CleanRun, ablation: Ablation, writers: Sequence[int]
) -> Float[Tensor, "batch answer vocab"]:
    """Logits with all that some writers write ablated, in every later reader; the rest runs again from the first of them.

    The same as running the circuit without the edges that leave these writers, at the cost of a plain run from there.
    """
    chosen = sorted(set(writers))
    change = ablation.outputs
    layers = [graph.layer_of_writer(writer) for writer in chosen if writer]
    first = 0 if 0 in chosen else min(layers, default=graph.n_layers)
    resid = run.streams[first]
    if 0 in chosen:
        resid = resid - run.outputs[0] + change[0]
    for layer in range(first, graph.n_layers):
        block, heads = decoder.blocks[layer], graph.head_writers(layer)
        attention = block.attention
        z = attention.attend(*attention.projections(resid), run.prefix.of_layer(layer))
        after_attention = resid + attention.output(z)
        own = [writer for writer in chosen if heads.start <= writer < heads.stop]
        if own:
            written = attention.contributions(attention.head_outputs(z))[[writer - heads.start for writer in own]]
            after_attention = after_attention - (written - change[own]).sum(0)
        out = block.mlp_output(decoder.mlp_input(layer, resid, after_attention))
        resid = after_attention + (change[heads.stop] if heads.stop in chosen else out)
    return logits_at_answers(decoder, resid, batch, run.prefix)


def _attention_with(
    decoder: Decoder, graph: Graph, reader: Reader, stream: Tensor, change: Tensor, prefix: PrefixCache
) -> Tensor:
    """The attention layer's write when one q, k or v reader sees ``stream + change`` and the others ``stream``."""
    attention = decoder.blocks[reader.layer].attention
    x, changed = attention.norm(stream), attention.norm(stream + change)
    past = prefix.of_heads(reader.layer, torch.arange(graph.n_heads) // attention.group_size)
    projections = []
    for kind in "qkv":
        y = attention.project(kind, x)
        weight, bias = attention.weights(kind)
        n_readers = graph.n_heads if kind == "q" else graph.n_kv_readers
        y = y.repeat_interleave(n_readers // weight.shape[0], dim=2)
        if kind == reader.kind:
            own = reader.index * weight.shape[0] // n_readers
            y[:, :, reader.index] = changed @ weight[own] + bias[own]
        projections.append(y.repeat_interleave(graph.n_heads // n_readers, dim=2))
    q, k, v = projections
    return attention.output(attention.attend(q, k, v, past))
