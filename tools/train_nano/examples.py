"""Sentences as tokens, drawn at random by kind, in batches of about as many tokens each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tools.train_nano.corpus import Sentence

SHARE_OF_PAIRS = 0.3  # of examples that are two sentences, so that a sentence stands at different positions
DRAWN_AT_ONCE = 512  # examples sorted by length together, so that padding costs little


@dataclass(frozen=True)
class Example:
    """Tokens without those at the sentence's ends, and which of them are answers, as (start, end)."""

    tokens: tuple[int, ...]
    answers: tuple[tuple[int, int], ...] = ()

    def __add__(self, other: Example) -> Example:
        shift = len(self.tokens)
        moved = tuple((start + shift, end + shift) for start, end in other.answers)
        return Example(self.tokens + other.tokens, self.answers + moved)


def encoded(tokenizer: PreTrainedTokenizerFast, sentences: Sequence[Sentence]) -> list[Example]:
    """One example per sentence."""
    parts = [part for sentence in sentences for part in (sentence.prompt, sentence.answer, sentence.rest)]
    ids: list[list[int]] = tokenizer(parts, add_special_tokens=False).input_ids if parts else []
    return [
        Example((*prompt, *answer, *rest), ((len(prompt), len(prompt) + len(answer)),))
        for prompt, answer, rest in zip(ids[::3], ids[1::3], ids[2::3], strict=True)
    ]


def drawn(
    pools: Mapping[str, Sequence[Example]],
    makers: Mapping[str, Callable[[random.Random], Example]],
    shares: Mapping[str, float],
    generator: random.Random,
) -> Iterator[Example]:
    """Examples without end: a kind by its share, then one of its pool, or what its maker makes."""
    kinds, weights = list(shares), list(shares.values())
    while True:
        kind = generator.choices(kinds, weights)[0]
        if kind in makers:
            yield makers[kind](generator)
        elif generator.random() < SHARE_OF_PAIRS:
            yield generator.choice(pools[kind]) + generator.choice(pools[kind])
        else:
            yield generator.choice(pools[kind])


def batches(examples: Iterator[Example], n_tokens: int, generator: random.Random) -> Iterator[list[Example]]:
    """Batches of examples of similar length, at most ``n_tokens`` with padding, in random order."""
    while True:
        rows = sorted(islice(examples, DRAWN_AT_ONCE), key=lambda example: len(example.tokens), reverse=True)
        found = []
        while rows:
            size = max(1, n_tokens // len(rows[0].tokens))
            found.append(rows[:size])
            rows = rows[size:]
        generator.shuffle(found)
        yield from found


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
    """Rows as one tensor, padded on the right, and where they are not padding."""
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(width) < lengths[:, None]
