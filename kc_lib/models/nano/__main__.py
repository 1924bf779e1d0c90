"""``python -m kc_lib.models.nano``: train the nano models and say whether they are the ones that come with the project."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import transformers.utils.logging as transformers_logging
import typer
from rich.console import Console

from kc_lib.models.nano.build import build, comparison
from kc_lib.models.nano.shipped import CAUSAL, MANIFEST, MASKED, MODELS, read_manifest


def main(
    out: Annotated[Path, typer.Option(help="folder for the models")] = MODELS,
    threads: Annotated[int, typer.Option(help="threads of torch; other numbers give slightly other weights")] = 2,
) -> None:
    """Train the nano models (minutes) into a folder, replacing those there once all are trained."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    transformers_logging.disable_progress_bar()
    known = read_manifest() if (MODELS / MANIFEST).exists() else None
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".training-", dir=out) as folder:
        draft = Path(folder)
        made = build(draft, threads=threads, say=console.print)
        for name in (CAUSAL, MASKED, MANIFEST):
            shutil.rmtree(out / name, ignore_errors=True)
            os.replace(draft / name, out / name)
    for line in ["there was no manifest to compare with"] if known is None else comparison(known, made):
        console.print(line)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    console.print(f"{size / 1e6:.1f} MB in {out}")


typer.run(main)
