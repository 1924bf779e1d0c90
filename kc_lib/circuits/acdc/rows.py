"""The distinct positions of a batch as one flat list of rows.

Prompts that start alike ("The capital city of ...") hold the same activations at the positions they share, under any
circuit and any ablation that depends on the prompt to the left only. A run over rows computes each such position once for
all prompts, and pads not at all. Attention runs over the rows too where prompts share enough of them, else prompt by prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kc_lib.residual.parts import Tree
from kc_lib.residual.prefix_cache import EMPTY, Context
from kc_lib.tasks.batches import Batch

PAIRS = 2  # how many times the pairs of positions in prompts the pairs of rows may be, for attention over rows to pay


@dataclass(frozen=True)
class Rows:
    """Rows of a batch: those that predict answers first, the rest from the right end of the prompts to the left.

    ``row_of`` gives the row of every position after the context (pads: any row), ``first`` one flat position (example times
    positions plus position) of every row, ``sees`` the rows that each row may attend to, ``answers`` the answers' rows.
    ``tree`` holds the rows for attention, or nothing: a context before them, or so many that all pairs are too many.
    """

    row_of: Int[Tensor, "batch pos"]
    first: Int[Tensor, " row"]
    sees: Bool[Tensor, "row row"]
    answers: Int[Tensor, "batch answer"]
    tree: Tree | None

    def __len__(self) -> int:
        return self.first.shape[0]

    def take(self, x: Tensor) -> Tensor:
        """``[n, batch, pos, d]`` (or sizes of 1 that broadcast) as ``[n, row, d]``."""
        return x.expand(x.shape[0], *self.row_of.shape, x.shape[-1]).flatten(1, 2)[:, self.first]


def rows_of(batch: Batch, intervention: str, context: Context = EMPTY) -> Rows:
    """The rows of a batch's clean prompts; under patching, positions are one row only if corrupted prompts agree too."""
    clean, corrupted = batch.clean.tolist(), batch.corrupted.tolist()
    lengths, start = batch.lengths.tolist(), context.start
    answers = {(i, p) for i, positions in enumerate(batch.answer_positions.tolist()) for p in positions}
    places = [(i, p) for i, length in enumerate(lengths) for p in range(start, length)]
    key_of = {
        (i, p): (tuple(clean[i][: p + 1]), tuple(corrupted[i][: p + 1]) if intervention == "patching" else ())
        for i, p in places
    }
    answering = {key_of[place] for place in answers}
    order = sorted(places, key=lambda place: (key_of[place] not in answering, -place[1], place[0]))
    row_of_key: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    first: list[int] = []
    width = batch.clean.shape[1] - start
    for i, p in order:
        if key_of[i, p] not in row_of_key:
            row_of_key[key_of[i, p]] = len(first)
            first.append(i * width + p - start)
    row_of = torch.zeros(len(lengths), width, dtype=torch.long)
    for i, p in places:
        row_of[i, p - start] = row_of_key[key_of[i, p]]
    sees = torch.zeros(len(first), len(first), dtype=torch.bool)
    for i, p in places:
        sees[row_of[i, p - start], row_of[i, : p - start + 1]] = True
    at = (batch.answer_positions - start).cpu()
    device = batch.clean.device
    firsts = torch.tensor(first, device=device)
    few = not start and len(first) ** 2 <= PAIRS * row_of.numel() * width
    tree = Tree(firsts % width, sees.to(device), width) if few else None
    return Rows(row_of.to(device), firsts, sees, row_of.gather(1, at).to(device), tree)
