"""Agreement of subject and verb (Linzen et al. 2016, arXiv:1611.01368), generated.

"The dogs near the tree" -> are, were, have. The corrupted prompt has the subject in the other number; both have as many
tokens. Half the prompts are singular, and in half of either the noun between subject and verb is of the other number.
"""

from __future__ import annotations

import random

from kc_lib.errors import TaskError
from kc_lib.tasks.files import PairText
from kc_lib.tasks.relations import load_relation
from kc_lib.tasks.tokens import Tokenizer

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
