"""A model over its training: the same measures at one checkpoint after the other (Tigges et al. 2024, arXiv:2407.10827).

The loop alone: ``measures.py`` says which measures there are, ``result.py`` and ``summary.py`` what their rows mean over
time. One checkpoint is in memory at a time, and what is done of it is kept measure by measure: published code saves at the
end, and loses days with one failed download.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from kc_lib.errors import MethodError
from kc_lib.models.checkpoints import Checkpoint, load_checkpoint
from kc_lib.models.model import Model
from kc_lib.results import hash_of, save_whole
from kc_lib.training.drawn import DrawnTasks
from kc_lib.training.options import LoadOptions
from kc_lib.training.result import COLUMNS, TYPES, TrainingResult

Measure = Callable[[Model, DrawnTasks], pd.DataFrame]


def over_training(
    checkpoints: Sequence[Checkpoint],
    tasks: DrawnTasks,
    measures: Mapping[str, Measure],
    *,
    partial_file: str | Path | None = None,
    progress: bool = False,
    **options: Any,
) -> TrainingResult:
    """Every measure at every checkpoint, on the same prompts.

    A measure may hold a model of its own as an argument of its ``partial`` (the donor of ``swaps.swap_measure``).

    Args:
        tasks: the prompts, read with the tokenizer of one of the checkpoints; the others must have the same vocabulary.
        measures: functions of a model and the tasks that give rows of ``MEASURED``, or ``partial``s of such, by name.
        partial_file: a file that keeps what is done, after each measure of each checkpoint. If it is there, work goes on
            from it, also with further checkpoints; a checkpoint of which all is done is not loaded again.
        options: fields of ``LoadOptions``, which ``load_checkpoint`` takes.

    Example:
        >>> checkpoints = kc.checkpoints_of("nano", "0 750 6000")
        >>> tasks = draw_tasks("ioi agreement", load_checkpoint(checkpoints[-1]), seeds=2)
        >>> result = kc.over_training(checkpoints, tasks, training_measures(["behaviour", "circuit"]))
        >>> result.summary()

    Raises:
        MethodError: nothing to do, a file of another run, or checkpoints that do not share their vocabulary.
        ModelError: a checkpoint that cannot be loaded; what is done before stays in ``partial_file``.
    """
    loading = LoadOptions.of(options)
    if not checkpoints or not measures:
        raise MethodError("over_training needs at least one checkpoint and one measure")
    described = {name: _described(measure) for name, measure in measures.items()}
    identity = hash_of([tasks.hash, loading.dtype, described])  # of what determines rows, beside the checkpoint
    file = None if partial_file is None else Path(partial_file)
    frames, done, vocabulary = _resumed(file, identity)
    todo = [(checkpoint, name) for checkpoint in checkpoints for name in measures]
    todo = [(checkpoint, name) for checkpoint, name in todo if _key(checkpoint, name) not in done]
    again = {(checkpoint.name, name) for checkpoint, name in todo}  # of a checkpoint whose files have changed since
    frames = [old[[place not in again for place in zip(old["checkpoint"], old["measure"], strict=True)]] for old in frames]
    loaded: Checkpoint | None = None
    model: Model | None = None
    bar = tqdm(todo, desc="over training", unit="measure", disable=not progress)
    for checkpoint, name in bar:
        bar.set_postfix(step=checkpoint.step, measure=name)
        if model is None or loaded != checkpoint:
            model = None  # the last one goes before the next one comes
            model = load_checkpoint(checkpoint, **loading)
            loaded = checkpoint
            vocabulary = _same_vocabulary(model, vocabulary, checkpoint)
        rows = measures[name](model, tasks)
        rows = rows.assign(checkpoint=checkpoint.name, step=checkpoint.step, tokens=checkpoint.tokens, measure=name)
        frames.append(rows[list(COLUMNS)].astype(TYPES))
        done.append(_key(checkpoint, name))
        if file is not None:
            kept = {"identity": identity, "done": done, "vocabulary": vocabulary}
            save_whole(TrainingResult(_joined(frames), kept), file)
    frame = _joined(frames)
    asked = frame["checkpoint"].isin([checkpoint.name for checkpoint in checkpoints])
    order = ["step", "measure", "task", "seed"]
    frame = frame[asked].sort_values(order, kind="stable", ignore_index=True)
    settings = {"tasks": tasks.names, "seeds": tasks.seeds, "n_checkpoints": len(checkpoints), "dtype": loading.dtype}
    settings |= {"n_pairs": tasks.report["used"]}
    return TrainingResult(frame, settings | {"measures": described})


def _same_vocabulary(model: Model, known: str | None, checkpoint: Checkpoint) -> str:
    """Hash of every token's number: the same number of tokens may be other tokens."""
    vocabulary = hash_of(model.tokenizer.get_vocab())
    if known is not None and vocabulary != known:
        raise MethodError(
            f"the checkpoint at step {checkpoint.step} ({checkpoint.name}) has another vocabulary ({len(model.tokenizer)} "
            "tokens) than the one before: their prompts are not the same; give checkpoints of one training"
        )
    return vocabulary


def _joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True)


def _described(measure: Measure) -> dict[str, Any]:
    """What a measure is: the name of its function, and of a ``partial`` the arguments, of which a model is its weights."""
    if isinstance(measure, partial):
        arguments = {name: _described_value(value) for name, value in measure.keywords.items()}
        return {"function": measure.func.__qualname__} | arguments
    return {"function": getattr(measure, "__qualname__", type(measure).__qualname__)}


def _described_value(value: Any) -> Any:
    return [value.name, value.hash] if isinstance(value, Model) else value


def _key(checkpoint: Checkpoint, measure: str) -> str:
    """A measure of a checkpoint, and of a local folder which files it had: another training may overwrite them."""
    folder = Path(checkpoint.source)
    local = checkpoint.revision is None and folder.is_dir()
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir())] if local else []
    return hash_of([asdict(checkpoint), files, measure])


def _resumed(file: Path | None, identity: str) -> tuple[list[pd.DataFrame], list[str], str | None]:
    """The rows that an earlier run left in its file, what they are of, and the hash of their checkpoints' vocabulary."""
    done = TrainingResult.resumed(file, identity)
    if done is None:
        return [], [], None
    return [done.frame], list(done.provenance["done"]), done.provenance.get("vocabulary")
