"""Edge attribution: one score for every edge, averaged over examples; ``docs/methods.md`` says when to use which.

Scores are in units of the metric: how much the loss (the metric, signed so that lower is better) is predicted, or for
``exact`` is measured, to rise when the edge alone is ablated. Only ``flow_routes`` asks something else.

- ``eap``: first-order estimate at the clean input (Nanda 2023; Syed et al. 2023, arXiv:2310.10348).
- ``eap_ig``: the gradient averaged over ``steps`` inputs between the ablated and the clean embeddings (Hanna et al. 2024,
  arXiv:2403.17806). The authors' code takes k/m for k = 0..m-1 from the corrupted end and so never sees the clean input:
  ``ig_rule="left"``, the default, for comparability; ``right`` takes k = 1..m, ``midpoint`` (k + 1/2)/m.
- ``clean_corrupted``: the mean of the gradients at both ends (Hanna et al. 2024, appendix).
- ``eap_ig_activations``: the gradient averaged over ``steps`` values of the writer's own layer, between ablated and clean
  (Marks et al. 2024, arXiv:2403.19647; ``kernels/activations.py``). Authors' points: ``ig_rule="right"``.
- ``qk_fix``: ``eap``, with the attention pattern recomputed for queries and keys (AtP*, Kramar et al. 2024,
  arXiv:2403.00745, section 4.1; ``kernels/patterns.py``).
- ``flow_routes``: the share of the reader's input that is the writer's (Ferrando & Voita 2024, arXiv:2403.00824;
  ``kernels/flow.py``). It uses neither metric nor corrupted prompts: both options, and the intervention, are ignored.
- ``exact``: one edge at a time, everything above it recomputed; cost grows with the number of edges.

Published code sums over the examples of a batch a loss that is already their mean and then divides by the number of
examples; ours is the mean over examples, which does not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from kc_lib.errors import MethodError
from kc_lib.graph import Graph
from kc_lib.kernels.activations import activation_edge_scores
from kc_lib.kernels.context import Context, shared_context
from kc_lib.kernels.flow import flow_scores
from kc_lib.kernels.gradients import grouped_edge_scores
from kc_lib.kernels.groups import Groups, by_example, one_group
from kc_lib.kernels.patterns import qk_fix_scores
from kc_lib.kernels.restart import clean_run, patch_edges
from kc_lib.kernels.runs import full_logits, reference_means
from kc_lib.kernels.writers import INTERVENTIONS, Ablation, Means, ablation
from kc_lib.methods.scores import EdgeScores, FactScores
from kc_lib.metrics import Metric, get_metric
from kc_lib.models import model_name
from kc_lib.tasks import Batch, TokenPair, batches
from kc_lib.wiring import Wiring, wiring_of

IG_RULES: dict[str, Callable[[int, int], float]] = {
    "left": lambda k, m: k / m,
    "right": lambda k, m: (k + 1) / m,
    "midpoint": lambda k, m: (k + 0.5) / m,
}
# methods whose scores are sums over positions, and so can be had for groups of positions by themselves
POSITION_KERNELS: dict[str, Callable[..., Float[Tensor, "group writer reader"]]] = {
    "eap": grouped_edge_scores,
    "eap_ig": grouped_edge_scores,
    "clean_corrupted": grouped_edge_scores,
    "eap_ig_activations": activation_edge_scores,
    "flow_routes": lambda wiring, graph, batch, _metric, _ablated, _points, groups, *_: flow_scores(
        wiring, graph, batch, groups
    ),
}
METHODS = (*POSITION_KERNELS, "qk_fix", "exact")
EDGES_AT_ONCE = 32  # edges patched as one batch by ``exact``


def path_points(method: str, steps: int = 5, ig_rule: str = "left") -> list[float]:
    """Where on the way from the ablated (0) to the clean input or activation (1) a method takes its gradients, if any."""
    fixed = {"eap": [1.0], "qk_fix": [1.0], "clean_corrupted": [0.0, 1.0], "flow_routes": [], "exact": []}
    if method in fixed:
        return fixed[method]
    if method not in METHODS:
        raise MethodError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    if ig_rule not in IG_RULES:
        raise MethodError(f"unknown ig_rule {ig_rule!r}: use one of {', '.join(IG_RULES)}")
    if steps < 1:
        raise MethodError(f"steps is {steps}; integrated gradients need at least 1")
    return [IG_RULES[ig_rule](k, steps) for k in range(steps)]


def check_attribution(
    method: str = "eap_ig",
    *,
    steps: int = 5,
    ig_rule: str = "left",
    metric: str | Metric = "logit_difference",
    intervention: str = "patching",
) -> None:
    """Refuse what ``attribute_edges`` would refuse, before a model is loaded.

    Raises:
        MethodError: unknown method, metric, rule or intervention, or one that does not fit the method.
    """
    get_metric(metric)
    path_points(method, steps, ig_rule)
    if intervention not in INTERVENTIONS:
        raise MethodError(f"unknown intervention {intervention!r}: use one of {', '.join(INTERVENTIONS)}")
    if method == "clean_corrupted" and intervention != "patching":
        raise MethodError(
            f"clean_corrupted runs the corrupted prompts: it needs intervention='patching', not {intervention!r}"
        )


def attribute_edges(
    model: TransformerBridge,
    pairs: Sequence[TokenPair],
    method: str = "eap_ig",
    *,
    steps: int = 5,
    ig_rule: str = "left",
    metric: str | Metric = "logit_difference",
    intervention: str = "patching",
    grouped: bool = True,
    full_answer: bool = False,
    batch_size: int = 8,
    progress: bool = False,
) -> EdgeScores:
    """Score every edge of the model's graph on clean/corrupted pairs; see the head of this file for the methods.

    Args:
        intervention: what an ablated edge carries: the corrupted prompt's output ("patching"), "zero", or the "mean" or
            "positional_mean" over the pairs' clean prompts. Interpolation starts at that value of the input.
        grouped: under grouped queries, one key and value reader per key-value head; False gives one per query head.
        full_answer: score all answer tokens, teacher-forced, instead of the first.

    Raises:
        MethodError: unknown method, metric, rule or intervention, one that does not fit the method, or scores that overflow.
        ModelError: a model whose residual stream is no sum of writers.
    """
    options = _Options(method, steps, ig_rule, get_metric(metric), intervention, grouped, full_answer, batch_size, progress)
    wiring = wiring_of(model)
    graph = wiring.graph(grouped)
    scores = torch.zeros(len(graph.writers), len(graph.readers), device=wiring.device)
    for part in _batch_scores(wiring, graph, pairs, options, one_group):
        scores += part[0]
    return EdgeScores(graph, _finite(scores.cpu() / len(pairs), model), options.provenance(model, len(pairs)))


def attribute_facts(
    model: TransformerBridge,
    pairs: Sequence[TokenPair],
    method: str = "eap_ig",
    *,
    steps: int = 5,
    ig_rule: str = "left",
    metric: str | Metric = "logit_difference",
    intervention: str = "patching",
    grouped: bool = True,
    full_answer: bool = False,
    batch_size: int = 8,
    progress: bool = False,
) -> FactScores:
    """``attribute_edges`` for each pair by itself, in the order of ``pairs``, at the cost of their mean.

    Arguments and errors are those of ``attribute_edges``, and ``attribute_facts(...).mean()`` is what it returns. A mean
    intervention takes its mean over all pairs. Only ``POSITION_KERNELS`` keep facts apart inside a batch; others run one
    pair at a time. Holds one score matrix per pair in memory.
    """
    if method not in POSITION_KERNELS:
        batch_size = 1
    options = _Options(method, steps, ig_rule, get_metric(metric), intervention, grouped, full_answer, batch_size, progress)
    wiring = wiring_of(model)
    graph = wiring.graph(grouped)
    parts = [part.cpu() for part in _batch_scores(wiring, graph, pairs, options, by_example)]
    return FactScores(graph, _finite(torch.cat(parts), model), options.provenance(model, len(pairs)))


def patch_single_edges(
    model: TransformerBridge,
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
    wiring = wiring_of(model)
    graph = wiring.graph(grouped)
    positions = [graph.edge_positions(edge) for edge in edges]
    means = reference_means(wiring, intervention, pairs, batch_size, full_answer)
    total = torch.zeros(len(edges), device=wiring.device)
    prepared = _prepared(wiring, pairs, metric, intervention, means, batch_size, full_answer)
    for batch, ablated, reference, context in prepared:
        run = clean_run(wiring, graph, batch, context)
        clean_loss = metric.loss(full_logits(wiring, batch, context), batch, reference).sum()
        for i, (row, column) in enumerate(positions):
            logits = patch_edges(wiring, graph, batch, run, ablated, graph.readers[column], [row])[0]
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


@dataclass(frozen=True)
class _Options:
    """How edges are to be scored; the same for all levels of detail."""

    method: str
    steps: int
    ig_rule: str
    metric: Metric
    intervention: str
    grouped: bool
    full_answer: bool
    batch_size: int
    progress: bool

    def __post_init__(self) -> None:
        check_attribution(
            self.method, steps=self.steps, ig_rule=self.ig_rule, metric=self.metric, intervention=self.intervention
        )

    def provenance(self, model: TransformerBridge, n_pairs: int) -> dict[str, Any]:
        reads_only = self.method == "flow_routes"
        return {
            "model": model_name(model),
            "method": self.method,
            "steps": self.steps,
            "ig_rule": self.ig_rule,
            "metric": None if reads_only else self.metric.name,
            "unit": "share of the reader's input" if reads_only else self.metric.unit,
            "intervention": None if reads_only else self.intervention,
            "n_pairs": n_pairs,
        }


def _batch_scores(
    wiring: Wiring, graph: Graph, pairs: Sequence[TokenPair], options: _Options, grouping: Callable[[Batch], Groups]
) -> Iterator[Float[Tensor, "group writer reader"]]:
    """Sums of scores over each batch's examples, apart for the groups of positions that ``grouping`` names.

    A method that is none of ``POSITION_KERNELS`` knows no groups and gives one sum.
    """
    method, metric = options.method, options.metric
    intervention = "zero" if method == "flow_routes" else options.intervention  # it asks for no ablated values
    means = reference_means(wiring, intervention, pairs, options.batch_size, options.full_answer)
    prepared = _prepared(wiring, pairs, metric, intervention, means, options.batch_size, options.full_answer)
    points = path_points(method, options.steps, options.ig_rule)
    n_steps = len(pairs) if method != "exact" else len(pairs) * len(graph.readers)
    with tqdm(total=n_steps, desc=f"{method} scores", unit="pair", disable=not options.progress) as bar:
        for batch, ablated, reference, context in prepared:
            if method == "exact":
                yield _exact_scores(wiring, graph, batch, metric, ablated, reference, context, bar)[None]
                continue
            if method == "qk_fix":
                yield qk_fix_scores(wiring, graph, batch, metric, ablated, reference, context)[None]
            else:
                kernel = POSITION_KERNELS[method]
                yield kernel(wiring, graph, batch, metric, ablated, points, grouping(batch), reference, context)
            bar.update(len(batch))


def _finite(scores: Tensor, model: TransformerBridge) -> Tensor:
    if not scores.isfinite().all():
        raise MethodError(
            f"{int((~scores.isfinite()).sum())} edge scores are not finite: the model overflows in {model.cfg.dtype}; "
            "load it with dtype='float32'"
        )
    return scores


def _prepared(
    wiring: Wiring,
    pairs: Sequence[TokenPair],
    metric: Metric,
    intervention: str,
    means: Means | None,
    batch_size: int,
    full_answer: bool,
) -> Iterator[tuple[Batch, Ablation, Tensor | None, Context]]:
    """Batches with their ablated values, the full model's logits where the metric compares with them, and context."""
    for batch in batches(pairs, batch_size, full_answer, wiring.device):
        context = shared_context(wiring, batch, intervention)
        reference = full_logits(wiring, batch, context) if metric.needs_reference else None
        yield batch, ablation(wiring, intervention, batch, means, context), reference, context


def _exact_scores(
    wiring: Wiring,
    graph: Graph,
    batch: Batch,
    metric: Metric,
    ablated: Ablation,
    reference: Tensor | None,
    context: Context,
    bar: Any,
) -> Float[Tensor, "writer reader"]:
    scores = torch.zeros(len(graph.writers), len(graph.readers), device=wiring.device)
    run = clean_run(wiring, graph, batch, context)
    clean_loss = metric.loss(full_logits(wiring, batch, context), batch, reference).sum()
    for column, reader in enumerate(graph.readers):
        for start in range(0, reader.n_writers, EDGES_AT_ONCE):
            rows = range(start, min(start + EDGES_AT_ONCE, reader.n_writers))
            logits = patch_edges(wiring, graph, batch, run, ablated, reader, rows)
            for row, edge_logits in zip(rows, logits, strict=True):
                scores[row, column] = metric.loss(edge_logits, batch, reference).sum() - clean_loss
        bar.update(len(batch))
    return scores
