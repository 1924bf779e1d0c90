"""ParaRel's files (Elazar et al. 2021, arXiv:2102.01017): facts in many wordings, and the wordings as patterns.

``data_1-1.json``, as published with the code of knowledge neurons (Dai et al. 2022), is a JSON list of facts; a fact is a
list of ``[sentence with [MASK], answer, "P36(capital)"]``. Of a pattern file each row is ``{"pattern": "[X] ... [Y]"}``.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from kc_lib.errors import TaskError
from kc_lib.reading import read_json_lines

MASK, SUBJECT, ANSWER = "[MASK]", "[X]", "[Y]"
FORM = '[sentence with [MASK], answer, "P36(capital)"]'


@dataclass(frozen=True)
class FactText:
    """A fact and the sentences that ask for it, each with ``[MASK]`` in the answer's place."""

    subject: str
    answer: str
    sentences: tuple[str, ...]
    where: str = ""  # file and row, for errors


def fact_texts(rows: Sequence[tuple[str, str]], patterns: Sequence[str], where: str = "") -> list[FactText]:
    """Facts from (subject, answer) and patterns with ``[X]`` and ``[Y]``."""
    asked = [pattern.replace(ANSWER, MASK) for pattern in patterns]
    return [
        FactText(subject, answer, tuple(sentence.replace(SUBJECT, subject) for sentence in asked), f"{where}: {subject!r}")
        for subject, answer in rows
    ]


def read_patterns(path: str | Path) -> tuple[str, ...]:
    """The distinct patterns of a ParaRel pattern file, in its order.

    Raises:
        TaskError: no such file, or a row that is no pattern with one ``[X]`` and one ``[Y]``.
    """
    patterns: dict[str, None] = {}
    for number, row in read_json_lines(path):
        pattern = row.get("pattern") if isinstance(row, dict) else None
        if not isinstance(pattern, str) or pattern.count(SUBJECT) != 1 or pattern.count(ANSWER) != 1:
            raise TaskError(
                f"{path}: row {number} has the pattern {pattern!r}; a pattern holds one {SUBJECT} (subject) and one "
                f"{ANSWER} (answer)"
            )
        patterns[pattern.strip()] = None
    if not patterns:
        raise TaskError(f'{path}: holds no patterns; give at least one row {{"pattern": "{SUBJECT} ... {ANSWER}"}}')
    return tuple(patterns)


def parse_pararel(document: Sequence[Any], source: str, relation: str | None = None) -> dict[str, list[FactText]]:
    """Facts by relation id ("P36") from a parsed ``data_1-1.json``; ``relation`` picks one.

    The file does not name subjects: the subject of a fact is what its sentences hold where those of the relation's other
    facts, row by row, hold something else, in whole words.

    Raises:
        TaskError: an unknown relation, or rows of another form; the message names fact and row.
    """
    by_relation: dict[str, list[tuple[str, str, list[str]]]] = defaultdict(list)
    for number, rows in enumerate(document):
        where = f"{source}: fact {number}"
        if not isinstance(rows, list) or not rows:
            raise TaskError(f"{where} is no list of rows {FORM}: this is no ParaRel file")
        for i, row in enumerate(rows):
            _check_row(row, rows[0], f"{where}, row {i}")
        _, answer, label = rows[0]
        by_relation[label.partition("(")[0].strip()].append((where, answer.strip(), [row[0].strip() for row in rows]))
    if not by_relation:
        raise TaskError(f"{source}: holds no facts; a fact is a list of rows {FORM}")
    if relation is not None and relation not in by_relation:
        raise TaskError(f"{source}: has no relation {relation!r}; it has {', '.join(sorted(by_relation))}")
    wanted = list(by_relation) if relation is None else [relation]
    return {name: _with_subjects(by_relation[name], f"{source}: relation {name}") for name in wanted}


def _check_row(row: Any, first: Any, where: str) -> None:
    if not isinstance(row, list) or len(row) != 3 or not all(isinstance(part, str) and part.strip() for part in row):
        raise TaskError(f"{where} is {row!r}; a row is {FORM}")
    if row[0].count(MASK) != 1:
        raise TaskError(f"{where}: the sentence {row[0]!r} has {row[0].count(MASK)} {MASK}; put one in the answer's place")
    if row[1:] != first[1:]:
        raise TaskError(
            f"{where}: its answer and relation are {row[1:]!r}, those of row 0 {first[1:]!r}; split the fact in two"
        )


def _with_subjects(facts: Sequence[tuple[str, str, list[str]]], where: str) -> list[FactText]:
    n_rows = len(facts[0][2])
    for fact, _, sentences in facts:
        if len(sentences) != n_rows:
            raise TaskError(f"{fact} has {len(sentences)} rows, the first of its relation {n_rows}; give as many to each")
    if len({tuple(sentences) for _, _, sentences in facts}) < 2:
        raise TaskError(f"{where} has one fact, so its subject cannot be told from its wording; give at least two facts")
    borders = [_borders([sentences[i] for _, _, sentences in facts]) for i in range(n_rows)]
    texts = []
    for fact, answer, sentences in facts:
        between = (sentence[start : len(sentence) - end] for sentence, (start, end) in zip(sentences, borders, strict=True))
        subject, _ = Counter(between).most_common(1)[0]
        if not subject.strip() or any(subject not in sentence for sentence in sentences):
            raise TaskError(
                f"{fact}: no subject is in all of its sentences, e.g. {sentences[0]!r}, where those of other facts of "
                f"{where} have another; word row by row all facts of a relation alike"
            )
        texts.append(FactText(subject, answer, tuple(sentences), fact))
    return texts


def _borders(sentences: Sequence[str]) -> tuple[int, int]:
    """How many characters all sentences start and end with, in whole words and without overlap."""
    start = _n_common(sentences)
    return start, _n_common([sentence[start:][::-1] for sentence in sentences])


def _n_common(texts: Sequence[str]) -> int:
    same = takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
    return len(re.sub(r"\w+$", "", "".join(characters[0] for characters in same)))
