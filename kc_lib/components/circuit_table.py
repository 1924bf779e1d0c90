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
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.selection import select
from kc_lib.components.attention import SOURCES, head_names, source_table
from kc_lib.components.direct import DirectAttribution, direct_attribution, promoted_tokens
from kc_lib.components.lens import LogitLens
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit, Graph
from kc_lib.metrics import Metric, get_metric
from kc_lib.models.model import Model
from kc_lib.residual.activations import ablation, shared_prefix
from kc_lib.residual.logits import full_logits, reference_means
from kc_lib.residual.patch import clean_run, patch_writers
from kc_lib.results import Result
from kc_lib.stats import interval, resampled_means
from kc_lib.tasks.batches import TokenPair, batches

LISTED = 5  # edges and tokens named per node
NEAR = 10  # a rank that counts as near the top
WHAT = {"answer": "answer's logit", "difference": "logit difference"}
SUMMARISED = ["node", "class", "direct", "total", "total_low", "total_high", "strongest_in", "raises"]


@dataclass(frozen=True)
class CircuitTable(Result):
    """One row per node, in the order of the graph.

    Columns: node, class, direct and total effect with intervals (logits; units of the metric), number of edges in and out
    with the strongest of them, tokens raised and lowered, and for heads the attention from the answer position by source.
    """

    columns = ("node", "class", "direct", "total")

    nodes: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def summary(self, n: int = 20) -> pd.DataFrame:
        """The n nodes of largest total effect, with what matters of them."""
        rows = self.nodes["total"].abs().sort_values(ascending=False).index[:n]
        return self.nodes.loc[rows, SUMMARISED].round(2)

    def counts(self) -> dict[str, int]:
        """How many nodes have a direct effect, how many a total effect but no direct one, and how many neither."""
        direct, total = (
            (self.nodes[f"{effect}_low"] > 0) | (self.nodes[f"{effect}_high"] < 0) for effect in ("direct", "total")
        )
        return {
            "direct": int(direct.sum()),
            "through others": int((total & ~direct).sum()),
            "none": int((~total & ~direct).sum()),
        }

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


def given_or_found(
    given: Circuit | None,
    model: Model,
    pairs: Sequence[TokenPair],
    *,
    size: int | float = 0.005,
    batch_size: int = 8,
    progress: bool = False,
) -> Circuit:
    """The given circuit; without one, the circuit of this size that EAP-IG finds on the pairs.

    Raises:
        MethodError: a size out of range, or too small for any path.
    """
    return given or select(score_edges(model, pairs, batch_size=batch_size, progress=progress), size=size)


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
    effects = direct_attribution(model, pairs, "difference", batch_size=batch_size).summary(seed).set_index("component")
    node_sets = {node: [node] for node in nodes}
    values = ablated_values(model, node_sets, pairs, metric=metric, batch_size=batch_size, progress=progress)
    drops = pd.DataFrame({node: values["full"] - values[node] for node in nodes})
    low, high = interval(resampled_means(drops.to_numpy(), seed))
    known = {"input": "embedding"}
    if classes is not None:
        known |= dict(zip(head_names(zip(classes["layer"], classes["head"], strict=True)), classes["class"], strict=True))
    frame = pd.DataFrame({"node": nodes, "class": [known.get(node, "") for node in nodes]})
    for end in ("", "_low", "_high"):
        frame[f"direct{end}"] = effects.loc[nodes, f"contribution{end}"].to_numpy()
    frame = frame.assign(total=drops.mean().to_numpy(), total_low=low, total_high=high)
    unexplained = (frame["class"] == "") & (frame["direct_low"] <= 0) & (frame["direct_high"] >= 0)
    frame.loc[unexplained, "class"] = "unexplained"
    frame = frame.join(_edges_of(circuit, nodes), on="node")
    tokens = promoted_tokens(model, pairs, nodes, k=LISTED, batch_size=batch_size)
    for end, column in (("top", "raises"), ("bottom", "lowers")):
        lists = tokens[tokens["end"] == end].groupby("component")["token"].agg(lambda some: " ".join(map(repr, some)))
        frame[column] = lists.loc[nodes].to_numpy()
    if all(pair.positions.get("subject") for pair in pairs):
        sources = source_table(model, pairs, batch_size=batch_size)
        sources["node"] = head_names(zip(sources["layer"], sources["head"], strict=True))
        columns = {source: f"sees_{source}" for source in SOURCES}
        frame = frame.merge(sources[["node", *SOURCES]].rename(columns=columns), "left", "node")
    provenance = {"model": model.name, "metric": metric, "n_edges": circuit.n_edges, "n_pairs": len(pairs)}
    return CircuitTable(frame, provenance)


def _edges_of(circuit: Circuit, nodes: Sequence[str]) -> pd.DataFrame:
    """By node: the number of edges in and out, and the strongest of them, as text."""
    edges = circuit.to_frame()
    # a head may read one writer by its queries, keys and values apart
    edges["writer_into"] = edges["writer"] + edges["reader"].str.extract(r"(<.>)$", expand=False).fillna("")
    rows = {}
    for node in nodes:
        into, out = edges[edges["reader"].isin(_readers_of(circuit.graph, node))], edges[edges["writer"] == node]
        rows[node] = {"edges_in": len(into), "strongest_in": _strongest(into, "writer_into")}
        rows[node] |= {"edges_out": len(out), "strongest_out": _strongest(out, "reader")}
    return pd.DataFrame.from_dict(rows, orient="index")


