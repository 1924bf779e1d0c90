"""When behaviours and kinds of heads appear in several trainings of nano, which differ in their seed alone.

    python -m tools.train_nano --only nano --seed 1 --out outputs/nano_seed1
    python -m tools.train_nano --only nano --seed 2 --out outputs/nano_seed2
    python bench/nano_seeds.py data/models outputs/nano_seed1 outputs/nano_seed2

Prints, as a Markdown table, for every training the first checkpoint at which a behaviour reaches 33% of its maximum, and for
every kind of head the first one at which a head counts and how many heads count at the last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kc_lib.heads.options import SCORES
from kc_lib.models.checkpoints import checkpoints_of, load_checkpoint
from kc_lib.models.shipped import CAUSAL
from kc_lib.training.drawn import draw_tasks, metric_of
from kc_lib.training.measures import training_measures
from kc_lib.training.over_training import over_training
from kc_lib.training.result import TrainingResult, emergence

TASKS = ("agreement", "greater_than", "pronoun", "country_capital", "ioi")


def main(
    folders: Annotated[list[Path], typer.Argument(help="folders that 'python -m tools.train_nano --out' wrote")],
    seeds: Annotated[int, typer.Option(help="draws of the prompts")] = 1,
) -> None:
    """Measure every training, and print the table."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    measures = training_measures(["behaviour", "heads"])
    results, metrics = [], {}
    for folder in folders:
        checkpoints = checkpoints_of(str(folder / CAUSAL))
        drawn = draw_tasks(TASKS, load_checkpoint(checkpoints[-1], device="cpu"), seeds=seeds)
        metrics |= {draw.name: metric_of(draw, None) for draw in drawn.draws}
        results.append(over_training(checkpoints, drawn, measures, device="cpu", progress=True))
    console.print(f"| | {' | '.join(map(str, folders))} |")
    console.print(f"|---|{'---|' * len(folders)}")
    for task in TASKS:
        console.print(f"| {task} | {' | '.join(behaviour_step(result, task, metrics[task]) for result in results)} |")
    for score in SCORES:
        console.print(f"| `{score}` heads | {' | '.join(head_steps(result, score) for result in results)} |")


def behaviour_step(result: TrainingResult, task: str, metric: str) -> str:
    """The first step at which the behaviour reaches 33% of its maximum."""
    rows = emergence(result)
    own = rows[(rows["task"] == task) & (rows["quantity"] == metric)]
    (step,) = own[own["measure"] == "behaviour"]["step"]
    return f"{step:.0f}"


def head_steps(result: TrainingResult, score: str) -> str:
    """The first step at which a head counts, and the heads that do so at the last one."""
    rows = result.of("heads", score)
    passing = rows[rows["passes"].fillna(False).astype(bool)]
    if passing.empty:
        return "none"
    last = passing[passing["step"] == result.steps[-1]]["part"].nunique()
    return f"{passing['step'].min()} ({last} at last)"


if __name__ == "__main__":
    typer.run(main)
