"""Tasks that are generated for a tokenizer: IOI, Greater-Than, pronouns, and agreement of subject and verb."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import zip_longest

from kc_lib.errors import TaskError
from kc_lib.tasks.files import PairText
from kc_lib.tasks.relations import load_relation
from kc_lib.tasks.tokens import Tokenizer

# --- indirect object identification ----------------------------------------------------------------------------------
# Indirect object identification (Wang et al. 2023, arXiv:2211.00593), generated.
#
# Half the prompts are ABBA, half BABA ("A and B ... B gave it to" -> A). The corrupted prompt replaces the second
# mention of the subject by the indirect object (Tigges et al. 2024), so that A and B trade places as the answer; for path
# patching there are also corrupted prompts with three other names.

# fmt: off
NAMES = (
    "Mary", "John", "James", "Robert", "Michael", "William", "David", "Richard", "Thomas", "Charles", "Daniel",
    "Matthew", "Anthony", "Mark", "Paul", "Steven", "Andrew", "George", "Edward", "Brian", "Kevin", "Jason", "Ryan",
    "Jacob", "Eric", "Adam", "Peter", "Jack", "Henry", "Patricia", "Jennifer", "Linda", "Elizabeth", "Barbara",
    "Susan", "Jessica", "Sarah", "Karen", "Lisa", "Nancy", "Emily", "Anna", "Laura", "Amy", "Kate", "Emma", "Alice",
    "Jane", "Rose", "Ruth", "Helen", "Maria",
)
# fmt: on
PLACES = ("store", "garden", "station", "office", "school", "park", "museum", "kitchen")
THINGS = ("drink", "book", "ring", "letter", "map", "key", "flower", "ticket")
TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} gave a {thing} to",
    "After {a} and {b} came to the {place}, {s} handed a {thing} to",
    "While {a} and {b} were at the {place}, {s} passed a {thing} to",
    "Then {a} and {b} sat down in the {place}. Later {s} showed a {thing} to",
)


def ioi_pairs(tokenizer: Tokenizer, n: int, seed: int, *, strangers: bool = False) -> list[PairText]:
    """``n`` distinct prompts with names that are single tokens.

    With ``strangers`` the corrupted prompts are "ABC": three other names in the places of all three (Wang et al. 2023,
    section 3), so that no name is there twice; the clean prompts are the same.

    Raises:
        TaskError: the tokenizer splits almost every name.
    """
    names = [name for name in NAMES if tokenizer.single(name) is not None]
    if len(names) < 8:
        raise TaskError(f"IOI needs names that are single tokens; this tokenizer has {len(names)} of {len(NAMES)}")
    generator, of_strangers = random.Random(seed), random.Random(seed + 1)
    pairs: dict[str, PairText] = {}
    while len(pairs) < n:
        template = generator.choice(TEMPLATES)
        recipient, subject = generator.sample(names, 2)
        first, second = (recipient, subject) if len(pairs) % 2 == 0 else (subject, recipient)  # ABBA, BABA
        fill = {"place": generator.choice(PLACES), "thing": generator.choice(THINGS)}
        clean = template.format(a=first, b=second, s=subject, **fill)
        if strangers:
            a, b, c = of_strangers.sample([name for name in names if name not in (recipient, subject)], 3)
            corrupted = template.format(a=a, b=b, s=c, **fill)
        else:
            corrupted = template.format(a=first, b=second, s=recipient, **fill)
        pairs[clean] = PairText(clean, corrupted, recipient, subject, subject, None)
    return list(pairs.values())


# --- greater-than ----------------------------------------------------------------------------------------------------
# Greater-Than (Hanna et al. 2023, arXiv:2305.00586), generated: the end of a range of years is later than its start.
#
# "The war lasted from the year 1732 to the year 17" -> 33 to 99. The corrupted prompt starts in 01, after which every other
# end is as good. Answers are two-digit tokens, so a tokenizer serves only if it reads a year as two of them; years that it
# reads otherwise (many have one token for 1900) are left out.

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


# --- pronouns --------------------------------------------------------------------------------------------------------
# Gendered pronouns by name (Mathwin et al. 2023), generated: "So Mary is such a good cook, isn't" -> she.
#
# The corrupted prompt has a name of the other gender. There is one prompt for each name that is a single token.

# fmt: off
FEMALE_NAMES = frozenset({
    "Mary", "Patricia", "Jennifer", "Linda", "Elizabeth", "Barbara", "Susan", "Jessica", "Sarah", "Karen", "Lisa", "Nancy",
    "Emily", "Anna", "Laura", "Amy", "Kate", "Emma", "Alice", "Jane", "Rose", "Ruth", "Helen", "Maria",
})
# fmt: on
PRONOUN_QUESTION = "So {name} is such a good cook, isn't"
FEMALE, MALE = "she", "he"


def pronoun_pairs(tokenizer: Tokenizer, n: int, seed: int) -> list[PairText]:
    """``n`` prompts, or as many as there are names, of either gender by turns.

    Raises:
        TaskError: the tokenizer splits almost every name, or a pronoun.
    """
    names = [name for name in NAMES if tokenizer.single(name) is not None]
    female = [name for name in names if name in FEMALE_NAMES]
    male = [name for name in names if name not in FEMALE_NAMES]
    missing = [pronoun for pronoun in (FEMALE, MALE) if tokenizer.single(pronoun, "isn't") is None]
    if min(len(female), len(male)) < 4 or missing:
        raise TaskError(
            f"pronoun needs names that are single tokens, and the tokens {FEMALE} and {MALE}; this tokenizer has "
            f"{len(female)} and {len(male)} of {len(NAMES)} names" + (f", and splits {missing[0]}" if missing else "")
        )
    generator = random.Random(seed)
    women = [(name, FEMALE, generator.choice(male), MALE) for name in generator.sample(female, len(female))]
    men = [(name, MALE, generator.choice(female), FEMALE) for name in generator.sample(male, len(male))]
    rows = [row for both in zip_longest(women, men) for row in both if row is not None]
    start = PRONOUN_QUESTION.index("{")
    return [
        PairText(
            PRONOUN_QUESTION.format(name=name),
            PRONOUN_QUESTION.format(name=other),
            pronoun,
            other_pronoun,
            subject=name,
            spans={"subject": (start, start + len(name))},
        )
        for name, pronoun, other, other_pronoun in rows[:n]
    ]


# --- agreement of subject and verb -----------------------------------------------------------------------------------
# Agreement of subject and verb (Linzen et al. 2016, arXiv:1611.01368), generated.
#
# "The dogs near the tree" -> are, were, have. The corrupted prompt has the subject in the other number; both have as many
# tokens. Half the prompts are singular, and in half of either the noun between subject and verb is of the other number.

SINGULAR, PLURAL = ("is", "was", "has"), ("are", "were", "have")
# further verbs that count, with no form that is also a noun
MORE_SINGULAR = ("does", "goes", "seems", "comes", "gives", "appears", "contains", "becomes")
MORE_PLURAL = ("do", "go", "seem", "come", "give", "appear", "contain", "become")
AGREEMENT_TEMPLATES = (
    "The {noun} near the {other}",
    "The {noun} behind the {other}",
    "The {noun} beside the {other}",
    "The {noun} next to the {other}",
    "The {noun} in front of the {other}",
    "The {noun}",
)
FEWEST_NOUNS = 4


def agreement_nouns() -> list[tuple[str, str]]:
    """Nouns in the singular and the plural."""
    return [(fact.subject, fact.object) for fact in load_relation("noun_plural").facts]


def agreement_pairs(tokenizer: Tokenizer, n: int, seed: int) -> list[PairText]:
    """``n`` distinct prompts with a noun between subject and verb; right are verbs of the subject's number.

    Answer and distractor are two forms of one verb: of be, or have.

    Raises:
        TaskError: the tokenizer splits almost every noun or every verb.
    """
    verbs = _verbs(tokenizer)
    nouns = [noun for noun in agreement_nouns() if _is_pair(tokenizer, noun)]
    if len(nouns) < FEWEST_NOUNS or not verbs:
        raise TaskError(
            f"agreement needs nouns with as many tokens in the plural, and verbs that are single tokens; this tokenizer has "
            f"{len(nouns)} of {len(agreement_nouns())} nouns and {len(verbs)} of {len(SINGULAR + MORE_SINGULAR)} verbs"
        )
    generator = random.Random(seed)
    templates = [template for template in AGREEMENT_TEMPLATES if "{other}" in template]
    n = min(n, len(templates) * len(nouns) * (len(nouns) - 1))
    pairs: dict[str, PairText] = {}
    while len(pairs) < n:
        number, other_number = len(pairs) % 2, len(pairs) // 2 % 2
        template = generator.choice(templates)
        noun, between = generator.sample(nouns, 2)
        other = between[other_number]
        clean = template.format(noun=noun[number], other=other)
        verb = generator.choice(verbs[: len(SINGULAR)])
        start = template.index("{")
        pairs[clean] = PairText(
            clean,
            template.format(noun=noun[1 - number], other=other),
            answer=verb[number][0],
            distractor=verb[1 - number][0],
            subject=noun[number],
            right=tuple(forms[number][1] for forms in verbs),
            wrong=tuple(forms[1 - number][1] for forms in verbs),
            spans={"subject": (start, start + len(noun[number])), "other": (len(clean) - len(other), len(clean))},
        )
    return list(pairs.values())


def _verbs(tokenizer: Tokenizer) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    """Verbs whose forms are single tokens: (singular, its token), (plural, its token)."""
    found = []
    for forms in zip(SINGULAR + MORE_SINGULAR, PLURAL + MORE_PLURAL, strict=True):
        one, many = (tokenizer.single(form, "house") for form in forms)
        if one is not None and many is not None:
            found.append(((forms[0], one), (forms[1], many)))
    return found


def _is_pair(tokenizer: Tokenizer, noun: tuple[str, str]) -> bool:
    """Whether both numbers are words the tokenizer knows, of equal length in tokens."""
    one, many = (tokenizer.answer("The", form) for form in noun)
    return len(one) == len(many) and one != many and tokenizer.inner.unk_token_id not in (*one, *many)


# --- by name -----------------------------------------------------------------------------------------------------------

GENERATED = {
    "ioi": "indirect object identification (generated)",
    "ioi_abc": "the same, corrupted by three other names (generated)",
    "greater_than": "the end of a range of years is after its start (generated)",
    "pronoun": "he or she by name (generated)",
    "agreement": "agreement of subject and verb (generated)",
}
DEFAULT_GENERATED = 100
_MAKERS: dict[str, Callable[[Tokenizer, int, int], list[PairText]]] = {
    "ioi": ioi_pairs,
    "ioi_abc": partial(ioi_pairs, strangers=True),
    "greater_than": year_pairs,
    "pronoun": pronoun_pairs,
    "agreement": agreement_pairs,
}


def generated_pairs(name: str, tokenizer: Tokenizer, n: int = DEFAULT_GENERATED, seed: int = 0) -> list[PairText]:
    """At most ``n`` pairs of one of ``GENERATED``, by seed.

    Raises:
        TaskError: a tokenizer for which the task cannot be asked.
    """
    return _MAKERS[name](tokenizer, n, seed)
