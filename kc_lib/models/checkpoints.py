"""Checkpoints of a training: which steps there are, which of them a schedule takes, and loading one after the other.

A family is ``nano``, a hub repository whose revisions are named ``step<N>`` (EleutherAI/pythia-*) or ``checkpoint-<N>``
(stanford-crfm/*), a folder of folders so named, or a list of model folders. Schedules are those of Tigges et al. 2024
(arXiv:2407.10827); of a schedule's steps those are taken that the model has.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants

from kc_lib.errors import ModelError
from kc_lib.models.hub import STEP, cached, fetch, step_revisions
from kc_lib.models.load import load_model
from kc_lib.models.model import Model
from kc_lib.models.shipped import CAUSAL, nano_folder, nano_steps

PYTHIA = "EleutherAI/pythia"
PYTHIA_TOKENS_PER_STEP = 2_097_152  # 1024 sequences of 2048 tokens (Biderman et al. 2023, arXiv:2304.01373)


def _every(step: int, first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1, step))


_POWERS = tuple(2**i for i in range(10))
SCHEDULES: Mapping[str, tuple[int, ...] | None] = {
    "all": None,  # whatever the model has: of Pythia 0, 2^0 to 2^9, and 1000 to 143000 by thousands
    "linear": _every(1_000, 1_000, 143_000),
    "exponential": (*_POWERS, *(round(2**i / 1000) * 1000 for i in range(10, 18))),
    "exp_plus_detail": (
        *_POWERS,
        *_every(1_000, 1_000, 15_000),
        *_every(5_000, 20_000, 65_000),
        *_every(10_000, 70_000, 140_000),
        143_000,
    ),
    "sparse": (
        *(256, 512),
        *_every(1_000, 1_000, 9_000),
        *_every(5_000, 10_000, 45_000),
        *_every(10_000, 50_000, 90_000),
        *_every(20_000, 100_000, 140_000),
        143_000,
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """A model at one step of its training; ``source`` is a folder, or with a ``revision`` a hub repository.

    ``tokens`` are those read up to the step, None where it is not known how many a step reads.
    """

    name: str
    step: int
    tokens: int | None
    source: str
    revision: str | None = None


def schedule_steps(schedule: str | Sequence[int], available: Sequence[int]) -> list[int]:
    """The steps of a schedule, or of an explicit list ("0 512 1000" as well), that a model has, in order.

    Raises:
        ModelError: an unknown schedule; a listed step that the model does not have (the nearest are named); a schedule
            that shares no step with the model's.
    """
    has = sorted(set(available))
    if not has:
        raise ModelError("the model has no checkpoints: give one whose training steps are kept")
    if not isinstance(schedule, str):
        return _listed(schedule, has)
    if all(word.isdecimal() for word in schedule.split()):
        return _listed([int(word) for word in schedule.split()], has)
    if schedule not in SCHEDULES:
        raise ModelError(f"unknown schedule {schedule!r}: use one of {', '.join(SCHEDULES)}, or a list of steps")
    wanted = SCHEDULES[schedule]
    steps = has if wanted is None else sorted(set(wanted) & set(has))
    if wanted is not None and not steps:
        raise ModelError(
            f"schedule {schedule!r} ({len(wanted)} steps from {min(wanted)} to {max(wanted)}) has no step in common with "
            f"the model's ({len(has)} from {has[0]} to {has[-1]}): use another schedule, 'all', or a list of steps"
        )
    return steps


def checkpoints_of(
    family: str | Path | Sequence[str | Path], schedule: str | Sequence[int] = "all", tokens_per_step: int | None = None
) -> tuple[Checkpoint, ...]:
    """The checkpoints of a family that a schedule takes; of a list of folders in its order, else by step.

    A list of folders may be one text, separated by spaces. A listed folder's step is the number that its name ends with; its
    place in the list where any of them has none.

    Args:
        tokens_per_step: how many tokens a step of the training reads; known of Pythia only.

    Example:
        >>> [checkpoint.step for checkpoint in kc.checkpoints_of("nano", [0, 512, 6000])]

    Raises:
        ModelError: no such family, no checkpoints in it, folders of the same step, or as in ``schedule_steps``.
    """
    if isinstance(family, str) and " " in family and not Path(family).is_dir():
        family = family.split()
    if tokens_per_step is None and str(family).startswith(PYTHIA):
        tokens_per_step = PYTHIA_TOKENS_PER_STEP
    if tokens_per_step is not None and tokens_per_step < 1:
        raise ModelError(f"tokens_per_step is {tokens_per_step}; it must be at least 1")
    found = _family(str(family)) if isinstance(family, str | Path) else _folders(family)
    steps = set(schedule_steps(schedule, [checkpoint.step for checkpoint in found]))
    kept = (checkpoint for checkpoint in found if checkpoint.step in steps)
    if tokens_per_step is None:
        return tuple(kept)
    return tuple(replace(checkpoint, tokens=checkpoint.step * tokens_per_step) for checkpoint in kept)


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    device: str | None = None,
    dtype: str = "float32",
    retries: int = 3,
    keep_files: bool = True,
) -> Model:
    """A checkpoint as a model, as ``load_model`` loads it.

    Args:
        retries: attempts after the first to download what a hub did not give; files that are complete are kept between them.
        keep_files: False removes the files that this call downloads, whatever comes of it, so that one checkpoint at a
            time is on disk. They lie in a folder of their own in the hub's cache meanwhile; what is in the cache is used
            and never touched.

    Raises:
        ModelError: the checkpoint cannot be downloaded or loaded; the message names its step and what was said.
    """
    if retries < 0:
        raise ModelError(f"retries is {retries}; it must be at least 0")
    try:
        if checkpoint.revision is None:
            return _named(checkpoint, load_model(checkpoint.source, device=device, dtype=dtype))
        folder = cached(checkpoint.source, checkpoint.revision)
        if folder is None and not keep_files:
            cache = Path(constants.HF_HUB_CACHE)
            cache.mkdir(parents=True, exist_ok=True)
            # Not delete_revisions: of a repository's only revision it takes the whole folder, and listings stay behind.
            with tempfile.TemporaryDirectory(prefix="kc-checkpoint-", dir=cache, ignore_cleanup_errors=True) as own:
                folder = fetch(checkpoint.source, checkpoint.revision, retries=retries, cache=Path(own))
                return _named(checkpoint, load_model(str(folder), device=device, dtype=dtype))
        if folder is None:
            folder = fetch(checkpoint.source, checkpoint.revision, retries=retries)
        return _named(checkpoint, load_model(str(folder), device=device, dtype=dtype))
    except (ModelError, OSError) as error:
        raise ModelError(
            f"the checkpoint at step {checkpoint.step} ({checkpoint.name}) cannot be loaded: {error}; other checkpoints are "
            "not affected"
        ) from error


def _named(checkpoint: Checkpoint, model: Model) -> Model:
    model.name = checkpoint.name
    return model


def _family(family: str) -> list[Checkpoint]:
    if family == CAUSAL:
        steps = nano_steps() or (0,)  # where there are none, nano_folder says what to do
        return [Checkpoint(f"{CAUSAL}@step{step}", step, None, str(nano_folder(CAUSAL, step))) for step in steps]
    path = Path(family).expanduser()
    if path.is_dir():
        inner = {int(match[1]): folder for folder in path.iterdir() if (match := STEP.fullmatch(folder.name))}
        if not inner:
            raise ModelError(f"the folder {path} holds no checkpoints: they are folders named step<N> or checkpoint-<N>")
        return [Checkpoint(str(inner[step]), step, None, str(inner[step])) for step in sorted(inner)]
    if path.is_absolute() or family.startswith((".", "~")) or family.count("/") > 1:
        raise ModelError(f"{family!r} is no folder: give a folder of checkpoints, a list of model folders, or a hub name")
    revisions = step_revisions(family)
    if not revisions:
        raise ModelError(f"{family!r} has no checkpoints: none of its revisions is named step<N> or checkpoint-<N>")
    return [Checkpoint(f"{family}@{revisions[step]}", step, None, family, revisions[step]) for step in sorted(revisions)]


def _folders(folders: Sequence[str | Path]) -> list[Checkpoint]:
    paths = [Path(folder).expanduser() for folder in folders]
    missing = [path for path in paths if not path.is_dir()]
    if missing:
        raise ModelError(
            f"{str(missing[0])!r} in the list of checkpoints is no folder: give folders saved by save_pretrained"
        )
    numbers = [re.search(r"\d+$", path.name) for path in paths]
    steps = [int(number[0]) if number else place for place, number in enumerate(numbers)]
    if not all(numbers):
        steps = list(range(len(paths)))
    first: dict[int, Path] = {}
    for step, path in zip(steps, paths, strict=True):
        if step in first:
            raise ModelError(f"the folders {first[step]} and {path} are both of step {step}: rename one")
        first[step] = path
    return [Checkpoint(str(path), step, None, str(path)) for step, path in first.items()]


def _listed(steps: Sequence[int], has: Sequence[int]) -> list[int]:
    if not len(steps):
        raise ModelError(f"the list of steps is empty: give some of the model's ({has[0]} to {has[-1]})")
    for step in steps:
        if isinstance(step, bool) or not isinstance(step, int):
            raise ModelError(f"{step!r} in the list of steps is no training step: give whole numbers")
        if step not in has:
            nearest = [*[h for h in has if h < step][-1:], *[h for h in has if h > step][:1]]
            raise ModelError(
                f"the model has no checkpoint at step {step}; nearest: {' and '.join(map(str, nearest))}; it has {len(has)} "
                f"from {has[0]} to {has[-1]}"
            )
    return sorted(set(steps))
