"""One way in for every text file of the user's: regular files of a sane size, decoded, JSON not nested without end."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from kc_lib.errors import KnowledgeCircuitsError, TaskError, first_line

LARGEST = 512 * 1024**2  # bytes
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_bytes(path: str | Path, error: type[KnowledgeCircuitsError] = TaskError) -> bytes:
    """The bytes of a regular file.

    Raises:
        KnowledgeCircuitsError: of the given kind: no such file, a folder, pipe or device, or a file that is too large.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise error(f"{path} cannot be read: no such file; check the path")
        if not path.is_file():
            raise error(f"{path} cannot be read: it is a {'folder' if path.is_dir() else 'pipe or device'}, not a file")
        if path.stat().st_size > LARGEST:
            raise error(f"{path} cannot be read: it has {path.stat().st_size:,} bytes, more than {LARGEST:,}")
        return path.read_bytes()
    except (OSError, ValueError) as problem:  # ValueError: a path with a null in it
        raise error(f"{str(path)[:200]} cannot be read ({first_line(problem)[:200]}): check the path") from problem


def read_text(path: str | Path, error: type[KnowledgeCircuitsError] = TaskError, fallback: str | None = None) -> str:
    """The text of a file: UTF-8, or what its byte order mark says, or else the ``fallback`` encoding where there is one.

    Raises:
        KnowledgeCircuitsError: of the given kind: as ``read_bytes``, or bytes that are no such text.
    """
    content = read_bytes(path, error)
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as problem:
        if fallback is None or encoding != "utf-8":
            raise error(f"{path} cannot be read as text ({first_line(problem)}): save it as UTF-8") from problem
        return content.decode(fallback, errors="replace")


def parse_json(text: str, where: str, error: type[KnowledgeCircuitsError] = TaskError) -> Any:
    """A parsed JSON text; ``where`` names it in errors.

    Raises:
        KnowledgeCircuitsError: of the given kind: no JSON, or one that is nested too deeply or holds endless numbers.
    """
    try:
        return json.loads(text)
    except RecursionError as problem:
        raise error(f"{where} cannot be read as JSON: it is nested too deeply") from problem
    except ValueError as problem:  # no JSON, or a number with too many digits
        raise error(f"{where} cannot be read as JSON ({first_line(problem)})") from problem


def read_json(path: str | Path, error: type[KnowledgeCircuitsError] = TaskError) -> Any:
    """The parsed JSON of a file.

    Raises:
        KnowledgeCircuitsError: of the given kind: as ``read_text`` and ``parse_json``.
    """
    return parse_json(read_text(path, error), str(path), error)


def read_json_lines(path: str | Path, error: type[KnowledgeCircuitsError] = TaskError) -> list[tuple[int, Any]]:
    """The parsed lines of a file in which each is JSON, with their numbers; empty lines are left out.

    Raises:
        KnowledgeCircuitsError: of the given kind: as ``read_text`` and ``parse_json``.
    """
    lines = enumerate(read_text(path, error).split("\n"), start=1)
    return [(number, parse_json(line, f"{path}: row {number}", error)) for number, line in lines if line.strip()]
