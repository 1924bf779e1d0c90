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

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from kc_lib.circuits.scoring.edges import RecordedBlock, edge_scores, recorded_run
from kc_lib.circuits.scoring.prepared import Prepared
from kc_lib.errors import checked
from kc_lib.graph import Graph
from kc_lib.residual.activations import PrefixCache
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.patch import clean_run

WRITERS_AT_ONCE = 32  # writers whose patterns are computed as one batch


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
        recorded = recorded_run(decoder, decoder.graph(), run.streams[:1], prepared)
        gradients = torch.autograd.grad(recorded.loss, [record.z for record in recorded.blocks])
        for layer, (record, gradient) in enumerate(zip(recorded.blocks, gradients, strict=True)):
            for rows in torch.arange(graph.writers_before(layer)).split(WRITERS_AT_ONCE):
                seen = run.streams[layer] + difference[rows]
                for kind in "qk":
                    effects = _pattern_effects(decoder, record, gradient, kind, seen, prepared.prefix)
                    n_readers = graph.n_heads if kind == "q" else graph.n_kv_readers
                    of_readers = reduce(effects, "writer (reader copy) -> writer reader", "sum", reader=n_readers)
                    scores[rows[0] : rows[-1] + 1, graph.reader_columns(layer, kind)] = of_readers
    return scores


def _pattern_effects(
    decoder: Decoder,
    clean: RecordedBlock,
    gradient: Float[Tensor, "batch pos head d_head"],
    kind: str,
    seen: Float[Tensor, "writer batch pos d_model"],
    prefix: PrefixCache,
) -> Float[Tensor, "writer head"]:
    """Each head's ``(z_ablated - z_clean) . gradient`` when its query or key projection sees another stream."""
    attention, n_writers = decoder.blocks[clean.layer].attention, seen.shape[0]
    projections = {name: x.repeat(n_writers, 1, 1, 1) for name, x in clean.projections.items() if name != kind}
    projections[kind] = attention.project(kind, attention.norm(seen.flatten(0, 1)))
    z = attention.attend(projections["q"], projections["k"], projections["v"], prefix.of_layer(clean.layer))
    change = rearrange(z, "(w b) p h e -> w b p h e", w=n_writers).float() - clean.z.float()
    return torch.einsum("wbphe,bphe->wh", change, gradient.float())
