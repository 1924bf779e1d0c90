"""What runs of a batch have changed against a circuit's activations, and what its readers see of it.

Shapes: ``[row, trial, d_model]``, as in ``removals.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DENSE = 0.2  # share of possible edges from which a product sums them faster than one by one


@dataclass(frozen=True)
class EdgeSums:
    """How readers' edges are summed: by a product with ``edges``, or one by one, a bag for each reader and row.

    A product would read every writer for every reader; a bag holds the writers' rows, as entries and where each bag starts.
    """

    n_rows: int
    edges: Float[Tensor, "reader writer"]
    bags: tuple[Int[Tensor, " entry"], Int[Tensor, " bag"]] | None

    def of(self, changes: Float[Tensor, "writer row trial d_model"]) -> Float[Tensor, "reader n_rows trial d_model"]:
        """The sums; of the rows the first."""
        if self.bags is None:
            return torch.einsum("vr,rnkd->vnkd", self.edges, changes[:, : self.n_rows])
        entries, starts = self.bags
        summed = torch.nn.functional.embedding_bag(entries, changes.flatten(2).flatten(0, 1), starts, mode="sum")
        return summed.view(-1, self.n_rows, *changes.shape[2:])


def edge_sums(
    edges: Bool[Tensor, "writer reader"], n_rows: int, like: Float[Tensor, "writer row trial d_model"]
) -> EdgeSums:
    """The quicker way to sum changes, held by a tensor ``like`` this one, over each reader's edges at the first rows."""
    to_reader = edges.T.to(like)
    if to_reader.mean() > DENSE:
        return EdgeSums(n_rows, to_reader, None)
    writer = edges.T.nonzero()[:, 1]
    n_edges = edges.sum(0)
    of_reader = [writers * like.shape[1] for writers in writer.split(n_edges.tolist())]
    entries = torch.cat([(torch.arange(n_rows)[:, None] + writers).flatten() for writers in of_reader])
    sizes = n_edges.repeat_interleave(n_rows)
    return EdgeSums(n_rows, to_reader, (entries.to(like.device), (sizes.cumsum(0) - sizes).to(like.device)))


@dataclass
class Changes:
    """What a trial run has changed so far: writers' new outputs minus the circuit's, and what readers see instead."""

    buffer: Float[Tensor, "writer row trial d_model"]
    writers: list[int] = field(default_factory=list)
    inputs: list[tuple[list[int], Tensor, Tensor | None]] = field(default_factory=list)  # columns, inputs, projections
    raw: dict[int, Tensor] = field(default_factory=dict)

    @property
    def n_trials(self) -> int:
        return self.buffer.shape[2]

    def add(
        self, writers: Sequence[int], before: Float[Tensor, "writer needed d_model"]
    ) -> Float[Tensor, "writer needed trial d_model"]:
        """Room for what some writers change, holding what they wrote before; at rows that nothing needs nothing changes."""
        slot = self.buffer[len(self.writers) : len(self.writers) + len(writers)]
        slot[:, before.shape[1] :] = 0.0
        self.writers += writers
        return slot[:, : before.shape[1]].copy_(before[:, :, None].expand(-1, -1, self.n_trials, -1))

    def summed(self, sums: EdgeSums) -> Float[Tensor, "reader row trial d_model"]:
        """The changes of the writers so far, summed over each reader's edges."""
        return sums.of(self.buffer[: len(self.writers)])
