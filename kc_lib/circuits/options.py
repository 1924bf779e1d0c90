"""The names of the attribution methods, what each of them needs, and the options they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kc_lib.errors import MethodError
from kc_lib.metrics import Metric, get_metric
from kc_lib.models.model import Model
from kc_lib.residual.activations import INTERVENTIONS
from kc_lib.residual.backward_rules import GIM, NATIVE, RELP, BackwardRules

# methods that multiply a difference of activations with one averaged gradient, and the rules of its backward pass
GRADIENT_RULES: dict[str, BackwardRules] = {
    "eap": NATIVE,
    "eap_ig": NATIVE,
    "clean_corrupted": NATIVE,
    "relp": RELP,
    "gim": GIM,
}
METHODS = (*GRADIENT_RULES, "eap_ig_activations", "flow_routes", "qk_fix", "exact")
FIXED_POINTS: dict[str, tuple[float, ...]] = {
    "eap": (1.0,),
    "relp": (1.0,),
    "gim": (1.0,),
    "qk_fix": (1.0,),
    "clean_corrupted": (0.0, 1.0),
    "flow_routes": (),
    "exact": (),
}
IG_RULES: dict[str, Callable[[int, int], float]] = {
    "left": lambda k, m: k / m,
    "right": lambda k, m: (k + 1) / m,
    "midpoint": lambda k, m: (k + 0.5) / m,
}


def path_points(method: str, steps: int = 5, ig_rule: str = "left") -> list[float]:
    """Where on the way from the ablated (0) to the clean input or activation (1) a method takes its gradients, if any."""
    if method in FIXED_POINTS:
        return list(FIXED_POINTS[method])
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


@dataclass(frozen=True)
class Options:
    """How scores are found; the same for edges, facts, groups of positions and neurons.

    Raises:
        MethodError: as ``check_attribution``.
    """

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

    def provenance(self, model: Model, n_pairs: int) -> dict[str, Any]:
        reads_only = self.method == "flow_routes"
        return {
            "model": model.name,
            "method": self.method,
            "steps": self.steps,
            "ig_rule": self.ig_rule,
            "metric": None if reads_only else self.metric.name,
            "unit": "share of the reader's input" if reads_only else self.metric.unit,
            "intervention": None if reads_only else self.intervention,
            "n_pairs": n_pairs,
        }


def finite(scores: Tensor, model: Model) -> Tensor:
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
