"""Results as files: tables as parquet that carry their provenance, written whole, and hashes of what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from kc_lib.errors import MethodError, first_line


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


class Savable(Protocol):
    """A result that writes itself to one file."""

    def save(self, path: Path) -> Path: ...


def save_whole(result: Savable, path: Path) -> None:
    """Write a result beside its file and move it there, so that an interruption leaves the old file or the new one."""
    draft = path.with_name(f".{path.name}")
    result.save(draft)
    os.replace(draft, path)


@dataclass(frozen=True)
class Rows:
    """A table without more to it, as a result that a run can keep."""

    rows: pd.DataFrame

    def save(self, path: str | Path) -> Path:
        return save_table(self.rows, path, {})

    @classmethod
    def load(cls, path: str | Path) -> Rows:
        return cls(load_table(path)[0])


def hash_of(value: Any) -> str:
    """Hash of a value that json can hold, whatever the order of its keys; anything else enters as its text."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
