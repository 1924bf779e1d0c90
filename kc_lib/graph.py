"""The graph of a decoder (writers x readers), circuits as masks over it, and their files.

Writers, in the order they write: ``input``, then per layer the heads ``a{layer}.h{head}`` and the MLP ``m{layer}``.
Readers, in the order they read: per layer ``a{layer}.h{head}<q>``, ``a{layer}.h{head}<k>``, ``a{layer}.h{head}<v>`` and
``m{layer}``, then ``logits``. Under grouped queries the index of a ``<k>`` or ``<v>`` reader is that of the key-value
head; the *ungrouped* view has one ``<k>`` and ``<v>`` per query head, as published code has. An edge runs from a writer
to every reader that comes later; in parallel blocks attention does not come before its own block's MLP.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kc_lib.errors import GraphError, first_line

MAX_HEADS = 20_000  # over all layers; what a file claims beyond it is no model, and its graph would not fit in memory
JSON_NAMES = {dict: "an object", list: "a list", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Reader:
    """One reader: its layer, kind ("q", "k", "v", "mlp" or "logits"), head index, and how many writers precede it."""

    name: str
    layer: int
    kind: str
    index: int
    n_writers: int


@dataclass(frozen=True)
class Graph:
    """All writers, readers and possible edges of a decoder; see the head of this file."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    parallel: bool = False
    grouped: bool = True

    @property
    def n_kv_readers(self) -> int:
        """Key (or value) readers of a layer: key-value heads, or query heads in the ungrouped view."""
        return self.n_kv_heads if self.grouped else self.n_heads

    @cached_property
    def writers(self) -> list[str]:
        names = ["input"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)] + [f"m{layer}"]
        return names

    @cached_property
    def readers(self) -> list[Reader]:
        readers = []
        counts = {"q": self.n_heads, "k": self.n_kv_readers, "v": self.n_kv_readers}
        for layer in range(self.n_layers):
            before = self.writers_before(layer)
            for kind, n in counts.items():
                readers += [Reader(f"a{layer}.h{i}<{kind}>", layer, kind, i, before) for i in range(n)]
            before_mlp = before if self.parallel else before + self.n_heads
            readers.append(Reader(f"m{layer}", layer, "mlp", 0, before_mlp))
        readers.append(Reader("logits", self.n_layers, "logits", 0, len(self.writers)))
        return readers

    def writers_before(self, layer: int) -> int:
        """How many writers come before a layer's attention."""
        return 1 + layer * (self.n_heads + 1)

    def head_writers(self, layer: int) -> slice:
        """The rows of a layer's heads; the layer's MLP is the row after them."""
        start = self.writers_before(layer)
        return slice(start, start + self.n_heads)

    def layer_of_writer(self, writer: int) -> int:
        """The layer of a head's or MLP's row; the input's, row 0, is -1."""
        return (writer - 1) // (self.n_heads + 1)

    def reader_columns(self, layer: int, kind: str) -> slice:
        """The columns of a layer's readers of one kind ("q", "k", "v" or "mlp")."""
        per_layer = self.n_heads + 2 * self.n_kv_readers + 1
        sizes = {"q": self.n_heads, "k": self.n_kv_readers, "v": self.n_kv_readers, "mlp": 1}
        offset = layer * per_layer
        for name, size in sizes.items():
            if name == kind:
                return slice(offset, offset + size)
            offset += size
        raise GraphError(f"unknown reader kind {kind!r}: use one of {', '.join(sizes)}")

    @cached_property
    def writer_index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.writers)}

    @cached_property
    def reader_index(self) -> dict[str, int]:
        return {reader.name: i for i, reader in enumerate(self.readers)}

    @cached_property
    def edges(self) -> Bool[Tensor, "writer reader"]:
        """True where the writer comes before the reader."""
        before = torch.tensor([reader.n_writers for reader in self.readers])
        return torch.arange(len(self.writers))[:, None] < before

    @property
    def n_edges(self) -> int:
        return int(self.edges.sum())

    @cached_property
    def serves(self) -> Bool[Tensor, "writer reader"]:
        """True where the reader is an input of the node that the writer is the output of."""
        serves = torch.zeros(len(self.writers), len(self.readers), dtype=torch.bool)
        group = self.n_heads // self.n_kv_readers
        for layer in range(self.n_layers):
            heads = self.head_writers(layer)
            for head in range(self.n_heads):
                serves[heads.start + head, self.reader_columns(layer, "q").start + head] = True
                for kind in "kv":
                    serves[heads.start + head, self.reader_columns(layer, kind).start + head // group] = True
            serves[heads.stop, self.reader_columns(layer, "mlp").start] = True
        return serves

    def edge_positions(self, edge: str) -> tuple[int, int]:
        """Row and column of an edge ``"writer->reader"``.

        Raises:
            GraphError: a name this graph does not have, or an edge against the flow.
        """
        writer, arrow, reader = edge.partition("->")
        if not arrow or writer not in self.writer_index or reader not in self.reader_index:
            unknown = reader if arrow and writer in self.writer_index else writer
            raise GraphError(
                f"edge {edge!r}: the graph has no {unknown!r} ({self.n_layers} layers, {self.n_heads} heads, "
                f"{self.n_kv_readers} key and value readers a layer)"
            )
        row, column = self.writer_index[writer], self.reader_index[reader]
        if not self.edges[row, column]:
            raise GraphError(f"edge {edge!r} runs against the flow: {writer} does not come before {reader}")
        return row, column

    def prune(self, mask: Bool[Tensor, "writer reader"]) -> Bool[Tensor, "writer reader"]:
        """Keep only the edges on a path from the input to the logits.

        A node is on a path when it has an incoming edge at any of its readers and an outgoing one, as in EAP-IG.
        """
        mask = mask & self.edges
        serves = self.serves.float()
        while True:
            fed = (serves @ mask.any(0).float()) > 0  # some reader of the node has an edge
            fed[0] = True
            alive = fed & mask.any(1)
            live_readers = (alive.float() @ serves) > 0
            live_readers[-1] = True
            pruned = mask & alive[:, None] & live_readers
            if torch.equal(pruned, mask):
                return mask
            mask = pruned


@dataclass(frozen=True)
class Circuit:
    """A set of edges of a graph, with the scores they were chosen by and where they come from.

    Example:
        >>> circuit = kc.Circuit.load("circuit.json", model.residual.graph())
        >>> circuit.n_edges, circuit.nodes[:3]
    """

    graph: Graph
    mask: Bool[Tensor, "writer reader"]
    scores: Float[Tensor, "writer reader"] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.graph.writers), len(self.graph.readers))
        if tuple(self.mask.shape) != shape:
            raise GraphError(f"a mask of shape {tuple(self.mask.shape)} does not fit a graph of shape {shape}")
        if (self.mask & ~self.graph.edges).any():
            row, column = (self.mask & ~self.graph.edges).nonzero()[0].tolist()
            edge = f"{self.graph.writers[row]}->{self.graph.readers[column].name}"
            raise GraphError(f"edge {edge!r} runs against the flow")

    @property
    def n_edges(self) -> int:
        return int(self.mask.sum())

    @property
    def share(self) -> float:
        """Share of the graph's edges."""
        return self.n_edges / self.graph.n_edges

    @property
    def hash(self) -> str:
        """Hash of the graph and the edges: two circuits of one hash run alike."""
        described = json.dumps(asdict(self.graph), sort_keys=True).encode() + self.mask.numpy().tobytes()
        return hashlib.blake2b(described, digest_size=16).hexdigest()

    @cached_property
    def nodes(self) -> list[str]:
        """Writers with an outgoing edge, and the logits."""
        return [name for name, kept in zip(self.graph.writers, self.mask.any(1).tolist(), strict=True) if kept] + ["logits"]

    def pruned(self) -> Circuit:
        return replace(self, mask=self.graph.prune(self.mask))

    def to_frame(self) -> pd.DataFrame:
        """One row per edge of the circuit: writer, reader, score; largest absolute score first."""
        return edge_frame(self.graph, self.scores, self.mask).sort_values(
            "score", key=lambda score: -score.abs(), kind="stable", ignore_index=True
        )

    def save(self, path: str | Path) -> Path:
        """Write the circuit as EAP-IG / MIB json (every edge with score and ``in_graph``).

        That format knows one key and value reader per query head. A grouped circuit is written as the equal ungrouped
        one, each copy with its share of the score, and marked in ``cfg`` so that ``load`` gives the same circuit back.
        """
        graph = self.graph
        out = graph if not graph.grouped else replace(graph, grouped=False)
        spread = _group_spread(graph)  # grouped reader x ungrouped reader
        mask = (self.mask.float() @ spread) > 0
        scores = torch.zeros_like(spread[:1]).expand(len(graph.writers), -1)
        if self.scores is not None:
            scores = self.scores.double().nan_to_num() @ (spread / spread.sum(1, keepdim=True)).double()
        alive = mask.any(1)
        edges = {
            f"{out.writers[u]}->{out.readers[v].name}": {"score": scores[u, v].item(), "in_graph": bool(mask[u, v])}
            for u, v in out.edges.nonzero().tolist()
        }
        nodes = {name: {"in_graph": bool(alive[i])} for i, name in enumerate(out.writers)}
        document = {
            "cfg": {
                "n_layers": graph.n_layers,
                "n_heads": graph.n_heads,
                "parallel_attn_mlp": graph.parallel,
                "d_model": graph.d_model,
                "n_key_value_heads": graph.n_kv_heads,
                "grouped": graph.grouped,
                "scored": self.scores is not None,
            },
            "provenance": dict(self.provenance),
            "nodes": nodes | {"logits": {"in_graph": True}},
            "edges": edges,
        }
        path = Path(path)
        path.write_text(json.dumps(document))
        return path

    @classmethod
    def load(cls, path: str | Path, graph: Graph | None = None) -> Circuit:
        """Read EAP-IG / MIB json, ours or foreign; with ``graph``, refuse a circuit of another model.

        Raises:
            GraphError: no such file, not such a file (down to a score that is no number or an ``in_graph`` that is no
                boolean), unknown nodes, edges against the flow, left-out neurons, or another model's graph.
        """
        try:
            document = _read_json(path)
            cfg, file_graph = _read_cfg(document, graph)
            if graph is not None and file_graph != replace(graph, grouped=False):
                raise GraphError(
                    f"is a circuit of another model ({file_graph}), not of this one ({graph}): load that model, or give a "
                    "circuit of this one"
                )
            _check_nodes(document, file_graph)
            mask = torch.zeros_like(file_graph.edges)
            scores = torch.zeros(mask.shape, dtype=torch.float64)
            for (u, v), in_graph, score in _read_edges(document, file_graph):
                mask[u, v], scores[u, v] = in_graph, score if math.isfinite(score) else 0.0
            provenance = _value({"provenance": {}} | document, "provenance", dict, "the file")
        except GraphError as error:
            raise GraphError(f"{path}: {error}") from error
        if cfg["grouped"]:
            file_graph = replace(file_graph, grouped=True)
            merge = _group_spread(file_graph).T
            mask, scores = (mask.float() @ merge) > 0, scores @ merge.double()
        kept = scores.float() if cfg["scored"] else None
        return cls(file_graph, mask, kept, provenance)


