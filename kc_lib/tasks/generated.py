"""Tasks that are generated: what they are called, and their prompts for a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kc_lib.tasks.agreement import agreement_pairs
from kc_lib.tasks.files import PairText
from kc_lib.tasks.ioi import ioi_pairs
from kc_lib.tasks.pronouns import pronoun_pairs
from kc_lib.tasks.tokens import Tokenizer
from kc_lib.tasks.years import year_pairs

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
