"""What runs of a batch have changed against a circuit's activations, and what its readers see of it.

Shapes: ``[row, trial, d_model]``, as in ``removals.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

DENSE = 0.2  # share of possible edges from which a product sums them faster than one by one


@dataclass
class Changes:
    """What a trial run has changed so far: writers' new outputs minus the circuit's, and what readers see instead."""

    n_trials: int
    buffer: Tensor | None  # [writer, row, trial, d_model]; None keeps the parts, through which gradients can flow
    parts: list[Tensor] = field(default_factory=list)
    writers: list[int] = field(default_factory=list)
    inputs: list[tuple[list[int], Tensor, Tensor | None]] = field(default_factory=list)  # columns, inputs, projections
    raw: dict[int, Tensor] = field(default_factory=dict)

    def add(self, writers: Sequence[int], changes: Float[Tensor, "writer needed trial d_model"]) -> None:
        if self.buffer is None:
            self.parts.append(changes)
        else:
            slot = self.buffer[len(self.writers) : len(self.writers) + len(writers)]
            slot[:, : changes.shape[1]] = changes
            slot[:, changes.shape[1] :] = 0.0
        self.writers += writers

    def summed(self, edges: Bool[Tensor, "writer reader"], n_rows: int) -> Float[Tensor, "reader row trial d_model"]:
        """The changes of the writers so far, summed over each reader's edges, at the first rows."""
        if self.buffer is None:
            return self._summed_parts(edges, n_rows)
        stacked = self.buffer[: len(self.writers)]
        if edges.float().mean() > DENSE:
            return (edges.T.to(stacked) @ stacked[:, :n_rows].flatten(1)).view(-1, n_rows, *stacked.shape[2:])
        # a bag for each reader and row holds the writers' rows; a product would read every writer for every reader
        writer = edges.T.nonzero()[:, 1]
        n_edges = edges.sum(0)
        of_reader = [writers * stacked.shape[1] for writers in writer.split(n_edges.tolist())]
        entries = torch.cat([(torch.arange(n_rows)[:, None] + writers).flatten() for writers in of_reader])
        sizes = n_edges.repeat_interleave(n_rows)
        starts = sizes.cumsum(0) - sizes
        device = stacked.device
        flat = stacked.view(-1, stacked.shape[2] * stacked.shape[3])
        summed = torch.nn.functional.embedding_bag(entries.to(device), flat, starts.to(device), mode="sum")
        return summed.view(-1, n_rows, *stacked.shape[2:])

    def _summed_parts(self, edges: Bool[Tensor, "writer reader"], n_rows: int) -> Tensor:
        total: Tensor | None = None
        for part, of_part in zip(self.parts, edges.split([part.shape[0] for part in self.parts]), strict=True):
            n = min(n_rows, part.shape[1])
            summed = torch.einsum("vr,vnkd->rnkd", of_part.to(part), part[:, :n])
            summed = torch.nn.functional.pad(summed, (0, 0, 0, 0, 0, n_rows - n))
            total = summed if total is None else total + summed
        return torch.as_tensor(total)
