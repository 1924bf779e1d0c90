"""Discovery beyond one ranking: ensembles of several methods' scores, and circuits that need more than scores.

Mondorf et al. 2025 (arXiv:2510.06811) combine the scores that several methods give an edge by mean, minimum or maximum
("parallel ensembling") and find the mean best: methods fail on different edges. The minimum keeps what every method
finds, the maximum what any method finds.

They combine raw scores of methods whose units agree (EAP and its two integrated-gradients forms), or first divide a
node's incoming scores by their sum. Here each method's scores are standardised over the graph's edges, so that methods of
any unit have an equal say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.options import ChooseOptions, ScoreOptions
from kc_lib.circuits.scores import EdgeScores
from kc_lib.circuits.selection import select, select_bootstrap
from kc_lib.circuits.smallest import smallest_faithful
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit
from kc_lib.models.model import Model
from kc_lib.tasks.batches import TokenPair

COMBINATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda standardised: standardised.mean(0),
    "min": lambda standardised: standardised.amin(0),
    "max": lambda standardised: standardised.amax(0),
}


def choose(
    model: Model, pairs: Sequence[TokenPair], scores: EdgeScores, asked: ChooseOptions, scoring: ScoreOptions
) -> Circuit:
    """The circuit that any selection makes of scores, also those that need more than scores.

    Args:
        scoring: how the scores were found on the pairs. Selection "bootstrap" scores them again, each fact by itself;
            "faithful" runs circuits under the same metric and intervention.

    Raises:
        MethodError: as ``select``, ``select_bootstrap`` or ``smallest_faithful``.
    """
    if asked.selection == "bootstrap":
        method = str(scores.provenance["method"])
        return select_bootstrap(score_edges(model, pairs, method, per="fact", **scoring), seed=asked.seed)
    if asked.selection == "faithful":
        same = {name: scoring[name] for name in ("metric", "intervention", "full_answer")}
        return smallest_faithful(model, scores, pairs, asked.faithfulness, **same)[0]
    return select(scores, asked.selection, asked.size, asked.threshold, asked.fill)


def ensemble(scores: Sequence[EdgeScores], how: str, absolute: bool = False) -> EdgeScores:
    """The mean, minimum or maximum of several methods' standardised scores, in standard deviations.

    A standardised score is ``(score - mean) / standard deviation`` over the graph's edges. It is 0 at the average edge, so
    select by ``selection="signed"`` (largest first), not by absolute value.

    Args:
        absolute: standardise ``|score|`` instead: how much an edge matters, whichever way.

    Raises:
        MethodError: unknown combination, no scores, scores of different graphs or models, or scores that are all equal or
            not finite.
    """
    if how not in COMBINATIONS:
        raise MethodError(f"unknown combination {how!r}: use one of {', '.join(COMBINATIONS)}")
    if not scores:
        raise MethodError("an ensemble needs the scores of at least one method; none were given")
    graph = scores[0].graph
    for other in scores[1:]:
        if other.graph != graph:
            raise MethodError(f"scores of different graphs cannot be combined: {graph} and {other.graph}")
    models = sorted({str(one.provenance["model"]) for one in scores if "model" in one.provenance})
    if len(models) > 1:
        raise MethodError(f"scores of different models cannot be combined: {', '.join(models)}")
    standardised = torch.stack([_standardised(one, absolute) for one in scores])
    combined = torch.zeros(graph.edges.shape)
    combined[graph.edges] = COMBINATIONS[how](standardised)
    provenance: dict[str, Any] = {
        "method": f"ensemble_{how}",
        "absolute": absolute,
        "unit": "standard deviations",
        "members": [dict(one.provenance) for one in scores],
    }
    if models:
        provenance["model"] = models[0]
    return EdgeScores(graph, combined, provenance)


def _standardised(scores: EdgeScores, absolute: bool) -> Float[Tensor, " edge"]:
    values = scores.scores[scores.graph.edges].double()
    values = values.abs() if absolute else values
    spread = values.std(correction=0)
    name = scores.provenance.get("method", "one of the methods")
    if not values.isfinite().all():
        raise MethodError(f"scores of {name} are not finite and cannot be standardised: score the edges again in float32")
    if spread <= 1e-12 * values.abs().amax():
        raise MethodError(f"scores of {name} are all equal, so they rank nothing: leave that method out")
    return ((values - values.mean()) / spread).float()
