"""Sums of writers' outputs over the edges of a few readers, for many runs at once.

Shapes: ``[row, trial, d_model]``, as in ``removals.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

DENSE = 8.0  # edges per writer from which a product, which reads every writer once, is faster than edge after edge


@dataclass(frozen=True)
class EdgeSums:
    """How readers' edges are summed: by a product with ``edges``, or one by one, a bag for each reader and row.

    A product reads the writers from ``first`` on, whether there is an edge from them or not; a bag holds rows of the writers
    it has edges from, as entries and where each bag starts.
    """

    n_rows: int
    first: int
    edges: Float[Tensor, "reader writer"]
    bags: tuple[Int[Tensor, " entry"], Int[Tensor, " bag"]] | None

    def of(self, outputs: Float[Tensor, "writer row trial d_model"]) -> Float[Tensor, "reader n_rows trial d_model"]:
        """The sums, at the first rows."""
        if self.bags is None:
            read = outputs[self.first : self.first + self.edges.shape[1], : self.n_rows]
            return torch.einsum("vr,rnkd->vnkd", self.edges, read)
        entries, starts = self.bags
        summed = F.embedding_bag(entries, outputs.flatten(2).flatten(0, 1), starts, mode="sum")
        return summed.view(-1, self.n_rows, *outputs.shape[2:])


def edge_sums(
    edges: Bool[Tensor, "writer reader"], n_rows: int, like: Float[Tensor, "writer row trial d_model"]
) -> EdgeSums:
    """The quicker way to sum writers' outputs, held by a tensor ``like`` this one, over each reader's edges."""
    writers = edges.any(1).nonzero()[:, 0]
    first, end = (int(writers[0]), int(writers[-1]) + 1) if len(writers) else (0, 0)
    to_reader = edges[first:end].T.to(like)
    if edges.sum() > DENSE * (end - first):
        return EdgeSums(n_rows, first, to_reader, None)
    n_edges = edges.sum(0)
    of_reader = [some * like.shape[1] for some in edges.T.nonzero()[:, 1].split(n_edges.tolist())]
    entries = torch.cat([(torch.arange(n_rows)[:, None] + some).flatten() for some in of_reader])
    sizes = n_edges.repeat_interleave(n_rows)
    return EdgeSums(n_rows, first, to_reader, (entries.to(like.device), (sizes.cumsum(0) - sizes).to(like.device)))
