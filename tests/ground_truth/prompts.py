"""Words and clean/corrupted prompts of the hand-wired models."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence

from ground_truth.wires import BOS
from kc_lib.tasks.batches import TokenPair

LETTERS = (BOS, *string.ascii_lowercase[:15])
CAPITALS = {
    "Austria": "Vienna",
    "China": "Beijing",
    "Egypt": "Cairo",
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
}
UNKNOWN = "Atlantis"  # a country no fact is stored of
COUNTRIES = (*CAPITALS, UNKNOWN)
FACT_WORDS = (BOS, *COUNTRIES, *CAPITALS.values(), "capital", "of", "is")
TEMPLATES = ("capital of {} is", "{} capital is")
N_INDUCTION = 5  # draws of letters, each with three corrupted prompts


def induction_pairs(words: Sequence[str], seed: int = 0) -> list[TokenPair]:
    """``A B c D E A`` -> B, corrupted so that the answer is E: followers swapped, predecessors swapped, or D at the end."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(N_INDUCTION):
        a, b, c, d, e = draw.sample(list(words[1:]), 5)
        for corrupted in ([a, e, c, d, b, a], [d, b, c, a, e, a], [a, b, c, d, e, d]):
            pairs.append(_pair(words, [a, b, c, d, e, a], corrupted, b, e, {"first": (1,), "second": (2,)}, subject=a))
    return pairs


def fact_pairs(words: Sequence[str]) -> list[TokenPair]:
    """Every country, with two others as the corrupted one."""
    return [_fact_pair(words, template, country, other, CAPITALS[other]) for template, country, other in _contrasts()]


def unknown_fact_pairs(words: Sequence[str]) -> list[TokenPair]:
    """As ``fact_pairs``, but the corrupted prompt names the unknown country; the other's capital is the distractor."""
    return [_fact_pair(words, template, country, UNKNOWN, CAPITALS[other]) for template, country, other in _contrasts()]


def _contrasts() -> Iterator[tuple[list[str], str, str]]:
    """Template, country and other country: each country with the next two, in both templates over all."""
    countries = list(CAPITALS)
    for i, country in enumerate(countries):
        for step in (1, 2):
            yield TEMPLATES[(i + step) % 2].split(), country, countries[(i + step) % len(countries)]


def _fact_pair(words: Sequence[str], template: Sequence[str], country: str, other: str, distractor: str) -> TokenPair:
    clean, corrupted = ([name if word == "{}" else word for word in template] for name in (country, other))
    subject = 1 + template.index("{}")
    relation = tuple(p for p in range(1, len(clean) + 1) if p != subject)
    positions = {"subject": (subject,), "relation": relation}
    return _pair(words, clean, corrupted, CAPITALS[country], distractor, positions, subject=country)


def _pair(
    words: Sequence[str],
    clean: Sequence[str],
    corrupted: Sequence[str],
    answer: str,
    distractor: str,
    positions: dict[str, tuple[int, ...]],
    subject: str,
) -> TokenPair:
    """A pair from words, with BOS before either prompt."""
    ids = {word: i for i, word in enumerate(words)}
    text = {
        "clean": " ".join(clean),
        "corrupted": " ".join(corrupted),
        "answer": answer,
        "distractor": distractor,
        "subject": subject,
    }
    return TokenPair(
        clean=(ids[BOS], *(ids[word] for word in clean)),
        corrupted=(ids[BOS], *(ids[word] for word in corrupted)),
        answer=(ids[answer],),
        distractor=ids[distractor],
        positions=positions,
        text=text,
    )
