"""Results as files: a table as parquet that carries the rest of the result in its metadata, written whole or not at all.

A result is a frozen dataclass that derives from ``Result``. Its first field is a DataFrame, with one row per thing that was
measured; its other fields are what else is to be known (provenance, smaller tables, a graph, a metric).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, get_args, get_type_hints

import pandas as pd

from kc_lib.errors import MethodError, first_line


class Savable(Protocol):
    """A result that writes itself to one file."""

    def save(self, path: Path) -> Path: ...


class Result:
    """A result that knows its table and its file.

    A subclass is a frozen dataclass. It names in ``columns`` what its table must have, and overrides ``to_frame`` and
    ``from_frame`` where its first field is no table (scores as tensors).

    Example:
        >>> result.to_frame().head()
        >>> result.save("result.parquet")
        >>> type(result).load("result.parquet").hash == result.hash
    """

    columns: ClassVar[tuple[str, ...]] = ()

    def to_frame(self) -> pd.DataFrame:
        """The table, one row per thing that was measured."""
        table: pd.DataFrame = getattr(self, fields(self)[0].name)  # type: ignore[arg-type]  # subclasses are dataclasses
        return table

    def about(self) -> dict[str, Any]:
        """Everything but the table, as values that json can hold."""
        return {declared.name: _plain(getattr(self, declared.name)) for declared in fields(self)[1:]}  # type: ignore[arg-type]  # as above

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, about: Mapping[str, Any]) -> Self:
        """The result of a table and what ``about`` gave."""
        hints = get_type_hints(cls)
        names = [declared.name for declared in fields(cls)[1:]]  # type: ignore[arg-type]  # as above
        if names == ["provenance"] and "provenance" not in about:
            about = {"provenance": about}  # as files before 0.2 have it
        return cls(frame, *(_restored(about[name], hints[name]) for name in names))  # type: ignore[call-arg]  # a dataclass's

    @property
    def hash(self) -> str:
        """Hash of the table and of all that goes with it: what an analysis of the result depends on."""
        return hash_of([self.to_frame().to_json(orient="split", double_precision=15), self.about()])

    def save(self, path: str | Path) -> Path:
        """Write the result as one parquet file."""
        return save_table(self.to_frame(), path, {"result": type(self).__name__, **self.about()})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            MethodError: the file is not there, is no table, or holds another result.
        """
        frame, about = load_table(path)
        kind = about.pop("result", None)
        if kind is not None and kind != cls.__name__:
            raise MethodError(f"{path} holds a {kind}, not a {cls.__name__}: give the file of such a result")
        missing = [name for name in cls.columns if name not in frame.columns]
        if missing:
            raise MethodError(f"{path} holds no {cls.__name__}: it has no column {missing[0]!r}; give a file that it wrote")
        try:
            return cls.from_frame(frame, about)
        except (KeyError, TypeError, ValueError) as error:
            raise MethodError(f"{path} holds no {cls.__name__} ({first_line(error)}); give a file that it wrote") from error

    @classmethod
    def resumed(cls, file: Path | None, identity: str) -> Self | None:
        """What an interrupted run left in its file; None where there is no file.

        Raises:
            MethodError: the file cannot be read, or the ``identity`` in its provenance is another one.
        """
        if file is None or not file.exists():
            return None
        try:
            done = cls.load(file)
        except MethodError as error:
            raise MethodError(f"{file}: cannot be read as what is done of a run ({error}); delete it") from error
        if done.about()["provenance"].get("identity") != identity:
            raise MethodError(f"{file}: is of another model, task or set of parameters; delete it or name another file")
        return done


def save_table(frame: pd.DataFrame, path: str | Path, about: Mapping[str, Any]) -> Path:
    """Write a table, and what is to be known of it (values that json can hold)."""
    described = frame.copy(deep=False)
    described.attrs = {key: value for key, value in about.items()}
    described.to_parquet(path, index=False)
    return Path(path)


def load_table(path: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read what ``save_table`` wrote.

    Raises:
        MethodError: a file that is not there, or no parquet.
    """
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise MethodError(
            f"{path}: cannot be read as a table ({first_line(error)}); give a parquet file of a run"
        ) from error
    about = {str(key): value for key, value in frame.attrs.items()}
    frame.attrs = {}
    return frame, about


def save_whole(result: Savable | pd.DataFrame, path: Path) -> None:
    """Write a result beside its file and move it there, so that an interruption leaves the old file or the new one."""
    draft = path.with_name(f".{path.name}")
    if isinstance(result, pd.DataFrame):
        save_table(result, draft, {})
    else:
        result.save(draft)
    os.replace(draft, path)


def kept(path: Path, compute: Callable[..., Any] | Savable, *args: Any, **options: Any) -> Any:
    """The result of ``compute`` in a file: read where it is there already, else computed and kept.

    ``compute`` may be a result itself, which is then written. The kind of result is what ``compute`` says that it returns,
    of several the one that the file holds; a DataFrame is kept as a plain table.

    Raises:
        KnowledgeCircuitsError: the file is there and cannot be read; what ``compute`` raises.
    """
    if not callable(compute):
        if not path.exists():
            save_whole(compute, path)
        return compute
    kind = get_type_hints(compute).get("return")
    if kind is None:
        raise TypeError(f"{compute} does not say what it returns, so that its result could not be read back")
    if path.exists():
        return load_table(path)[0] if kind is pd.DataFrame else _loaded(path, get_args(kind) or (kind,))
    value = compute(*args, **options)
    save_whole(value, path)
    return value


def _loaded(path: Path, kinds: Sequence[Any]) -> Any:
    for kind in kinds[:-1]:
        with suppress(MethodError):
            return kind.load(path)
    return kinds[-1].load(path)


def hash_of(value: Any) -> str:
    """Hash of a value that json can hold, whatever the order of its keys; anything else enters as its text."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, pd.DataFrame):
        return value.to_dict("list")
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else value


def _restored(value: Any, kind: Any) -> Any:
    if kind is pd.DataFrame:
        return pd.DataFrame(value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return kind(**value)
    return tuple(value) if isinstance(value, list) and "tuple" in str(kind) else value
