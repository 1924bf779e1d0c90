"""Sequences of random words that only earlier words of the same sequence tell: what heads of some kinds are good for.

Induction appears soon where many sequences are short and most use few words: after 300 steps that read nothing but up to
four pairs or eight words of 40, after 1,100 with up to twelve pairs or 40 words of 100. An earlier nano, which read a few
repeats of any words, had none after 4,000. Once there, it holds for all words, and longer repeats make it sharp.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tools.train_nano.examples import Example

SHORTEST_REPEAT, LONGEST_REPEAT = 3, 100  # words that are read, and then read again
LEAST_REPEATED = 24  # words of such a sequence, as short ones are repeated more often
SHARE_OF_FEW = 0.7  # of sequences that use the few words, if they suffice
MOST_BEFORE = 4  # words before a repeat, so that it starts anywhere
MOST_PAIRS = 4

Maker = Callable[[random.Random], Example]


def repeated(words: Sequence[int], generator: random.Random, longest: int = LONGEST_REPEAT) -> Example:
    """Random tokens twice over, or more often if they are few; short ones are more frequent, as long ones cost more."""
    return Example(_again(generator.sample(words, _length(longest, 2, generator))))


def _length(longest: int, power: float, generator: random.Random) -> int:
    """How many words are read before they are read again; short ones the more often, the higher the power."""
    return round(SHORTEST_REPEAT * (longest / SHORTEST_REPEAT) ** (generator.random() ** power))


def _again(once: Sequence[int]) -> tuple[int, ...]:
    return tuple(once) * max(2, LEAST_REPEATED // len(once))


def random_words(words: Sequence[int], few: Sequence[int]) -> dict[str, Maker]:
    """Makers of three kinds of sequences by name: of all words, or mostly of a few.

    ``repeats``: some words, and then others twice over or more often. ``pairs``: two to four pairs of words in random order,
    each several times, so that a word tells the next but no distance does. ``mirrored``: some words, and then the same
    backwards; what comes next is what stood before the present word, which one must look back to itself to read.
    """

    def source(n: int, generator: random.Random) -> Sequence[int]:
        return few if n <= len(few) and generator.random() < SHARE_OF_FEW else words

    def some(generator: random.Random) -> list[int]:
        n = _length(LONGEST_REPEAT, 2.5, generator)
        return generator.sample(source(n, generator), n)

    def repeats(generator: random.Random) -> Example:
        once = some(generator)
        before = generator.sample(words, generator.randint(0, MOST_BEFORE))
        return Example((*before, *_again(once)))

    def pairs(generator: random.Random) -> Example:
        n = generator.randint(2, MOST_PAIRS)
        drawn = generator.sample(source(2 * n, generator), 2 * n)
        both = list(zip(drawn[::2], drawn[1::2], strict=True))
        n_told = max(3, round(n * generator.uniform(2, 4)))
        return Example(tuple(word for _ in range(n_told) for word in generator.choice(both)))

    def mirrored(generator: random.Random) -> Example:
        once = some(generator)
        return Example((*once, *reversed(once)))

    return {"repeats": repeats, "pairs": pairs, "mirrored": mirrored}
