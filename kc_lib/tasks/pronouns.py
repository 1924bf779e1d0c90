"""Gendered pronouns by name (Mathwin et al. 2023), generated: "So Mary is such a good cook, isn't" -> she.

The corrupted prompt has a name of the other gender. There is one prompt for each name that is a single token.
"""

from __future__ import annotations

import random
from itertools import zip_longest

from kc_lib.errors import TaskError
from kc_lib.tasks.files import PairText
from kc_lib.tasks.ioi import NAMES
from kc_lib.tasks.tokens import Tokenizer

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
