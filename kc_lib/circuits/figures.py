"""A circuit as a layered graph, the distribution of edge scores, and tables: strongest edges and nodes, verdicts."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from kc_lib import plotting as plot
from kc_lib.circuits.scores import EdgeScores
from kc_lib.circuits.verdict import COLUMNS
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit, Graph

EDGE_QUANTILES = (0.5, 0.8, 0.95)  # of |score|: where edges get wider and darker
EDGE_WIDTHS, EDGE_OPACITIES = (0.9, 1.6, 2.7, 4.5), (0.35, 0.55, 0.75, 0.95)
SIGNS = (("no score", plot.NEUTRAL), ("positive score", plot.POSITIVE), ("negative score", plot.NEGATIVE))  # at 0, 1 and -1
MAX_LABELS, MAX_LABELS_A_LAYER = 60, 14
VERDICTS = {"yes": ("✓ yes", "#C6E2F2"), "no": ("✗ no", "#F9D3BC"), "undefined": ("? undefined", "#E4E4E4")}
WIDTHS = {"criterion": 205, "split": 80, "figure [95%]": 160, "baseline": 75, "bar": 130, "verdict": 105, "note": 205}  # px
CURVE = np.linspace(0.0, 1.0, 17)


def circuit_graph(circuit: Circuit, title: str | None = None, max_edges: int = 300) -> go.Figure:
    """The circuit as a layered graph of its strongest ``max_edges`` edges.

    The vertical axis is the layer (layers without a node take less room), the horizontal one the head's index, then the
    MLP. Width and opacity of an edge grow with its |score| (in the scores' unit), its colour is the sign.

    Example:
        >>> kc.circuit_graph(kc.select(scores, size=0.005))

    Raises:
        MethodError: a circuit without edges, scores that are no numbers, or ``max_edges`` below 1.
    """
    edges = _edges(circuit, "max_edges", max_edges)
    graph, scored = circuit.graph, bool(edges["score"].any())
    unit = plot.unit_of(circuit.provenance) if scored else ""
    scores = f"scores in {unit}" if unit else "no scores" if not scored else ""
    drawn = edges.head(max_edges).explode("node")
    wanted = set(drawn["writer"]) | set(drawn["node"])
    nodes = [name for name in [*graph.writers, "logits"] if name in wanted]
    position, heights = _positions(graph, nodes)
    counts = [f"{circuit.share:.2%} of all edges", f"{len(nodes)} nodes", scores]
    name = f"{title or 'Circuit'}: {min(max_edges, len(edges))} of {len(edges)} edges drawn"
    figure = go.Figure()
    _add_edges(figure, drawn, position, unit)
    _add_nodes(figure, edges, nodes, position, unit)
    layers = [_place(graph, node)[0] for node in nodes]
    labelled = len(nodes) <= MAX_LABELS and max(map(layers.count, layers)) <= MAX_LABELS_A_LAYER
    for node in nodes if labelled else [end for end in ("input", "logits") if end in wanted]:
        (x, y), font = position[node], {"color": "white", "size": 11}
        figure.add_annotation(x=x, y=y, text=node, font=font, bgcolor=_kind(node)[1], borderpad=2, showarrow=False)
    heads = list(range(0, graph.n_heads, -(-graph.n_heads // 32)))
    ticks: dict[float, str] = {**{float(head): f"h{head}" for head in heads}, _mlp_x(graph): "MLP"}
    figure.update_xaxes(tickvals=list(ticks), ticktext=list(ticks.values()), title_text="attention head, MLP")
    figure.update_xaxes(range=[-0.14 * graph.n_heads - 0.2, 1.26 * graph.n_heads + 0.4], showgrid=False)
    top = max(heights.values())
    figure.update_yaxes(tickvals=list(heights.values()), ticktext=list(heights), range=[-0.6, top + 0.6], title_text="layer")
    size = {"width": 1000, "height": 200 + int((40 if labelled else 34) * (top + 1.2))}
    return plot.titled(figure, name, [*plot.origin(circuit.provenance), *counts], hovermode="closest", **size)


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
        plot.with_unit("score", plot.unit_of(circuit.provenance)): top["score"],
        "share of total |score|": (top["score"].abs() / edges["score"].abs().sum()).map("{:.1%}".format),
    }
    return _table(f"Strongest edges: {len(top)} of {len(edges)}", circuit, columns)


def top_nodes_table(circuit: Circuit, n: int = 15) -> go.Figure:
    """The circuit's ``n`` nodes with the largest |score| over their edges: edges, and signed sums in their unit.

    Raises:
        MethodError: a circuit without edges or scores, or ``n`` below 1.
    """
    edges, unit = _edges(circuit, "n", n, need_scores=True), plot.unit_of(circuit.provenance)
    edges["magnitude"] = edges["score"].abs()
    into, out = edges.explode("node").groupby("node"), edges.groupby("writer")
    total = into["magnitude"].sum().add(out["magnitude"].sum(), fill_value=0.0)
    top = total.sort_values(ascending=False, kind="stable").index[:n]
    columns = {
        "node": top.to_series(),
        "edges in": into.size().reindex(top, fill_value=0),
        "edges out": out.size().reindex(top, fill_value=0),
        plot.with_unit("score in", unit): into["score"].sum().reindex(top),
        plot.with_unit("score out", unit): out["score"].sum().reindex(top),
    }
    return _table(f"Strongest nodes: {len(top)} of {len(total)}", circuit, columns)


def score_distribution(scores: EdgeScores, circuit: Circuit | None = None) -> go.Figure:
    """|score| of every edge (in the scores' unit) against its rank among those of its sign; both axes are log.

    Edges that score exactly 0 are counted in the subtitle. With ``circuit``, its edges are marked.

    Raises:
        MethodError: every edge scores 0, a score is no number, or the circuit is one of another graph.
    """
    graph, unit = scores.graph, plot.unit_of(scores.provenance)
    if circuit is not None and circuit.graph != graph:
        raise MethodError(f"the circuit is one of another graph ({circuit.graph}) than the scores ({graph})")
    writers, readers = graph.edges.nonzero(as_tuple=True)
    values = scores.scores[writers, readers].double().numpy()
    plot.check_finite(values)
    n_zero, inside = int((values == 0).sum()), np.zeros(len(values), dtype=bool)
    if n_zero == len(values):
        raise MethodError("every edge scores 0: there is no distribution to show")
    about = [*plot.origin(scores.provenance), f"{len(values):,} edges", f"{n_zero:,} of them score 0" if n_zero else ""]
    if circuit is not None:
        inside = circuit.mask[writers, readers].numpy()
        about.append(f"{circuit.n_edges:,} in the circuit (circles)")
    figure = go.Figure()
    for sign, name, colour in ((1, "positive", plot.POSITIVE), (-1, "negative", plot.NEGATIVE)):
        order = np.flatnonzero(np.sign(values) == sign)
        order = order[np.argsort(-np.abs(values[order]), kind="stable")]
        kept = np.flatnonzero(inside[order])
        line = {"mode": "lines", "name": f"{name} ({len(order):,})", "line": {"color": colour, "width": 2}}
        marker = {"size": 7, "color": "rgba(255,255,255,0.6)", "line": {"color": colour, "width": 1.5}}
        circles = {"mode": "markers", "name": f"{name}, in the circuit ({len(kept):,})", "marker": marker}
        for ranks, look in ((np.arange(len(order)), line), (kept, circles)):
            ranks = ranks[_thinned(len(ranks))]
            if len(ranks):
                text = [plot.arrow(graph.writers[writers[i]], graph.readers[readers[i]].name) for i in order[ranks]]
                look |= {"hovertemplate": f"%{{text}}<br>rank %{{x}}: %{{y:.3g}} {unit}<extra>{name}</extra>"}
                y = np.abs(values[order[ranks]]).tolist()
                figure.add_scatter(x=(ranks + 1).tolist(), y=y, text=text, legendgroup=name, **look)
    last = np.log10(max(1, (values > 0).sum(), (values < 0).sum()))
    rank = "rank among edges of the same sign"
    figure.update_xaxes(type="log", dtick=1, title_text=rank, tickformat=",", range=[-0.15, last + 0.15])
    figure.update_yaxes(type="log", dtick=1, title_text=plot.with_unit("|score|", unit), exponentformat="power")
    return plot.titled(figure, "Distribution of edge scores", about, width=900, height=500, hovermode="closest")


def verdict_table(verdicts: pd.DataFrame) -> go.Figure:
    """What ``verdict`` returns, as a table: criterion, split, figure with interval, baseline, bar, verdict, and notes.

    Verdicts are written and coloured: "yes" blue, "no" vermillion, "undefined" grey.

    Raises:
        MethodError: no rows, a missing column, or a verdict of another name.
    """
    missing = [column for column in COLUMNS if column not in verdicts.columns]
    if missing or verdicts.empty:
        raise MethodError(f"the verdicts have no column {missing[0]!r}" if missing else "there are no verdicts to show")
    unknown = set(verdicts["verdict"]) - VERDICTS.keys()
    if unknown:
        raise MethodError(f"unknown verdict {unknown.pop()!r}: use one of {', '.join(VERDICTS)}")
    rows = verdicts.rename(columns={"low": "figure_low", "high": "figure_high"}).to_dict("records")
    columns = {
        "criterion": [f"<b>{row['criterion']}</b><br>{_wrapped(row['measure'], 'criterion')}" for row in rows],
        "split": [plot.shown_split(row["split"]) or "none" for row in rows],
        "figure [95%]": ["not measured" if pd.isna(row["figure"]) else plot.figure_text(row, "figure", 3) for row in rows],
        "baseline": [plot.number(row["baseline"], 3).replace("undefined", "none") for row in rows],
        "bar": [_wrapped(row["bar"], "bar") for row in rows],
        "verdict": [f"<b>{VERDICTS[row['verdict']][0]}</b>" for row in rows],
        "note": [_wrapped(row["note"], "note") for row in rows],
    }
    if not any(columns["note"]):
        del columns["note"]
    cells = {name: [f"<span>{cell}</span>" for cell in column] for name, column in columns.items()}
    colours = [VERDICTS[row["verdict"]][1] for row in rows]
    fills = [colours if name == "verdict" else ["white"] * len(rows) for name in columns]
    widths = [WIDTHS[name] for name in columns]
    figure = plot.table(cells, widths, fill_color=fills, line_color="#D0D0D0", font_size=12)
    yes = "yes: bar cleared (faithful, complete, minimal: by the whole 95% interval)"
    met = f"Verdict: {(verdicts['verdict'] == 'yes').sum()} of {len(rows)} criteria met"
    return plot.titled(figure, met, [yes, "no: not shown, which is not the opposite shown"])


def _edges(circuit: Circuit, name: str, n: int, need_scores: bool = False) -> pd.DataFrame:
    """writer, reader, score (0 without scores) and node (those the reader is an input of); largest |score| first."""
    if n < 1:
        raise MethodError(f"{name} is {n}; it must be at least 1")
    if not circuit.n_edges:
        raise MethodError("the circuit has no edges: there is nothing to show")
    edges = circuit.to_frame()
    if circuit.scores is None:
        edges["score"] = 0.0
    plot.check_finite(edges["score"].to_numpy())
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
        return "input, logits", plot.DARK, "diamond"
    return ("attention head", plot.HEAD, "circle") if name.startswith("a") else ("MLP", plot.MLP, "square")


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


def _add_edges(figure: go.Figure, drawn: pd.DataFrame, position: Mapping[str, tuple[float, float]], unit: str) -> None:
    """Curves by size and sign of the score, the thinnest first, and invisible mid-points to hover on."""
    magnitude = drawn["score"].abs()
    bounds = np.quantile(magnitude[~drawn.index.duplicated()], EDGE_QUANTILES)
    extent = max(x for x, _ in position.values()), max(y for _, y in position.values())
    ends = zip(drawn["writer"], drawn["node"], drawn["reader"], strict=True)
    curves = [_curve(position[writer], position[node], reader, extent) for writer, node, reader in ends]
    drawn = drawn.assign(magnitude=magnitude, curve=pd.Series(curves, index=drawn.index))
    drawn["bucket"] = np.searchsorted(bounds, magnitude, side="right")
    drawn["sign"] = np.sign(drawn["score"]).astype(int) % len(SIGNS)
    for bucket, (width, opacity) in enumerate(zip(EDGE_WIDTHS, EDGE_OPACITIES, strict=True)):
        for sign, (name, colour) in enumerate(SIGNS):
            edges = drawn[(drawn["bucket"] == bucket) & (drawn["sign"] == sign)]
            if len(edges):
                x, y = ([value for curve in edges["curve"] for value in (*curve[axis], None)] for axis in (0, 1))
                label = f"{edges['magnitude'].min():.2g} to {edges['magnitude'].max():.2g}" if sign else "edges"
                look = {"line": {"color": colour, "width": width if sign else 1.2}, "opacity": opacity if sign else 0.55}
                group = {"legendgroup": name, "legendgrouptitle_text": plot.with_unit(name, unit), "meta": "edges"}
                figure.add_scatter(x=x, y=y, mode="lines", name=label, hoverinfo="skip", **look, **group)
    for sign, (name, colour) in enumerate(SIGNS):
        edges = drawn[drawn["sign"] == sign]
        x, y = ([curve[axis][len(CURVE) // 2] for curve in edges["curve"]] for axis in (0, 1))
        text = [_edge_hover(edge, unit) for edge in edges.itertuples()]
        look = {"size": 9, "opacity": 0, "hoverlabel": {"bgcolor": colour}, "meta": "edge hover", "showlegend": False}
        if x:
            plot.points(figure, x, y, colour, text, legendgroup=name, **look)


def _edge_hover(edge: Any, unit: str) -> str:
    kind = {"<q>": "query", "<k>": "key", "<v>": "value"}.get(edge.reader[-3:])
    part = f"<br>{kind} of {edge.node}" if kind else ""
    return f"<b>{plot.arrow(edge.writer, edge.reader)}</b>{_score(edge.score, unit)}{part}"


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


def _add_nodes(
    figure: go.Figure, edges: pd.DataFrame, nodes: Sequence[str], position: Mapping[str, tuple[float, float]], unit: str
) -> None:
    """Markers by kind of node; their hover is about all of the circuit's edges, drawn or not."""
    scored = bool(edges["score"].any())
    into, out = dict(list(edges.explode("node").groupby("node"))), dict(list(edges.groupby("writer")))
    by_kind: dict[tuple[str, str, str], dict[str, str]] = {}
    for node in nodes:
        lines = [f"<b>{node}</b>"]
        for direction, joined in (("in", into.get(node)), ("out", out.get(node))):
            if joined is not None:
                total = f", total |score| {joined['score'].abs().sum():.3g} {unit}".rstrip() if scored else ""
                lines.append(f"{len(joined)} {'edge' if len(joined) == 1 else 'edges'} {direction}{total}")
                strongest = joined.head(3 if scored else 0).to_dict("records")
                names = [plot.arrow(edge["writer"], edge["reader"]) for edge in strongest]
                lines += [f"   {name}{_score(edge['score'], unit)}" for name, edge in zip(names, strongest, strict=True)]
        by_kind.setdefault(_kind(node), {})[node] = "<br>".join(lines)
    for (kind, colour, symbol), texts in by_kind.items():
        look: dict[str, Any] = {"symbol": symbol, "size": 11, "outline": {"color": "white", "width": 1}, "meta": "nodes"}
        group = {"name": kind, "legendgroup": "nodes", "legendgrouptitle_text": "nodes"}
        x, y = zip(*(position[node] for node in texts), strict=True)
        plot.points(figure, x, y, colour, list(texts.values()), customdata=list(texts), **look, **group)


def _table(title: str, circuit: Circuit, columns: Mapping[str, pd.Series]) -> go.Figure:
    """A table; columns of floats are scores, signed and coloured (3 decimals, or where all are tiny 3 digits)."""
    cells: dict[str, list[str]] = {}
    colours, align = [], []
    for name, values in columns.items():
        signed = pd.api.types.is_float_dtype(values)
        form = "" if not signed else "+.3f" if values.abs().max() >= 0.01 else "+.2e"
        shown = ["" if pd.isna(value) else f"{value:{form}}" for value in values]
        cells[name] = [f"<span>{value}</span>" for value in shown]  # a plain cell stands higher than one with a <q>
        colours.append(
            [plot.POSITIVE if v > 0 else plot.NEGATIVE if v < 0 else plot.DARK for v in values] if signed else plot.DARK
        )
        align.append("right" if pd.api.types.is_numeric_dtype(values) or "%" in shown[0] else "left")
    figure = plot.table(cells, align=align, font_color=colours)
    return plot.titled(figure, title, plot.origin(circuit.provenance))


def _thinned(n: int, n_points: int = 500) -> np.ndarray:
    """At most ``n_points`` of the positions 0..n-1, evenly spread on a log axis."""
    return np.unique(np.geomspace(1, n, n_points).round().astype(int)) - 1 if n > n_points else np.arange(n)


def _wrapped(text: Any, column: str) -> str:
    """A text broken to lines of a column of the verdicts, at 6.6 pixels a letter."""
    return "<br>".join(html.escape(line) for line in textwrap.wrap(str(text), int((WIDTHS[column] - 16) / 6.6)))
