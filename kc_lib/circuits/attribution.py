"""Edge attribution: one score for every edge, averaged over examples; ``docs/methods.md`` says when to use which.

Scores are in units of the metric: how much the loss (the metric, signed so that lower is better) is predicted, or for
``exact`` is measured, to rise when the edge alone is ablated. Only ``flow_routes`` asks something else.

- ``eap``: first-order estimate at the clean input (Nanda 2023; Syed et al. 2023, arXiv:2310.10348).
- ``eap_ig``: the gradient averaged over ``steps`` inputs between the ablated and the clean embeddings (Hanna et al. 2024,
  arXiv:2403.17806). The authors' code takes k/m for k = 0..m-1 from the corrupted end and so never sees the clean input:
  ``ig_rule="left"``, the default, for comparability; ``right`` takes k = 1..m, ``midpoint`` (k + 1/2)/m.
- ``clean_corrupted``: the mean of the gradients at both ends (Hanna et al. 2024, appendix).
- ``relp``: ``eap`` with the gradient replaced by relevance propagation: norm scales frozen, activations by act(x) / x, half
  of a gated product's gradient to each factor (Jafari et al. 2025, arXiv:2508.21258; ``backward_rules.py``).
- ``gim``: ``eap`` with norm scales frozen, the softmax's derivative at temperature 2, and a quarter of the gradient to
  queries and keys, half to values, gates and what they let through (Edin et al. 2025, arXiv:2505.17630).
- ``eap_ig_activations``: the gradient averaged over ``steps`` values of the writer's own layer, between ablated and clean
  (Marks et al. 2024, arXiv:2403.19647; ``scoring/activation_path.py``). Authors' points: ``ig_rule="right"``.
- ``qk_fix``: ``eap``, with the attention pattern recomputed for queries and keys (AtP*, Kramar et al. 2024,
  arXiv:2403.00745; ``scoring/qk_fix.py``).
- ``flow_routes``: the share of the reader's input that is the writer's (Ferrando & Voita 2024, arXiv:2403.00824;
  ``scoring/flow_routes.py``). It uses neither metric nor corrupted prompts: both options, and the intervention, are ignored.
- ``exact``: one edge at a time, everything above it recomputed; cost grows with the number of edges.

Published code sums over the examples of a batch a loss that is already their mean and then divides by the number of
examples; ours is the mean over examples, which does not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.circuits.options import ScoreOptions, check_method
from kc_lib.circuits.scores import EdgeScores, FactScores, NeuronScores, PositionScores
from kc_lib.circuits.scoring.activation_path import activation_edge_scores
from kc_lib.circuits.scoring.edges import edge_scores
from kc_lib.circuits.scoring.exact import exact_scores
from kc_lib.circuits.scoring.flow_routes import flow_scores
from kc_lib.circuits.scoring.neurons import neuron_ablation, neuron_outputs, neuron_scores
from kc_lib.circuits.scoring.prepared import (
    POSITION_GROUPS,
    Groups,
    Prepared,
    by_example,
    by_position,
    one_group,
    prepared_batches,
)
from kc_lib.circuits.scoring.qk_fix import qk_fix_scores
from kc_lib.errors import MethodError
from kc_lib.graph import Graph
from kc_lib.metrics import get_metric
from kc_lib.models.model import Model
from kc_lib.residual.backward_rules import GIM, NATIVE, RELP, BackwardRules
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.logits import reference_means
from kc_lib.tasks.batches import Batch, TokenPair

Kernel = Callable[[Decoder, Graph, Prepared, Sequence[float], Groups], Float[Tensor, "group writer reader"]]

# methods that multiply a difference of activations with one averaged gradient, and the rules of its backward pass
GRADIENT_RULES: dict[str, BackwardRules] = {
    "eap": NATIVE,
    "eap_ig": NATIVE,
    "clean_corrupted": NATIVE,
    "relp": RELP,
    "gim": GIM,
}
# methods whose scores are sums over positions, and so can be had for groups of positions by themselves
POSITION_KERNELS: dict[str, Kernel] = {
    **{method: partial(edge_scores, rules=rules) for method, rules in GRADIENT_RULES.items()},
    "eap_ig_activations": activation_edge_scores,
    "flow_routes": lambda decoder, graph, prepared, _, groups: flow_scores(decoder, graph, prepared.batch, groups),
}
POINTS: dict[str, list[float]] = {"eap": [1.0], "relp": [1.0], "gim": [1.0], "clean_corrupted": [0.0, 1.0]}
SHIFTS = {"left": 0.0, "midpoint": 0.5, "right": 1.0}  # of integrated gradients' points, in steps


def path_points(method: str, steps: int = 5, ig_rule: str = "left") -> list[float]:
    """Where on the way from the ablated (0) to the clean input or activation (1) a method takes its gradients."""
    return POINTS.get(method) or [(k + SHIFTS[ig_rule]) / steps for k in range(steps)]


@overload
def score_edges(
    model: Model, pairs: Sequence[TokenPair], method: str = ..., *, per: None = ..., **options: Any
) -> EdgeScores: ...
@overload
def score_edges(
    model: Model, pairs: Sequence[TokenPair], method: str = ..., *, per: Literal["fact"], **options: Any
) -> FactScores: ...
@overload
def score_edges(
    model: Model, pairs: Sequence[TokenPair], method: str = ..., *, per: Literal["position"], **options: Any
) -> PositionScores: ...
def score_edges(
    model: Model,
    pairs: Sequence[TokenPair],
    method: str = "eap_ig",
    *,
    per: Literal["fact", "position"] | None = None,
    progress: bool = False,
    **options: Any,
) -> EdgeScores | FactScores | PositionScores:
    """Score every edge of the model's graph on clean/corrupted pairs; see the head of this file for the methods.

    Args:
        per: "fact" keeps the scores of each pair apart, in the order of ``pairs``; their mean is the edge's score.
            Methods outside ``POSITION_KERNELS`` then run one pair at a time. "position" splits an edge's score over
            ``POSITION_GROUPS``: "last" where a position predicts a token of the answer, else "subject" or "relation"
            where the pair names it so, else "other". The idea is that of Haklay et al. 2025 (arXiv:2502.04577), whose
            edges also cross positions; ours are the graph's, and attention moves information inside a node.
        options: fields of ``ScoreOptions``. An ablated edge carries the corrupted prompt's output ("patching"), "zero",
            or the "mean" or "positional_mean" over the pairs' clean prompts; interpolation starts at that input.

    Example:
        >>> scores = kc.score_edges(model, task.discovery, "eap_ig", steps=10)
        >>> scores.to_frame().head()
        >>> kc.score_edges(model, task.discovery, per="position").summary()

    Raises:
        MethodError: unknown method, metric, rule or intervention, one that does not fit the method, or scores that overflow.
        ModelError: a model whose residual stream is no sum of writers.
    """
    asked = ScoreOptions.of(options)
    check_method(method, asked.intervention)
    if per == "position" and method not in POSITION_KERNELS:
        raise MethodError(f"{method!r} scores are no sums over positions: use one of {', '.join(POSITION_KERNELS)}")
    if per not in (None, "fact", "position"):
        raise MethodError(f"unknown per {per!r}: use fact or position, or leave it out")
    graph = model.residual.graph(asked.grouped)
    remaining = iter(pairs)
    groupings: dict[str | None, Callable[[Batch], Groups]] = {
        None: one_group,
        "fact": by_example,
        "position": lambda batch: by_position(batch, list(islice(remaining, len(batch)))),
    }
    parts = _batch_scores(model.residual, graph, pairs, method, asked, groupings[per], progress)
    provenance = _provenance(model, method, asked, len(pairs))
    if per == "fact":
        return FactScores(graph, _finite(torch.cat([part.cpu() for part in parts]), model), provenance)
    scores = _finite(sum(parts, start=torch.zeros((), device=model.residual.device)).cpu() / len(pairs), model)
    return (
        EdgeScores(graph, scores[0], provenance)
        if per is None
        else PositionScores(graph, POSITION_GROUPS, scores, provenance)
    )


def score_neurons(
    model: Model, pairs: Sequence[TokenPair], method: str = "eap_ig", *, progress: bool = False, **options: Any
) -> NeuronScores:
    """Score every MLP neuron on clean/corrupted pairs: (ablated - clean) . d loss / d neuron, averaged over examples.

    A neuron's value is what it hands to its output direction, after activation and gate; the score sums over positions.
    Methods are the gradient methods of ``score_edges``: "eap" is attribution patching of neurons (Nanda 2023; Syed et
    al. 2023, arXiv:2310.10348, section 2), the others put another gradient there, "eap_ig" one that is averaged over
    inputs (Hanna et al. 2024, arXiv:2403.17806). Integrating a neuron's own value is another method (knowledge neurons,
    Dai et al. 2022).

    Args:
        options: fields of ``ScoreOptions``; ``grouped`` makes no difference.

    Raises:
        MethodError: as ``score_edges``, or a method that is not one gradient.
        ModelError: MLPs that are no sum over neurons, such as experts, or of different widths.
    """
    asked = ScoreOptions.of(options)
    check_method(method, asked.intervention)
    if method not in GRADIENT_RULES:
        raise MethodError(f"{method!r} gives neurons no scores: use one of {', '.join(GRADIENT_RULES)}")
    decoder, metric, points = model.residual, get_metric(asked.metric), path_points(method, asked.steps, asked.ig_rule)
    batching = asked.batch_size, asked.full_answer
    means = reference_means(decoder, asked.intervention, pairs, *batching, neuron_outputs)
    total = torch.zeros((), device=decoder.device)
    with tqdm(total=len(pairs), desc=f"{method} neuron scores", unit="pair", disable=not progress) as bar:
        for prepared in prepared_batches(decoder, pairs, metric, asked.intervention, *batching):
            ablated = neuron_ablation(decoder, asked.intervention, prepared.batch, means, prepared.prefix)
            total = total + neuron_scores(decoder, prepared, ablated, points, GRADIENT_RULES[method])
            bar.update(len(prepared.batch))
    return NeuronScores(_finite(total.cpu() / len(pairs), model), _provenance(model, method, asked, len(pairs)))


def _batch_scores(
    decoder: Decoder,
    graph: Graph,
    pairs: Sequence[TokenPair],
    method: str,
    asked: ScoreOptions,
    grouping: Callable[[Batch], Groups],
    progress: bool,
) -> Iterator[Float[Tensor, "group writer reader"]]:
    """Sums of scores over each batch's examples, apart for the groups of positions that ``grouping`` names.

    A method outside ``POSITION_KERNELS`` knows no groups and gives one sum.
    """
    intervention = "zero" if method == "flow_routes" else asked.intervention  # it asks for no ablated values
    points = path_points(method, asked.steps, asked.ig_rule)
    batch_size = asked.batch_size if method in POSITION_KERNELS or grouping is one_group else 1
    metric = get_metric(asked.metric)
    n_steps = len(pairs) if method != "exact" else len(pairs) * len(graph.readers)
    with tqdm(total=n_steps, desc=f"{method} scores", unit="pair", disable=not progress) as bar:
        for prepared in prepared_batches(decoder, pairs, metric, intervention, batch_size, asked.full_answer):
            if method == "exact":
                yield exact_scores(decoder, graph, prepared, bar.update)[None]
                continue
            if method == "qk_fix":
                yield qk_fix_scores(decoder, graph, prepared)[None]
            else:
                yield POSITION_KERNELS[method](decoder, graph, prepared, points, grouping(prepared.batch))
            bar.update(len(prepared.batch))


def _provenance(model: Model, method: str, asked: ScoreOptions, n_pairs: int) -> dict[str, Any]:
    metric, reads_only = get_metric(asked.metric), method == "flow_routes"
    return {
        "model": model.name,
        "method": method,
        "steps": asked.steps,
        "ig_rule": asked.ig_rule,
        "metric": None if reads_only else metric.name,
        "unit": "share of the reader's input" if reads_only else metric.unit,
        "intervention": None if reads_only else asked.intervention,
        "n_pairs": n_pairs,
    }


def _finite(scores: Tensor, model: Model) -> Tensor:
    """The scores, all of which are numbers.

    Raises:
        MethodError: some are not.
    """
    if not scores.isfinite().all():
        raise MethodError(
            f"{int((~scores.isfinite()).sum())} scores are not finite: the model overflows in {model.cfg.dtype}; "
            "load it with dtype='float32', or, under zero ablation, use ig_rule 'right' or 'midpoint' "
            "('left' takes a gradient at a zero stream, where a norm has none)"
        )
    return scores
