"""Information flow routes: how much of what a reader sees comes from each writer, in one plain forward pass.

importance(u -> v) at one position is ``max(0, |in_v|_1 - |in_v - out_u|_1)``, divided by its sum over the writers u of
the reader (Ferrando & Voita 2024, arXiv:2403.00824, after ALTI): the nearer a writer's output is to the whole input, the
more of the input it is. No metric, no corrupted prompt and no gradient come in, so the score says what is *read*, not
what matters for the answer; it is never negative.

Where this differs from others:

- The paper's parts of a stream are one block's heads, split by the position they attend to, and the residual connection,
  and it walks from the answer down the routes it finds. Here the parts are all earlier writers, a head as a whole, as
  everywhere in this suite, and every edge is scored, as in EAP-IG's ``get_scores_information_flow_routes``.
- That code averages every reader over all positions. For the logits we take the answer's positions, the only ones from
  which anything is read.
- At a position where every writer's term is 0, EAP-IG's code divides 0 by 0; here all importances are 0 there. The paper's
  own code raises every term to at least 1e-5 first.
- Attention biases are part of the input but belong to no writer: they enter ``in_v`` and get no share.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kc_lib.circuits.scoring.prepared import Groups
from kc_lib.errors import checked
from kc_lib.graph import Graph
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.logits import at_answers
from kc_lib.residual.patch import clean_run
from kc_lib.tasks.batches import Batch


@torch.no_grad()
@checked
def flow_scores(decoder: Decoder, graph: Graph, batch: Batch, groups: Groups) -> Float[Tensor, "group writer reader"]:
    """Sum over the batch's examples of each edge's share of its reader's input, 0 to 1, in parts for groups of positions.

    A share is the mean over the clean prompt's positions (pads left out), for the logits over the answer's. The queries,
    keys and values of a layer, and in parallel blocks its MLP, read the same vector and have the same shares.
    """
    run = clean_run(decoder, graph, batch)
    real = torch.arange(batch.clean.shape[1], device=run.outputs.device) < batch.lengths[:, None]
    scores = torch.zeros(groups.n_groups, len(graph.writers), len(graph.readers), device=run.outputs.device)
    for layer in range(graph.n_layers):
        seen, before = run.streams[layer], graph.writers_before(layer)
        shares = _shares(run.outputs[:before], seen, real, groups)
        for kind in "qkv":
            scores[:, :before, graph.reader_columns(layer, kind)] = shares
        if not graph.parallel:
            heads = graph.head_writers(layer)
            seen, before = seen + run.outputs[heads].sum(0) + decoder.blocks[layer].attention.b_O, heads.stop
            shares = _shares(run.outputs[:before], seen, real, groups)
        scores[:, :before, graph.reader_columns(layer, "mlp")] = shares
    outputs, seen = at_answers(run.outputs, batch), at_answers(run.streams[-1], batch)
    scores[:, :, -1:] = _shares(outputs, seen, batch.answer_mask, groups.at(batch.answer_positions))
    return scores


def _shares(
    outputs: Float[Tensor, "writer batch pos d_model"],
    seen: Float[Tensor, "batch pos d_model"],
    real: Bool[Tensor, "batch pos"],
    groups: Groups,
) -> Float[Tensor, "group writer 1"]:
    """Each writer's share of ``seen``, averaged over an example's real positions and summed over examples, by group."""
    seen = seen.float()
    size = torch.linalg.vector_norm(seen, ord=1, dim=-1)
    proximity = torch.stack([size - torch.linalg.vector_norm(seen - u.float(), ord=1, dim=-1) for u in outputs]).relu()
    total = proximity.sum(0)
    shares = proximity / torch.where(total > 0, total, 1.0)
    weights = real / real.sum(-1, keepdim=True)
    return groups.contract(groups.ordered(shares[..., None]), weights[None, ..., None])
