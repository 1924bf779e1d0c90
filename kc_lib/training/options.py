"""Which checkpoints, which prompts and which measures, and what the notebook circuits_over_training asks for."""

from __future__ import annotations

from dataclasses import dataclass

from kc_lib.circuits.options import METHODS, RANKINGS
from kc_lib.errors import MethodError, ModelError, TaskError
from kc_lib.heads.options import SCORES
from kc_lib.models.options import DTYPES
from kc_lib.options import Notebook, Options, option

TRAINING_MEASURES = ("behaviour", "circuit", "direct", "heads", "consistency")
METRICS_OF_SETS = {True: "probability_difference", False: "logit_difference"}  # whether a task has sets of answers
METRICS = tuple(METRICS_OF_SETS.values())
OWN_METRIC = "none: probability_difference for tasks with several right answers, else logit_difference"


@dataclass(frozen=True)
class ScheduleOptions(Options):
    """Keywords of ``checkpoints_of``."""

    error = ModelError

    schedule: str = option("all", 'all, linear, exponential, exp_plus_detail, sparse; or a list of steps, as "0 512 1000"')
    tokens_per_step: int | None = option(None, "none: known of Pythia, else time is in steps", least=1)


@dataclass(frozen=True)
class LoadOptions(Options):
    """Keywords of ``load_checkpoint``."""

    error = ModelError

    device: str | None = option(None, "none: CUDA where there is one", determines=False)
    dtype: str = option("float32", "of the weights; scores are float32 whatever the weights are", among=DTYPES)
    retries: int = option(3, "of a download that fails", least=0, determines=False)
    keep_files: bool = option(True, "false: one downloaded checkpoint at a time is on disk", determines=False)


@dataclass(frozen=True)
class DrawOptions(Options):
    """Keywords of ``draw_tasks``."""

    error = TaskError

    seeds: int = option(3, "draws of the prompts", least=1)
    n_prompts: int = option(64, "of a draw, half of them held out", least=4)
    known_only: bool = option(False, "keep prompts that the last checkpoint answers ...")
    known_rank: int = option(1, "... that is, whose answer has at most this rank among all tokens", least=1)
    prepend_bos: bool | None = option(None, "none: TransformerLens's default for the model, as a rule true")
    seed: int = option(0, "of the first draw")


@dataclass(frozen=True)
class CircuitOptions(Options):
    """Keywords of ``circuit_rows`` and ``consistency_rows``: how a circuit is found, and beside what it is evaluated."""

    method: str = option("eap_ig", "edge attribution, as in circuit_discovery", among=METHODS)
    steps: int = option(5, "of integrated gradients", least=1)
    metric: str | None = option(None, OWN_METRIC, among=METRICS)
    faithfulness: float = option(0.8, "that the smallest circuit keeps on the prompts it is found on", above=0, most=1)
    selection: str = option("greedy", "ranking of edges", among=RANKINGS)
    minimal_effect: float = option(0.05, "of the prompts, in units of the metric: below it a circuit is undefined", above=0)
    n_random: int = option(3, "random circuits of the same size", least=1)
    n_resamples: int = option(5, "of the prompts: how much of the circuit depends on them", least=2)
    batch_size: int = option(32, "pairs scored at once", least=1, determines=False)


@dataclass(frozen=True)
class MeasureOptions(CircuitOptions):
    """Keywords of ``training_measures``."""

    measures: list[str] = option(" ".join(TRAINING_MEASURES), "what is measured", among=TRAINING_MEASURES)
    scores: list[str] = option("all", "head scores by name; all: those the model allows", among=("all", *SCORES))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.measures:
            raise MethodError(f"nothing is no measure over training: use some of {', '.join(TRAINING_MEASURES)}")


@dataclass(frozen=True)
class SwapOptions(Options):
    """Keywords of ``swap_measures``."""

    swap_heads: int = option(6, "heads of the last checkpoint put into each one, those of largest effect; 0: none", least=0)
    components: list[str] | None = option(None, "instead of swap_heads: which heads and MLPs, as a3.h1 m2")
    metric: str | None = option(None, OWN_METRIC, among=METRICS)
    n_null: int = option(3, "other components that are put in the same place, one at a time", least=1)
    batch_size: int = option(64, "prompts at once", least=1, determines=False)


@dataclass(frozen=True)
class TrainingCell(Options):
    """The first cell of the notebook circuits_over_training."""

    model: str = option(
        "nano",
        "nano, a hub name with revisions step<N>, a folder of step<N> folders; or several model folders",
        determines=False,
    )
    schedule: str = option("all", 'all, linear, exponential, exp_plus_detail, sparse; or a list of steps, as "0 512 1000"')
    tasks: list[str] = option(
        "ioi country_capital agreement", "of ioi, greater_than, pronoun, agreement, and the relations", determines=False
    )
    seeds: int = option(3, "draws of the prompts", least=1)
    n_prompts: int = option(64, "of a draw, half of them held out", least=4)
    measures: list[str] = option(" ".join(TRAINING_MEASURES), "what is measured", among=TRAINING_MEASURES)
    metric: str | None = option(None, OWN_METRIC, among=METRICS)
    faithfulness: float = option(0.8, "that the smallest circuit keeps on the prompts it is found on", above=0, most=1)
    swap_heads: int = option(6, "heads of the last checkpoint put into each one, those of largest effect; 0: none", least=0)
    compare: list[str] | None = option(None, "training.parquet of other models: circuit size against model size")
    seed: int = option(0, "of the first draw")
    out: str | None = option(None, "folder for results; none: outputs/", determines=False)


NOTEBOOKS = {
    "circuits_over_training": Notebook(
        cell=TrainingCell,
        groups={
            "checkpoints": ScheduleOptions,
            "load": LoadOptions,
            "draw": DrawOptions,
            "measure": MeasureOptions,
            "swap": SwapOptions,
        },
    ),
}
