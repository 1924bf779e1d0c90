"""What all figures share: one template, one set of colours, titles that say units and n, and how results are named."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from kc_lib.errors import MethodError

POSITIVE, NEGATIVE, NEUTRAL, DARK = "#0072B2", "#D55E00", "#8A8A8A", "#222222"
HEAD, MLP = "#009E73", "#B0578D"
SIGNED_SCALE = [[0.0, NEGATIVE], [0.5, "#FFFFFF"], [1.0, POSITIVE]]  # centre it on zero
SPLIT_COLOURS = (POSITIVE, "#E69F00", HEAD, MLP)
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


def titled(figure: go.Figure, title: str, about: Iterable[str]) -> go.Figure:
    """The figure with the shared template, a title, and a subtitle of those parts that are not empty."""
    subtitle = " · ".join(html.escape(part) for part in about if part)
    return figure.update_layout(template=TEMPLATE, title={"text": html.escape(title), "subtitle": {"text": subtitle}})


def origin(provenance: Mapping[str, Any]) -> list[str]:
    """What a subtitle says of where scores come from."""
    known = [str(provenance[key]) for key in ("model", "method", "metric") if provenance.get(key)]
    return known + ([f"n = {provenance['n_pairs']} pairs"] if "n_pairs" in provenance else [])


def unit_of(provenance: Mapping[str, Any]) -> str:
    return html.escape(str(provenance.get("unit") or ""))


def with_unit(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name


def arrow(writer: str, reader: str) -> str:
    """An edge as shown; the reader's <q> would be taken for a tag."""
    return f"{writer} → {html.escape(reader)}"


def check_finite(values: np.ndarray) -> None:
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise MethodError(f"{bad} of {len(values)} edges have a score that is no finite number")


def judged_split(summary: pd.DataFrame) -> str:
    """Held-out facts where there are any, else the first split."""
    if summary.empty:
        raise MethodError("the evaluation is empty: there is nothing to show")
    splits = summary["split"].unique().tolist()
    return "held_out" if "held_out" in splits else str(splits[0])


def shown_split(split: Any) -> str:
    return str(split).replace("_", "-")


def sizes(summary: pd.DataFrame) -> str:
    """How many facts each split has."""
    return ", ".join(
        f"{shown_split(split)} n = {n}" for split, n in summary.groupby("split", sort=False)["n"].first().items()
    )
