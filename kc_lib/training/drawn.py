"""Several tasks, each drawn several times: the prompts that the checkpoints of a training are compared on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kc_lib.errors import TaskError
from kc_lib.models.model import Model
from kc_lib.tasks.task import Task, load_task


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
        rows = [[draw.name, draw.seed, draw.task.hash] for draw in self.draws]
        return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()


def draw_tasks(
    names: Sequence[str],
    model: Model,
    *,
    seeds: int = 3,
    n_prompts: int = 64,
    seed: int = 0,
    prepend_bos: bool | None = None,
    known_only: bool = False,
    known_rank: int = 1,
) -> DrawnTasks:
    """``seeds`` draws of ``n_prompts`` pairs of each task, half of them held out; other arguments as ``load_task`` takes.

    ``model`` gives the tokenizer, and with ``known_only`` says which answers are known: the last checkpoint. A relation with
    fewer facts than are asked for gives the same facts in every draw, with other partners and another half held out.

    Raises:
        TaskError: no tasks, one given twice, numbers out of range, or what ``load_task`` refuses.
    """
    if not names:
        raise TaskError("no tasks are given: name some, as 'ioi country_capital'")
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise TaskError(f"task {twice[0]!r} is given twice: name each once")
    for what, number, least in (("seeds", seeds, 1), ("n_prompts", n_prompts, 4)):
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise TaskError(f"{what} is {number!r}; it must be a whole number, at least {least}")
    draws = []
    for name in names:
        for draw in range(seed, seed + seeds):
            task = load_task(
                name,
                model,
                known_only=known_only,
                known_rank=known_rank,
                max_facts=n_prompts,
                prepend_bos=prepend_bos,
                seed=draw,
            )
            draws.append(DrawnTask(name, draw, task))
    return DrawnTasks(tuple(draws))
