"""Exact effects of single edges, one run of the layers above for each: what the other methods estimate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kc_lib.circuits.options import ScoreOptions
from kc_lib.circuits.scoring.prepared import Prepared, prepared_batches
from kc_lib.graph import Graph
from kc_lib.metrics import get_metric
from kc_lib.models.model import Model
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.logits import full_logits
from kc_lib.residual.patch import clean_run, patch_edges
from kc_lib.tasks.batches import TokenPair

EDGES_AT_ONCE = 32  # edges patched as one batch


def patch_single_edges(model: Model, pairs: Sequence[TokenPair], edges: Sequence[str], **options: Any) -> pd.DataFrame:
    """The exact effect of ablating each named edge (``"a3.h5->m7"``) alone: columns edge, writer, reader, score.

    Args:
        options: fields of ``ScoreOptions``; steps make no difference.

    Raises:
        GraphError: an edge the model's graph does not have.
        MethodError: an option out of range.
    """
    asked, decoder = ScoreOptions.of(options), model.residual
    metric, graph = get_metric(asked.metric), decoder.graph(asked.grouped)
    positions = [graph.edge_positions(edge) for edge in edges]
    total = torch.zeros(len(edges), device=decoder.device)
    for prepared in prepared_batches(decoder, pairs, metric, asked.intervention, asked.batch_size, asked.full_answer):
        run = clean_run(decoder, graph, prepared.batch, prepared.prefix)
        clean_loss = prepared.loss(full_logits(decoder, prepared.batch, prepared.prefix))
        for i, (row, column) in enumerate(positions):
            logits = patch_edges(decoder, graph, run, prepared.ablation, graph.readers[column], [row])[0]
            total[i] += prepared.loss(logits) - clean_loss
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
    decoder: Decoder, graph: Graph, prepared: Prepared, advance: Callable[[int], Any]
) -> Float[Tensor, "writer reader"]:
    """Sum over the batch's examples of each edge's exact effect on the loss.

    After each reader ``advance`` is told the number of examples.
    """
    scores = torch.zeros(len(graph.writers), len(graph.readers), device=decoder.device)
    run = clean_run(decoder, graph, prepared.batch, prepared.prefix)
    clean_loss = prepared.loss(full_logits(decoder, prepared.batch, prepared.prefix))
    for column, reader in enumerate(graph.readers):
        for rows in torch.arange(reader.n_writers).split(EDGES_AT_ONCE):
            logits = patch_edges(decoder, graph, run, prepared.ablation, reader, rows.tolist())
            scores[rows, column] = torch.stack([prepared.loss(of_edge) for of_edge in logits]) - clean_loss
        advance(len(prepared.batch))
    return scores
