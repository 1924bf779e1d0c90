"""Batches with everything a score is computed from, and disjoint groups of their positions.

An edge's score is a sum over examples and positions. Scores for each example, or for the subject's positions and the
last one, are parts of that sum: the same multiplications, added up in blocks. Positions are brought into the order of
their groups once, so that every block is a slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kc_lib.metrics import Metric
from kc_lib.residual.activations import NO_PREFIX, Ablation, PrefixCache, ablation, shared_prefix
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.logits import full_logits, reference_means
from kc_lib.tasks.batches import Batch, TokenPair, batches

POSITION_GROUPS = ("subject", "relation", "last", "other")


@dataclass(frozen=True)
class Prepared:
    """A batch with everything a score is computed from.

    ``ablation`` covers the positions after those of the prefix cache. ``reference`` is the full model's logits, where the
    metric compares with them.
    """

    batch: Batch
    metric: Metric
    ablation: Ablation
    reference: Float[Tensor, "batch answer vocab"] | None = None
    prefix: PrefixCache = NO_PREFIX

    def loss(self, logits: Float[Tensor, "batch answer vocab"]) -> Float[Tensor, ""]:
        """The metric's loss, summed over the examples."""
        return self.metric.loss(logits, self.batch, self.reference).sum()


def prepared_batches(
    decoder: Decoder,
    pairs: Sequence[TokenPair],
    metric: Metric,
    intervention: str,
    batch_size: int,
    full_answer: bool,
) -> Iterator[Prepared]:
    """The pairs in their order, ``batch_size`` at a time; a mean intervention takes its mean over all of them."""
    means = reference_means(decoder, intervention, pairs, batch_size, full_answer)
    for batch in batches(pairs, batch_size, full_answer, decoder.device):
        prefix = shared_prefix(decoder, batch, intervention)
        reference = full_logits(decoder, batch, prefix) if metric.needs_reference else None
        yield Prepared(batch, metric, ablation(decoder, intervention, batch, means, prefix), reference, prefix)


@dataclass(frozen=True)
class Groups:
    """The number, 0 to ``n_groups - 1``, of the one group that each position of a batch belongs to."""

    number: Int[Tensor, "batch pos"]
    n_groups: int

    def after(self, start: int) -> Groups:
        """The groups of the positions from ``start`` on."""
        return Groups(self.number[:, start:], self.n_groups)

    def at(self, positions: Int[Tensor, "batch answer"]) -> Groups:
        """The groups of the given positions only."""
        return Groups(self.number.gather(1, positions), self.n_groups)

    @cached_property
    def _sizes(self) -> list[int]:
        return torch.bincount(self.number.flatten(), minlength=self.n_groups).tolist()

    @cached_property
    def _order(self) -> Int[Tensor, " batch_pos"] | None:
        """What brings the flattened positions into the order of their groups; None where they are in it already."""
        flat = self.number.flatten()
        return None if bool((flat[1:] >= flat[:-1]).all()) else flat.argsort(stable=True)

    def ordered(self, x: Float[Tensor, "n batch pos d_model"]) -> Float[Tensor, "n batch_pos d_model"]:
        """All positions in a row, group after group, in float32."""
        flat = x.flatten(1, 2).float()
        return flat if self._order is None else flat[:, self._order]

    def contract(
        self, outputs: Float[Tensor, "writer batch_pos d_model"], gradients: Float[Tensor, "reader batch pos d_model"]
    ) -> Float[Tensor, "group writer reader"]:
        """Sums over the positions of each group; ``outputs`` come ordered, since many gradients meet the same ones."""
        blocks = zip(outputs.split(self._sizes, 1), self.ordered(gradients).split(self._sizes, 1), strict=True)
        return torch.stack([u.flatten(1) @ v.flatten(1).T for u, v in blocks])


def one_group(batch: Batch) -> Groups:
    """Every position of every example together."""
    return Groups(torch.zeros_like(batch.clean), 1)


def by_example(batch: Batch) -> Groups:
    """Each example by itself."""
    rows = torch.arange(len(batch), device=batch.clean.device)
    return Groups(rows[:, None].expand_as(batch.clean), len(batch))


def by_position(batch: Batch, pairs: Sequence[TokenPair]) -> Groups:
    """Positions by what they hold, in the order of ``POSITION_GROUPS``; ``pairs`` are those of the batch.

    A position that predicts a token of the answer is "last", whatever else it is, and a subject's is no relation's.
    """
    number = torch.full_like(batch.clean, POSITION_GROUPS.index("other"))
    for row, pair in zip(number, pairs, strict=True):
        for name in ("relation", "subject"):
            row[list(pair.positions.get(name, ()))] = POSITION_GROUPS.index(name)
    return Groups(number.scatter(1, batch.answer_positions, POSITION_GROUPS.index("last")), len(POSITION_GROUPS))
