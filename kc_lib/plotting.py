"""What all figures share: one template, one set of colours, titles that say units and n, and the kinds of figure.

A figure function takes a result, makes a tidy table of it, draws the table with ``curve``, ``band``, ``points``, ``bars``,
``heatmap`` or ``table``, and gives it its title with ``titled``. A column ``name`` has its interval in ``name_low`` and
``name_high``.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kc_lib.errors import MethodError

POSITIVE, NEGATIVE, NEUTRAL, DARK = "#0072B2", "#D55E00", "#8A8A8A", "#222222"
HEAD, MLP = "#009E73", "#B0578D"
SIGNED_SCALE = [[0.0, NEGATIVE], [0.5, "#FFFFFF"], [1.0, POSITIVE]]  # centre it on zero
SHADES = [[0.0, "#FFFFFF"], [1.0, "#005A8E"]]  # of blue: good in grey, too
OKABE_ITO = (POSITIVE, "#E69F00", HEAD, MLP, "#56B4E9", NEGATIVE)  # for things without a sign, in this order
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "x")  # as many as not to go with a colour twice
OVER_FACTS = "95% bootstrap over facts"  # what intervals are
Hover = Sequence[str] | str | None  # texts of marks, a template of plotly, or nothing to say
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


def titled(figure: go.Figure, title: str, about: Iterable[str], **layout: Any) -> go.Figure:
    """The figure with the shared template, a title, a subtitle of those parts that are not empty, and the layout."""
    subtitle = " · ".join(html.escape(part) for part in about if part)
    heading = {"text": html.escape(title), "subtitle": {"text": subtitle}}
    return figure.update_layout(template=TEMPLATE, title=heading, **layout)


def panels(names: Sequence[str], n_columns: int | None = None, size: int = 13, **options: Any) -> go.Figure:
    """Subplots with their names above them, row by row; in one row unless ``n_columns`` is given."""
    columns = n_columns or len(names)
    figure = make_subplots(-(-len(names) // columns), columns, subplot_titles=list(names), **options)
    return figure.update_annotations(font_size=size)


def place(i: int, n_columns: int) -> dict[str, int]:
    """Row and column of the ``i``-th panel."""
    return {"row": i // n_columns + 1, "col": i % n_columns + 1}


def below(depth: float, **look: Any) -> dict[str, Any]:
    """A legend in a line below the figure, ``depth`` of its height down."""
    return {"orientation": "h", "x": 0, "y": -depth, "yanchor": "top"} | look


def empty(reason: str, title: str = "") -> go.Figure:
    """A figure that has nothing to show, and says why in its panel.

    Example:
        ``neuron_layer_figure(sets) if len(sets.frame) else empty("no fact has neurons")``
    """
    figure = titled(go.Figure(), title, [], width=700, height=220, margin={"t": 70 if title else 30, "b": 30})
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    text = html.escape(reason)
    return figure.add_annotation(text=text, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False, font_size=14)


def level_lines(figure: go.Figure, axis: str, *levels: float, dash: str = "dot", colour: str = DARK, **look: Any) -> None:
    """Lines at levels of axis "x" or "y", across the panels in which something is drawn."""
    add = figure.add_hline if axis == "y" else figure.add_vline
    for level in levels:
        add(level, line={"dash": dash, "color": colour, "width": 1}, **look)


def band(figure: go.Figure, rows: pd.DataFrame, x: str, y: str, colour: str, **look: Any) -> None:
    """The interval of figure ``y`` along column ``x``, shaded; broken where it is undefined."""
    known = np.flatnonzero(rows[[f"{y}_low", f"{y}_high"]].notna().all(axis=1))
    outline_x, outline_y = [], []
    for run in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1) if len(known) else []:
        stretch = rows.iloc[run]
        outline_x += [*stretch[x], *stretch[x][::-1], None]
        outline_y += [*stretch[f"{y}_low"], *stretch[f"{y}_high"][::-1], None]
    shape = {"mode": "none", "fill": "toself", "fillcolor": colour, "opacity": 0.16, "hoverinfo": "skip"}
    figure.add_scatter(x=outline_x[:-1], y=outline_y[:-1], **shape | {"showlegend": False} | look)


def curve(figure: go.Figure, rows: pd.DataFrame, x: str, y: str, colour: str, hover: Hover = None, **look: Any) -> None:
    """A line through figure ``y`` along column ``x``.

    ``look`` is that of plotly, with ``dash``, ``width``, and ``symbol`` and ``size`` of markers (none without a size).
    """
    line = {"color": colour, "dash": look.pop("dash", "solid"), "width": look.pop("width", 2)}
    marker = {"color": colour, "symbol": look.pop("symbol", "circle"), "size": look.pop("size", 0)}
    drawn = {"mode": "lines+markers", "marker": marker} if marker["size"] else {"mode": "lines"}
    figure.add_scatter(x=rows[x].tolist(), y=rows[y].tolist(), line=line, **drawn | _hover(hover) | look)


def points(figure: go.Figure, x: Iterable[Any], y: Iterable[Any], colour: Any, hover: Hover = None, **look: Any) -> None:
    """Markers; ``look`` is that of plotly, and their ``symbol``, ``size``, ``opacity`` and ``outline``."""
    marker = {"color": colour, "symbol": look.pop("symbol", "circle"), "size": look.pop("size", 8)}
    marker |= {"opacity": look.pop("opacity", 1.0), "line": look.pop("outline", None)}
    figure.add_scatter(x=list(x), y=list(y), **{"mode": "markers", "marker": marker} | _hover(hover) | look)


def labels(figure: go.Figure, x: Iterable[Any], y: Iterable[Any], text: Iterable[str], **look: Any) -> None:
    """Words at places of a figure, that are no entry of its legend."""
    shown = {"mode": "text", "showlegend": False} | _hover(None)
    figure.add_scatter(x=list(x), y=list(y), text=list(text), **shown | look)


def bars(figure: go.Figure, rows: pd.DataFrame, x: str, y: str, colour: Any, hover: Hover, **look: Any) -> None:
    """Bars of figure ``y`` at column ``x``, with whiskers where it has an interval; lying with orientation "h"."""
    along, up = ("y", "x") if look.get("orientation") == "h" else ("x", "y")
    drawn = {along: rows[x].tolist(), up: rows[y].tolist(), "marker_color": colour} | _hover(hover)
    error = look.pop("error", {})
    if f"{y}_low" in rows:
        drawn[f"error_{up}"] = whiskers(rows.to_dict("records"), y) | error
    figure.add_bar(**drawn | look)


def heatmap(figure: go.Figure, values: pd.DataFrame | np.ndarray, hover: Hover, **look: Any) -> None:
    """Cells of a table, its columns to the right and its rows upwards.

    Shades of blue; with ``limit``, or a ``coloraxis``, colours around 0. ``look`` is that of plotly.
    """
    limit = look.pop("limit", None)
    scale = {} if "coloraxis" in look else {"colorscale": SHADES} if limit is None else signed_scale(limit)
    if isinstance(values, pd.DataFrame):
        scale |= {"x": values.columns.tolist(), "y": values.index.tolist()}
    cells = {"z": np.asarray(values).tolist(), "xgap": 1, "ygap": 1, "hoverongaps": False}
    figure.add_heatmap(**cells | _hover(hover) | scale | look)


def signed_scale(limit: float, key: str = "z") -> dict[str, Any]:
    """Colours from ``-limit`` to ``limit`` around a white 0, of a heatmap (key "z") or of a coloraxis ("c")."""
    return {"colorscale": SIGNED_SCALE, f"{key}min": -limit, f"{key}mid": 0, f"{key}max": limit}


def colour_bar(title: str) -> dict[str, Any]:
    return {"title": {"text": title, "side": "right"}, "thickness": 14, "outlinewidth": 0}


def layer_axis(figure: go.Figure, n_layers: int, **look: Any) -> None:
    """The horizontal axis by layer, with at most 15 numbers."""
    figure.update_xaxes(**{"title_text": "layer", "dtick": max(1, n_layers // 15)} | look)


def table(columns: Mapping[str, Sequence[str]], widths: Sequence[int] = (), **look: Any) -> go.Figure:
    """Rows of text, as high as their longest cell, in striped columns (header -> cells); ``look`` is of plotly's cells."""
    heights = [14 + 17 * max(cell.count("<br>") + 1 for cell in row) for row in zip(*columns.values(), strict=True)]
    stripes = [[("white", "#F5F5F5")[row % 2] for row in range(len(heights))]]
    cells = {"values": list(columns.values()), "align": "left", "fill_color": stripes, "height": min(heights)} | look
    header = {"values": [f"<b>{name}</b>" for name in columns], "align": cells["align"]}
    figure = go.Figure()
    figure.add_table(header=header | {"fill_color": "#E4E4E4", "height": 32}, cells=cells, columnwidth=list(widths) or None)
    size = {"width": sum(widths) + 40 if widths else 800, "height": 145 + sum(heights)}
    return figure.update_layout(**size, margin={"l": 10, "r": 10, "t": 80, "b": 20})


def _hover(hover: Hover) -> dict[str, Any]:
    """Texts, a template, or nothing to say."""
    if hover is None:
        return {"hoverinfo": "skip"}
    if isinstance(hover, str):
        return {"hovertemplate": hover}
    return {"hovertext": list(hover), "hovertemplate": "%{hovertext}<extra></extra>"}


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
    counts = summary.groupby("split", sort=False)["n"].first()
    return ", ".join(f"{shown_split(split)} n = {n}" for split, n in counts.items())


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
