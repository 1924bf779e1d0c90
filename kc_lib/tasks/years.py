"""Greater-Than (Hanna et al. 2023, arXiv:2305.00586), generated: the end of a range of years is later than its start.

"The war lasted from the year 1732 to the year 17" -> 33 to 99. The corrupted prompt starts in 01, after which every other
end is as good. Answers are two-digit tokens, so a tokenizer serves only if it reads a year as two of them; years that it
reads otherwise (many have one token for 1900) are left out.
"""

from __future__ import annotations

import random

from kc_lib.errors import TaskError
from kc_lib.tasks.files import PairText
from kc_lib.tasks.tokens import Tokenizer

EVENTS = ("war", "siege", "voyage", "reign", "strike", "drought", "trial", "conflict", "journey", "project")
YEARS_TEMPLATE = "The {event} lasted from the year {century}{start} to the year {century}"
CENTURIES = tuple(str(century) for century in range(11, 20))
FIRST_YEAR, LAST_YEAR = 2, 98  # within a century; some year is earlier and some later than any of them
CORRUPTED_YEAR = 1


def year_pairs(tokenizer: Tokenizer, n: int, seed: int) -> list[PairText]:
    """``n`` distinct prompts, or all there are; right are the years of the century after the start, wrong the others.

    Answer and distractor are one of each, drawn, for metrics that compare two tokens.

    Raises:
        TaskError: a tokenizer that reads no such year as two tokens of two digits.
    """
    tokens = [_two_digits(tokenizer, year) for year in range(100)]
    starts = [
        (event, century, start)
        for century in CENTURIES
        if _splits(tokenizer, century, CORRUPTED_YEAR, tokens)
        for start in range(FIRST_YEAR, LAST_YEAR + 1)
        if _splits(tokenizer, century, start, tokens)
        for event in EVENTS
    ]
    if not starts or None in tokens:
        example = tokenizer.inner.convert_ids_to_tokens(list(tokenizer.answer("in", "1732")))
        raise TaskError(
            "greater_than needs a tokenizer that reads a year as two tokens of two digits (1732 as 17 and 32); this one "
            f"reads it as {', '.join(map(repr, example))}: use another model or task"
        )
    ids = [int(token) for token in tokens if token is not None]
    generator = random.Random(seed)
    pairs = []
    for event, century, start in generator.sample(starts, min(n, len(starts))):
        fill = {"event": event, "century": century}
        clean = YEARS_TEMPLATE.format(start=f"{start:02}", **fill)
        at = clean.index(century)
        pairs.append(
            PairText(
                clean,
                YEARS_TEMPLATE.format(start=f"{CORRUPTED_YEAR:02}", **fill),
                answer=f"{generator.randint(start + 1, 99):02}",
                distractor=f"{generator.randint(0, start):02}",
                subject=f"{century}{start:02}",
                between="",
                right=tuple(ids[start + 1 :]),
                wrong=tuple(ids[: start + 1]),
                spans={
                    "subject": (at, at + 4),
                    "event": (clean.index(event), clean.index(event) + len(event)),
                    "year": (at + 2, at + 4),
                    "century": (len(clean) - 2, len(clean)),
                },
            )
        )
    return pairs


def _two_digits(tokenizer: Tokenizer, year: int) -> int | None:
    tokens = tokenizer.inner(f"{year:02}", add_special_tokens=False).input_ids
    return int(tokens[0]) if len(tokens) == 1 and tokens[0] != tokenizer.inner.unk_token_id else None


def _splits(tokenizer: Tokenizer, century: str, year: int, tokens: list[int | None]) -> bool:
    """Whether the tokenizer reads a year as one token for the century and the token of its two other digits."""
    if tokenizer.single(century, "year") is None:
        return False
    before = tokenizer.encode(f"The year {century}")
    return tokenizer.encode(f"The year {century}{year:02}") == (*before, tokens[year])
