"""Indirect object identification (Wang et al. 2023, arXiv:2211.00593), generated.

Half the prompts are ABBA, half BABA ("A and B ... B gave it to" -> A). The corrupted prompt replaces the second
mention of the subject by the indirect object (Tigges et al. 2024), so that A and B trade places as the answer; for path
patching there are also corrupted prompts with three other names.
"""

from __future__ import annotations

import random

from kc_lib.errors import TaskError
from kc_lib.tasks.files import PairText
from kc_lib.tasks.tokens import Tokenizer

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