def edge_frame(
    graph: Graph, scores: Float[Tensor, "writer reader"] | None, mask: Bool[Tensor, "writer reader"] | None = None
) -> pd.DataFrame:
    """Edges as rows (writer, reader, score), all of the graph's or those in ``mask``."""
    rows, columns = (graph.edges if mask is None else mask).nonzero(as_tuple=True)
    writers = np.array(graph.writers)[rows.numpy()]
    readers = np.array([reader.name for reader in graph.readers])[columns.numpy()]
    values = np.full(len(rows), np.nan) if scores is None else scores[rows, columns].double().numpy()
    return pd.DataFrame({"writer": writers, "reader": readers, "score": values})


def scores_from_frame(graph: Graph, frame: pd.DataFrame) -> Float[Tensor, "writer reader"]:
    """The score matrix of a table with the columns writer, reader, score; edges that are not listed score 0."""
    scores = torch.zeros(len(graph.writers), len(graph.readers))
    for writer, reader, score in zip(frame["writer"], frame["reader"], frame["score"], strict=True):
        scores[graph.edge_positions(f"{writer}->{reader}")] = float(score)
    return scores


def _group_spread(graph: Graph) -> Float[Tensor, "reader ungrouped_reader"]:
    """1 where an ungrouped reader is a copy of a reader of this graph."""
    ungrouped = replace(graph, grouped=False)
    group = graph.n_heads // graph.n_kv_readers
    spread = torch.zeros(len(graph.readers), len(ungrouped.readers))
    for column, reader in enumerate(ungrouped.readers):
        name = reader.name
        if reader.kind in ("k", "v"):
            name = f"a{reader.layer}.h{reader.index // group}<{reader.kind}>"
        spread[graph.reader_index[name], column] = 1.0
    return spread


