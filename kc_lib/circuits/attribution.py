"""Edge attribution: one score for every edge, averaged over examples; ``docs/methods.md`` says when to use which.

Scores are in units of the metric: how much the loss (the metric, signed so that lower is better) is predicted, or for
``exact`` is measured, to rise when the edge alone is ablated. Only ``flow_routes`` asks something else.

- ``eap``: first-order estimate at the clean input (Nanda 2023; Syed et al. 2023, arXiv:2310.10348).
- ``eap_ig``: the gradient averaged over ``steps`` inputs between the ablated and the clean embeddings (Hanna et al. 2024,
  arXiv:2403.17806). The authors' code takes k/m for k = 0..m-1 from the corrupted end and so never sees the clean input:
  ``ig_rule="left"``, the default, for comparability; ``right`` takes k = 1..m, ``midpoint`` (k + 1/2)/m.
- ``clean_corrupted``: the mean of the gradients at both ends (Hanna et al. 2024, appendix).
- ``relp``: ``eap`` with the gradient replaced by relevance propagation: norm scales frozen, activations by act(x) / x, half
  of a gated product's gradient to each factor (Jafari et al. 2025, arXiv:2508.21258; ``decoder/backward.py``).
- ``gim``: ``eap`` with norm scales frozen, the softmax's derivative at temperature 2, and a quarter of the gradient to
  queries and keys, half to values, gates and what they let through (Edin et al. 2025, arXiv:2505.17630).
- ``eap_ig_activations``: the gradient averaged over ``steps`` values of the writer's own layer, between ablated and clean
  (Marks et al. 2024, arXiv:2403.19647; ``kernels/activations.py``). Authors' points: ``ig_rule="right"``.
- ``qk_fix``: ``eap``, with the attention pattern recomputed for queries and keys (AtP*, Kramar et al. 2024,
  arXiv:2403.00745; ``kernels/patterns.py``).
- ``flow_routes``: the share of the reader's input that is the writer's (Ferrando & Voita 2024, arXiv:2403.00824;
  ``kernels/flow.py``). It uses neither metric nor corrupted prompts: both options, and the intervention, are ignored.
- ``exact``: one edge at a time, everything above it recomputed; cost grows with the number of edges.

Published code sums over the examples of a batch a loss that is already their mean and then divides by the number of
examples; ours is the mean over examples, which does not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.circuits.options import GRADIENT_RULES, METHODS, Options, check_attribution, finite, path_points
from kc_lib.circuits.scores import EdgeScores, FactScores, PositionScores
from kc_lib.circuits.scoring.activation_path import activation_edge_scores
from kc_lib.circuits.scoring.edges import grouped_edge_scores
from kc_lib.circuits.scoring.exact import exact_scores, patch_single_edges
from kc_lib.circuits.scoring.flow_routes import flow_scores
from kc_lib.circuits.scoring.groups import POSITION_GROUPS, Groups, by_example, by_position, one_group
from kc_lib.circuits.scoring.prepared import prepared_batches
from kc_lib.circuits.scoring.qk_fix import qk_fix_scores
from kc_lib.errors import MethodError
from kc_lib.graph import Graph
from kc_lib.metrics import Metric, get_metric
from kc_lib.models.model import Model
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.logits import reference_means
from kc_lib.tasks.batches import Batch, TokenPair

__all__ = [
    "METHODS",
    "EdgeScores",
    "FactScores",
    "PositionScores",
    "attribute_edges",
    "attribute_facts",
    "attribute_positions",
    "check_attribution",
    "patch_single_edges",
    "path_points",
]

# methods whose scores are sums over positions, and so can be had for groups of positions by themselves
POSITION_KERNELS: dict[str, Callable[..., Float[Tensor, "group writer reader"]]] = {
    **{method: partial(grouped_edge_scores, rules=rules) for method, rules in GRADIENT_RULES.items()},
    "eap_ig_activations": activation_edge_scores,
    "flow_routes": lambda decoder, graph, batch, _metric, _ablated, _points, groups, *_: flow_scores(
        decoder, graph, batch, groups
    ),
}


def attribute_edges(
    model: Model,
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
    options = Options(method, steps, ig_rule, get_metric(metric), intervention, grouped, full_answer, batch_size, progress)
    decoder = model.residual
    graph = decoder.graph(grouped)
    scores = torch.zeros(len(graph.writers), len(graph.readers), device=decoder.device)
    for part in _batch_scores(decoder, graph, pairs, options, one_group):
        scores += part[0]
    return EdgeScores(graph, finite(scores.cpu() / len(pairs), model), options.provenance(model, len(pairs)))


def attribute_facts(
    model: Model,
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
    options = Options(method, steps, ig_rule, get_metric(metric), intervention, grouped, full_answer, batch_size, progress)
    decoder = model.residual
    graph = decoder.graph(grouped)
    parts = [part.cpu() for part in _batch_scores(decoder, graph, pairs, options, by_example)]
    return FactScores(graph, finite(torch.cat(parts), model), options.provenance(model, len(pairs)))


def attribute_positions(
    model: Model,
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
) -> PositionScores:
    """``attribute_edges`` split over groups of positions, whose scores sum to its own.

    The idea of circuits by position is that of Haklay et al. 2025 (arXiv:2502.04577), whose edges also cross positions.
    Ours are the graph's: an edge's score in a group is what it carries there, attention moves information inside a node.
    Every position of a prompt is in one group: "last" where it predicts a token of the answer, else "subject" or
    "relation" where the pair names it so, else "other" (BOS among them).

    Arguments and errors are those of ``attribute_edges``.

    Raises:
        MethodError: a method whose scores are no sums over positions.
    """
    options = Options(method, steps, ig_rule, get_metric(metric), intervention, grouped, full_answer, batch_size, progress)
    if method not in POSITION_KERNELS:
        raise MethodError(f"{method!r} scores are no sums over positions: use one of {', '.join(POSITION_KERNELS)}")
    decoder = model.residual
    graph = decoder.graph(grouped)
    remaining = iter(pairs)
    scores = torch.zeros(len(POSITION_GROUPS), len(graph.writers), len(graph.readers), device=decoder.device)
    for part in _batch_scores(
        decoder, graph, pairs, options, lambda batch: by_position(batch, list(islice(remaining, len(batch))))
    ):
        scores += part
    scores = finite(scores.cpu() / len(pairs), model)
    return PositionScores(graph, POSITION_GROUPS, scores, options.provenance(model, len(pairs)))


def _batch_scores(
    decoder: Decoder, graph: Graph, pairs: Sequence[TokenPair], options: Options, grouping: Callable[[Batch], Groups]
) -> Iterator[Float[Tensor, "group writer reader"]]:
    """Sums of scores over each batch's examples, apart for the groups of positions that ``grouping`` names.

    A method that is none of ``POSITION_KERNELS`` knows no groups and gives one sum.
    """
    method, metric = options.method, options.metric
    intervention = "zero" if method == "flow_routes" else options.intervention  # it asks for no ablated values
    means = reference_means(decoder, intervention, pairs, options.batch_size, options.full_answer)
    prepared = prepared_batches(decoder, pairs, metric, intervention, means, options.batch_size, options.full_answer)
    points = path_points(method, options.steps, options.ig_rule)
    n_steps = len(pairs) if method != "exact" else len(pairs) * len(graph.readers)
    with tqdm(total=n_steps, desc=f"{method} scores", unit="pair", disable=not options.progress) as bar:
        for batch, ablated, reference, context in prepared:
            if method == "exact":
                yield exact_scores(decoder, graph, batch, metric, ablated, reference, context, bar)[None]
                continue
            if method == "qk_fix":
                yield qk_fix_scores(decoder, graph, batch, metric, ablated, reference, context)[None]
            else:
                kernel = POSITION_KERNELS[method]
                yield kernel(decoder, graph, batch, metric, ablated, points, grouping(batch), reference, context)
            bar.update(len(batch))
