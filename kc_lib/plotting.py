"""What all figures share: one template, one set of colours, titles that say units and n, and how results are named."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from kc_lib.errors import MethodError

POSITIVE, NEGATIVE, NEUTRAL, DARK = "#0072B2", "#D55E00", "#8A8A8A", "#222222"
HEAD, MLP = "#009E73", "#B0578D"
SIGNED_SCALE = [[0.0, NEGATIVE], [0.5, "#FFFFFF"], [1.0, POSITIVE]]  # centre it on zero
SHADES = [[0.0, "#FFFFFF"], [1.0, "#005A8E"]]  # of blue: good in grey, too
OKABE_ITO = (POSITIVE, "#E69F00", HEAD, MLP, "#56B4E9", NEGATIVE)  # for things without a sign, in this order
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "x")  # as many as not to go with a colour twice
SPLIT_COLOURS = (POSITIVE, "#E69F00", HEAD, MLP)
OVER_FACTS = "95% bootstrap over facts"  # what intervals are
Row = Mapping[Any, Any] | pd.Series  # of a table of results
ENDS = ("", "_low", "_high")  # of the columns that give a figure and its interval
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
            "y": 1.0,
            "yanchor": "top",
            "pad": {"t": 16},
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


def circuit_hover(row: Row) -> str:
    """What a point of an evaluation says of its circuit."""
    return (
        f"<b>{html.escape(row['circuit'])}</b>, {shown_split(row['split'])} (n = {row['n']})"
        f"<br>{row['n_edges']:,} edges, share {row['share']:.2%}"
        f"<br>faithfulness {figure_text(row, 'faithfulness', 3)}"
        f"<br>Hit@10 {row['hit_at_10']:.1%}<br>probability {row['probability']:.3g}"
        f"<br>median rank {row['rank_median']:g}"
    )


def number(value: float, digits: int = 2) -> str:
    """A figure as shown: no -0.00, and "undefined" where it is."""
    return "undefined" if pd.isna(value) else f"{round(float(value), digits) + 0.0:.{digits}f}"


def short_number(number: float) -> str:
    """A count at a tick of an axis: 512, 1.25k, 2M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def figure_text(row: Row, name: str, digits: int = 2) -> str:
    """A figure of a table with its interval (columns name, name_low, name_high), where there is one."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    known = bool(pd.notna(low) and pd.notna(high))
    return number(row[name], digits) + (f" [{number(low, digits)}, {number(high, digits)}]" if known else "")


def undefined_on(splits: Sequence[str]) -> str:
    """What a subtitle says of splits that are not drawn."""
    return f"undefined on {', '.join(map(shown_split, splits))}" if splits else ""


def marks(text: Sequence[str], colour: Any, symbol: str = "circle", size: int = 8, opacity: float = 1.0) -> dict[str, Any]:
    """Markers that say ``text`` on hover."""
    marker = {"color": colour, "symbol": symbol, "size": size, "opacity": opacity}
    return {"mode": "markers", "marker": marker, "hovertext": text, "hovertemplate": "%{hovertext}<extra></extra>"}


def whiskers(rows: Iterable[Row], name: str) -> dict[str, Any]:
    """Error bars of a figure with an interval (columns name, name_low, name_high); of no length where there is none."""
    ends = [[row.get(f"{name}{end}", float("nan")) for end in ENDS] for row in rows]
    value, low, high = np.array(ends, dtype=float).reshape(-1, 3).T
    up, down = np.nan_to_num(high - value), np.nan_to_num(value - low)
    lengths = {"array": up.clip(min=0.0).tolist(), "arrayminus": down.clip(min=0.0).tolist()}
    return {"type": "data", "symmetric": False, "thickness": 1.5, "width": 4} | lengths


def faithfulness_range(points: pd.DataFrame, intervals: pd.DataFrame) -> list[float]:
    """An axis that holds 0, 1, every faithfulness, and intervals as far as -1 and 2: wider ones run out of the figure."""
    low, high = intervals["faithfulness_low"].clip(lower=-1), intervals["faithfulness_high"].clip(upper=2)
    bounds = pd.concat([pd.Series([0.0, 1.0]), points["faithfulness"], low, high])
    pad = 0.08 * (bounds.max() - bounds.min())
    return [bounds.min() - pad, bounds.max() + pad]
