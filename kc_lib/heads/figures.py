"""Heads by what they look at, by score, by class beside random baselines, and by what the model loses without them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from kc_lib import plotting as plot
from kc_lib.components.attention import SOURCES
from kc_lib.errors import MethodError
from kc_lib.heads.ablation import HeadAblation
from kc_lib.heads.classes import HeadClasses

SOURCE_NAMES = {
    "subject": "the subject",
    "relation": "the relation's tokens",
    "first": "the first token",
    "last": "the answer position itself",
}
CLASS_LOOKS = {  # colour, symbol
    "": (plot.NEUTRAL, "circle"),
    "mover": (plot.POSITIVE, "circle"),
    "relation": ("#E69F00", "square"),
    "mixture": (plot.MLP, "diamond"),
}
SCORES = {"mover": "mover score", "relation": "relation score"}
ABLATED = {  # -> what it is, shift upwards, colour, symbol
    "heads": ("heads of the class", 0.14, plot.HEAD, "circle"),
    "random": ("random heads, mean", -0.18, plot.DARK, "diamond"),
}
ROW = 64  # px
COLUMNS = 4  # panels side by side
LABELLED = 4  # heads named per panel


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
    figure, hover = go.Figure(), "<b>a%{x}.h%{y}</b><br>%{z:.3f} of its attention<extra></extra>"
    plot.heatmap(figure, mass, hover, zmin=0, zmax=1, colorbar=plot.colour_bar("share"))
    plot.layer_axis(figure, n_layers, showgrid=False, ticks="")
    figure.update_yaxes(title_text="head", dtick=1, showgrid=False, ticks="")
    size = {"width": max(620, 190 + 26 * n_layers), "height": 190 + 26 * n_heads}
    return plot.titled(figure, title or f"Attention to {SOURCE_NAMES[source]}, from the answer position", about, **size)


def head_class_figure(classes: HeadClasses, title: str | None = None) -> go.Figure:
    """Mover and relation score of every head, layers left to right, beside the 99th percentile of its random baseline.

    Classified heads have their class's colour and their name; all names are in the hover.

    Raises:
        MethodError: no heads.
    """
    heads = classes.heads
    if heads.empty:
        raise MethodError("there are no heads to show")
    last, n_heads = int(heads["layer"].max()), int(heads["head"].max()) + 1
    heads = heads.assign(x=heads["layer"] + (heads["head"] - (n_heads - 1) / 2) / (1.25 * n_heads))
    figure = plot.panels(list(SCORES.values()), 1, size=14, shared_xaxes=True, vertical_spacing=0.09)
    figure.update_annotations(x=0, xanchor="left")
    for row, score in enumerate(SCORES, start=1):
        at: dict[str, Any] = {"row": row, "col": 1}
        tick = {"symbol": "line-ew-open", "size": 7, "name": "99th percentile of the random baseline", "meta": "null"}
        null = heads[f"{score}_null_99"]
        plot.points(figure, heads["x"], null, "#B5B5B5", None, showlegend=row == 1, **tick, **at)
        for name, (colour, symbol) in CLASS_LOOKS.items():
            of_class = heads[heads["class"] == name]
            look: dict[str, Any] = {"size": 6 if name else 4, "opacity": 1.0 if name else 0.6, "cliponaxis": False}
            if name in (score, "mixture"):
                sides = ["middle left" if x > last / 2 else "middle right" for x in of_class["x"]]
                names = [f" a{head.layer}.h{head.head} " for head in of_class.itertuples()]
                look |= {"size": 10, "mode": "markers+text", "text": names, "textposition": sides}
                look |= {"textfont": {"size": 12, "color": colour}}
            look |= {"symbol": symbol, "name": name or "no class", "legendgroup": name or "none", "meta": name or "none"}
            hover = [_head_hover(head, score) for head in of_class.to_dict("records")]
            in_legend = row == 1 and len(of_class) > 0
            plot.points(figure, of_class["x"], of_class[f"{score}_score"], colour, hover, showlegend=in_legend, **look, **at)
    plot.layer_axis(figure, last + 1, range=[-0.7, last + 0.7], showgrid=False, title_text="")
    figure.update_xaxes(title_text="layer (its heads side by side)", row=2)
    figure.update_yaxes(rangemode="tozero")
    about = [
        *plot.origin(classes.provenance),
        "grey ticks: 99th percentile of the head's random baseline",
        _criterion(classes),
    ]
    size = {"width": 960, "height": 680, "margin": {"t": 110, "b": 110}, "legend": plot.below(0.14)}
    return plot.titled(figure, title or "Classes of heads", about, **size)


def ablation_figure(ablations: Mapping[str, HeadAblation], title: str | None = None, seed: int = 0) -> go.Figure:
    """What the metric loses without the heads of each class, beside as many random heads of the same layers.

    Every random set is a dot; both means have their 95% interval over facts, and p is the share of sets that cost as much.

    Raises:
        MethodError: ablations of several metrics.
    """
    title = title or "What the model loses without the heads"
    metrics = sorted({ablation.metric for ablation in ablations.values()})
    if not metrics:
        return plot.empty("no class has heads: there is nothing to ablate", title)
    if len(metrics) > 1:
        raise MethodError(f"ablations by {', '.join(metrics)} have no common axis")
    figure, ticks = go.Figure(), []
    for place, (name, ablation) in enumerate(reversed(list(ablations.items()))):
        summary = {row["ablated"]: row for row in ablation.summary(seed).to_dict("records")}
        drops = ablation.values.rsub(ablation.values["full"], axis=0).drop(columns=["full", "heads"]).mean().tolist()
        spread = place - 0.18 + 0.07 * (2 * (np.arange(len(drops)) * 0.618034 % 1.0) - 1)
        hover = [f"{html.escape(name)}, random set<br>drop {plot.number(drop, 3)}" for drop in drops]
        dots = {"size": 5, "opacity": 0.5, "showlegend": False, "meta": "draws"}
        plot.points(figure, drops, spread, plot.NEUTRAL, hover, **dots)
        for ablated, (label, shift, colour, symbol) in ABLATED.items():
            row = summary[ablated]
            hover = [f"<b>{html.escape(name)}</b>, {label}<br>drop {plot.figure_text(row, 'drop', 3)}"]
            look = {"symbol": symbol, "size": 11, "error_x": plot.whiskers([row], "drop") | {"color": colour}}
            look |= {"name": label, "legendgroup": label, "showlegend": place == len(ablations) - 1, "meta": ablated}
            plot.points(figure, [row["drop"]], [place + shift], colour, hover, **look)
        heads = summary["heads"]
        against = f"{plot.figure_text(summary['more'], 'drop')} more, p = {plot.number(heads['p'])}"
        beside = {"xref": "x domain", "x": 1.01, "xanchor": "left", "showarrow": False, "font_size": 12}
        figure.add_annotation(y=place, text=against, **beside)
        ticks.append(f"<b>{html.escape(name)}</b><br>{heads['n_heads']} heads, n = {heads['n_facts']} facts")
    plot.level_lines(figure, "x", 0)
    figure.update_xaxes(title_text=f"drop in {metrics[0].replace('_', ' ')}")
    axis = {"tickvals": list(range(len(ticks))), "ticktext": ticks, "range": [-0.55, len(ticks) - 0.45]}
    figure.update_yaxes(**axis, showgrid=False)
    height = ROW * len(ticks) + 60
    about = [f"whiskers: {plot.OVER_FACTS}", "small dots: random sets of as many heads of the same layers"]
    size = {"width": 960, "height": 200 + height, "margin": {"r": 215, "b": 110}, "legend": plot.below(70 / height)}
    return plot.titled(figure, title, about, **size)


def head_score_grid(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """One panel per score, layers by heads; heads that pass are ringed, the best of them named.

    ``frame`` is ``GeneralHeadScores.to_frame()``. Colours run from 0 to the panel's largest score: what counts as high
    differs between scores, so each panel's subtitle gives its threshold.

    Example:
        >>> kc.head_score_grid(kc.head_scores(model).to_frame())
    """
    if frame.empty:
        return plot.empty("no head score is asked for, or none is defined for the model", title or "General head scores")
    by_name = {str(name): rows for name, rows in frame.groupby("name", sort=False)}
    n_rows = -(-len(by_name) // COLUMNS)
    texts = [
        f"{name.replace('_', ' ')}: {int(rows['passes'].sum())} pass (> {rows['threshold'].iloc[0]:g})"
        for name, rows in by_name.items()
    ]
    spacing: dict[str, Any] = {"horizontal_spacing": 0.05, "vertical_spacing": 0.22 / n_rows}
    figure = plot.panels(texts, COLUMNS, size=12, shared_xaxes=True, **spacing)
    for i, (name, rows) in enumerate(by_name.items()):
        at: dict[str, Any] = plot.place(i, COLUMNS)
        values = rows.pivot(index="head", columns="layer", values="score").clip(lower=0)
        hover = f"{name}<br>a%{{x}}.h%{{y}}: %{{z:.3f}}<extra></extra>"
        plot.heatmap(figure, values, hover, zmin=0, showscale=False, **at)
        passing = rows[rows["passes"].astype(bool)].sort_values("score", ascending=False)
        names = [f"a{head.layer}.h{head.head}" if n < LABELLED else "" for n, head in enumerate(passing.itertuples())]
        ring: dict[str, Any] = {"symbol": "circle-open", "outline": {"width": 1.5}, "mode": "markers+text", "text": names}
        ring |= {"textposition": "top center", "textfont": {"size": 10}, "showlegend": False}
        plot.points(figure, passing["layer"], passing["head"], plot.DARK, None, **ring, **at)
    figure.update_xaxes(range=[-0.5, frame["layer"].max() + 0.5]).update_yaxes(range=[-0.5, frame["head"].max() + 0.9])
    figure.update_xaxes(title_text="layer", row=n_rows).update_yaxes(title_text="head", col=1)
    about = ["rings: heads above the threshold and above what chance gives", "colour from 0 to the panel's largest score"]
    return plot.titled(figure, title or "General head scores", about, height=130 + 230 * n_rows, width=1150)


def recurrence_figure(classes: Mapping[str, Sequence[tuple[int, int]]], title: str | None = None) -> go.Figure:
    """Which heads are of a class in which relations: heads (by how often, then layer) over relations."""
    heads = sorted({head for of_class in classes.values() for head in of_class})
    if not heads:
        return plot.empty("no relation has a head of the class", title or "Heads over relations")
    member = np.array([[head in of_class for head in heads] for of_class in classes.values()])
    order = np.argsort(-member.sum(0), kind="stable")
    names = [f"a{heads[i][0]}.h{heads[i][1]}" for i in order]
    cells = pd.DataFrame(member[:, order].astype(float), index=list(classes), columns=names)
    figure = go.Figure()
    plot.heatmap(figure, cells, "%{x} in %{y}<extra></extra>", zmin=0, zmax=1.4, showscale=False)
    figure.update_yaxes(autorange="reversed", title_text="relation")
    figure.update_xaxes(title_text="head, those of most relations first", type="category", tickangle=-45)
    size = {"height": 170 + 32 * len(classes), "width": max(560, 190 + 34 * len(names))}
    about = [f"{len(heads)} heads, {len(classes)} relations"]
    return plot.titled(figure, title or "Heads over relations", about, **size)


def _criterion(classes: HeadClasses) -> str:
    level, attention = classes.provenance.get("level"), classes.provenance.get("least_attention")
    known = level is not None and attention is not None
    return f"classified: corrected p at most {level:g}, attention at least {attention:g}" if known else ""


def _head_hover(head: plot.Row, score: str) -> str:
    return (
        f"<b>a{head['layer']}.h{head['head']}</b> {head['class'] or 'no class'}"
        f"<br>{SCORES[score]} {head[f'{score}_score']:.4f} (random baseline's 99%: {head[f'{score}_null_99']:.4f})"
        f"<br>corrected p {head[f'{score}_p']:.2g}"
        f"<br>attention: subject {head['subject']:.2f}, relation {head['relation_tokens']:.2f}"
        f"<br>adds {head['contribution']:+.2f} logits to the answer"
    )
