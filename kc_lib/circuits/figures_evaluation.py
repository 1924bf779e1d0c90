"""Circuits on facts: faithfulness by size, and circuits beside random ones and the whole model."""

from __future__ import annotations

import html
import re
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kc_lib.circuits.evaluate import Evaluation
from kc_lib.errors import MethodError
from kc_lib.plotting import (
    DARK,
    NEUTRAL,
    POSITIVE,
    SPLIT_COLOURS,
    circuit_hover,
    faithfulness_range,
    judged_split,
    shown_split,
    sizes,
    titled,
)

NULL_KINDS = ("random", "null")
PANELS = {
    "hit_at_10": "Hit@10 (share of facts)",
    "probability": "probability of the answer",
    "rank_median": "median rank of the answer (lower is better)",
    "faithfulness": "faithfulness",
}


def faithfulness_figure(evaluation: Evaluation, title: str | None = None) -> go.Figure:
    """Faithfulness (0 is the empty circuit, 1 the full model) against the number of edges, on a log axis.

    One line with its 95% band per split for the circuits of kind "top"; random circuits of the same sizes, with the
    line of their mean, are grey, on the held-out split where there is one.

    Raises:
        MethodError: no "top" circuit has edges and a faithfulness.
    """
    summary, judged = evaluation.summary, judged_split(evaluation.summary)
    shown = summary[(summary["n_edges"] > 0) & summary["faithfulness"].notna()].sort_values(["n_edges", "circuit"])
    top = shown[shown["kind"] == "top"]
    random = shown[(shown["kind"] == "random") & (shown["split"] == judged)]
    if top.empty:
        raise MethodError("the evaluation has no 'top' circuit with edges and a defined faithfulness to show")
    left_out = summary[(summary["kind"] == "top") & ~summary.index.isin(shown.index)]["circuit"].unique()
    about = [sizes(summary), f"{evaluation.metric.name} ({evaluation.metric.unit})", "bands: 95% bootstrap over facts"]
    about += [f"not shown (no edges, or undefined): {', '.join(left_out)}"] if len(left_out) else []
    figure = titled(go.Figure(), title or "Faithfulness of circuits by size", about)
    for level, name in ((0, "empty circuit"), (1, "full model")):
        line = {"dash": "dot", "color": DARK, "width": 1}
        figure.add_hline(level, line=line, annotation_text=name, annotation_position="top left")
    by_split = dict(list(top.groupby("split", sort=False)))
    for colour, (split, rows) in zip(cycle(SPLIT_COLOURS), by_split.items(), strict=False):
        band = rows.dropna(subset=["faithfulness_low", "faithfulness_high"])
        low, high = band["faithfulness_low"], band["faithfulness_high"]
        x, y = [*band["n_edges"], *band["n_edges"][::-1]], [*low, *high[::-1]]
        look = {"mode": "none", "fill": "toself", "fillcolor": colour, "opacity": 0.2, "hoverinfo": "skip"}
        figure.add_scatter(x=x, y=y, name=f"95% band, {shown_split(split)}", legendgroup=split, showlegend=False, **look)
    if len(random):
        mean = random.groupby("n_edges")["faithfulness"].mean()
        look = {"mode": "lines", "line": {"color": NEUTRAL, "width": 2}, "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(x=[*mean.index], y=[*mean], name="mean of random", legendgroup="random", **look)
        look = {"mode": "markers", "marker": {"color": NEUTRAL, "size": 7}}
        _add_points(figure, random, name=f"random, {shown_split(judged)}<br>(line: mean)", legendgroup="random", **look)
    for colour, (split, rows) in zip(cycle(SPLIT_COLOURS), by_split.items(), strict=False):
        look = {"mode": "lines+markers", "marker": {"size": 9}, "line": {"color": colour, "width": 2.5}}
        _add_points(figure, rows, name=f"top, {shown_split(split)}", legendgroup=split, **look)
    figure.update_xaxes(type="log", title_text="edges in the circuit", dtick=1, tickformat=",", minor_ticks="outside")
    figure.update_yaxes(title_text="faithfulness", range=faithfulness_range(shown, top))
    return figure.update_layout(width=900, height=520, hovermode="closest")


def comparison_bars(evaluation: Evaluation, circuits: list[str] | None = None) -> go.Figure:
    """Circuits beside their random nulls, the full model and the empty circuit, on held-out facts where there are any.

    Panels: Hit@10 (share of facts), probability of the answer, its median rank (log axis), faithfulness. A null's bar
    is the mean over its draws, its whisker their range. Without ``circuits`` it is that of name "circuit", or all.

    Raises:
        MethodError: a circuit that was not evaluated, or none at all.
    """
    split = judged_split(evaluation.summary)
    rows = evaluation.summary[evaluation.summary["split"] == split].set_index("circuit", drop=False)
    others = rows["kind"].isin(["full", "empty", *NULL_KINDS, "profile null"]) | rows["kind"].str.startswith("without ")
    own = rows.index[~others].tolist()
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
    titled(figure, "Circuits against random circuits and the full model", [sizes(rows), *draws, metric])
    hover = [circuit_hover(part.iloc[0]) if len(part) == 1 else "" for part, _ in bars.values()]
    for i, column in enumerate(PANELS):
        at = {"row": i // 2 + 1, "col": i % 2 + 1}
        mean, low, high = np.array([part[column].agg(["mean", "min", "max"]) for part, _ in bars.values()]).T
        text = [f"{round(value, 6) + 0.0:.3g}" if value < 1000 else f"{value:,.0f}" for value in mean]
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


def _add_points(figure: go.Figure, rows: pd.DataFrame, **look: Any) -> None:
    """Faithfulness of an evaluation's rows against their number of edges."""
    look |= {"text": [circuit_hover(row) for _, row in rows.iterrows()], "hovertemplate": "%{text}<extra></extra>"}
    figure.add_scatter(x=rows["n_edges"].tolist(), y=rows["faithfulness"].tolist(), **look)


def _nulls(rows: pd.DataFrame, name: str) -> tuple[str, pd.DataFrame]:
    """Its random ones: ``random 0.005 #1`` for ``top 0.005``, ``null #1`` for ``circuit``; else those of its size."""
    nulls, size = rows[rows["kind"].isin(NULL_KINDS)], name.partition(" ")[2]
    named = [re.sub(r"^(random|null) ?|\s*#\d+$", "", null) == size for null in nulls.index]
    if any(named) and (size or name == "circuit"):
        return f"random<br>{html.escape(size) or 'circuits'}", nulls[named]
    same_size = nulls[nulls["n_edges"] == rows["n_edges"][name]]
    return f"random<br>{rows['n_edges'][name]:,} edges", same_size
