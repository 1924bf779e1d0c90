"""The trained nano models that come with the project: where they lie, which steps there are, and their manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kc_lib.errors import ModelError
from kc_lib.resources import DATA

MODELS = DATA / "models"
CAUSAL, MASKED = "nano", "nano-bert"
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"


def nano_steps(models: Path = MODELS) -> tuple[int, ...]:
    """Training steps of the nano model that are kept, in order; none where its folder is missing."""
    return tuple(sorted(int(path.name.removeprefix("step")) for path in (models / CAUSAL).glob("step[0-9]*")))


def has_masked(models: Path = MODELS) -> bool:
    """Whether the masked nano model is there."""
    return (models / MASKED / WEIGHTS).exists()


def nano_folder(name: str, checkpoint: int | None = None, models: Path = MODELS) -> Path:
    """The Hugging Face folder of a nano model; of ``nano`` at a training step, by default the last.

    Raises:
        ModelError: the folder is missing, or the model has no such step.
    """
    if name == MASKED:
        if checkpoint is not None:
            raise ModelError(
                f"{MASKED!r} has no training checkpoints (only {CAUSAL!r} has); leave out checkpoint={checkpoint}"
            )
        folder = models / MASKED
    else:
        steps = nano_steps(models)
        if checkpoint is not None and steps and checkpoint not in steps:
            below = [step for step in steps if step < checkpoint][-1:]
            nearest = " and ".join(map(str, below + [step for step in steps if step > checkpoint][:1]))
            raise ModelError(
                f"{CAUSAL!r} has no checkpoint {checkpoint}; nearest: {nearest}; all: {', '.join(map(str, steps))}"
            )
        step = checkpoint if checkpoint is not None else max(steps, default=0)
        folder = models / CAUSAL / f"step{step}"
    if not (folder / WEIGHTS).exists():
        raise ModelError(
            f"the model {name!r} is not in {folder}: run 'make nano' to train it (minutes), or fetch data/models again"
        )
    return folder


def file_hashes(models: Path = MODELS) -> dict[str, str]:
    """SHA-256 of every file of the nano models, by its path in their folder."""
    files = sorted(path for name in (CAUSAL, MASKED) for path in (models / name).rglob("*") if path.is_file())
    return {path.relative_to(models).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_manifest(models: Path = MODELS) -> dict[str, Any]:
    """How the nano models were made: command, seeds, steps, versions, hashes of files, and figures.

    Raises:
        ModelError: there is none, or it is no JSON.
    """
    path = models / MANIFEST
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise ModelError(f"the manifest {path} cannot be read ({error}): run 'make nano'") from error
