"""Exact effects of single edges, one run of the layers above for each: what the other methods estimate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kc_lib.circuits.scoring.prepared import prepared_batches
from kc_lib.graph import Graph
from kc_lib.metrics import Metric, get_metric
from kc_lib.models.model import Model
from kc_lib.residual.activations import Ablation
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.logits import full_logits, reference_means
from kc_lib.residual.patch import clean_run, patch_edges
from kc_lib.residual.prefix_cache import Context
from kc_lib.tasks.batches import Batch, TokenPair

EDGES_AT_ONCE = 32  # edges patched as one batch


def patch_single_edges(
    model: Model,
    pairs: Sequence[TokenPair],
    edges: Sequence[str],
    *,
    metric: str | Metric = "logit_difference",
    intervention: str = "patching",
    grouped: bool = True,
    full_answer: bool = False,
    batch_size: int = 8,
) -> pd.DataFrame:
    """The exact effect of ablating each named edge (``"a3.h5->m7"``) alone: columns edge, writer, reader, score.

    Raises:
        GraphError: an edge the model's graph does not have.
    """
    metric = get_metric(metric)
    decoder = model.residual
    graph = decoder.graph(grouped)
    positions = [graph.edge_positions(edge) for edge in edges]
    means = reference_means(decoder, intervention, pairs, batch_size, full_answer)
    total = torch.zeros(len(edges), device=decoder.device)
    prepared = prepared_batches(decoder, pairs, metric, intervention, means, batch_size, full_answer)
    for batch, ablated, reference, context in prepared:
        run = clean_run(decoder, graph, batch, context)
        clean_loss = metric.loss(full_logits(decoder, batch, context), batch, reference).sum()
        for i, (row, column) in enumerate(positions):
            logits = patch_edges(decoder, graph, batch, run, ablated, graph.readers[column], [row])[0]
            total[i] += metric.loss(logits, batch, reference).sum() - clean_loss
    names = [edge.partition("->") for edge in edges]
    return pd.DataFrame(
        {
            "edge": list(edges),
            "writer": [name[0] for name in names],
            "reader": [name[2] for name in names],
            "score": (total / len(pairs)).cpu().double().numpy(),
        }
    )


def exact_scores(
    decoder: Decoder,
    graph: Graph,
    batch: Batch,
    metric: Metric,
    ablated: Ablation,
    reference: Tensor | None,
    context: Context,
    bar: Any,
) -> Float[Tensor, "writer reader"]:
    """Sum over the batch's examples of each edge's exact effect on the loss."""
    scores = torch.zeros(len(graph.writers), len(graph.readers), device=decoder.device)
    run = clean_run(decoder, graph, batch, context)
    clean_loss = metric.loss(full_logits(decoder, batch, context), batch, reference).sum()
    for column, reader in enumerate(graph.readers):
        for start in range(0, reader.n_writers, EDGES_AT_ONCE):
            rows = range(start, min(start + EDGES_AT_ONCE, reader.n_writers))
            logits = patch_edges(decoder, graph, batch, run, ablated, reader, rows)
            for row, edge_logits in zip(rows, logits, strict=True):
                scores[row, column] = metric.loss(edge_logits, batch, reference).sum() - clean_loss
        bar.update(len(batch))
    return scores
