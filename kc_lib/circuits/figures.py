"""A circuit as a layered graph, and its strongest edges and nodes as tables."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from kc_lib.errors import MethodError
from kc_lib.graph import Circuit, Graph
from kc_lib.plotting import (
    DARK,
    HEAD,
    MLP,
    NEGATIVE,
    NEUTRAL,
    POSITIVE,
    arrow,
    check_finite,
    origin,
    titled,
    unit_of,
    with_unit,
)

EDGE_QUANTILES = (0.5, 0.8, 0.95)  # of |score|: where edges get wider and darker
EDGE_WIDTHS, EDGE_OPACITIES = (0.9, 1.6, 2.7, 4.5), (0.35, 0.55, 0.75, 0.95)
MAX_LABELS, MAX_LABELS_A_LAYER = 60, 14
CURVE = np.linspace(0.0, 1.0, 17)


def circuit_graph(circuit: Circuit, title: str | None = None, max_edges: int = 300) -> go.Figure:
    """The circuit as a layered graph of its strongest ``max_edges`` edges.

    The vertical axis is the layer (layers without a node take less room), the horizontal one the head's index, then the
    MLP. Width and opacity of an edge grow with its |score| (in the scores' unit), its colour is the sign.

    Raises:
        MethodError: a circuit without edges, scores that are no numbers, or ``max_edges`` below 1.
    """
    edges = _edges(circuit, "max_edges", max_edges)
    graph, scored = circuit.graph, bool(edges["score"].any())
    unit = unit_of(circuit.provenance) if scored else ""
    scores = f"scores in {unit}" if unit else "no scores" if not scored else ""
    drawn = edges.head(max_edges).explode("node")
    wanted = set(drawn["writer"]) | set(drawn["node"])
    nodes = [name for name in [*graph.writers, "logits"] if name in wanted]
    position, heights = _positions(graph, nodes)
    counts = [f"{circuit.share:.2%} of all edges", f"{len(nodes)} nodes", scores]
    name = f"{title or 'Circuit'}: {min(max_edges, len(edges))} of {len(edges)} edges drawn"
    figure = titled(go.Figure(), name, [*origin(circuit.provenance), *counts])
    figure.add_traces(_edge_traces(drawn, position, unit))
    figure.add_traces(_node_traces(edges, nodes, position, unit, scored))
    layers = [_place(graph, node)[0] for node in nodes]
    labelled = len(nodes) <= MAX_LABELS and max(map(layers.count, layers)) <= MAX_LABELS_A_LAYER
    for name in nodes if labelled else [end for end in ("input", "logits") if end in wanted]:
        (x, y), font = position[name], {"color": "white", "size": 11}
        figure.add_annotation(x=x, y=y, text=name, font=font, bgcolor=_kind(name)[1], borderpad=2, showarrow=False)
    heads = list(range(0, graph.n_heads, -(-graph.n_heads // 32)))
    figure.update_xaxes(
        tickvals=[*heads, _mlp_x(graph)],
        ticktext=[*(f"h{head}" for head in heads), "MLP"],
        range=[-0.14 * graph.n_heads - 0.2, 1.26 * graph.n_heads + 0.4],
        title_text="attention head, MLP",
        showgrid=False,
    )
    top = max(heights.values())
    figure.update_yaxes(tickvals=list(heights.values()), ticktext=list(heights), range=[-0.6, top + 0.6], title_text="layer")
    return figure.update_layout(width=1000, height=200 + int((40 if labelled else 34) * (top + 1.2)), hovermode="closest")


def top_edges_table(circuit: Circuit, n: int = 25) -> go.Figure:
    """The circuit's ``n`` edges with the largest |score|: signed, in the scores' unit, and its share of all |score|.

    Raises:
        MethodError: a circuit without edges or scores, or ``n`` below 1.
    """
    edges = _edges(circuit, "n", n, need_scores=True)
    top = edges.head(n)
    columns = {
        "writer": top["writer"],
        "reader": top["reader"].map(html.escape),
        with_unit("score", unit_of(circuit.provenance)): top["score"],
        "share of total |score|": (top["score"].abs() / edges["score"].abs().sum()).map("{:.1%}".format),
    }
    return _table(f"Strongest edges: {len(top)} of {len(edges)}", circuit, columns)


def top_nodes_table(circuit: Circuit, n: int = 15) -> go.Figure:
    """The circuit's ``n`` nodes with the largest |score| over their edges: edges, and signed sums in their unit.

    Raises:
        MethodError: a circuit without edges or scores, or ``n`` below 1.
    """
    edges, unit = _edges(circuit, "n", n, need_scores=True), unit_of(circuit.provenance)
    edges["magnitude"] = edges["score"].abs()
    into, out = edges.explode("node").groupby("node"), edges.groupby("writer")
    total = into["magnitude"].sum().add(out["magnitude"].sum(), fill_value=0.0)
    top = total.sort_values(ascending=False, kind="stable").index[:n]
    columns = {
        "node": top.to_series(),
        "edges in": into.size().reindex(top, fill_value=0),
        "edges out": out.size().reindex(top, fill_value=0),
        with_unit("score in", unit): into["score"].sum().reindex(top),
        with_unit("score out", unit): out["score"].sum().reindex(top),
    }
    return _table(f"Strongest nodes: {len(top)} of {len(total)}", circuit, columns)


def _edges(circuit: Circuit, name: str, n: int, need_scores: bool = False) -> pd.DataFrame:
    """writer, reader, score (0 without scores) and node (those the reader is an input of); largest |score| first."""
    if n < 1:
        raise MethodError(f"{name} is {n}; it must be at least 1")
    if not circuit.n_edges:
        raise MethodError("the circuit has no edges: there is nothing to show")
    edges = circuit.to_frame()
    if circuit.scores is None:
        edges["score"] = 0.0
    check_finite(edges["score"].to_numpy())
    if need_scores and not edges["score"].any():
        raise MethodError("the circuit has no scores to rank by")
    graph, writing, nodes = circuit.graph, set(circuit.nodes), {}
    for reader in edges["reader"].unique():
        served = graph.serves[:, graph.reader_index[reader]].nonzero()[:, 0].tolist()
        names = [graph.writers[row] for row in served] or ["logits"]
        nodes[reader] = [name for name in names if name in writing] or names[:1]
    return edges.assign(node=edges["reader"].map(nodes))


def _kind(name: str) -> tuple[str, str, str]:
    """Kind, colour and symbol of a node."""
    if name in ("input", "logits"):
        return "input, logits", DARK, "diamond"
    return ("attention head", HEAD, "circle") if name.startswith("a") else ("MLP", MLP, "square")


def _place(graph: Graph, name: str) -> tuple[int, int]:
    """Layer of a node and its index there: heads, then the MLP; input and logits are below and above all layers."""
    if name == "logits":
        return graph.n_layers, 0
    return divmod(graph.writer_index[name] - 1, graph.n_heads + 1) if name != "input" else (-1, 0)


def _mlp_x(graph: Graph) -> float:
    return 1.1 * graph.n_heads


def _positions(graph: Graph, nodes: Sequence[str]) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """Where each node is drawn, and by its label the height of each layer that has one."""
    places = {name: _place(graph, name) for name in nodes}
    labels = {layer: name if index < 0 else str(layer) for name, (layer, index) in places.items()}
    labels |= {-1: "input", graph.n_layers: "logits"}
    heights, y = {}, 0.0
    for layer in range(-1, graph.n_layers + 1):
        heights[layer] = y
        y += (1.2 if layer in (-1, graph.n_layers - 1) else 1.0) if layer in labels else 0.25
    position = {}
    for name, (layer, index) in places.items():
        x, up = (float(index), 0.0) if 0 <= layer < graph.n_layers else ((graph.n_heads - 1) / 2, 0.0)
        if index == graph.n_heads:
            x, up = _mlp_x(graph), 0.4  # above the heads of its layer, which it reads
        position[name] = (x, heights[layer] + up)
    return position, {labels[layer]: heights[layer] for layer in sorted(labels)}


def _edge_traces(drawn: pd.DataFrame, position: Mapping[str, tuple[float, float]], unit: str) -> list[go.Scatter]:
    """Per sign, one trace of curves per bucket of |score|, and one of invisible mid-points to hover on."""
    magnitude, signs = drawn["score"].abs().to_numpy(), np.sign(drawn["score"].to_numpy())
    bounds = np.quantile(magnitude[~drawn.index.duplicated()], EDGE_QUANTILES)
    buckets = np.searchsorted(bounds, magnitude, side="right")
    extent = (max(x for x, _ in position.values()), max(y for _, y in position.values()))
    curves = [
        _curve(position[writer], position[node], reader, extent)
        for writer, reader, node in zip(drawn["writer"], drawn["reader"], drawn["node"], strict=True)
    ]
    traces = []
    for sign, name, colour in (
        (0, "no score", NEUTRAL),
        (1, "positive score", POSITIVE),
        (-1, "negative score", NEGATIVE),
    ):
        group = {"legendgroup": name, "legendgrouptitle_text": with_unit(name, unit)}
        for bucket, (width, opacity) in enumerate(zip(EDGE_WIDTHS, EDGE_OPACITIES, strict=True)):
            chosen = np.flatnonzero((signs == sign) & (buckets == bucket))
            if len(chosen):
                label = f"{magnitude[chosen].min():.2g} to {magnitude[chosen].max():.2g}" if sign else "edges"
                x, y = [[value for i in chosen for value in (*curves[i][axis], None)] for axis in (0, 1)]
                line = {"color": colour, "width": width if sign else 1.2}
                look = {"mode": "lines", "line": line, "opacity": opacity if sign else 0.55, "hoverinfo": "skip"}
                traces.append(go.Scatter(x=x, y=y, name=label, meta="edges", **look, **group))
        own = np.flatnonzero(signs == sign)
        if len(own):
            text = [_edge_hover(edge, unit) for edge in drawn.iloc[own].itertuples()]
            middle = np.array([(curves[i][0][len(CURVE) // 2], curves[i][1][len(CURVE) // 2]) for i in own])
            look = {"mode": "markers", "marker": {"opacity": 0, "size": 9, "color": colour}, "showlegend": False}
            look |= {"hovertemplate": "%{text}<extra></extra>", "hoverlabel": {"bgcolor": colour}, "meta": "edge hover"}
            traces.append(go.Scatter(x=middle[:, 0].tolist(), y=middle[:, 1].tolist(), text=text, **look, **group))
    return sorted(traces, key=lambda trace: trace.line.width or 10.0)


def _edge_hover(edge: Any, unit: str) -> str:
    kind = {"<q>": "query", "<k>": "key", "<v>": "value"}.get(edge.reader[-3:])
    return f"<b>{arrow(edge.writer, edge.reader)}</b>{_score(edge.score, unit)}" + (
        f"<br>{kind} of {edge.node}" if kind else ""
    )


def _score(score: float, unit: str) -> str:
    return f": {score:+.3g} {unit}".rstrip() if score else ""


def _curve(
    start: tuple[float, float], end: tuple[float, float], reader: str, extent: tuple[float, float]
) -> tuple[list[float], list[float]]:
    """A Bézier curve that leaves and arrives upright and swings outward where it would run along its own column."""
    port = {"<q>": -0.07, "<v>": 0.07}.get(reader[-3:], 0.0)  # queries, keys and values arrive side by side
    (x0, y0), (x1, y1), swing = start, end, 0.0
    if abs(x1 - x0) < 0.6 and y1 - y0 > 0.7:
        swing = (0.35 + 0.16 * extent[0] * ((y1 - y0) / extent[1]) ** 0.8) * (1 if 2 * x0 >= extent[0] else -1)
    bend, t = 0.35 * (y1 - y0), CURVE
    weights = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    x = np.array([x0, x0 + swing, x1 + port + swing, x1 + port]) @ weights
    return x.round(3).tolist(), (np.array([y0, y0 + bend, y1 - bend, y1]) @ weights).round(3).tolist()


def _node_traces(
    edges: pd.DataFrame, nodes: Sequence[str], position: Mapping[str, tuple[float, float]], unit: str, scored: bool
) -> list[go.Scatter]:
    """Markers by kind of node; their hover is about all of the circuit's edges, drawn or not."""
    into, out = dict(list(edges.explode("node").groupby("node"))), dict(list(edges.groupby("writer")))
    texts: dict[str, list[str]] = {}
    for name in nodes:
        lines = [f"<b>{name}</b>"]
        for direction, found in (("in", into.get(name)), ("out", out.get(name))):
            if found is not None:
                total = f", total |score| {found['score'].abs().sum():.3g} {unit}".rstrip() if scored else ""
                lines.append(f"{len(found)} {'edge' if len(found) == 1 else 'edges'} {direction}{total}")
                strongest: Iterable[Any] = found.head(3 if scored else 0).itertuples()
                lines += [f"   {arrow(edge.writer, edge.reader)}{_score(edge.score, unit)}" for edge in strongest]
        texts.setdefault(_kind(name)[0], []).append("<br>".join(lines))
    traces = []
    for kind, text in texts.items():
        own = [name for name in nodes if _kind(name)[0] == kind]
        x, y = zip(*(position[name] for name in own), strict=True)
        _, colour, symbol = _kind(own[0])
        marker = {"color": colour, "size": 11, "symbol": symbol, "line": {"color": "white", "width": 1}}
        look = {"mode": "markers", "marker": marker, "hovertemplate": "%{text}<extra></extra>", "meta": "nodes"}
        group = {"name": kind, "legendgroup": "nodes", "legendgrouptitle_text": "nodes"}
        traces.append(go.Scatter(x=x, y=y, text=text, customdata=own, **look, **group))
    return traces


def _table(title: str, circuit: Circuit, columns: Mapping[str, pd.Series]) -> go.Figure:
    """A table; columns of floats are scores, signed and coloured (3 decimals, or where all are tiny 3 digits)."""
    cells, colours, align = [], [], []
    for values in columns.values():
        signed, text = (
            pd.api.types.is_float_dtype(values),
            values.dtype == object or pd.api.types.is_string_dtype(values),
        )
        form = "+.3f" if signed and values.abs().max() >= 0.01 else "+.2e"
        shown = ["" if pd.isna(value) else f"{value:{form if signed else ''}}" for value in values]
        cells.append([f"<span>{value}</span>" for value in shown])  # a plain cell stands higher than one with a <q>
        colours.append([POSITIVE if v > 0 else NEGATIVE if v < 0 else DARK for v in values] if signed else DARK)
        align.append("left" if text and "%" not in str(values.iloc[0]) else "right")
    figure = titled(go.Figure(), title, origin(circuit.provenance))
    stripes = [[("white", "#F5F5F5")[row % 2] for row in range(len(cells[0]))]]
    header = {"values": [f"<b>{name}</b>" for name in columns], "align": align, "fill_color": "#E4E4E4", "height": 32}
    body = {
        "values": cells,
        "align": align,
        "font_color": colours,
        "fill_color": stripes,
        "height": 31,
    }
    figure.add_table(header=header, cells=body)
    return figure.update_layout(width=800, height=145 + 31 * len(cells[0]), margin={"l": 10, "r": 10, "t": 80, "b": 20})
