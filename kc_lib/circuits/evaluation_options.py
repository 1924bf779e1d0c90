"""What evaluating a circuit asks for, and the parameters of the notebook that does it."""

from __future__ import annotations

from dataclasses import dataclass

from kc_lib.options import Options, option

METRIC_NAMES = ("logit_difference", "log_probability", "probability", "probability_difference", "kl", "match_nll")
INTERVENTIONS = ("patching", "zero", "mean", "positional_mean")
RANKINGS = ("absolute", "signed", "greedy")  # selections whose circuits contain each other


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """How circuits are run: keywords of ``evaluate``, ``metric_values`` and ``minimality``."""

    metric: str = option("logit_difference", "what is measured at the answer", among=METRIC_NAMES)
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
