"""Figures of head scores: every score over layers and heads, and which heads recur over relations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kc_lib.errors import MethodError
from kc_lib.plotting import DARK, POSITIVE, titled

COLUMNS = 4  # panels side by side
LABELLED = 4  # heads named per panel
ONE_SIGN = [[0.0, "#FFFFFF"], [1.0, POSITIVE]]


def head_score_grid(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """One panel per score, layers by heads; heads that pass are ringed, the best of them named.

    ``frame`` is ``GeneralHeadScores.to_frame()``. Colours run from 0 to the panel's largest score: what counts as high
    differs between scores, so each panel's subtitle gives its threshold.

    Raises:
        MethodError: no scores.
    """
    if frame.empty:
        raise MethodError("there are no head scores to show: none is defined for the model")
    names = frame["name"].unique().tolist()
    n_rows = -(-len(names) // COLUMNS)
    texts = []
    for name in names:
        own = frame[frame["name"] == name]
        texts.append(f"{name.replace('_', ' ')}: {int(own['passes'].sum())} pass (> {own['threshold'].iloc[0]:g})")
    spacing = {"horizontal_spacing": 0.05, "vertical_spacing": 0.22 / n_rows}
    figure = make_subplots(n_rows, COLUMNS, subplot_titles=texts, shared_xaxes=True, **spacing)
    figure.update_annotations(font_size=12)
    for i, name in enumerate(names):
        row, column = divmod(i, COLUMNS)
        own = frame[frame["name"] == name]
        values = own.pivot(index="head", columns="layer", values="score")
        hover = f"{name}<br>a%{{x}}.h%{{y}}: %{{z:.3f}}<extra></extra>"
        heatmap = go.Heatmap(
            z=values.to_numpy().clip(min=0), x=values.columns, y=values.index, colorscale=ONE_SIGN, zmin=0, showscale=False
        )
        figure.add_trace(heatmap.update(hovertemplate=hover), row + 1, column + 1)
        passing = own[own["passes"].astype(bool)].sort_values("score", ascending=False)
        labels = [f"a{r.layer}.h{r.head}" if n < LABELLED else "" for n, r in enumerate(passing.itertuples())]
        ring = {"symbol": "circle-open", "size": 8, "color": DARK, "line": {"width": 1.5}}
        figure.add_trace(
            go.Scatter(
                x=passing["layer"],
                y=passing["head"],
                mode="markers+text",
                text=labels,
                textposition="top center",
                textfont={"size": 10},
                marker=ring,
                hoverinfo="skip",
                showlegend=False,
            ),
            row + 1,
            column + 1,
        )
    figure.update_xaxes(range=[-0.5, frame["layer"].max() + 0.5])
    figure.update_yaxes(range=[-0.5, frame["head"].max() + 0.9])
    for column in range(1, COLUMNS + 1):
        figure.update_xaxes(title_text="layer", row=n_rows, col=column)
    for row in range(1, n_rows + 1):
        figure.update_yaxes(title_text="head", row=row, col=1)
    figure.update_layout(height=130 + 230 * n_rows, width=1150)
    about = ["rings: heads above the threshold and above what chance gives", "colour from 0 to the panel's largest score"]
    return titled(figure, title or "General head scores", about)


def recurrence_figure(classes: Mapping[str, Sequence[tuple[int, int]]], title: str | None = None) -> go.Figure:
    """Which heads are of a class in which relations: heads (by how often, then layer) over relations.

    Raises:
        MethodError: no relation, or no head in any.
    """
    heads = sorted({head for own in classes.values() for head in own})
    if not heads:
        raise MethodError("no relation has a head of the class: there is nothing to show")
    member = np.array([[head in own for head in heads] for own in classes.values()])
    order = np.argsort(-member.sum(0), kind="stable")
    names = [f"a{heads[i][0]}.h{heads[i][1]}" for i in order]
    figure = go.Figure(
        go.Heatmap(
            z=member[:, order].astype(float),
            x=names,
            y=list(classes),
            colorscale=ONE_SIGN,
            zmin=0,
            zmax=1.4,
            xgap=2,
            ygap=2,
            showscale=False,
            hovertemplate="%{x} in %{y}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", title_text="relation")
    figure.update_xaxes(title_text="head, those of most relations first", type="category", tickangle=-45)
    figure.update_layout(height=170 + 32 * len(classes), width=max(560, 190 + 34 * len(names)))
    return titled(figure, title or "Heads over relations", [f"{len(heads)} heads, {len(classes)} relations"])
