"""One way in for files: what is no regular file, too large, no text or nested without end is refused in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kc_lib import reading
from kc_lib.errors import GraphError, TaskError
from kc_lib.tasks.files import read_pairs
from kc_lib.tasks.pararel import read_patterns
from kc_lib.tasks.relations import load_relation

Reader = Callable[[Path], Any]
READERS: dict[str, tuple[Reader, str]] = {
    "pairs csv": (read_pairs, "file.csv"),
    "pairs jsonl": (read_pairs, "file.jsonl"),
    "relation": (load_relation, "file.json"),
    "patterns": (read_patterns, "file.jsonl"),
}
readers = pytest.mark.parametrize(("reader", "name"), READERS.values(), ids=READERS)


def refusal(reader: Reader, path: Path) -> str:
    with pytest.raises(TaskError) as error:
        reader(path)
    message = str(error.value)
    assert "\n" not in message
    assert path.name in message
    return message


@readers
def test_what_is_no_regular_file_is_refused_at_once(reader: Reader, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    assert "pipe or device" in refusal(reader, path)
    path.unlink()
    path.mkdir()
    assert "folder" in refusal(reader, path)


@readers
def test_a_file_too_large_is_not_read(reader: Reader, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    path.write_text("x" * 100)
    monkeypatch.setattr(reading, "LARGEST", 50)
    assert "100 bytes" in refusal(reader, path)


@pytest.mark.parametrize("name", ["pairs jsonl", "relation", "patterns"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000], ids=["lists", "objects", "number"])
def test_json_without_end_is_refused(name: str, content: str, tmp_path: Path) -> None:
    reader, file = READERS[name]
    path = tmp_path / file
    path.write_text(content)
    refusal(reader, path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_are_decoded_by_their_mark(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes('{"name": "Málaga, 京都"}'.encode(encoding))
    assert reading.read_json(path) == {"name": "Málaga, 京都"}


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"absent\.json"):
        reading.read_json(tmp_path / "absent.json", GraphError)
    with pytest.raises(TaskError, match="check the path"):
        reading.read_text("a\0b")


ROWS = [
    ("clean", "corrupted", "answer", "subject"),
    ("The capital of Spain, in Europe, is", "The capital of Italy, in Europe, is", "Madrid", "Spain"),
    ('The "City of Light" is', "The town of Siena is", "París", "City"),
]


def table(separator: str, rows: list[tuple[str, ...]] = ROWS) -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if separator in text or '"' in text else text

    return "\r\n".join(separator.join(map(cell, row)) for row in rows) + "\r\n"


INDEXED = [("" if i == 0 else str(i), *row) for i, row in enumerate(ROWS)]
UNNAMED = [("Unnamed: 0" if i == 0 else str(i), *row) for i, row in enumerate(ROWS)]
TRAILING = [(*row, "") for row in ROWS]
SPREADSHEETS: dict[str, bytes] = {
    "commas": table(",").encode(),
    "excel utf-8": table(";").encode("utf-8-sig"),
    "excel western": table(";").encode("cp1252"),
    "excel unicode text": table("\t").encode("utf-16"),
    "pandas with index": table(",", INDEXED).encode(),
    "pandas read again": table(",", UNNAMED).encode(),
    "trailing separators": table(";", TRAILING).encode(),
    "empty rows at the end": table(",", [*ROWS, ("", "", "", "")]).encode(),
    "old line ends": table(",").replace("\r\n", "\n").encode(),
}


@pytest.mark.parametrize("content", SPREADSHEETS.values(), ids=SPREADSHEETS)
@pytest.mark.parametrize("name", ["file.csv", "FILE.CSV"])
def test_what_spreadsheets_write_is_read(content: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    pairs = read_pairs(path)
    assert [(pair.clean, pair.corrupted, pair.answer, pair.subject) for pair in pairs] == ROWS[1:]


def test_a_doubled_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_text("clean,corrupted,answer,answer\na,b,c,d\n")
    assert "'answer' twice" in refusal(read_pairs, path)


def test_an_unnamed_column_in_the_midst_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_text("clean,,corrupted,answer\na,x,b,c\n")
    assert "unknown column ''" in refusal(read_pairs, path)
