"""What head classes, their ablation and the general head scores ask for."""

from __future__ import annotations

from dataclasses import dataclass

from kc_lib.errors import MethodError
from kc_lib.models.options import ModelOptions
from kc_lib.options import Notebook, Options, option
from kc_lib.tasks.options import TaskOptions

REPEATS = ("previous_token", "duplicate_token", "induction")
COPIES = ("name_mover", "negative_name_mover")
SCORES = (*REPEATS, *COPIES, "copy_suppression", "s_inhibition", "successor")
RELATIONS = "country_capital country_language verb_past_tense adjective_comparative"


@dataclass(frozen=True)
class ClassOptions(Options):
    """Options of ``classify_heads``."""

    k: int = option(10, "tokens a head raises most that count as what it writes", least=1)
    level: float = option(0.01, "largest corrected p of a classified head", above=0, most=1)
    least_attention: float = option(
        0.1, "share of attention on the subject (movers), on the relation's tokens (relation heads)", least=0, most=1
    )
    n_null: int = option(30_000, "draws of the random baselines", least=1)
    batch_size: int = option(8, "facts at once", least=1, determines=False)
    seed: int = option(0, "of the random baselines")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level == 1:
            raise MethodError("level is 1, at which every head passes; it must be below 1")


@dataclass(frozen=True)
class AblationOptions(Options):
    """Options of ``ablate_heads``."""

    n_random: int = option(19, "random sets of heads beside each class; 19 are the fewest that give a p of 0.05", least=0)
    batch_size: int = option(16, "facts at once", least=1, determines=False)
    seed: int = option(0, "of the random sets")


@dataclass(frozen=True)
class HeadScoreOptions(Options):
    """Options of ``head_scores``."""

    scores: list[str] = option("all", "general head scores by name; none leaves them out", among=("all", "none", *SCORES))
    text: str | None = option(None, "natural text for copy suppression, or a file of it; none: the project's")
    seed: int = option(0, "of every score's draws")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scores:
            raise MethodError(f"no head score is asked for: name some of {', '.join(SCORES)}, or all")


@dataclass(frozen=True)
class ClassificationCell(Options):
    """First cell of the notebook head_classification."""

    model: str = option("smollm2", "embedded model, local folder or hub name", determines=False)
    relations: list[str] = option(RELATIONS, "names or LRE .json files", determines=False)
    max_facts: int | None = option(None, "of every relation at most so many facts, drawn by seed", least=1)
    k: int = option(10, "tokens a head raises most that count as what it writes", least=1)
    level: float = option(0.01, "largest corrected p of a classified head", above=0, most=1)
    least_attention: float = option(
        0.1, "share of attention on the subject (movers), on the relation's tokens (relation heads)", least=0, most=1
    )
    n_random: int = option(19, "random sets of heads beside each class; 19 are the fewest that give a p of 0.05", least=0)
    scores: list[str] = option("all", "general head scores by name; none leaves them out", among=("all", "none", *SCORES))
    batch_size: int = option(8, "facts at once; ablations run on twice as many", least=1, determines=False)
    seed: int = option(0, "of the split, random baselines and intervals")
    out: str | None = option(None, "folder for results; none: outputs/", determines=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.relations:
            raise MethodError("relations is empty; name at least one relation of the project, or a file")


NOTEBOOKS = {
    "head_classification": Notebook(
        cell=ClassificationCell,
        groups={"model": ModelOptions, "task": TaskOptions, "classes": ClassOptions, "scores": HeadScoreOptions},
    )
}
