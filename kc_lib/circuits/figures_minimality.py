"""What every sampled edge of a circuit is worth: drops in faithfulness, beside those of edges that nobody selected."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kc_lib.circuits.minimality import Minimality
from kc_lib.errors import MethodError
from kc_lib.plotting import (
    DARK,
    NEGATIVE,
    NEUTRAL,
    OVER_FACTS,
    POSITIVE,
    Row,
    arrow,
    figure_text,
    marks,
    shown_split,
    titled,
    undefined_on,
    whiskers,
)

OUTCOMES = {  # of taking an edge out -> colour and symbol
    "needed: interval above 0": (POSITIVE, "circle"),
    "works against the answer: below 0": (NEGATIVE, "diamond"),
    "not told from 0": (NEUTRAL, "circle-open"),
}
ROW = 270  # px


def minimality_figure(minimality: Minimality, title: str | None = None, n_labels: int = 3) -> go.Figure:
    """Drop in faithfulness for every sampled edge, largest first, with its interval: of the circuit, and null edges.

    One row per split. The ``n_labels`` largest drops of circuit edges are labelled, all names are in the hover.

    Raises:
        MethodError: no sampled edges, or no drop that is defined.
    """
    edges = minimality.edges.dropna(subset=["drop"]) if len(minimality.edges) else minimality.edges
    if edges.empty:
        raise MethodError("the minimality has no edge with a defined drop: there is nothing to show")
    summary = {(row["split"], row["kind"]): row for row in minimality.summary.to_dict("records")}
    splits, kinds = edges["split"].unique().tolist(), edges["kind"].unique().tolist()
    names = [_sample_text(summary[split, kind]) for split in splits for kind in kinds]
    spacing = {"horizontal_spacing": 0.03, "vertical_spacing": 0.2 / len(splits)}
    figure = make_subplots(len(splits), len(kinds), shared_yaxes=True, subplot_titles=names, **spacing)
    figure.update_annotations(font_size=13)
    left_out = undefined_on([split for split in minimality.summary["split"].unique() if split not in splits])
    about = [f"whiskers: {OVER_FACTS}", "null edges join nodes of the circuit and were not selected", left_out]
    titled(figure, title or "What taking out one edge does", about)
    for i, split in enumerate(splits):
        for j, kind in enumerate(kinds):
            own = edges[(edges["split"] == split) & (edges["kind"] == kind)]
            own = own.sort_values("drop", ascending=False, kind="stable").reset_index(drop=True)
            _add_edges(figure, own, kind, row=i + 1, col=j + 1)
            if kind == "circuit":
                _label_edges(figure, own, n_labels, row=i + 1, col=j + 1)
    seen: set[str] = set()
    for trace in figure.data:
        trace.showlegend = trace.name not in seen
        seen.add(trace.name)
    figure.add_hline(0, line={"color": DARK, "width": 1, "dash": "dot"})
    figure.update_xaxes(showticklabels=False, ticks="", showgrid=False)
    figure.update_xaxes(title_text="sampled edges, largest drop first", row=len(splits))
    figure.update_yaxes(ticks="")
    figure.update_yaxes(title_text="drop in faithfulness", ticks="outside", col=1)
    height = ROW * len(splits)
    legend = {"orientation": "h", "x": 0, "y": -70 / (height - 40), "yanchor": "top"}
    return figure.update_layout(width=960, height=170 + height, margin={"t": 115, "b": 95}, legend=legend)


def _add_edges(figure: go.Figure, edges: pd.DataFrame, kind: str, **at: int) -> None:
    """Edges in their order, by what taking them out does."""
    outcome = np.select([edges["drop_low"] > 0, edges["drop_high"] < 0], list(OUTCOMES)[:2], list(OUTCOMES)[2])
    for name, (colour, symbol) in OUTCOMES.items():
        part = edges[outcome == name]
        if len(part):
            rows = part.to_dict("records")
            error = whiskers(rows, "drop") | {"width": 0, "color": colour}
            look = marks([_edge_hover(row) for row in rows], colour, symbol, 7) | {"error_y": error, "legendgroup": name}
            x, y = (part.index + 1).tolist(), part["drop"].tolist()
            figure.add_scatter(x=x, y=y, name=name, meta=kind, **look, **at)
    figure.update_xaxes(range=[0, len(edges) + 1], **at)


def _label_edges(figure: go.Figure, edges: pd.DataFrame, n_labels: int, **at: int) -> None:
    """Names of the first edges, with a line to each, at the upper right, where sorted drops leave room."""
    ends = edges[["drop", "drop_low", "drop_high"]].to_numpy(dtype=float)
    low, high = np.nanmin(ends), np.nanmax(ends)
    line = {"arrowhead": 0, "arrowwidth": 1, "arrowcolor": NEUTRAL, "standoff": 5}
    panel = next(figure.select_traces(**at))
    refs = {"axref": panel.xaxis, "ayref": panel.yaxis}
    for place, edge in enumerate(edges.head(n_labels).to_dict("records")):
        end = {"ax": 0.4 * len(edges) + 1, "ay": high - 0.12 * place * (high - low)} | refs
        text = {"text": arrow(edge["writer"], edge["reader"]), "xanchor": "left", "font_size": 12}
        figure.add_annotation(x=place + 1, y=edge["drop"], **text, **end, **line, **at)


def _sample_text(about: Row) -> str:
    """What stands above a panel of sampled edges: how many of how many, and how many make a difference."""
    sample = f"{about['n_sampled']} of {about['n_edges']:,} {about['kind']} edges"
    if pd.notna(about["share"]):
        sample += f": {about['share'] * about['n_sampled']:.0f} differ from 0"
    return f"{shown_split(about['split'])} (n = {about['n']} facts), {sample}"


def _edge_hover(edge: Row) -> str:
    name, drop = arrow(edge["writer"], edge["reader"]), figure_text(edge, "drop", 4)
    return f"<b>{name}</b><br>drop {drop}<br>{edge['relative']:.1%} of the circuit's faithfulness"
