"""How a task's facts are asked, which of them are kept, and how they are split."""

from __future__ import annotations

from dataclasses import dataclass

from kc_lib.errors import TaskError
from kc_lib.options import Options, option

POSITION_CLASSES = (  # of a fact's tokens, from its subject on
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first token after",
    "further tokens",
    "last token",
)


@dataclass(frozen=True)
class TaskOptions(Options):
    """Keywords of ``load_task``."""

    error = TaskError

    template: int = option(0, "which of a relation's sentences", least=0)
    reverse: bool = option(False, "ask a relation from its objects")
    known_only: bool = option(True, "keep facts the model knows ...")
    known_rank: int = option(1, "... that is, whose answer has at most this rank among all tokens", least=1)
    max_facts: int | None = option(None, "at most so many, drawn by seed", least=1)
    test_fraction: float = option(0.5, "share of the facts held out; 0: every pair serves discovery", least=0, most=1)
    validation_fraction: float = option(0.0, "share of the facts held out for choices", least=0, most=1)
    prepend_bos: bool | None = option(None, "none: TransformerLens's default for the model, as a rule true")
    seed: int = option(0, "of the draw, the split and the partners")
    batch_size: int = option(16, "prompts at once", least=1, determines=False)


@dataclass(frozen=True)
class FactOptions(Options):
    """Keywords of ``load_facts``."""

    error = TaskError

    template: int = option(0, "which of a relation's sentences", least=0)
    reverse: bool = option(False, "ask a relation from its objects")
    prepend_bos: bool | None = option(None, "none: TransformerLens's default for the model, as a rule true")
    seed: int = option(0, "of generated tasks")
