"""Token pairs as padded tensors.

Padding is on the right. Under causal attention nothing left of a pad can see it, positions count from the left, and
everything is read at named positions, so no result depends on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kc_lib.errors import TaskError


@dataclass(frozen=True)
class TokenPair:
    """One clean and one corrupted prompt of the same token length, with answer, distractor and named positions.

    ``positions`` maps a name ("subject", "relation") to the token indices of the clean prompt it covers; the last
    position is always the one that predicts the answer. Of a task with several right answers ``right`` and ``wrong`` are
    all the tokens that count for and against it; where they are empty, these are the answer's first and the distractor.
    """

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    answer: tuple[int, ...]
    distractor: int
    positions: dict[str, tuple[int, ...]]
    text: dict[str, str]
    right: tuple[int, ...] = ()
    wrong: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.clean) != len(self.corrupted):
            raise TaskError(
                f"clean and corrupted prompt differ in length ({len(self.clean)} and {len(self.corrupted)} tokens): "
                f"{self.text.get('clean')!r} / {self.text.get('corrupted')!r}; choose another corrupted prompt"
            )
        if not self.answer:
            raise TaskError(f"the prompt {self.text.get('clean')!r} has an empty answer")
        if bool(self.right) != bool(self.wrong) or set(self.right) & set(self.wrong):
            raise TaskError(
                f"the prompt {self.text.get('clean')!r} has {len(self.right)} right and {len(self.wrong)} wrong tokens; "
                "give both or none, and none that is both"
            )


@dataclass(frozen=True)
class Batch:
    """Pairs as tensors; ``answer_positions[b, a]`` is the position whose logits predict ``answers[b, a]``.

    ``right`` and ``wrong`` hold the tokens that count for and against each pair, -1 where it has fewer than another.
    """

    clean: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]
    answers: Int[Tensor, "batch answer"]
    answer_positions: Int[Tensor, "batch answer"]
    answer_mask: Bool[Tensor, "batch answer"]
    distractors: Int[Tensor, " batch"]
    right: Int[Tensor, "batch right"]
    wrong: Int[Tensor, "batch wrong"]

    def __len__(self) -> int:
        return self.clean.shape[0]

    def among_answers(self) -> tuple[Batch, Int[Tensor, " token"]]:
        """The batch with answers and distractors counted among themselves, and the token each number stands for.

        For metrics of answers and distractors only: ``right`` and ``wrong`` stay tokens.
        """
        flat = torch.cat([self.answers.flatten(), self.distractors])
        tokens, places = flat.unique(return_inverse=True)
        answers = places[: self.answers.numel()].view_as(self.answers)
        return replace(self, answers=answers, distractors=places[self.answers.numel() :]), tokens


def make_batch(pairs: Sequence[TokenPair], full_answer: bool = False, device: torch.device | str = "cpu") -> Batch:
    """Pad pairs to one batch; ``full_answer`` reads every answer token, teacher-forced, instead of the first."""
    if not pairs:
        raise TaskError("no pairs to make a batch of: every fact was dropped before this step")
    answers = [pair.answer if full_answer else pair.answer[:1] for pair in pairs]
    clean = [(*pair.clean, *answer[:-1]) for pair, answer in zip(pairs, answers, strict=True)]
    corrupted = [(*pair.corrupted, *answer[:-1]) for pair, answer in zip(pairs, answers, strict=True)]
    first = torch.tensor([len(pair.clean) - 1 for pair in pairs])
    lengths = torch.tensor([len(tokens) for tokens in clean])
    padded_answers = _pad(answers)
    positions = (first[:, None] + torch.arange(padded_answers.shape[1])).minimum(lengths[:, None] - 1)
    mask = torch.arange(padded_answers.shape[1]) < torch.tensor([len(answer) for answer in answers])[:, None]
    return Batch(
        clean=_pad(clean).to(device),
        corrupted=_pad(corrupted).to(device),
        lengths=lengths.to(device),
        answers=padded_answers.to(device),
        answer_positions=positions.to(device),
        answer_mask=mask.to(device),
        distractors=torch.tensor([pair.distractor for pair in pairs]).to(device),
        right=_pad([pair.right or pair.answer[:1] for pair in pairs], -1).to(device),
        wrong=_pad([pair.wrong or (pair.distractor,) for pair in pairs], -1).to(device),
    )


def batches(
    pairs: Sequence[TokenPair],
    batch_size: int,
    full_answer: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """The pairs in their order, ``batch_size`` at a time."""
    if batch_size < 1:
        raise TaskError(f"batch_size is {batch_size}; it must be at least 1")
    for start in range(0, len(pairs), batch_size):
        yield make_batch(pairs[start : start + batch_size], full_answer, device)


def _pad(rows: Sequence[Sequence[int]], fill: int = 0) -> Int[Tensor, "row column"]:
    width = max(len(row) for row in rows)
    return torch.tensor([list(row) + [fill] * (width - len(row)) for row in rows])
