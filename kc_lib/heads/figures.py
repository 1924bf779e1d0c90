"""Heads by what they look at, by class beside the classes' nulls, and by what the model loses without them."""

from __future__ import annotations

import html
from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kc_lib.components.attention import SOURCES
from kc_lib.errors import MethodError
from kc_lib.heads.ablation import HeadAblation
from kc_lib.heads.classes import HeadClasses
from kc_lib.plotting import (
    DARK,
    HEAD,
    MLP,
    NEUTRAL,
    OVER_FACTS,
    POSITIVE,
    SHADES,
    Row,
    figure_text,
    marks,
    number,
    origin,
    titled,
    whiskers,
)

SOURCE_NAMES = {
    "subject": "the subject",
    "relation": "the relation's tokens",
    "first": "the first token",
    "last": "the answer position itself",
}
CLASS_LOOKS = {  # colour, symbol
    "mover": (POSITIVE, "circle"),
    "relation": ("#E69F00", "square"),
    "mixture": (MLP, "diamond"),
}
SCORES = {"mover": "mover score", "relation": "relation score"}
ROW = 64  # px


def attention_sources_heatmap(frame: pd.DataFrame, source: str, title: str | None = None) -> go.Figure:
    """Attention from the answer position to one of ``SOURCES``, every head by layer: shares from 0 to 1.

    ``frame`` is what ``sources_frame`` returns.

    Raises:
        MethodError: an unknown source.
    """
    if source not in SOURCES:
        raise MethodError(f"unknown source {source!r}: use one of {', '.join(SOURCES)}")
    mass = frame.pivot(index="head", columns="layer", values=source)
    n_heads, n_layers = mass.shape
    best = frame.sort_values(source).iloc[-1]
    about = [f"most: a{best['layer']:.0f}.h{best['head']:.0f} with {best[source]:.2f}", "mean over facts"]
    figure = titled(go.Figure(), title or f"Attention to {SOURCE_NAMES[source]}, from the answer position", about)
    figure.add_heatmap(
        z=mass.to_numpy().tolist(),
        x=mass.columns.tolist(),
        y=mass.index.tolist(),
        zmin=0,
        zmax=1,
        colorscale=SHADES,
        xgap=1,
        ygap=1,
        hovertemplate="<b>a%{x}.h%{y}</b><br>%{z:.3f} of its attention<extra></extra>",
        colorbar={"title": "share", "thickness": 14, "outlinewidth": 0},
    )
    figure.update_xaxes(title_text="layer", dtick=max(1, n_layers // 15), showgrid=False, ticks="")
    figure.update_yaxes(title_text="head", dtick=1, showgrid=False, ticks="")
    return figure.update_layout(width=max(620, 190 + 26 * n_layers), height=190 + 26 * n_heads)


def head_class_figure(classes: HeadClasses, title: str | None = None) -> go.Figure:
    """Mover and relation score of every head, layers left to right, beside the 99th percentile of its own null (grey tick).

    Classified heads have their class's colour and their name; all names are in the hover.

    Raises:
        MethodError: no heads.
    """
    heads = classes.heads
    if heads.empty:
        raise MethodError("there are no heads to show")
    last, n_heads = int(heads["layer"].max()), int(heads["head"].max()) + 1
    heads = heads.assign(x=heads["layer"] + (heads["head"] - (n_heads - 1) / 2) / (1.25 * n_heads))
    about = [*origin(classes.provenance), "grey ticks: 99th percentile of the head's null", _criterion(classes)]
    figure = make_subplots(2, 1, shared_xaxes=True, subplot_titles=list(SCORES.values()), vertical_spacing=0.09)
    figure.update_annotations(font_size=14, x=0, xanchor="left")
    titled(figure, title or "Classes of heads", about)
    for row, score in enumerate(SCORES, start=1):
        column, null = f"{score}_score", f"{score}_null_99"
        at = {"row": row, "col": 1}
        tick = {"color": "#B5B5B5", "symbol": "line-ew-open", "size": 7}
        look = {"mode": "markers", "marker": tick, "hoverinfo": "skip", "name": "99th percentile of the null"}
        figure.add_scatter(x=heads["x"].tolist(), y=heads[null].tolist(), meta="null", showlegend=row == 1, **look, **at)
        for name, (colour, symbol) in {"": (NEUTRAL, "circle"), **CLASS_LOOKS}.items():
            own = heads[heads["class"] == name]
            text = [_head_hover(head, score) for head in own.to_dict("records")]
            named = name in (score, "mixture")
            look = marks(text, colour, symbol, 10 if named else 6 if name else 4, 1.0 if name else 0.6) | {
                "cliponaxis": False
            }
            if named:
                sides = ["middle left" if x > last / 2 else "middle right" for x in own["x"]]
                names = [f" a{head.layer}.h{head.head} " for head in own.itertuples()]
                look |= {
                    "mode": "markers+text",
                    "text": names,
                    "textposition": sides,
                    "textfont": {"size": 12, "color": colour},
                }
            legend = {"name": name or "no class", "legendgroup": name or "none", "showlegend": row == 1 and len(own) > 0}
            figure.add_scatter(x=own["x"].tolist(), y=own[column].tolist(), meta=name or "none", **legend, **look, **at)
    figure.update_xaxes(dtick=max(1, (last + 1) // 15), range=[-0.7, last + 0.7], showgrid=False)
    figure.update_xaxes(title_text="layer (its heads side by side)", row=2)
    figure.update_yaxes(rangemode="tozero")
    legend = {"orientation": "h", "x": 0, "y": -0.14, "yanchor": "top"}
    return figure.update_layout(width=960, height=680, margin={"t": 110, "b": 110}, legend=legend)


def ablation_figure(ablations: Mapping[str, HeadAblation], title: str | None = None, seed: int = 0) -> go.Figure:
    """What the metric loses without the heads of each class, beside as many random heads of the same layers.

    Every random set is a dot; both means have their 95% interval over facts, and p is the share of sets that cost as much.

    Raises:
        MethodError: no ablations, or of several metrics.
    """
    metrics = sorted({ablation.metric for ablation in ablations.values()})
    if len(metrics) != 1:
        raise MethodError(
            f"ablations by {', '.join(metrics)} have no common axis" if metrics else "there are no ablations to show"
        )
    about = [f"whiskers: {OVER_FACTS}", "small dots: random sets of as many heads of the same layers"]
    figure = titled(go.Figure(), title or "What the model loses without the heads", about)
    ticks = {}
    for place, (name, ablation) in enumerate(reversed(list(ablations.items()))):
        summary = {row["ablated"]: row for row in ablation.summary(seed).to_dict("records")}
        own, null = summary["heads"], summary["random"]
        values = ablation.values
        draws = [float((values["full"] - values[column]).mean()) for column in values if column not in ("full", "heads")]
        spread = place - 0.18 + 0.07 * (2 * (np.arange(len(draws)) * 0.618034 % 1.0) - 1)
        shown = place == len(ablations) - 1
        text = [f"{html.escape(name)}, random set<br>drop {number(draw, 3)}" for draw in draws]
        dots = marks(text, NEUTRAL, size=5, opacity=0.5) | {"showlegend": False, "meta": "draws"}
        figure.add_scatter(x=draws, y=spread.tolist(), **dots)
        for row, label, shift, colour, symbol in (
            (own, "heads of the class", 0.14, HEAD, "circle"),
            (null, "random heads, mean", -0.18, DARK, "diamond"),
        ):
            hover = f"<b>{html.escape(name)}</b>, {label}<br>drop {figure_text(row, 'drop', 3)}"
            look = marks([hover], colour, symbol, 11) | {"error_x": whiskers([row], "drop") | {"color": colour}}
            group = {"name": label, "legendgroup": label, "showlegend": shown, "meta": row["ablated"]}
            figure.add_scatter(x=[row["drop"]], y=[place + shift], **group, **look)
        against = f"{figure_text(summary['more'], 'drop')} more, p = {number(own['p'])}"
        beside = {"xref": "x domain", "x": 1.01, "xanchor": "left", "showarrow": False, "font_size": 12}
        figure.add_annotation(y=place, text=against, **beside)
        ticks[place] = f"<b>{html.escape(name)}</b><br>{own['n_heads']} heads, n = {own['n_facts']} facts"
    figure.add_vline(0, line={"color": DARK, "width": 1, "dash": "dot"})
    figure.update_xaxes(title_text=f"drop in {metrics[0].replace('_', ' ')}")
    figure.update_yaxes(
        tickvals=list(ticks), ticktext=list(ticks.values()), range=[-0.55, len(ticks) - 0.45], showgrid=False
    )
    height = ROW * len(ticks) + 60
    legend = {"orientation": "h", "x": 0, "y": -70 / height, "yanchor": "top"}
    return figure.update_layout(width=960, height=200 + height, margin={"r": 215, "b": 110}, legend=legend)


def _criterion(classes: HeadClasses) -> str:
    about = classes.provenance
    if not {"level", "least_attention"} <= set(about):
        return ""
    return f"classified: corrected p at most {about['level']:g}, attention at least {about['least_attention']:g}"


def _head_hover(head: Row, score: str) -> str:
    return (
        f"<b>a{head['layer']}.h{head['head']}</b> {head['class'] or 'no class'}"
        f"<br>{SCORES[score]} {head[f'{score}_score']:.4f} (null's 99%: {head[f'{score}_null_99']:.4f})"
        f"<br>corrected p {head[f'{score}_p']:.2g}"
        f"<br>attention: subject {head['subject']:.2f}, relation {head['relation_tokens']:.2f}"
        f"<br>adds {head['contribution']:+.2f} logits to the answer"
    )
