"""``python -m tools.train_nano``: train the nano models and say whether they are the ones that come with the project."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import transformers.utils.logging as transformers_logging
import typer
from rich.console import Console

from kc_lib.models.shipped import CAUSAL, MANIFEST, MASKED, MODELS, read_manifest
from tools.train_nano.build import build, comparison, merged, write_manifest
from tools.train_nano.train import CAUSAL_PLAN, MASKED_PLAN


class Model(StrEnum):
    """The models that can be trained."""

    CAUSAL = CAUSAL
    MASKED = MASKED


def main(
    out: Annotated[Path, typer.Option(help="folder for the models")] = MODELS,
    only: Annotated[Model | None, typer.Option(help="train this one and leave the other as it is")] = None,
    seed: Annotated[int, typer.Option(help="seed of weights and of the order of sentences; another one needs --out")] = 0,
    threads: Annotated[int, typer.Option(help="torch's; other numbers give slightly other weights")] = 2,
) -> None:
    """Train the nano models (minutes) into a folder, replacing those there once all are trained."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    transformers_logging.disable_progress_bar()
    if seed != CAUSAL_PLAN.seed and out.resolve() == MODELS.resolve():
        raise typer.BadParameter(f"seed {seed} would replace the models that come with the project: give another --out")
    known = read_manifest() if (MODELS / MANIFEST).exists() else None
    out.mkdir(parents=True, exist_ok=True)
    names = (CAUSAL, MASKED) if only is None else (only.value,)
    with tempfile.TemporaryDirectory(prefix=".training-", dir=out) as folder:
        draft = Path(folder)
        made = build(
            draft,
            names=names,
            threads=threads,
            causal_plan=replace(CAUSAL_PLAN, seed=seed),
            masked_plan=replace(MASKED_PLAN, seed=seed),
            say=console.print,
        )
        if only is not None and (out / MANIFEST).exists():
            write_manifest(merged(made, read_manifest(out)), draft)
        for name in names:
            shutil.rmtree(out / name, ignore_errors=True)
            os.replace(draft / name, out / name)
        os.replace(draft / MANIFEST, out / MANIFEST)
    for line in ["there was no manifest to compare with"] if known is None else comparison(known, made):
        console.print(line)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    console.print(f"{size / 1e6:.1f} MB in {out}")


typer.run(main)