def _malformed(what: str) -> GraphError:
    return GraphError(
        f"no circuit in EAP-IG's json format: {what}; give a json file that Circuit.save or EAP-IG's Graph.to_json wrote"
    )


def _read_json(path: str | Path) -> dict[str, Any]:
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise GraphError(f"cannot be read ({first_line(error)}); check the path") from error
    except (ValueError, RecursionError) as error:  # ValueError: no text, no JSON, or a number too long
        raise _malformed(f"it is not JSON ({first_line(error)})") from error
    if not isinstance(document, dict):
        raise _malformed(f"it is {_shown(document)}, not an object")
    return document


def _read_cfg(document: dict[str, Any], graph: Graph | None) -> tuple[dict[str, bool], Graph]:
    """Whether the file is grouped and scored, and its graph (ungrouped)."""
    cfg = _value(document, "cfg", dict, "the file")
    sizes = {name: _value(cfg, name, int, "cfg") for name in ("n_layers", "n_heads", "d_model")}
    # foreign files do not say how many key-value heads there are
    shared = graph.n_kv_heads if graph is not None and graph.n_heads == sizes["n_heads"] else sizes["n_heads"]
    cfg = {"n_key_value_heads": shared, "grouped": False, "scored": True} | cfg
    n_kv_heads, parallel = _value(cfg, "n_key_value_heads", int, "cfg"), _value(cfg, "parallel_attn_mlp", bool, "cfg")
    if min(sizes.values()) < 1 or sizes["n_layers"] * sizes["n_heads"] > MAX_HEADS:
        raise _malformed(f"cfg is of no model: {', '.join(f'{name} {size}' for name, size in sizes.items())}")
    if n_kv_heads < 1 or sizes["n_heads"] % n_kv_heads:
        raise _malformed(f"{sizes['n_heads']} heads cannot share {n_kv_heads} key-value heads; see cfg")
    flags = {name: _value(cfg, name, bool, "cfg") for name in ("grouped", "scored")}
    return flags, Graph(**sizes, n_kv_heads=n_kv_heads, parallel=parallel, grouped=False)


