"""What has to run again in a layer of a circuit when some writers below it change, prepared once for many runs.

Runs of trials at one reader change the same writers each time. What does not depend on what these write is settled: which
readers see any of it, what else these see, what the other readers of the same heads hand on.

Shapes: ``[row, trial, d_model]``, as in ``removals.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kc_lib.circuits.acdc.edge_sums import EdgeSums
from kc_lib.graph import Graph
from kc_lib.residual.parts import Attention, Norm


@dataclass(frozen=True)
class Projection:
    """Queries, keys and values of some readers of a layer, the norm before them folded in; ``bias`` is nothing if zero."""

    norm: Norm
    weight: Float[Tensor, "reader d_model d_head"]
    bias: Float[Tensor, "reader 1 1 d_head"] | None

    def of(self, x: Float[Tensor, "reader row trial d_model"]) -> Float[Tensor, "reader row trial d_head"]:
        """What the readers hand on of what they see."""
        projected = torch.bmm(x.flatten(1, 2), self.weight).view(*x.shape[:3], -1).mul_(self.norm.scale(x))
        return projected if self.bias is None else projected.add_(self.bias)

    def some(self, places: list[int]) -> Projection:
        """The same for some of the readers."""
        if places == list(range(len(self.weight))):
            return self  # no copy of the weights
        return Projection(self.norm, self.weight[places], None if self.bias is None else self.bias[places])


@dataclass(frozen=True)
class Heads:
    """Heads of a layer that run again: the readers that see something new, and what their other readers hand on.

    ``served`` has, for queries, keys and values, the place of every head's reader among the former and then the latter.
    """

    heads: list[int]
    changed: Projection
    unchanged: Float[Tensor, "reader row d_head"]
    served: tuple[Int[Tensor, " head"], ...]

    def projected(self, x: Float[Tensor, "reader row trial d_model"]) -> list[Float[Tensor, "head row trial d_head"]]:
        """Queries, keys and values of the heads when the former readers see ``x``."""
        known = self.changed.of(x)
        if len(self.unchanged):
            known = torch.cat([known, self.unchanged[:, :, None].expand(-1, -1, x.shape[2], -1)])
        return [known[places] for places in self.served]


@dataclass(frozen=True)
class Sums:
    """What some readers see: the ``edges`` from writers that change, on top of what is ``settled``."""

    settled: Float[Tensor, "reader needed d_model"]
    edges: EdgeSums

    def of(self, outputs: Float[Tensor, "writer row trial d_model"]) -> Float[Tensor, "reader needed trial d_model"]:
        """What the readers see when the writers write this."""
        return self.edges.of(outputs).add_(self.settled[:, :, None])


@dataclass(frozen=True)
class Plan:
    """What of a layer's heads, its MLP or the logits runs again when the readers under trial, or writers, of ``key`` change.

    ``columns`` are the readers that see something new. What readers under trial see is given with a run; for others there
    are ``sums``.
    """

    key: tuple[list[int], list[int]]
    columns: list[int]
    sums: Sums | None = None
    heads: Heads | None = None


@dataclass
class Run:
    """A run of some trials: what writers that ran again write."""

    buffer: Float[Tensor, "writer row trial d_model"]
    writers: list[int] = field(default_factory=list)

    @property
    def n_trials(self) -> int:
        return self.buffer.shape[2]


def layer_projection(attention: Attention, graph: Graph, layer: int) -> Projection:
    """All q, k and v readers of a layer, in the graph's order."""
    weights, biases = [], []
    for kind in "qkv":
        columns = graph.reader_columns(layer, kind)
        weight, bias = attention.norm.folded(*attention.weights(kind))
        n_readers = columns.stop - columns.start
        weights.append(weight.repeat_interleave(n_readers // len(weight), 0))
        biases.append(bias.repeat_interleave(n_readers // len(bias), 0))
    bias = torch.cat(biases)
    return Projection(attention.norm, torch.cat(weights), bias[:, None, None] if bias.any() else None)


def slices(places: Sequence[int]) -> list[slice]:
    """Ascending places as slices, as long as they can be."""
    starts = [i for i, place in enumerate(places) if i == 0 or place != places[i - 1] + 1]
    return [slice(places[i], places[j - 1] + 1) for i, j in pairwise([*starts, len(places)])]
