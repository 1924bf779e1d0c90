"""Edge attribution with the QK fix: attention patterns are recomputed, not linearised, for queries and keys.

Where attention is saturated, the softmax is flat and the gradient at queries and keys says next to nothing, however much
another query or key would move the pattern. The fix (Kramar et al. 2024, AtP*, arXiv:2403.00745, "QK fix") computes
the pattern that the ablated value gives and linearises only what comes after it. For a reader v that is a query or a key,

    score(u -> v) = sum over examples, heads of v and positions of (pattern_ablated - pattern_clean) . d loss / d pattern,

with ``pattern_ablated`` that of a run in which v alone sees ``ablated_u`` in place of ``clean_u``, at all positions.

The head's output is ``z = pattern v``, so the sum above equals ``(z_ablated - z_clean) . d loss / d z`` with the values
left clean: no pattern is kept and one gradient per head output serves all writers. A query reader reaches its own head
only, so all heads of a layer go through one attention call, and so do all its keys.

Where this differs from the paper: it scores nodes (a head's query or key at one position); here the writer's whole change,
at all positions, goes through the norm into one reader, which makes it an edge's score. The keys of all positions change
together, where the paper adds up the effects of changing them one by one. Its other half, GradDrop, is not part of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from kc_lib.circuits.scoring.edges import edge_scores
from kc_lib.circuits.scoring.prepared import Prepared
from kc_lib.errors import checked
from kc_lib.graph import Graph
from kc_lib.residual.decoder import Decoder, frozen
from kc_lib.residual.logits import logits_at_answers
from kc_lib.residual.patch import clean_run
from kc_lib.residual.prefix_cache import Context

WRITERS_AT_ONCE = 32  # writers whose patterns are computed as one batch


@dataclass(frozen=True)
class _Heads:
    """Queries, keys and values of one layer of the clean run, its heads' outputs and the loss's gradient there."""

    projections: dict[str, Tensor]  # "q", "k", "v" -> batch pos head d_head
    z: Float[Tensor, "batch pos head d_head"]
    gradient: Float[Tensor, "batch pos head d_head"]


@checked
def qk_fix_scores(decoder: Decoder, graph: Graph, prepared: Prepared) -> Float[Tensor, "writer reader"]:
    """Sum over the batch's examples of each edge's score, in units of the metric; see the head of this file.

    Values, MLPs and logits have the scores of ``edge_scores`` at the clean input (EAP). At most ``WRITERS_AT_ONCE``
    patterns per example and layer are in memory.
    """
    (scores,) = edge_scores(decoder, graph, prepared, [1.0])
    with torch.no_grad():
        run = clean_run(decoder, graph, prepared.batch, prepared.prefix)
        difference = prepared.ablation.outputs - run.outputs
        for layer, heads in enumerate(_clean_heads(decoder, prepared)):
            for rows in torch.arange(graph.writers_before(layer)).split(WRITERS_AT_ONCE):
                seen = run.streams[layer] + difference[rows]
                for kind in "qk":
                    effects = _pattern_effects(decoder, layer, heads, kind, seen, prepared.prefix)
                    n_readers = graph.n_heads if kind == "q" else graph.n_kv_readers
                    of_readers = reduce(effects, "writer (reader copy) -> writer reader", "sum", reader=n_readers)
                    scores[rows[0] : rows[-1] + 1, graph.reader_columns(layer, kind)] = of_readers
    return scores


def _pattern_effects(
    decoder: Decoder,
    layer: int,
    heads: _Heads,
    kind: str,
    seen: Float[Tensor, "writer batch pos d_model"],
    prefix: Context,
) -> Float[Tensor, "writer head"]:
    """Each head's ``(z_ablated - z_clean) . gradient`` when its query or key projection sees another stream."""
    attention, n_writers = decoder.blocks[layer].attention, seen.shape[0]
    projections = {name: x.repeat(n_writers, 1, 1, 1) for name, x in heads.projections.items() if name != kind}
    projections[kind] = attention.project(kind, attention.norm(seen.flatten(0, 1)))
    z = attention.attend(projections["q"], projections["k"], projections["v"], prefix.of_layer(layer))
    change = rearrange(z, "(w b) p h e -> w b p h e", w=n_writers).float() - heads.z.float()
    return torch.einsum("wbphe,bphe->wh", change, heads.gradient.float())


def _clean_heads(decoder: Decoder, prepared: Prepared) -> Iterator[_Heads]:
    """The attention of every layer in a plain run of the clean prompts."""
    batch, prefix = prepared.batch, prepared.prefix
    projections, outputs = [], []
    with frozen(decoder.bridge), torch.enable_grad():
        resid = decoder.embed(batch.clean)[:, prefix.start :].requires_grad_()
        for layer, block in enumerate(decoder.blocks):
            attention = block.attention
            x = attention.norm(resid)
            q, k, v = (attention.project(kind, x) for kind in "qkv")
            z = attention.attend(q, k, v, prefix.of_layer(layer))
            after_attention = resid + attention.output(z)
            mlp_input = resid if block.parallel else after_attention
            resid = after_attention + block.mlp_output(block.mlp_norm(mlp_input))
            projections.append({"q": q.detach(), "k": k.detach(), "v": v.detach()})
            outputs.append(z)
        loss = prepared.loss(logits_at_answers(decoder, resid, batch, prefix))
        gradients = torch.autograd.grad(loss, outputs)
    for layer, gradient in enumerate(gradients):
        yield _Heads(projections[layer], outputs[layer].detach(), gradient)
