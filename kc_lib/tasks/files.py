"""A task of one's own: pairs in a CSV or JSONL file with the columns clean, corrupted, answer, and optional others."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kc_lib.errors import TaskError
from kc_lib.reading import read_json_lines, read_text
from kc_lib.resources import DATA

REQUIRED = ("clean", "corrupted", "answer")
OPTIONAL = ("distractor", "subject", "relation")
SUFFIXES = (".csv", ".jsonl")
SEPARATORS = (",", ";", "\t")


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

    A CSV may be what Excel, LibreOffice or pandas write: separated by commas, semicolons or tabs, in UTF-8, UTF-16 or the
    Western code page of Windows, with an index column or empty columns at the end, which are left out.

    Raises:
        TaskError: no such file, another format, missing, unknown or doubled columns, or a row that cannot be a pair.
    """
    path = Path(path)
    rows = _read_jsonl(path) if path.suffix.lower() == ".jsonl" else _read_csv(path)
    if not rows:
        raise TaskError(f"{path}: holds no rows; give at least one row with {', '.join(REQUIRED)}")
    pairs = [_pair(row, f"{path}: row {number}") for number, row in rows]
    seen: dict[tuple[str, str], str] = {}
    for pair in pairs:
        first = seen.setdefault((pair.clean, pair.answer), pair.where)
        if first != pair.where:
            raise TaskError(f"{pair.where} repeats {first.rpartition(': ')[2]} (same clean prompt and answer); remove one")
    return pairs


def is_pair_file(name_or_path: str) -> bool:
    """Whether a task's name is that of a file of pairs, by its suffix in capitals or not."""
    return Path(name_or_path).suffix.lower() in SUFFIXES


def _read_csv(path: Path) -> Sequence[tuple[int, Mapping[Any, Any]]]:
    text = read_text(path, fallback="cp1252")
    if not text.strip():
        raise TaskError(f"{path}: cannot be read as CSV (the file is empty)")
    first = text.lstrip("\n\r").split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=max(SEPARATORS, key=first.count))
    rows: list[tuple[int, Mapping[Any, Any]]] = []
    try:
        header = [column.strip() for column in next(reader, [])]
        columns = [i for i, name in enumerate(header) if not _is_index(name, i, len(header))]
        _check_columns([header[i] for i in columns], f"{path}: the header")
        last = reader.line_num
        for values in reader:
            number, last = last + 1, reader.line_num  # the line a row starts on, as an editor counts
            if not any(value.strip() for value in values):
                continue
            if len(values) != len(header):
                raise TaskError(
                    f"{path}: row {number} has {len(values)} fields, the header {len(header)}; put a text with a comma "
                    "in double quotes"
                )
            rows.append((number, {header[i]: values[i] for i in columns}))
    except csv.Error as error:
        raise TaskError(f"{path}: cannot be read as CSV ({error})") from error
    return rows


def _is_index(name: str, place: int, n_columns: int) -> bool:
    """Whether a column is pandas's index (the first, without a name) or an empty one at the end."""
    return (place == 0 and name in ("", "Unnamed: 0")) or (name == "" and place == n_columns - 1)


def _read_jsonl(path: Path) -> Sequence[tuple[int, Mapping[Any, Any]]]:
    rows = read_json_lines(path)
    for number, row in rows:
        if not isinstance(row, dict):
            raise TaskError(f"{path}: row {number} is no JSON object with the keys {', '.join(REQUIRED)}")
        _check_columns(list(row), f"{path}: row {number}")
    return rows


def _check_columns(columns: list[str], where: str) -> None:
    missing = [column for column in REQUIRED if column not in columns]
    unknown = [column for column in columns if column not in REQUIRED + OPTIONAL]
    doubled = [column for i, column in enumerate(columns) if column in columns[:i]]
    if doubled:
        raise TaskError(f"{where} has the column {doubled[0]!r} twice; keep the one that is meant")
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
    is_text = isinstance(path, str) and ("\n" in path or not path.lower().endswith(".txt"))
    found = str(path) if is_text else read_text(path)
    if not found.strip():
        raise TaskError("the text is empty: give some running text")
    return found
