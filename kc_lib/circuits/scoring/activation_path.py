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
differentiated (half the work), the steps are one batch, and shared positions are left out (``prefix_cache.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kc_lib.circuits.scoring.edges import Differences, reader_gradients, recorded_run
from kc_lib.circuits.scoring.prepared import Groups, Prepared
from kc_lib.errors import checked
from kc_lib.graph import Graph
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.patch import clean_run


@torch.no_grad()
@checked
def activation_edge_scores(
    decoder: Decoder, graph: Graph, prepared: Prepared, alphas: Sequence[float], groups: Groups
) -> Float[Tensor, "group writer reader"]:
    """Each edge's score summed over the positions of each group, in units of the metric; see the head of this file."""
    run = clean_run(decoder, graph, prepared.batch, prepared.prefix)
    change = prepared.ablation.outputs - run.outputs
    differences = Differences.of(prepared, run.outputs, groups)
    alpha = torch.tensor(alphas, device=change.device, dtype=change.dtype)[:, None, None, None]
    scores = torch.zeros(groups.n_groups, len(graph.writers), len(graph.readers), device=decoder.device)
    for writers, start in _interpolations(graph):
        layer, skip_attention = start
        stream = run.streams[layer]
        if skip_attention:
            stream = stream + run.outputs[graph.head_writers(layer)].sum(0) + decoder.blocks[layer].attention.b_O
        above = recorded_run(decoder, graph, stream + (1 - alpha) * change[writers].sum(0), prepared, start)
        for columns, gradient in reader_gradients(decoder, graph, above):
            is_logits = graph.readers[columns.start].kind == "logits"
            scores[:, writers, columns] = differences.contract(writers, gradient, is_logits)
    return scores


def _interpolations(graph: Graph) -> Iterator[tuple[slice, tuple[int, bool]]]:
    """Layers of writers, each with the first block that reads them, and whether only that block's MLP does."""
    yield slice(0, 1), (0, False)
    for layer in range(graph.n_layers):
        heads = graph.head_writers(layer)
        yield heads, (layer + 1, False) if graph.parallel else (layer, True)
        yield slice(heads.stop, heads.stop + 1), (layer + 1, False)
