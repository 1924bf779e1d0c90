"""Prompts of one length in one batch: what is read at one position of each needs no padding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor


class Read(Protocol):
    """Tokens, and the index of the one at which something is read: a ``Cloze`` or a ``ReadSentence``."""

    @property
    def tokens(self) -> tuple[int, ...]: ...

    @property
    def position(self) -> int: ...


def batches_by_length(
    items: Sequence[Read], batch_size: int
) -> Iterator[tuple[list[int], Int[Tensor, "batch pos"], Int[Tensor, " batch"]]]:
    """Indices into ``items``, tokens and positions of batches of one length; equal prompts are next to each other."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i in sorted(range(len(items)), key=lambda i: (items[i].tokens, items[i].position)):
        by_length[len(items[i].tokens)].append(i)
    for group in by_length.values():
        for start in range(0, len(group), batch_size):
            rows = group[start : start + batch_size]
            yield rows, torch.tensor([items[i].tokens for i in rows]), torch.tensor([items[i].position for i in rows])
