"""A task of one's own: pairs in a CSV or JSONL file with the columns clean, corrupted, answer, and optional others."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kc_lib.errors import TaskError
from kc_lib.resources import DATA

REQUIRED = ("clean", "corrupted", "answer")
OPTIONAL = ("distractor", "subject", "relation")
SUFFIXES = (".csv", ".jsonl")


@dataclass(frozen=True)
class PairText:
    """One pair as text; subject and relation are parts of the clean prompt, to name positions by.

    What only generated tasks have: ``between`` stands between prompt and answer, ``right`` and ``wrong`` are tokens as in
    ``TokenPair``, and ``spans`` names characters (start, end) of the clean prompt, before subject and relation do.
    """

    clean: str
    corrupted: str
    answer: str
    distractor: str | None = None
    subject: str | None = None
    relation: str | None = None
    where: str = ""  # file and row, for errors
    between: str = " "
    right: tuple[int, ...] = ()
    wrong: tuple[int, ...] = ()
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def read_pairs(path: str | Path) -> list[PairText]:
    """The pairs of a file, checked row by row.

    Raises:
        TaskError: no such file, another format, missing or unknown columns, or a row that cannot be a pair.
    """
    path = Path(path)
    rows = _read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path)
    if not rows:
        raise TaskError(f"{path}: holds no rows; give at least one row with {', '.join(REQUIRED)}")
    pairs = [_pair(row, f"{path}: row {number}") for number, row in rows]
    seen: dict[tuple[str, str], str] = {}
    for pair in pairs:
        first = seen.setdefault((pair.clean, pair.answer), pair.where)
        if first != pair.where:
            raise TaskError(f"{pair.where} repeats {first.rpartition(': ')[2]} (same clean prompt and answer); remove one")
    return pairs


def _read_csv(path: Path) -> Sequence[tuple[int, Mapping[Any, Any]]]:
    rows: list[tuple[int, Mapping[Any, Any]]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            if not path.stat().st_size:
                raise TaskError(f"{path}: cannot be read as CSV (the file is empty)")
            header = [column.strip() for column in next(reader, [])]
            _check_columns(header, f"{path}: the header")
            last = reader.line_num
            for fields in reader:
                number, last = last + 1, reader.line_num  # the line a row starts on, as an editor counts
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise TaskError(
                        f"{path}: row {number} has {len(fields)} fields, the header {len(header)}; put a text with a comma "
                        "in double quotes"
                    )
                rows.append((number, dict(zip(header, fields, strict=True))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TaskError(f"{path}: cannot be read as CSV ({error})") from error
    return rows


def _read_jsonl(path: Path) -> Sequence[tuple[int, Mapping[Any, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskError(f"{path}: row {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise TaskError(f"{path}: row {number} is no JSON object with the keys {', '.join(REQUIRED)}")
        _check_columns(list(row), f"{path}: row {number}")
        rows.append((number, row))
    return rows


def _check_columns(columns: list[str], where: str) -> None:
    missing = [column for column in REQUIRED if column not in columns]
    unknown = [column for column in columns if column not in REQUIRED + OPTIONAL]
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has the unknown column {unknown[0]!r}"
        raise TaskError(f"{where} {what}; columns are {', '.join(REQUIRED)} and optionally {', '.join(OPTIONAL)}")


def _pair(row: Mapping[str, Any], where: str) -> PairText:
    values = {key: "" if value is None else value for key, value in row.items()}
    for key, value in values.items():
        if not isinstance(value, str):
            raise TaskError(f"{where}: {key} is {value!r}; it must be text")
    for key in REQUIRED:
        if not values[key].strip():
            raise TaskError(f"{where}: {key} is empty; fill it in or remove the row")
    clean, corrupted = values["clean"].rstrip(), values["corrupted"].rstrip()
    if clean == corrupted:
        raise TaskError(f"{where}: clean and corrupted prompt are the same; nothing would be measured")
    optional = {key: values.get(key, "").strip() or None for key in OPTIONAL}
    for key in ("subject", "relation"):
        part = optional[key]
        if part is not None and part not in clean:
            raise TaskError(f"{where}: the {key} {part!r} is not in the prompt {clean!r}")
    if optional["distractor"] == values["answer"].strip():
        raise TaskError(f"{where}: answer and distractor are both {optional['distractor']!r}")
    distractor, subject, relation = (optional[key] for key in OPTIONAL)
    return PairText(clean, corrupted, values["answer"].strip(), distractor, subject, relation, where)


DEFAULT_TEXT = DATA / "text" / "stories.txt"


def load_text(text: str | Path | None = None) -> str:
    """The text of a file, a text given as such, or the project's own for None.

    A ``Path`` is a file, and so is a string of one line that ends in ``.txt``.

    Raises:
        TaskError: the file cannot be read, or there is no text in it.
    """
    path = DEFAULT_TEXT if text is None else text
    if isinstance(path, str) and ("\n" in path or not path.endswith(".txt")):
        found = path
    else:
        try:
            found = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"the text {path} cannot be read ({error}): give a UTF-8 file or the text itself") from error
    if not found.strip():
        raise TaskError("the text is empty: give some running text")
    return found
