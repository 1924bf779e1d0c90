"""What nodes are worth: the metric of the full model with all that some of its nodes write ablated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.errors import MethodError
from kc_lib.metrics import Metric, get_metric
from kc_lib.models.model import Model
from kc_lib.residual.activations import ablation
from kc_lib.residual.logits import full_logits, reference_means
from kc_lib.residual.patch import clean_run, patch_writers
from kc_lib.residual.prefix_cache import shared_context
from kc_lib.tasks.batches import TokenPair, batches


def ablated_values(
    model: Model,
    node_sets: Mapping[str, Sequence[str]],
    pairs: Sequence[TokenPair],
    *,
    metric: str | Metric = "logit_difference",
    intervention: str = "patching",
    reference: Sequence[TokenPair] = (),
    batch_size: int = 16,
    progress: bool = False,
) -> pd.DataFrame:
    """The metric, fact x set of nodes, with "full" among the sets; every node of a set is ablated in all it writes.

    Args:
        reference: pairs whose clean prompts give the means of a mean intervention (those of discovery, not the judged).

    Raises:
        MethodError: unknown metric or intervention, a set named "full", or a node that writes nothing in the graph.
    """
    metric = get_metric(metric)
    decoder = model.residual
    graph = decoder.graph()
    if "full" in node_sets:
        raise MethodError("a set of nodes is named 'full', as the whole model: rename it")
    rows = {name: [_row_of(graph.writer_index, node) for node in nodes] for name, nodes in node_sets.items()}
    means = reference_means(decoder, intervention, reference, batch_size)
    values: dict[str, list[Tensor]] = {}
    with tqdm(total=len(pairs) * len(rows), desc="ablating nodes", unit="run", disable=not progress) as bar:
        for batch in batches(pairs, batch_size, device=decoder.device):
            context = shared_context(decoder, batch, intervention)
            ablated = ablation(decoder, intervention, batch, means, context)
            run, full = clean_run(decoder, graph, batch, context), full_logits(decoder, batch, context)
            values.setdefault("full", []).append(metric(full, batch, full).double().cpu())
            for name, writers in rows.items():
                logits = patch_writers(decoder, graph, batch, run, ablated, writers)
                values.setdefault(name, []).append(metric(logits, batch, full).double().cpu())
                bar.update(len(batch))
    return pd.DataFrame({name: torch.cat(parts).numpy() for name, parts in values.items()})


def _row_of(index: Mapping[str, int], node: str) -> int:
    if node not in index:
        raise MethodError(f"the graph has no node {node!r} that writes: name nodes like a0.h0, m0 or input")
    return index[node]