def _readers_of(graph: Graph, node: str) -> list[str]:
    """The readers whose input the node takes; under grouped queries heads share those of keys and values."""
    served = graph.serves[graph.writer_index[node]].tolist()
    return [reader for reader, column in graph.reader_index.items() if served[column]]


def _strongest(edges: pd.DataFrame, name: str) -> str:
    """The edges of largest absolute score, with it where the circuit has scores."""
    if edges["score"].isna().all():
        return ", ".join(edges[name].head(LISTED))
    best = edges.reindex(edges["score"].abs().sort_values(ascending=False).index).head(LISTED)
    return ", ".join(f"{other} ({score:.3g})" for other, score in zip(best[name], best["score"], strict=True))


def ablated_values(
    model: Model,
    node_sets: Mapping[str, Sequence[str]],
    pairs: Sequence[TokenPair],
    *,
    metric: str | Metric = "logit_difference",
    intervention: str = "patching",
    reference: Sequence[TokenPair] = (),
    batch_size: int = 16,
    progress: bool = False,
) -> pd.DataFrame:
    """The metric, fact x set of nodes, with "full" among the sets; every node of a set is ablated in all it writes.

    Args:
        reference: pairs whose clean prompts give the means of a mean intervention (those of discovery, not of evaluation).

    Raises:
        MethodError: unknown metric or intervention, a set named "full", or a node that writes nothing in the graph.
    """
    metric = get_metric(metric)
    decoder = model.residual
    graph = decoder.graph()
    if "full" in node_sets:
        raise MethodError("a set of nodes is named 'full', as the whole model: rename it")
    rows = {name: [_row_of(graph.writer_index, node) for node in nodes] for name, nodes in node_sets.items()}
    means = reference_means(decoder, intervention, reference, batch_size)
    values: dict[str, list[Tensor]] = {}
    with tqdm(total=len(pairs) * len(rows), desc="ablating nodes", unit="run", disable=not progress) as bar:
        for batch in batches(pairs, batch_size, device=decoder.device):
            prefix = shared_prefix(decoder, batch, intervention)
            ablated = ablation(decoder, intervention, batch, means, prefix)
            run, full = clean_run(decoder, graph, batch, prefix), full_logits(decoder, batch, prefix)
            values.setdefault("full", []).append(metric(full, batch, full).double().cpu())
            for name, writers in rows.items():
                logits = patch_writers(decoder, graph, batch, run, ablated, writers)
                values.setdefault(name, []).append(metric(logits, batch, full).double().cpu())
                bar.update(len(batch))
    return pd.DataFrame({name: torch.cat(parts).numpy() for name, parts in values.items()})


def _row_of(index: Mapping[str, int], node: str) -> int:
    if node not in index:
        raise MethodError(f"the graph has no node {node!r} that writes: name nodes like a0.h0, m0 or input")
    return index[node]


def reading_headline(lens: LogitLens, direct: DirectAttribution, table: CircuitTable, seed: int = 0) -> dict[str, str]:
    """The figures that matter: where the answer comes near the top, what writes it, how much of a circuit that tells."""
    what = WHAT.get(str(direct.provenance.get("direction")), "logit")
    effects = direct.summary(seed)
    heads = effects[effects["kind"] == "head"].sort_values("contribution")
    counts = table.counts()
    return {
        f"answer among the first {NEAR}": _arrival(lens, NEAR),
        "answer first": _arrival(lens, 1),
        what: f"{direct.totals.mean():.2f} logits (n = {len(direct.values)} facts)",
        f"{what}, attention": _sum_of(direct, effects["kind"] == "head", seed),
        f"{what}, MLPs": _sum_of(direct, effects["kind"] == "mlp", seed),
        "head that adds most": _effect(heads.iloc[-1]),
        "head that takes most": _effect(heads.iloc[0]),
        "nodes of the circuit": f"{len(table.nodes)}: {counts['direct']} with a direct effect, {counts['through others']} "
        f"through others only, {counts['none']} with none",
    }


def _arrival(lens: LogitLens, rank: int) -> str:
    """From where on the median rank stays within ``rank``."""
    summary = lens.summary()
    beyond = (summary["answer_rank_median"] > rank).to_numpy().nonzero()[0]
    first = int(beyond[-1]) + 1 if len(beyond) else 0
    if first == len(summary):
        return "never"
    layer = summary["layer"].iloc[first]
    if layer == 0:
        return "at the embedding"
    return f"after layer {int(layer)}'s attention" if layer % 1 else f"after layer {int(layer) - 1}"


def _sum_of(direct: DirectAttribution, chosen: pd.Series, seed: int) -> str:
    """What some components add together, with its interval over facts."""
    values = direct.values[:, chosen.tolist()].sum(1).double().numpy()
    low, high = interval(resampled_means(values[:, None], seed))
    return f"{values.mean():.2f} [{low[0]:.2f}, {high[0]:.2f}]"


def _effect(row: pd.Series) -> str:
    return f"{row['component']} ({row['contribution']:+.2f} [{row['contribution_low']:.2f}, {row['contribution_high']:.2f}])"
