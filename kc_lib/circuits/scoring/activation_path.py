"""Integrated gradients over a writer's own activations: EAP-IG (activations).

EAP-IG interpolates the input and lets the change travel through the whole model. Here one layer of writers at a time (the
input, all heads of a layer, one MLP) is interpolated between its ablated and its clean outputs, everything that does not
depend on it is clean, and the gradients at the readers above it, averaged over the steps, meet these writers' differences:

    score(u -> v) = sum over positions and d_model of (ablated_u - clean_u) . mean over alpha of
    d loss / d input_v, where u's layer puts out ``ablated + alpha (clean - ablated)``

(Marks et al. 2024, arXiv:2403.19647, for nodes; the author of EAP-IG's ``get_scores_ig_activations`` says that it is
theirs.) For the input this is EAP-IG (inputs); an edge into the logits from the last MLP gets its exact
effect as the steps grow.

Where this differs from EAP-IG's code:

- That code contracts the gradients of every layer's run with the differences of *all* writers, into one sum that it
  divides by the number of runs: a score there is the mean of EAP scores over runs most of which leave the writer at its
  clean value. Ours is the definition above.
- Its steps are k/m for k = 1..m, the clean end included: ``ig_rule="right"``. Our default is that of ``eap_ig``.
- Heads are interpolated by what they add to the stream, after a norm on outputs (Gemma), not before it.
- Batches are scaled as everywhere here: a sum over examples, divided by their number once.

Fast: a run starts from the clean stream at the layer that is interpolated, so blocks below it are neither run nor
differentiated (half the work), the steps are one batch, and shared positions are left out (``context.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from kc_lib.circuits.scoring.edges import at_positions, mlp_reader_gradient, reader_gradients, recorded_run
from kc_lib.circuits.scoring.groups import Groups
from kc_lib.errors import checked
from kc_lib.graph import Graph
from kc_lib.metrics import Metric
from kc_lib.residual.activations import Ablation
from kc_lib.residual.decoder import Decoder, frozen
from kc_lib.residual.patch import clean_run
from kc_lib.residual.prefix_cache import EMPTY, Context
from kc_lib.tasks.batches import Batch


@torch.no_grad()
@checked
def activation_edge_scores(
    decoder: Decoder,
    graph: Graph,
    batch: Batch,
    metric: Metric,
    ablation: Ablation,
    alphas: Sequence[float],
    groups: Groups,
    reference: Float[Tensor, "batch answer vocab"] | None = None,
    context: Context = EMPTY,
) -> Float[Tensor, "group writer reader"]:
    """Each edge's score summed over the positions of each group, in units of the metric; see the head of this file.

    ``ablation`` covers the positions after the context's.
    """
    run = clean_run(decoder, graph, batch, context)
    difference = ablation.outputs - run.outputs
    alpha = torch.tensor(alphas, device=difference.device, dtype=difference.dtype)[:, None, None, None]
    run_groups, answer_groups = groups.after(context.start), groups.at(batch.answer_positions)
    at_answers = answer_groups.ordered(at_positions(difference, batch.answer_positions - context.start))
    in_run = run_groups.ordered(difference)
    scores = torch.zeros(groups.n_groups, len(graph.writers), len(graph.readers), device=decoder.device)
    for writers, layer, mlp_only in _interpolations(graph):
        stream = run.streams[layer]
        if mlp_only:
            stream = stream + run.outputs[graph.head_writers(layer)].sum(0) + decoder.blocks[layer].attention.b_O
        path = stream + (1 - alpha) * difference[writers].sum(0)
        readers = _gradients_above(decoder, graph, path, batch, metric, reference, context, layer, mlp_only)
        for columns, gradient in readers:
            if graph.readers[columns.start].kind == "logits":
                scores[:, writers, columns] = answer_groups.contract(at_answers[writers], gradient)
            else:
                scores[:, writers, columns] = run_groups.contract(in_run[writers], gradient)
    return scores


def _interpolations(graph: Graph) -> Iterator[tuple[slice, int, bool]]:
    """Layers of writers, each with the first block that reads them, and whether only that block's MLP does."""
    yield slice(0, 1), 0, False
    for layer in range(graph.n_layers):
        heads = graph.head_writers(layer)
        yield (heads, layer + 1, False) if graph.parallel else (heads, layer, True)
        yield slice(heads.stop, heads.stop + 1), layer + 1, False


def _gradients_above(
    decoder: Decoder,
    graph: Graph,
    path: Float[Tensor, "step batch pos d_model"],
    batch: Batch,
    metric: Metric,
    reference: Tensor | None,
    context: Context,
    layer: int,
    mlp_only: bool,
) -> Iterator[tuple[slice, Float[Tensor, "reader batch pos d_model"]]]:
    """Gradients averaged over the path at every reader from a block (or from its MLP) on, the logits last."""
    n_steps, block = path.shape[0], decoder.blocks[layer] if mlp_only else None
    stops: list[Tensor] = []
    with frozen(decoder.bridge), torch.enable_grad():
        start = path.requires_grad_()
        if block is not None:
            seen = start.flatten(0, 1)
            stops.append(block.mlp_norm(seen))
            start = rearrange(seen + block.mlp_output(stops[0]), "(s b) p d -> s b p d", s=n_steps)
            layer += 1
        records, final, loss = recorded_run(decoder, graph, start, batch, metric, reference, context, layer)
        stops += [t for record in records for t in (*record.projections.values(), record.mlp_normed)]
        gradients = iter(torch.autograd.grad(loss / n_steps, [*stops, final]))
    if block is not None:
        columns = graph.reader_columns(layer - 1, "mlp")
        yield columns, mlp_reader_gradient(block, path.detach().flatten(0, 1), next(gradients), n_steps)
    yield from reader_gradients(decoder, graph, records, gradients, n_steps, layer)
    last = len(graph.readers) - 1
    yield slice(last, last + 1), rearrange(next(gradients), "(s b) a d -> s b a d", s=n_steps).sum(0)[None]
