"""The circuit table: one row per node of a circuit, with what is known of it, and nothing that is not.

Direct effect: what the node adds to the logit difference by itself (``direct.py``). Total effect: the drop of the
metric when all that the node writes is replaced by its value on the corrupted prompt, in the full model. A node without a
class whose direct effect cannot be told from 0 is named "unexplained": its part is through others, or none, and the table
gives it no story.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from kc_lib.components.attention import SOURCES, attention_sources, sources_frame
from kc_lib.components.direct import direct_attribution, promoted_tokens
from kc_lib.components.node_ablation import ablated_values
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit, Graph
from kc_lib.models.model import Model
from kc_lib.results import load_table, save_table
from kc_lib.stats import interval, resampled_means
from kc_lib.tasks.batches import TokenPair

LISTED = 5  # edges and tokens named per node


@dataclass(frozen=True)
class CircuitTable:
    """One row per node, in the order of the graph.

    Columns: node, class, direct and total effect with intervals (logits; units of the metric), number of edges in and out
    with the strongest of them, tokens raised and lowered, and for heads the attention from the answer position by source.
    """

    nodes: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        return self.nodes

    def save(self, path: str | Path) -> Path:
        """Write the rows as parquet, provenance in its metadata."""
        return save_table(self.nodes, path, self.provenance)

    @classmethod
    def load(cls, path: str | Path) -> CircuitTable:
        """Read what ``save`` wrote."""
        return cls(*load_table(path))

    def to_html(self, title: str = "Circuit") -> str:
        """A page that stands alone: the rows as a table that a browser can search and print."""
        shown = self.nodes.copy()
        for name in ("direct", "total"):
            ends = zip(shown[name], shown.pop(f"{name}_low"), shown.pop(f"{name}_high"), strict=True)
            shown[name] = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in ends]
        table = shown.to_html(index=False, float_format=lambda x: f"{x:.2f}", na_rep="", border=0)
        about = ", ".join(f"{key}: {value}" for key, value in self.provenance.items())
        style = (
            "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}th{position:sticky;top:0;background:#fff}"
            "td,th{padding:4px 10px;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}"
        )
        head = f"<!doctype html><html><head><meta charset='utf-8'><title>{html.escape(title)}</title><style>{style}</style>"
        return f"{head}</head><body><h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>{table}</body></html>"


def circuit_table(
    model: Model,
    circuit: Circuit,
    pairs: Sequence[TokenPair],
    classes: pd.DataFrame | None = None,
    *,
    metric: str = "logit_difference",
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> CircuitTable:
    """Describe every node of a circuit on some facts; ``classes`` has columns layer, head, class.

    Raises:
        MethodError: a circuit of another model's graph, or pairs without a distractor's direction to attribute.
    """
    graph = model.residual.graph(circuit.graph.grouped)
    if graph != circuit.graph:
        raise MethodError("the circuit is of another model's graph: load it with Circuit.load(path, graph)")
    nodes = [node for node in circuit.nodes if node in graph.writer_index]
    direct = direct_attribution(model, pairs, "difference", batch_size=batch_size)
    effects = direct.to_frame(seed).set_index("component").loc[nodes]
    alone = {node: [node] for node in nodes}
    values = ablated_values(model, alone, pairs, metric=metric, batch_size=batch_size, progress=progress)
    drops = pd.DataFrame({node: values["full"] - values[node] for node in nodes})
    low, high = interval(resampled_means(drops.to_numpy(), seed))
    frame = pd.DataFrame(
        {
            "node": nodes,
            "class": [_class_of(node, classes) for node in nodes],
            "direct": effects["contribution"].to_numpy(),
            "direct_low": effects["contribution_low"].to_numpy(),
            "direct_high": effects["contribution_high"].to_numpy(),
            "total": drops.mean().to_numpy(),
            "total_low": low,
            "total_high": high,
        }
    )
    none = (frame["class"] == "") & (frame["direct_low"] <= 0) & (frame["direct_high"] >= 0)
    frame.loc[none, "class"] = "unexplained"
    edges = circuit.to_frame()
    # a head may read one writer by its queries, keys and values apart
    edges["writer_into"] = edges["writer"] + edges["reader"].str.extract(r"(<.>)$", expand=False).fillna("")
    into = {node: edges[edges["reader"].isin(_readers_of(graph, node))] for node in nodes}
    out = {node: edges[edges["writer"] == node] for node in nodes}
    for column, of_node, other in (("in", into, "writer_into"), ("out", out, "reader")):
        frame[f"edges_{column}"] = [len(of_node[node]) for node in nodes]
        frame[f"strongest_{column}"] = [_strongest(of_node[node], other) for node in nodes]
    tokens = promoted_tokens(model, pairs, nodes, k=LISTED, batch_size=batch_size)
    for end, column in (("top", "raises"), ("bottom", "lowers")):
        lists = tokens[tokens["end"] == end].groupby("component")["token"].agg(lambda some: " ".join(map(repr, some)))
        frame[column] = lists.loc[nodes].to_numpy()
    if all(pair.positions.get("subject") for pair in pairs):
        seen = sources_frame(attention_sources(model, pairs, batch_size=batch_size))
        seen["node"] = [f"a{layer}.h{head}" for layer, head in zip(seen["layer"], seen["head"], strict=True)]
        frame = frame.merge(seen[["node", *SOURCES]].rename(columns={s: f"sees_{s}" for s in SOURCES}), "left", "node")
    provenance = {"model": model.name, "metric": metric, "n_edges": circuit.n_edges, "n_pairs": len(pairs)}
    return CircuitTable(frame, provenance)


def _readers_of(graph: Graph, node: str) -> list[str]:
    """The readers whose input the node takes; under grouped queries heads share those of keys and values."""
    served = graph.serves[graph.writer_index[node]].tolist()
    return [reader for reader, column in graph.reader_index.items() if served[column]]


def _class_of(node: str, classes: pd.DataFrame | None) -> str:
    if node == "input":
        return "embedding"
    if classes is None or not node.startswith("a"):
        return ""
    layer, head = (int(part) for part in node[1:].split(".h"))
    return str(classes.loc[(classes["layer"] == layer) & (classes["head"] == head), "class"].item())


def _strongest(edges: pd.DataFrame, name: str) -> str:
    """The edges of largest absolute score, with it where the circuit has scores."""
    if "score" not in edges or edges["score"].isna().all():
        return ", ".join(edges[name].head(LISTED))
    best = edges.reindex(edges["score"].abs().sort_values(ascending=False).index).head(LISTED)
    return ", ".join(f"{other} ({score:.3g})" for other, score in zip(best[name], best["score"], strict=True))
