"""What edge scores, ACDC and the selection of edges take, and what the notebooks about circuits ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kc_lib.errors import MethodError
from kc_lib.models.options import ModelOptions
from kc_lib.options import Notebook, Options, option
from kc_lib.tasks.options import TaskOptions

if TYPE_CHECKING:
    from kc_lib.metrics import Metric

GRADIENT_METHODS = ("eap", "eap_ig", "clean_corrupted", "relp", "gim")  # one gradient, so that scores add up to nodes
METHODS = (*GRADIENT_METHODS, "eap_ig_activations", "flow_routes", "qk_fix", "exact")
METRICS = ("logit_difference", "log_probability", "probability", "probability_difference", "kl", "match_nll")
INTERVENTIONS = ("patching", "zero", "mean", "positional_mean")
IG_RULES = ("left", "right", "midpoint")
RANKINGS = ("absolute", "signed", "greedy")  # selections whose circuits contain each other
SELECTIONS = ("absolute", "signed", "greedy", "threshold", "bootstrap", "faithful")


def check_method(method: str, intervention: str = "patching") -> None:
    """Raises MethodError for a method that does not exist, or that another intervention does not fit."""
    if method not in METHODS:
        raise MethodError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    if method == "clean_corrupted" and intervention != "patching":
        raise MethodError(
            f"clean_corrupted runs the corrupted prompts: it needs intervention='patching', not {intervention!r}"
        )


def check_size(size: int | float) -> None:
    """Raises MethodError for a size that is neither a share nor a whole number of edges."""
    if size > 1 and size != int(size):
        raise MethodError(f"size is {size}; it must be a whole number of edges, or a share of them up to 1.0")


@dataclass(frozen=True)
class ScoreOptions(Options):
    """Options of ``score_edges``."""

    steps: int = option(5, "interpolation steps of integrated gradients", least=1)
    ig_rule: str = option("left", "where a step takes its gradient; left is as published", among=IG_RULES)
    metric: str | Metric = option("logit_difference", "what is measured at the answer", among=METRICS)
    intervention: str = option("patching", "what an edge carries when it is ablated", among=INTERVENTIONS)
    grouped: bool = option(True, "one key and value reader per key-value head; false: per query head, as published code has")
    full_answer: bool = option(False, "all answer tokens, teacher-forced, instead of the first")
    batch_size: int = option(8, "pairs scored at once", least=1, determines=False)


@dataclass(frozen=True)
class AcdcOptions(Options):
    """Options of ``acdc``."""

    tau: float = option(0.01, "an edge stays if removing it raises the loss by at least this, in the metric's unit", above=0)
    metric: str | Metric = option("match_nll", "what is measured at the answer", among=METRICS)
    intervention: str = option("zero", "what a removed edge carries", among=INTERVENTIONS)
    order: str = option(
        "reverse", "of a reader's writers: from the latest, from the input, or random", among=("reverse", "normal", "random")
    )
    absolute: bool = option(False, "an edge stays as well if removing it lowers the loss by tau or more")
    normalize: str = option(
        "answer", "loss per answer token; positions: diluted by prompt length, as published", among=("answer", "positions")
    )
    skip: list[str] = option((), "nodes (a3.h5, m2, logits) whose incoming edges stay untested")
    prefilter: int | None = option(None, "start from so many edges of EAP-IG instead of all", least=1)
    grouped: bool = option(True, "one key and value reader per key-value head; false: per query head, as published code has")
    full_answer: bool = option(False, "all answer tokens, teacher-forced, instead of the first")
    seed: int = option(0, "of the random order")
    edges_at_once: int = option(32, "tests of a batch", least=1, determines=False)


@dataclass(frozen=True)
class SelectOptions(Options):
    """Keywords of ``select``; see the head of ``selection.py``."""

    selection: str = option("absolute", "which edges to keep; faithful: the smallest circuit that is", among=SELECTIONS)
    size: int | float = option(0.005, "share of the edges, or a number of edges", least=0)
    threshold: float | None = option(None, "least |score| of an edge, for selection threshold", least=0)
    fill: bool = option(True, "size counts edges after pruning; false: prune the top n, as published")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.size)
        if self.selection == "threshold" and self.threshold is None:
            raise MethodError("selection 'threshold' needs a threshold: give a number, at least 0")

    @property
    def ranking(self) -> str:
        """How edges are ranked where circuits of several sizes are compared."""
        return self.selection if self.selection in RANKINGS else "absolute"


@dataclass(frozen=True)
class ChooseOptions(SelectOptions):
    """Options of ``choose``, which takes selections that need more than scores."""

    faithfulness: float = option(0.8, "on the discovery facts, for selection faithful", above=0)
    seed: int = option(0, "of the resamples, for selection bootstrap")


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """How circuits are run: keywords of ``evaluate``, ``metric_values`` and ``minimality``."""

    metric: str | Metric = option("logit_difference", "what is measured at the answer", among=METRICS)
    intervention: str = option("patching", "what edges outside the circuit carry", among=INTERVENTIONS)
    full_answer: bool = option(False, "all answer tokens, teacher-forced, instead of the first")
    batch_size: int = option(32, "facts at once", least=1, determines=False)
    seed: int = option(0, "of the resamples of facts")


@dataclass(frozen=True)
class SmallestOptions(EvaluateOptions):
    """Keywords of ``smallest_faithful``."""

    faithfulness: float = option(0.8, "least faithfulness to keep", above=0)
    selection: str = option("absolute", "how edges are ranked", among=RANKINGS)
    resolution: float = option(0.02, "stop where two circuits differ by at most this share of their edges", least=0)
    at_once: int = option(8, "sizes tried in one pass", least=1)
    stable: bool = option(False, "the next larger circuit tried must suffice as well")


@dataclass(frozen=True)
class VerdictOptions(Options):
    """Bars of ``verdict``.

    Sources: ``faithful_within`` is the 80% of Tigges et al. 2024 (arXiv:2407.10827), and no more than that beyond the model
    (as MIB's CMD counts it). ``stable_from`` and ``stable_facts`` are the bar of 0.8 with n >= 100 of Méloux et al. 2025
    (arXiv:2510.00845). No bar is published for ``complete_below`` (what the bar for faithful leaves) and for
    ``minimal_share`` (a majority). It takes 19 draws to get below a ``significance`` of 0.05.
    """

    faithful_within: float = option(0.2, "faithful: this near to 1", least=0)
    complete_below: float = option(0.2, "complete: faithfulness without the circuit is at most this")
    minimal_share: float = option(0.5, "minimal: more than this share of the edges has an effect", least=0, most=1)
    stable_from: float = option(0.8, "stable: mean overlap over resamples is at least this ...", least=0, most=1)
    stable_facts: int = option(100, "... with at least so many facts", least=1)
    significance: float = option(0.05, "better than random: p is at most this", least=0, most=1)


@dataclass(frozen=True)
class DiscoveryCell(Options):
    """First cell of the notebook circuit_discovery."""

    model: str = option("smollm2", "embedded model, local folder or hub name", determines=False)
    task: str = option("country_capital", 'relation, "ioi", or a file of facts or pairs', determines=False)
    method: str = option("eap_ig", "how edges are found", among=(*METHODS, "acdc"))
    metric: str = option("logit_difference", "what is measured at the answer", among=METRICS)
    intervention: str = option("patching", "what an ablated edge carries", among=INTERVENTIONS)
    full_answer: bool = option(False, "all answer tokens, teacher-forced, instead of the first")
    selection: str = option("absolute", "which of the scored edges; acdc needs none", among=SELECTIONS)
    size: int | float = option(0.005, "share of the edges, or a number of edges", least=0)
    n_random: int = option(10, "random circuits of the same size", least=0)
    seed: int = option(0, "of splits, random circuits and intervals")
    out: str | None = option(None, "folder for results; none: outputs/", determines=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "acdc":
            check_method(self.method, self.intervention)


@dataclass(frozen=True)
class StabilityOptions(Options):
    """Which circuits the notebook circuit_evaluation compares with the one it found."""

    n_resamples: int = option(10, "resamples of the facts", least=2)
    other_methods: list[str] = option(("eap", "relp", "gim"), "methods whose circuits are compared", among=METHODS)


@dataclass(frozen=True)
class EvaluationCell(Options):
    """First cell of the notebook circuit_evaluation."""

    model: str = option("smollm2", "embedded model, local folder or hub name", determines=False)
    task: str = option("country_capital", 'relation, "ioi", or a file of facts or pairs', determines=False)
    circuit: str | None = option(
        None, "a circuit file, ours or EAP-IG's json; none: discover one by the method", determines=False
    )
    method: str = option("eap_ig", "of the ranking and of the discovered circuit", among=METHODS)
    size: int | float = option(0.005, "share of the edges, or a number of edges", least=0)
    metric: str = option("logit_difference", "what is measured at the answer", among=METRICS)
    intervention: str = option("patching", "what edges outside the circuit carry", among=INTERVENTIONS)
    full_answer: bool = option(False, "all answer tokens, teacher-forced, instead of the first")
    n_random: int = option(19, "random circuits of each kind; 19 are the fewest that can give a p of 0.05", least=1)
    n_edges: int = option(24, "edges taken out one by one", least=1)
    seed: int = option(0, "of splits, random circuits, samples and intervals")
    out: str | None = option(None, "folder for results; none: outputs/", determines=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_method(self.method, self.intervention)


NOTEBOOKS = {
    "circuit_evaluation": Notebook(
        cell=EvaluationCell,
        groups={
            "model": ModelOptions,
            "task": TaskOptions,
            "score": ScoreOptions,
            "select": SelectOptions,
            "evaluate": EvaluateOptions,
            "stability": StabilityOptions,
            "verdict": VerdictOptions,
        },
    ),
    "circuit_discovery": Notebook(
        cell=DiscoveryCell,
        groups={
            "model": ModelOptions,
            "task": TaskOptions,
            "score": ScoreOptions,
            "acdc": AcdcOptions,
            "select": ChooseOptions,
            "evaluate": EvaluateOptions,
        },
    ),
}
