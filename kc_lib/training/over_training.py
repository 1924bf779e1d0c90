"""A model over its training: the same measures at one checkpoint after the other (Tigges et al. 2024, arXiv:2407.10827).

The loop alone: which measures there are, ``measures.py`` says, and what their rows mean over time,
``summary.py``. One checkpoint is in memory at a time, and what is done of it is kept measure by measure:
published code saves at the end, and loses days with one failed download.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from kc_lib.errors import MethodError
from kc_lib.models.checkpoints import Checkpoint, load_checkpoint
from kc_lib.models.model import Model
from kc_lib.results import hash_of, load_table, save_table, save_whole
from kc_lib.training.drawn import DrawnTasks

Measure = Callable[[Model, DrawnTasks], pd.DataFrame]
MEASURED = ("task", "seed", "quantity", "part", "value", "low", "high", "passes", "note")
COLUMNS = ("checkpoint", "step", "tokens", "measure", *MEASURED)
_TYPES = {
    "checkpoint": "str",
    "step": "int64",
    "tokens": "Int64",
    "measure": "str",
    "task": "str",
    "seed": "int64",
    "quantity": "str",
    "part": "str",
    "value": "float64",
    "low": "float64",
    "high": "float64",
    "passes": "boolean",
    "note": "str",
}


@dataclass(frozen=True)
class TrainingResult:
    """What every measure gave at every checkpoint, one figure a row.

    Columns of ``frame``: checkpoint, step, tokens (NA where not known), measure, task ("" where it is of none), seed (of
    the draw of prompts), quantity, part (a head, edge or node of the graph; "" for the whole), value, low and high (its
    interval, NaN where it has none), passes (of a head's score: whether it counts as high), note (why a value is undefined).
    """

    frame: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """``frame``."""
        return self.frame

    def of(self, measure: str, *quantities: str) -> pd.DataFrame:
        """The rows of a measure, or of some of its quantities, in the order of training."""
        rows = self.frame[self.frame["measure"] == measure]
        return rows[rows["quantity"].isin(quantities)] if quantities else rows

    @property
    def hash(self) -> str:
        """Hash of every row."""
        return hash_of(self.frame.to_json(orient="split", double_precision=15))

    @property
    def steps(self) -> list[int]:
        return sorted(self.frame["step"].unique().tolist())

    def save(self, path: str | Path) -> Path:
        """Write ``frame`` as parquet, provenance in its metadata."""
        return save_table(self.frame, path, {"training": True, "provenance": dict(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> TrainingResult:
        """Read what ``save`` wrote.

        Raises:
            MethodError: a file that is not there, or is no such result.
        """
        frame, about = load_table(path)
        if "training" not in about or set(COLUMNS) - set(frame.columns):
            raise MethodError(f"{path} holds no measures over training: give a file that TrainingResult.save wrote")
        return cls(frame[list(COLUMNS)].astype(_TYPES), about["provenance"])


def over_training(
    checkpoints: Sequence[Checkpoint],
    tasks: DrawnTasks,
    measures: Mapping[str, Measure],
    *,
    device: str | None = None,
    dtype: str = "float32",
    retries: int = 3,
    keep_files: bool = True,
    partial_file: str | Path | None = None,
    progress: bool = False,
) -> TrainingResult:
    """Every measure at every checkpoint, on the same prompts.

    A measure may hold a model of its own as an argument of its ``partial`` (the donor of ``swaps.swap_measure``).

    Args:
        tasks: the prompts, read with the tokenizer of one of the checkpoints; the others must have the same vocabulary.
        measures: functions of a model and the tasks that give rows of ``MEASURED``, or ``partial``s of such, by name.
        device, dtype, retries, keep_files: as ``load_checkpoint`` takes them.
        partial_file: a file that keeps what is done, after each measure of each checkpoint. If it is there, work goes on
            from it, also with further checkpoints; a checkpoint of which all is done is not loaded again.

    Raises:
        MethodError: nothing to do, a file of another run, or checkpoints that do not share their vocabulary.
        ModelError: a checkpoint that cannot be loaded; what is done before stays in ``partial_file``.
    """
    if not checkpoints or not measures:
        raise MethodError("over_training needs at least one checkpoint and one measure")
    described = {name: _described(own) for name, own in measures.items()}
    identity = hash_of([tasks.hash, dtype, described])  # of what determines a checkpoint's rows, beside the checkpoint
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
            model = load_checkpoint(checkpoint, device=device, dtype=dtype, retries=retries, keep_files=keep_files)
            loaded = checkpoint
            vocabulary = _same_vocabulary(model, vocabulary, checkpoint)
        rows = measures[name](model, tasks)
        about: dict[str, Any] = {
            "checkpoint": checkpoint.name,
            "step": checkpoint.step,
            "tokens": checkpoint.tokens,
            "measure": name,
        }
        frames.append(rows.assign(**about)[list(COLUMNS)].astype(_TYPES))
        done.append(_key(checkpoint, name))
        if file is not None:
            kept = {"identity": identity, "done": done, "vocabulary": vocabulary}
            save_whole(TrainingResult(_joined(frames), kept), file)
    frame = _joined(frames)
    asked = frame["checkpoint"].isin([checkpoint.name for checkpoint in checkpoints])
    order = ["step", "measure", "task", "seed"]
    frame = frame[asked].sort_values(order, kind="stable", ignore_index=True)
    settings = {"tasks": tasks.names, "seeds": tasks.seeds, "n_checkpoints": len(checkpoints), "dtype": dtype}
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
        return {"function": measure.func.__qualname__} | {name: _told(value) for name, value in measure.keywords.items()}
    return {"function": getattr(measure, "__qualname__", type(measure).__qualname__)}


def _told(value: Any) -> Any:
    return [value.name, value.hash] if isinstance(value, Model) else value


def _key(checkpoint: Checkpoint, measure: str) -> str:
    """A measure of a checkpoint, and of a local folder which files it had: another training may overwrite them."""
    folder = Path(checkpoint.source)
    local = checkpoint.revision is None and folder.is_dir()
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir())] if local else []
    described = json.dumps([asdict(checkpoint), files, measure]).encode()
    return hashlib.blake2b(described, digest_size=16).hexdigest()


def _resumed(file: Path | None, identity: str) -> tuple[list[pd.DataFrame], list[str], str | None]:
    """The rows that an earlier run left in its file, what they are of, and the hash of their checkpoints' vocabulary."""
    if file is None or not file.exists():
        return [], [], None
    try:
        found = TrainingResult.load(file)
    except MethodError as error:
        raise MethodError(f"{file}: cannot be read as what is done of a training ({error}); delete it") from error
    if found.provenance.get("identity") != identity:
        raise MethodError(f"{file}: is of other tasks or measures; delete it or name another file")
    return [found.frame], list(found.provenance["done"]), found.provenance.get("vocabulary")
