"""What of a circuit has to run, at which positions, and from what: rows of a batch, needs of a circuit, plans of runs.

Prompts that start alike ("The capital city of ...") hold the same activations at the positions they share, under any
circuit and any ablation that depends on the prompt to the left only. A run over *rows*, the distinct positions, has each
once for all prompts, and no pads. Attention alone runs prompt by prompt.

A head is *needed* where a reader of it is; its keys and values are needed at all rows that such a row may attend to. Needs
are found from the logits down, so what removals at one reader change lies below it.

Runs of trials at one reader change the same writers each time. What does not depend on what these write is settled in a
*plan*: which readers see any of it, what else these see, what the other readers of the same heads hand on.

Shapes: ``[row, trial, d_model]``, as in ``removals.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kc_lib.circuits.acdc.products import EdgeSums
from kc_lib.graph import Graph
from kc_lib.residual.activations import NO_PREFIX, PrefixCache
from kc_lib.residual.parts import Attention, Norm
from kc_lib.tasks.batches import Batch


@dataclass(frozen=True)
class Rows:
    """Rows of a batch: those that predict answers first, the rest from the right end of the prompts to the left.

    ``row_of`` gives the row of every position after the prefix (pads: any row), ``first`` one flat position (example times
    positions plus position) of every row, ``sees`` the rows that each row may attend to, ``answers`` the answers' rows.
    """

    row_of: Int[Tensor, "batch pos"]
    first: Int[Tensor, " row"]
    sees: Bool[Tensor, "row row"]
    answers: Int[Tensor, "batch answer"]

    def __len__(self) -> int:
        return self.first.shape[0]

    def take(self, x: Tensor) -> Tensor:
        """``[n, batch, pos, d]`` (or sizes of 1 that broadcast) as ``[n, row, d]``."""
        return x.expand(x.shape[0], *self.row_of.shape, x.shape[-1]).flatten(1, 2)[:, self.first]


def rows_of(batch: Batch, intervention: str, prefix: PrefixCache = NO_PREFIX) -> Rows:
    """The rows of a batch's clean prompts; under patching, positions are one row only if corrupted prompts agree too."""
    clean, corrupted = batch.clean.tolist(), batch.corrupted.tolist()
    lengths, start = batch.lengths.tolist(), prefix.start
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
    return Rows(row_of.to(device), torch.tensor(first, device=device), sees, row_of.gather(1, at).to(device))


@dataclass(frozen=True)
class LayerNeeds:
    """What matters in a layer: its heads, the q, k and v readers (columns of the graph) that serve them, and how many rows.

    Rows are counted from the first: ``head_rows`` of the heads' outputs, ``read_rows`` of their inputs, ``mlp_rows``.
    """

    heads: list[int]
    columns: list[int]
    head_rows: int
    read_rows: int
    mlp_rows: int


class Needs:
    """The needs of every layer of a circuit, kept until ``find`` is called again for the layer."""

    def __init__(self, graph: Graph, rows: Rows, tied_heads: bool) -> None:
        self.graph, self.sees = graph, rows.sees.float()
        self.tied_heads = tied_heads  # by a norm on the layer's output: if one head matters, all do
        self.of_writers = torch.zeros(len(graph.writers), len(rows), dtype=torch.bool)
        self.of_readers = torch.zeros(len(graph.readers), len(rows), dtype=torch.bool)
        self.of_readers[-1, rows.answers.flatten().cpu()] = True
        self.layers: dict[int, LayerNeeds] = {}

    def find(self, layer: int, mask: Bool[Tensor, "writer reader"]) -> None:
        """Find a layer's needs, those of the readers above it being known."""
        graph = self.graph
        if layer == graph.n_layers:
            return
        heads, mlp = graph.head_writers(layer), graph.reader_columns(layer, "mlp").start
        columns = {kind: graph.reader_columns(layer, kind) for kind in "qkv"}
        of_mlp = self.of_readers[mask[heads.stop]].any(0)
        self.of_writers[heads.stop] = self.of_readers[mlp] = of_mlp
        of_heads = (mask[heads].float() @ self.of_readers.float()) > 0
        if self.tied_heads:
            of_heads = of_heads.any(0, keepdim=True).expand_as(of_heads)
        self.of_writers[heads] = self.of_readers[columns["q"]] = of_heads
        of_groups = rearrange(of_heads, "(kv g) row -> kv g row", kv=graph.n_kv_readers).any(1)
        self.of_readers[columns["k"]] = self.of_readers[columns["v"]] = (of_groups.float() @ self.sees) > 0
        reading = self.of_readers[columns["q"].start : columns["v"].stop]
        self.layers[layer] = LayerNeeds(
            heads=of_heads.any(1).nonzero()[:, 0].tolist(),
            columns=(columns["q"].start + reading.any(1).nonzero()[:, 0]).tolist(),
            head_rows=_count(of_heads.any(0)),
            read_rows=_count(reading.any(0)),
            mlp_rows=_count(of_mlp),
        )


def _count(needed: Bool[Tensor, " row"]) -> int:
    """How many of the first rows hold all that are needed."""
    where = needed.nonzero()
    return int(where[-1]) + 1 if len(where) else 0


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
