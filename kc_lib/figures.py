"""Figures of circuits, scores and evaluations: each function takes results and returns a plotly figure.

Positive scores are blue (ablating the edge hurts), negative ones vermillion (ablating it helps): colours of Okabe and
Ito's, which colour-blind readers can tell apart. Under grouped queries an edge into a key or value reader that
several heads share is drawn into, and counted for, each of those heads that writes in the circuit.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kc_lib.errors import MethodError
from kc_lib.evaluation import Evaluation
from kc_lib.graph import Circuit, Graph
from kc_lib.methods.attribution import EdgeScores

POSITIVE, NEGATIVE, NEUTRAL, DARK = "#0072B2", "#D55E00", "#8A8A8A", "#222222"
HEAD, MLP = "#009E73", "#B0578D"
SIGNED_SCALE = [[0.0, NEGATIVE], [0.5, "#FFFFFF"], [1.0, POSITIVE]]  # centre it on zero
SPLIT_COLOURS = (POSITIVE, "#E69F00", HEAD, MLP)
EDGE_QUANTILES = (0.5, 0.8, 0.95)  # of |score|: where edges get wider and darker
EDGE_WIDTHS, EDGE_OPACITIES = (0.9, 1.6, 2.7, 4.5), (0.35, 0.55, 0.75, 0.95)
NULL_KINDS = ("random", "null")
MAX_LABELS, MAX_LABELS_A_LAYER = 60, 14
CURVE = np.linspace(0.0, 1.0, 17)
PANELS = {
    "hit_at_10": "Hit@10 (share of facts)",
    "probability": "probability of the answer",
    "rank_median": "median rank of the answer (lower is better)",
    "faithfulness": "faithfulness",
}
_AXIS = {
    "linecolor": "#555555",
    "ticks": "outside",
    "gridcolor": "#ECECEC",
    "zeroline": False,
    "automargin": True,
    "title": {"font": {"size": 14}, "standoff": 10},
}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "Open Sans, Arial, Helvetica, sans-serif", "size": 13, "color": DARK},
        "title": {
            "x": 0.01,
            "xanchor": "left",
            "font": {"size": 18},
            "subtitle": {"font": {"size": 13, "color": "#555555"}},
        },
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": [POSITIVE, NEGATIVE, HEAD, "#E69F00", MLP, "#56B4E9", NEUTRAL],
        "colorscale": {"diverging": SIGNED_SCALE},
        "coloraxis": {"cmid": 0},
        "hoverlabel": {"align": "left", "font": {"size": 13}},
        "legend": {"font": {"size": 12}, "grouptitlefont": {"size": 13}},
        "margin": {"l": 70, "r": 30, "t": 90, "b": 60},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)


def circuit_graph(circuit: Circuit, title: str | None = None, max_edges: int = 300) -> go.Figure:
    """The circuit as a layered graph of its strongest ``max_edges`` edges.

    The vertical axis is the layer (layers without a node take less room), the horizontal one the head's index, then the
    MLP. Width and opacity of an edge grow with its |score| (in the scores' unit), its colour is the sign.

    Raises:
        MethodError: a circuit without edges, scores that are no numbers, or ``max_edges`` below 1.
    """
    edges = _edges(circuit, "max_edges", max_edges)
    graph, scored = circuit.graph, bool(edges["score"].any())
    unit = _unit(circuit.provenance) if scored else ""
    scores = f"scores in {unit}" if unit else "no scores" if not scored else ""
    drawn = edges.head(max_edges).explode("node")
    wanted = set(drawn["writer"]) | set(drawn["node"])
    nodes = [name for name in [*graph.writers, "logits"] if name in wanted]
    position, heights = _positions(graph, nodes)
    counts = [f"{circuit.share:.2%} of all edges", f"{len(nodes)} nodes", scores]
    name = f"{title or 'Circuit'}: {min(max_edges, len(edges))} of {len(edges)} edges drawn"
    figure = _titled(go.Figure(), name, [*_origin(circuit.provenance), *counts])
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


def faithfulness_figure(evaluation: Evaluation, title: str | None = None) -> go.Figure:
    """Faithfulness (0 is the empty circuit, 1 the full model) against the number of edges, on a log axis.

    One line with its 95% band per split for the circuits of kind "top"; random circuits of the same sizes, with the
    line of their mean, are grey, on the held-out split where there is one.

    Raises:
        MethodError: no "top" circuit has edges and a faithfulness.
    """
    summary, judged = evaluation.summary, _judged_split(evaluation.summary)
    shown = summary[(summary["n_edges"] > 0) & summary["faithfulness"].notna()].sort_values(["n_edges", "circuit"])
    top = shown[shown["kind"] == "top"]
    random = shown[(shown["kind"] == "random") & (shown["split"] == judged)]
    if top.empty:
        raise MethodError("the evaluation has no 'top' circuit with edges and a defined faithfulness to show")
    left_out = summary[(summary["kind"] == "top") & ~summary.index.isin(shown.index)]["circuit"].unique()
    about = [_sizes(summary), f"{evaluation.metric.name} ({evaluation.metric.unit})", "bands: 95% bootstrap over facts"]
    about += [f"not shown (no edges, or undefined): {', '.join(left_out)}"] if len(left_out) else []
    figure = _titled(go.Figure(), title or "Faithfulness of circuits by size", about)
    for level, name in ((0, "empty circuit"), (1, "full model")):
        line = {"dash": "dot", "color": DARK, "width": 1}
        figure.add_hline(level, line=line, annotation_text=name, annotation_position="top left")
    bounds = [0.0, 1.0, *shown["faithfulness"]]
    by_split = dict(list(top.groupby("split", sort=False)))
    for colour, (split, rows) in zip(cycle(SPLIT_COLOURS), by_split.items(), strict=False):
        band = rows.dropna(subset=["faithfulness_low", "faithfulness_high"])
        low, high = band["faithfulness_low"], band["faithfulness_high"]
        bounds += [*low.clip(lower=-1), *high.clip(upper=2)]
        x, y = [*band["n_edges"], *band["n_edges"][::-1]], [*low, *high[::-1]]
        look = {"mode": "none", "fill": "toself", "fillcolor": colour, "opacity": 0.2, "hoverinfo": "skip"}
        figure.add_scatter(x=x, y=y, name=f"95% band, {_shown(split)}", legendgroup=split, showlegend=False, **look)
    if len(random):
        mean = random.groupby("n_edges")["faithfulness"].mean()
        look = {"mode": "lines", "line": {"color": NEUTRAL, "width": 2}, "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(x=[*mean.index], y=[*mean], name="mean of random", legendgroup="random", **look)
        look = {"mode": "markers", "marker": {"color": NEUTRAL, "size": 7}}
        _add_points(figure, random, name=f"random, {_shown(judged)}<br>(line: mean)", legendgroup="random", **look)
    for colour, (split, rows) in zip(cycle(SPLIT_COLOURS), by_split.items(), strict=False):
        look = {"mode": "lines+markers", "marker": {"size": 9}, "line": {"color": colour, "width": 2.5}}
        _add_points(figure, rows, name=f"top, {_shown(split)}", legendgroup=split, **look)
    pad = 0.08 * (max(bounds) - min(bounds))
    figure.update_xaxes(type="log", title_text="edges in the circuit", dtick=1, tickformat=",", minor_ticks="outside")
    figure.update_yaxes(title_text="faithfulness", range=[min(bounds) - pad, max(bounds) + pad])
    return figure.update_layout(width=900, height=520, hovermode="closest")


def score_distribution(scores: EdgeScores, circuit: Circuit | None = None) -> go.Figure:
    """|score| of every edge (in the scores' unit) against its rank among those of its sign; both axes are log.

    Edges that score exactly 0 are counted in the subtitle. With ``circuit``, its edges are marked.

    Raises:
        MethodError: every edge scores 0, a score is no number, or the circuit is one of another graph.
    """
    graph, unit = scores.graph, _unit(scores.provenance)
    if circuit is not None and circuit.graph != graph:
        raise MethodError(f"the circuit is one of another graph ({circuit.graph}) than the scores ({graph})")
    rows, columns = graph.edges.nonzero(as_tuple=True)
    values = scores.scores[rows, columns].double().numpy()
    _check_finite(values)
    zero, inside = int((values == 0).sum()), np.zeros(len(values), dtype=bool)
    if zero == len(values):
        raise MethodError("every edge scores 0: there is no distribution to show")
    about = [*_origin(scores.provenance), f"{len(values):,} edges", f"{zero:,} of them score 0" if zero else ""]
    if circuit is not None:
        inside = circuit.mask[rows, columns].numpy()
        about.append(f"{circuit.n_edges:,} in the circuit (circles)")
    figure = _titled(go.Figure(), "Distribution of edge scores", about)
    for sign, name, colour in ((1, "positive", POSITIVE), (-1, "negative", NEGATIVE)):
        order = np.flatnonzero(np.sign(values) == sign)
        order = order[np.argsort(-np.abs(values[order]), kind="stable")]
        kept = np.flatnonzero(inside[order])
        line = {"mode": "lines", "name": f"{name} ({len(order):,})", "line": {"color": colour, "width": 2}}
        marker = {"size": 7, "color": "rgba(255,255,255,0.6)", "line": {"color": colour, "width": 1.5}}
        circles = {"mode": "markers", "name": f"{name}, in the circuit ({len(kept):,})", "marker": marker}
        for ranks, look in ((np.arange(len(order)), line), (kept, circles)):
            ranks = ranks[_thinned(len(ranks))]
            if len(ranks):
                edges = [(graph.writers[rows[i]], graph.readers[columns[i]].name) for i in order[ranks]]
                hover = f"%{{text}}<br>rank %{{x}}: %{{y:.3g}} {unit}<extra>{name}</extra>"
                text, y = [_arrow(*edge) for edge in edges], np.abs(values[order[ranks]]).tolist()
                figure.add_scatter(x=(ranks + 1).tolist(), y=y, text=text, hovertemplate=hover, legendgroup=name, **look)
    last = np.log10(max(1, (values > 0).sum(), (values < 0).sum()))
    rank = "rank among edges of the same sign"
    figure.update_xaxes(type="log", dtick=1, title_text=rank, tickformat=",", range=[-0.15, last + 0.15])
    figure.update_yaxes(type="log", dtick=1, title_text=_with_unit("|score|", unit), exponentformat="power")
    return figure.update_layout(width=900, height=500, hovermode="closest")


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
        _with_unit("score", _unit(circuit.provenance)): top["score"],
        "share of total |score|": (top["score"].abs() / edges["score"].abs().sum()).map("{:.1%}".format),
    }
    return _table(f"Strongest edges: {len(top)} of {len(edges)}", circuit, columns)


def top_nodes_table(circuit: Circuit, n: int = 15) -> go.Figure:
    """The circuit's ``n`` nodes with the largest |score| over their edges: edges, and signed sums in their unit.

    Raises:
        MethodError: a circuit without edges or scores, or ``n`` below 1.
    """
    edges, unit = _edges(circuit, "n", n, need_scores=True), _unit(circuit.provenance)
    edges["magnitude"] = edges["score"].abs()
    into, out = edges.explode("node").groupby("node"), edges.groupby("writer")
    total = into["magnitude"].sum().add(out["magnitude"].sum(), fill_value=0.0)
    top = total.sort_values(ascending=False, kind="stable").index[:n]
    columns = {
        "node": top.to_series(),
        "edges in": into.size().reindex(top, fill_value=0),
        "edges out": out.size().reindex(top, fill_value=0),
        _with_unit("score in", unit): into["score"].sum().reindex(top),
        _with_unit("score out", unit): out["score"].sum().reindex(top),
    }
    return _table(f"Strongest nodes: {len(top)} of {len(total)}", circuit, columns)


def comparison_bars(evaluation: Evaluation, circuits: list[str] | None = None) -> go.Figure:
    """Circuits beside their random nulls, the full model and the empty circuit, on held-out facts where there are any.

    Panels: Hit@10 (share of facts), probability of the answer, its median rank (log axis), faithfulness. A null's bar
    is the mean over its draws, its whisker their range. Without ``circuits`` it is that of name "circuit", or all.

    Raises:
        MethodError: a circuit that was not evaluated, or none at all.
    """
    split = _judged_split(evaluation.summary)
    rows = evaluation.summary[evaluation.summary["split"] == split].set_index("circuit", drop=False)
    own = rows.index[~rows["kind"].isin(["full", "empty", *NULL_KINDS])].tolist()
    names = list(circuits) if circuits is not None else [name for name in own if name == "circuit"] or own
    unknown = [name for name in names if name not in rows.index]
    if unknown or not names:
        problem = f"no circuit {unknown[0]!r}" if unknown else "no circuit to compare"
        raise MethodError(f"{problem} in the evaluation: it has {', '.join(own) or 'none'}")
    bars = {"empty<br>circuit": (rows[rows["kind"] == "empty"], "#C8C8C8")}
    for name in names:
        null_name, nulls = _nulls(rows, name)
        bars[null_name] = (nulls, NEUTRAL)
        bars[html.escape(name).replace(" ", "<br>", 1)] = (rows.loc[[name]], POSITIVE)
    bars["full<br>model"] = (rows[rows["kind"] == "full"], DARK)
    bars = {label: bar for label, bar in bars.items() if len(bar[0])}
    draws = [f"random: mean and range of {n} draws" for n in {len(part) for part, _ in bars.values()} - {1}]
    metric = f"faithfulness of {evaluation.metric.name} ({evaluation.metric.unit})"
    figure = make_subplots(2, 2, subplot_titles=list(PANELS.values()), vertical_spacing=0.2, horizontal_spacing=0.08)
    _titled(figure, "Circuits against random circuits and the full model", [_sizes(rows), *draws, metric])
    hover = [_hover(part.iloc[0]) if len(part) == 1 else "" for part, _ in bars.values()]
    for i, column in enumerate(PANELS):
        at = {"row": i // 2 + 1, "col": i % 2 + 1}
        mean, low, high = np.array([part[column].agg(["mean", "min", "max"]) for part, _ in bars.values()]).T
        text = [f"{value:.3g}" if value < 1000 else f"{value:,.0f}" for value in mean]
        hints = [
            one or f"mean {m:.3g}, range {a:.3g} to {b:.3g}" for one, m, a, b in zip(hover, mean, low, high, strict=True)
        ]
        look = {"marker_color": [colour for _, colour in bars.values()], "hovertemplate": "%{hovertext}<extra></extra>"}
        figure.add_bar(x=[*bars], y=mean.tolist(), hovertext=hints, name=PANELS[column], **look, **at)
        whiskers: dict[str, Any] = {
            "x": [],
            "y": [],
            "mode": "lines",
            "line": {"color": DARK, "width": 3},
            "hoverinfo": "skip",
        }
        for k, (label, (part, _)) in enumerate(bars.items()):
            if len(part) > 1:
                whiskers["x"] += [label, label, None]
                whiskers["y"] += [low[k], high[k], None]
        figure.add_scatter(name="range", **whiskers, **at)
        caption = {"mode": "text", "textposition": "top center", "cliponaxis": False, "hoverinfo": "skip"}
        figure.add_scatter(x=[*bars], y=np.maximum(high, column == "rank_median").tolist(), text=text, **caption, **at)
        ends = np.nan_to_num([0.0, *low, *high, float(column == "hit_at_10")])
        figure.update_yaxes(range=[1.15 * min(ends), 1.15 * max(ends) or 1.0], **at)
        if column == "rank_median":
            figure.update_yaxes(type="log", range=[0, 1.15 * np.log10(max(10, *ends))], dtick=1, tickformat=",", **at)
    figure.update_xaxes(tickangle=0)
    width = max(900, 160 + 140 * len(bars))
    return figure.update_layout(width=width, height=660, margin_t=120, bargap=0.35, showlegend=False)


def _titled(figure: go.Figure, title: str, about: Iterable[str]) -> go.Figure:
    """The figure with the shared template, a title, and a subtitle of those parts that are not empty."""
    subtitle = " · ".join(html.escape(part) for part in about if part)
    return figure.update_layout(template=TEMPLATE, title={"text": html.escape(title), "subtitle": {"text": subtitle}})


def _origin(provenance: Mapping[str, Any]) -> list[str]:
    """What a subtitle says of where scores come from."""
    known = [str(provenance[key]) for key in ("model", "method", "metric") if provenance.get(key)]
    return known + ([f"n = {provenance['n_pairs']} pairs"] if "n_pairs" in provenance else [])


def _unit(provenance: Mapping[str, Any]) -> str:
    return html.escape(str(provenance.get("unit") or ""))


def _with_unit(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name


def _arrow(writer: str, reader: str) -> str:
    """An edge as shown; the reader's <q> would be taken for a tag."""
    return f"{writer} → {html.escape(reader)}"


def _check_finite(values: np.ndarray) -> None:
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise MethodError(f"{bad} of {len(values)} edges have a score that is no finite number")


def _edges(circuit: Circuit, name: str, n: int, need_scores: bool = False) -> pd.DataFrame:
    """writer, reader, score (0 without scores) and node (those the reader is an input of); largest |score| first."""
    if n < 1:
        raise MethodError(f"{name} is {n}; it must be at least 1")
    if not circuit.n_edges:
        raise MethodError("the circuit has no edges: there is nothing to show")
    edges = circuit.to_frame()
    if circuit.scores is None:
        edges["score"] = 0.0
    _check_finite(edges["score"].to_numpy())
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
        group = {"legendgroup": name, "legendgrouptitle_text": _with_unit(name, unit)}
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
    return f"<b>{_arrow(edge.writer, edge.reader)}</b>{_score(edge.score, unit)}" + (
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
                lines += [f"   {_arrow(edge.writer, edge.reader)}{_score(edge.score, unit)}" for edge in strongest]
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


def _judged_split(summary: pd.DataFrame) -> str:
    """Held-out facts where there are any, else the first split."""
    if summary.empty:
        raise MethodError("the evaluation is empty: there is nothing to show")
    splits = summary["split"].unique().tolist()
    return "held_out" if "held_out" in splits else str(splits[0])


def _shown(split: Any) -> str:
    return str(split).replace("_", "-")


def _sizes(summary: pd.DataFrame) -> str:
    """How many facts each split has."""
    return ", ".join(f"{_shown(split)} n = {n}" for split, n in summary.groupby("split", sort=False)["n"].first().items())


def _hover(row: pd.Series) -> str:
    """What a point of an evaluation says of its circuit."""
    low, high = row["faithfulness_low"], row["faithfulness_high"]
    return (
        f"<b>{html.escape(row['circuit'])}</b>, {_shown(row['split'])} (n = {row['n']})"
        f"<br>{row['n_edges']:,} edges, share {row['share']:.2%}"
        f"<br>faithfulness {row['faithfulness']:.3f}{f' [{low:.3f}, {high:.3f}]' if pd.notna(low) else ''}"
        f"<br>Hit@10 {row['hit_at_10']:.1%}<br>probability {row['probability']:.3g}"
        f"<br>median rank {row['rank_median']:g}"
    )


def _add_points(figure: go.Figure, rows: pd.DataFrame, **look: Any) -> None:
    """Faithfulness of an evaluation's rows against their number of edges."""
    look |= {"text": [_hover(row) for _, row in rows.iterrows()], "hovertemplate": "%{text}<extra></extra>"}
    figure.add_scatter(x=rows["n_edges"].tolist(), y=rows["faithfulness"].tolist(), **look)


def _nulls(rows: pd.DataFrame, name: str) -> tuple[str, pd.DataFrame]:
    """Its random ones: ``random 0.005 #1`` for ``top 0.005``, ``null #1`` for ``circuit``; else those of its size."""
    nulls, size = rows[rows["kind"].isin(NULL_KINDS)], name.partition(" ")[2]
    named = [re.sub(r"^(random|null) ?|\s*#\d+$", "", null) == size for null in nulls.index]
    if any(named) and (size or name == "circuit"):
        return f"random<br>{html.escape(size) or 'circuits'}", nulls[named]
    same_size = nulls[nulls["n_edges"] == rows["n_edges"][name]]
    return f"random<br>{rows['n_edges'][name]:,} edges", same_size


def _thinned(n: int, points: int = 500) -> np.ndarray:
    """At most ``points`` of the positions 0..n-1, evenly spread on a log axis."""
    return np.unique(np.geomspace(1, n, points).round().astype(int)) - 1 if n > points else np.arange(n)


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
    figure = _titled(go.Figure(), title, _origin(circuit.provenance))
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