def _check_nodes(document: dict[str, Any], graph: Graph) -> None:
    """Nodes are those of the graph, in it or not, and whole: ``true`` (early files) or an object with ``in_graph``."""
    for name, node in _value({"nodes": {}} | document, "nodes", dict, "the file").items():
        if name != "logits" and name not in graph.writer_index:
            raise GraphError(f"node {name!r} of the section nodes is none of a model with its cfg: load the circuit's model")
        if type(node) is bool:
            continue
        inside = _value(node, "in_graph", bool, f"node {name!r}")
        if inside and not all(_value({"neurons": []} | node, "neurons", list, f"node {name!r}")):
            raise GraphError(f"node {name!r} lacks some of its neurons, which no edges can say: give a circuit of edges")


def _read_edges(document: dict[str, Any], graph: Graph) -> Iterator[tuple[tuple[int, int], bool, float]]:
    """Position, ``in_graph`` and score of every edge."""
    edges = _value(document, "edges", dict, "the file")
    if not edges:
        raise _malformed("it lists no edges")
    for name, edge in edges.items():
        in_graph, score = (_value(edge, key, kind, f"edge {name!r}") for key, kind in (("in_graph", bool), ("score", float)))
        try:
            yield graph.edge_positions(name), in_graph, float(score)
        except OverflowError:
            raise _malformed(f"the score of edge {name!r} is {_shown(score)}, too large") from None
        except GraphError as error:
            raise GraphError(f"{error}; correct the file, or its cfg") from error


def _value(mapping: Any, key: str, kind: type, where: str) -> Any:
    """The value of a key, exactly of that kind (a float may be written as a whole number; True is no number)."""
    if not isinstance(mapping, dict):
        raise _malformed(f"{where} is {_shown(mapping)}, not an object")
    if key not in mapping:
        raise _malformed(f"{where} has no {key!r}")
    value = mapping[key]
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise _malformed(f"{key!r} of {where} is {_shown(value)}, not {JSON_NAMES[kind]}")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
