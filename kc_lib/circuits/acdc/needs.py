"""At which rows of a batch the nodes of a circuit matter to an answer.

A head matters where a reader of it matters; its keys and values matter at all rows that such a row may attend to. Needs are
found from the logits down, so what removals at one reader change lies below it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor

from kc_lib.circuits.acdc.rows import Rows
from kc_lib.graph import Graph


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
