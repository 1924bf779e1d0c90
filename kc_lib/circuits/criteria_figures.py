"""What else is asked of a circuit, as figures: single edges, overlap with other circuits, and methods beside each other."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from kc_lib import plotting as plot
from kc_lib.circuits.criteria import Minimality, Stability
from kc_lib.errors import MethodError

OUTCOMES = {  # of taking an edge out -> colour and symbol
    "needed: interval above 0": (plot.POSITIVE, "circle"),
    "works against the answer: below 0": (plot.NEGATIVE, "diamond"),
    "not told from 0": (plot.NEUTRAL, "circle-open"),
}
ROW = 270  # px of a panel of edges
DARK_FROM = 0.75  # where numbers on a shade are white
NUMBERS_UP_TO = 24  # circuits: beyond, cells are too small
AGAINST = {"each other": "mean overlap", "reference": "with reference"}
MEASURES = {"cpr": "CPR (higher is better)", "cmd": "CMD (lower is better)", "seconds": "seconds (log axis)"}
METHOD_COLUMNS = ["task", "method", *(f"{name}{end}" for name in ("cpr", "cmd") for end in plot.ENDS), "seconds"]


def minimality_figure(minimality: Minimality, title: str | None = None, n_labels: int = 3) -> go.Figure:
    """Drop in faithfulness for every sampled edge, largest first, with its interval: of the circuit, and random edges.

    One row per split. The ``n_labels`` largest drops of circuit edges are labelled, all names are in the hover.

    Raises:
        MethodError: no sampled edges, or no drop that is defined.
    """
    edges = minimality.edges.dropna(subset=["drop"]) if len(minimality.edges) else minimality.edges
    if edges.empty:
        raise MethodError("the minimality has no edge with a defined drop: there is nothing to show")
    totals = {(row["split"], row["kind"]): row for row in minimality.totals.to_dict("records")}
    splits, kinds = edges["split"].unique().tolist(), edges["kind"].unique().tolist()
    shown = [(split, kind) for split in splits for kind in kinds]
    spacing: dict[str, Any] = {"horizontal_spacing": 0.03, "vertical_spacing": 0.2 / len(splits), "shared_yaxes": True}
    figure = plot.panels([_sample_text(totals[panel]) for panel in shown], len(kinds), **spacing)
    outcomes_shown: set[str] = set()
    for i, (split, kind) in enumerate(shown):
        rows = edges[(edges["split"] == split) & (edges["kind"] == kind)]
        rows = rows.sort_values("drop", ascending=False, kind="stable").reset_index(drop=True)
        outcome = np.select([rows["drop_low"] > 0, rows["drop_high"] < 0], list(OUTCOMES)[:2], list(OUTCOMES)[2])
        for name, (colour, symbol) in OUTCOMES.items():
            part = rows[outcome == name]
            if len(part):
                error = plot.whiskers(part.to_dict("records"), "drop") | {"width": 0, "color": colour}
                look = {"symbol": symbol, "size": 7, "error_y": error, "legendgroup": name, "name": name, "meta": kind}
                look |= {"showlegend": name not in outcomes_shown} | plot.place(i, len(kinds))
                hover = [_drop_hover(row) for row in part.to_dict("records")]
                plot.points(figure, part.index + 1, part["drop"], colour, hover, **look)
                outcomes_shown.add(name)
        figure.update_xaxes(range=[0, len(rows) + 1], **plot.place(i, len(kinds)))
        if kind == "circuit":
            _label_edges(figure, rows, n_labels, **plot.place(i, len(kinds)))
    plot.level_lines(figure, "y", 0)
    figure.update_xaxes(showticklabels=False, ticks="", showgrid=False)
    figure.update_xaxes(title_text="sampled edges, largest drop first", row=len(splits))
    figure.update_yaxes(ticks="")
    figure.update_yaxes(title_text="drop in faithfulness", ticks="outside", col=1)
    height = ROW * len(splits)
    left_out = plot.undefined_on([split for split in minimality.totals["split"].unique() if split not in splits])
    about = [f"whiskers: {plot.OVER_FACTS}", "random edges join nodes of the circuit and were not selected", left_out]
    size = {"width": 960, "height": 170 + height, "margin": {"t": 115, "b": 95}, "legend": plot.below(70 / (height - 40))}
    return plot.titled(figure, title or "What taking out one edge does", about, **size)


def overlap_figure(overlap: pd.DataFrame | Stability, title: str | None = None) -> go.Figure:
    """Jaccard overlap (edges in both over edges in either) of every two circuits, from 0 to 1, with numbers where they fit.

    Takes what ``jaccard_matrix`` returns (resamples, methods, templates), or a ``Stability``, whose reference is the last
    row. Overlaps that are undefined, as of two circuits without edges, are left blank.

    Raises:
        MethodError: no circuits, a table that is no square by name, or an overlap outside 0 to 1.
    """
    matrix = _matrix(overlap) if isinstance(overlap, Stability) else overlap
    names = [str(name) for name in matrix.index]
    if not names or names != [str(name) for name in matrix.columns]:
        rows, columns = matrix.shape
        raise MethodError(f"overlaps are a table of circuits by the same circuits (jaccard_matrix), not {rows} by {columns}")
    values = matrix.to_numpy(dtype=float)
    if ((values < 0) | (values > 1)).any():
        raise MethodError(f"an overlap is a share from 0 to 1, not {values[(values < 0) | (values > 1)][0]:g}")
    n = len(names)
    pairs = pd.Series(values[np.triu_indices(n, 1)]).dropna()
    about = [f"{n} circuits" if n > 1 else "one circuit: there is no other to compare it with"]
    if isinstance(overlap, Stability):
        about += [f"found on n = {overlap.n_facts} facts"] if overlap.n_facts else []
        summary = overlap.summary().to_dict("records")
        about += [f"{AGAINST[row['against']]} {plot.figure_text(row, 'jaccard')}" for row in summary]
        about.append("brackets: 95% of pairs")
    elif len(pairs):
        about.append(f"mean of {len(pairs)} pairs {plot.number(pairs.mean())}, lowest {plot.number(pairs.min())}")
    ticks = [_short(name) for name in names]
    letters = max(map(len, ticks))
    size = int(np.clip(46 * n, 340, 850 - 7 * letters))
    figure = go.Figure()
    both = [[f"{html.escape(a)}<br>{html.escape(b)}" for b in names] for a in names]
    look = {"zmin": 0, "zmax": 1, "customdata": both, "colorbar": plot.colour_bar("Jaccard")}
    plot.heatmap(figure, values, "%{customdata}<br>overlap %{z:.3f}<extra></extra>", **look)
    for colour, chosen in ((plot.DARK, values < DARK_FROM), ("white", values >= DARK_FROM)):
        y, x = chosen.nonzero()
        if n <= NUMBERS_UP_TO:
            font = {"color": colour, "size": int(np.clip(0.28 * size / n, 9, 13))}
            text = [plot.number(value) for value in values[y, x]]
            plot.labels(figure, x.tolist(), y.tolist(), text, textfont=font, meta="numbers")
    axis = {"tickvals": list(range(n)), "ticktext": ticks, "showgrid": False, "ticks": "", "ticklabelstandoff": 5}
    figure.update_xaxes(**axis, tickangle=-40 if letters > 4 else 0, constrain="domain", constraintoward="left")
    figure.update_yaxes(**axis, autorange="reversed", scaleanchor="x", constrain="domain")
    width = max(500, size + 7 * letters + 150, 6 * len(" · ".join(about)) + 40)
    height = int(size + 120 + 0.65 * 7 * letters)
    return plot.titled(figure, title or "Overlap of circuits (Jaccard)", about, width=width, height=height)


def method_bars(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """Methods by task, best CPR first: CPR and CMD with their intervals, and the seconds they took.

    ``frame`` has columns task, method, cpr, cpr_low, cpr_high, cmd, cmd_low, cmd_high, seconds, and n (facts) if you like.
    A figure that is undefined (NaN) is said to be, a method without CPR comes last. The method "random" is grey.

    Raises:
        MethodError: no rows, a missing column, a method twice on one task, or seconds of 0 or less.
    """
    missing = [column for column in METHOD_COLUMNS if column not in frame.columns]
    if missing or frame.empty:
        raise MethodError(f"the comparison has no column {missing[0]!r}" if missing else "the comparison has no methods")
    twice = frame[frame.duplicated(["task", "method"])]
    if len(twice):
        raise MethodError(f"method {twice['method'].iloc[0]!r} is there twice for task {twice['task'].iloc[0]!r}")
    if (frame["seconds"] <= 0).any():
        raise MethodError("seconds must be above 0 (or NaN where they were not taken): their axis is logarithmic")
    tasks = list(frame.sort_values("cpr", kind="stable", na_position="first").groupby("task", sort=False))
    tasks.sort(key=lambda task: frame["task"].tolist().index(task[0]))
    heights, gap = [30 * len(rows) + 20 for _, rows in tasks], 50
    total = sum(heights) + gap * (len(heights) - 1)
    spacing: dict[str, Any] = {"horizontal_spacing": 0.03, "vertical_spacing": gap / total, "row_heights": heights}
    figure = plot.panels([""] * len(tasks) * 3, 3, shared_xaxes=True, shared_yaxes=True, **spacing)
    for row, (task, rows) in enumerate(tasks, start=1):
        records, places = rows.to_dict("records"), list(range(len(rows)))
        names = [str(name) for name in rows["method"]]
        colours = [plot.NEUTRAL if name == "random" else plot.POSITIVE for name in names]
        for column, measure in enumerate(MEASURES, start=1):
            at: dict[str, Any] = {"row": row, "col": column, "name": str(task)}
            values = [_measured(record, measure) for record in records]
            hover = [f"<b>{html.escape(name)}</b><br>{value}" for name, value in zip(names, values, strict=True)]
            error = None if measure == "seconds" else plot.whiskers(records, measure) | {"color": "#555555"}
            plot.points(figure, rows[measure], places, colours, hover, size=9, error_x=error, meta=measure, **at)
            start = min(_ends(frame, measure), default=1.0) if measure == "seconds" else 0.0
            ends = [max(_ends(rows.iloc[[i]], measure), default=start) for i in places]
            text = [f"  {value.partition(' [')[0]}" for value in values]
            plot.labels(figure, ends, places, text, textposition="middle right", meta="numbers", **at)
        axis = {"tickvals": places, "ticktext": [_short(name) for name in names], "range": [-0.7, len(rows) - 0.3]}
        figure.update_yaxes(**axis, ticks="", showgrid=False, row=row)
        place = {"x": 0, "xref": "x domain", "xanchor": "left", "y": 1, "yref": "y domain", "yanchor": "bottom"}
        facts = f" (n = {rows['n'].iloc[0]} facts)" if "n" in rows else ""
        heading = f"<b>{html.escape(str(task))}</b>{facts}"
        figure.add_annotation(text=heading, showarrow=False, font_size=14, row=row, col=1, **place)
    for column, (measure, name) in enumerate(MEASURES.items(), start=1):
        figure.update_xaxes(title_text=name, row=len(tasks), col=column)
        figure.update_xaxes(range=_range(frame, measure), type="log" if measure == "seconds" else "linear", col=column)
    about = [f"whiskers: {plot.OVER_FACTS}", "best CPR first"]
    size = {"width": 1000, "height": 180 + total, "margin_t": 110, "showlegend": False}
    return plot.titled(figure, title or "Methods of discovery", about, **size)


def _label_edges(figure: go.Figure, edges: pd.DataFrame, n_labels: int, **at: int) -> None:
    """Names of the first edges, with a line to each, at the upper right, where sorted drops leave room."""
    ends = edges[["drop", "drop_low", "drop_high"]].to_numpy(dtype=float)
    low, high = np.nanmin(ends), np.nanmax(ends)
    line = {"arrowhead": 0, "arrowwidth": 1, "arrowcolor": plot.NEUTRAL, "standoff": 5}
    panel = next(figure.select_traces(**at))
    for place, edge in enumerate(edges.head(n_labels).to_dict("records")):
        end = {"ax": 0.4 * len(edges) + 1, "ay": high - 0.12 * place * (high - low)}
        end |= {"axref": panel.xaxis, "ayref": panel.yaxis}
        text = {"text": plot.arrow(edge["writer"], edge["reader"]), "xanchor": "left", "font_size": 12}
        figure.add_annotation(x=place + 1, y=edge["drop"], **text, **end, **line, **at)


def _sample_text(about: plot.Row) -> str:
    """What stands above a panel of sampled edges: how many of how many, and how many make a difference."""
    sample = f"{about['n_sampled']} of {about['n_edges']:,} {about['kind']} edges"
    if pd.notna(about["share"]):
        sample += f": {about['share'] * about['n_sampled']:.0f} differ from 0"
    return f"{plot.shown_split(about['split'])} (n = {about['n']} facts), {sample}"


def _drop_hover(edge: plot.Row) -> str:
    name, drop = plot.arrow(edge["writer"], edge["reader"]), plot.figure_text(edge, "drop", 4)
    return f"<b>{name}</b><br>drop {drop}<br>{edge['relative']:.1%} of the circuit's faithfulness"


def _matrix(stability: Stability) -> pd.DataFrame:
    """Overlaps by name, 1 on the diagonal; blank for pairs that were not compared."""
    pairs = stability.pairs
    names = list(dict.fromkeys([*pairs["a"], *pairs["b"]]))
    matrix = pd.DataFrame(np.eye(len(names)), index=names, columns=names).replace(0.0, np.nan)
    for a, b, value in zip(pairs["a"], pairs["b"], pairs["jaccard"], strict=True):
        matrix.loc[a, b] = matrix.loc[b, a] = value
    return matrix


def _measured(record: plot.Row, measure: str) -> str:
    """A method's figure in words, with its interval."""
    if measure != "seconds":
        return plot.figure_text(record, measure)
    seconds = float(record[measure])
    return "not timed" if np.isnan(seconds) else f"{seconds:.2g} s" if seconds < 10 else f"{seconds:,.0f} s"


def _ends(frame: pd.DataFrame, measure: str) -> list[float]:
    """All that is drawn of a measure: values and ends of intervals."""
    columns = [measure] if measure == "seconds" else [f"{measure}{end}" for end in plot.ENDS]
    return [float(value) for value in frame[columns].to_numpy(dtype=float).ravel() if not np.isnan(value)]


def _range(frame: pd.DataFrame, measure: str) -> list[float]:
    """An axis with room for the number beside the last mark; in powers of ten for seconds."""
    ends = _ends(frame, measure)
    if measure == "seconds":
        low, high = (np.log10(min(ends)), np.log10(max(ends))) if ends else (0.0, 1.0)
        low, high = np.floor(low), max(np.ceil(high), np.floor(low) + 1)
    else:
        low, high = min([0.0, *ends]), max([0.0, *ends]) or 1.0
    return [float(low - 0.04 * (high - low)), float(high + 0.25 * (high - low))]


def _short(name: str, letters: int = 36) -> str:
    """A name that fits, with what tells it from others: its two ends."""
    half = letters // 2
    return html.escape(name if len(name) <= letters else f"{name[:half]}…{name[1 - half :]}")
