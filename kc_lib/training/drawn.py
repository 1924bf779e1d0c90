"""Several tasks, each drawn several times: the prompts that the checkpoints of a training are compared on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kc_lib.errors import TaskError
from kc_lib.models.model import Model
from kc_lib.options import names_in
from kc_lib.results import hash_of
from kc_lib.tasks.task import Task, load_task
from kc_lib.training.options import METRICS_OF_SETS, DrawOptions


@dataclass(frozen=True)
class DrawnTask:
    """One draw of a task's prompts."""

    name: str
    seed: int
    task: Task


@dataclass(frozen=True)
class DrawnTasks:
    """Every draw of every task; what a run asks of its task (name, hash, report, prepend_bos) it has as well."""

    draws: tuple[DrawnTask, ...]

    @property
    def names(self) -> list[str]:
        """The tasks, in the order given."""
        return list(dict.fromkeys(draw.name for draw in self.draws))

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(draw.seed for draw in self.draws))

    @property
    def name(self) -> str:
        return "+".join(dict.fromkeys(draw.task.name for draw in self.draws))

    @property
    def prepend_bos(self) -> bool:
        return self.draws[0].task.prepend_bos

    @property
    def report(self) -> Mapping[str, int]:
        """How many draws there are, and how many pairs in all of them."""
        n_pairs = sum(len(draw.task.discovery) + len(draw.task.test) for draw in self.draws)
        return {"draws": len(self.draws), "used": n_pairs}

    @property
    def hash(self) -> str:
        """Hash of every pair, its split, task and seed."""
        return hash_of([[draw.name, draw.seed, draw.task.hash] for draw in self.draws])


def draw_tasks(names: str | Sequence[str], model: Model, **options: Any) -> DrawnTasks:
    """``seeds`` draws of ``n_prompts`` pairs of each task, half of them held out.

    A relation with fewer facts than are asked for gives the same facts in every draw, with other partners and another half
    held out.

    Args:
        names: tasks as ``load_task`` takes them, as a list or in one text ("ioi agreement").
        model: gives the tokenizer, and with ``known_only`` says which answers are known: the last checkpoint.
        options: fields of ``DrawOptions``.

    Raises:
        TaskError: no tasks, one given twice, an option out of range, or what ``load_task`` refuses.
    """
    asked = DrawOptions.of(options)
    names = names_in(names) if isinstance(names, str) else names
    if not names:
        raise TaskError("no tasks are given: name some, as 'ioi country_capital'")
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise TaskError(f"task {twice[0]!r} is given twice: name each once")
    loading = {name: asked[name] for name in ("known_only", "known_rank", "prepend_bos")} | {"max_facts": asked.n_prompts}
    seeds = range(asked.seed, asked.seed + asked.seeds)
    draws = [DrawnTask(name, seed, load_task(name, model, seed=seed, **loading)) for name in names for seed in seeds]
    return DrawnTasks(tuple(draws))


def metric_of(draw: DrawnTask, metric: str | None) -> str:
    """The metric asked for, or the task's own."""
    return metric or METRICS_OF_SETS[any(pair.right for pair in draw.task.discovery)]
