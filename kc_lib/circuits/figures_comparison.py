"""Circuits, methods and criteria beside each other: overlap of edge sets, methods by task, and the table of verdicts."""

from __future__ import annotations

import html
import textwrap
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kc_lib.circuits.stability import Stability
from kc_lib.circuits.verdict import COLUMNS
from kc_lib.errors import MethodError
from kc_lib.plotting import (
    DARK,
    ENDS,
    NEUTRAL,
    OVER_FACTS,
    POSITIVE,
    SHADES,
    Row,
    figure_text,
    marks,
    number,
    shown_split,
    titled,
    whiskers,
)

DARK_FROM = 0.75  # where numbers on a shade are white
NUMBERS_UP_TO = 24  # circuits: beyond, cells are too small
VERDICTS = {"yes": ("✓ yes", "#C6E2F2"), "no": ("✗ no", "#F9D3BC"), "undefined": ("? undefined", "#E4E4E4")}
VERDICT_WIDTHS = {"criterion": 205, "split": 80, "figure": 160, "null": 65, "bar": 130, "verdict": 105, "note": 215}  # px
HEADERS = {"figure": "figure [95%]"}
LINE = 17  # px
_AGAINST = {"each other": "mean overlap", "reference": "with reference"}
MEASURES = {"cpr": "CPR (higher is better)", "cmd": "CMD (lower is better)", "seconds": "seconds (log axis)"}
METHOD_COLUMNS = ["task", "method", *(f"{name}{end}" for name in ("cpr", "cmd") for end in ("", "_low", "_high")), "seconds"]


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
    others = values[np.triu_indices(n, 1)]
    known = others[~np.isnan(others)]
    about = [f"{n} circuits"]
    if isinstance(overlap, Stability):
        about += [f"found on n = {overlap.n_facts} facts"] if overlap.n_facts else []
        overlaps = overlap.summary.to_dict("records")
        about += [f"{_AGAINST[row['against']]} {figure_text(row, 'jaccard')}" for row in overlaps]
        about.append("brackets: 95% of pairs")
    elif len(known):
        about.append(f"mean of {len(known)} pairs {number(known.mean())}, lowest {number(known.min())}")
    ticks = [_short(name) for name in names]
    longest = 7 * max(map(len, ticks))
    size = int(np.clip(46 * n, 340, 850 - longest))
    figure = titled(go.Figure(), title or "Overlap of circuits (Jaccard)", about)
    full = [[f"{html.escape(a)}<br>{html.escape(b)}" for b in names] for a in names]
    figure.add_heatmap(
        z=values.tolist(),
        zmin=0,
        zmax=1,
        colorscale=SHADES,
        customdata=full,
        hovertemplate="%{customdata}<br>overlap %{z:.3f}<extra></extra>",
        xgap=1,
        ygap=1,
        hoverongaps=False,
        colorbar={"title": {"text": "Jaccard", "side": "right"}, "thickness": 14, "outlinewidth": 0},
    )
    for colour, chosen in ((DARK, values < DARK_FROM), ("white", values >= DARK_FROM)):
        y, x = chosen.nonzero()
        font = {"color": colour, "size": int(np.clip(0.28 * size / n, 9, 13))}
        look = {"mode": "text", "textfont": font, "hoverinfo": "skip", "meta": "numbers"}
        if n <= NUMBERS_UP_TO:
            figure.add_scatter(x=x.tolist(), y=y.tolist(), text=[number(value) for value in values[y, x]], **look)
    axis = {"tickvals": list(range(n)), "ticktext": ticks, "showgrid": False, "ticks": "", "ticklabelstandoff": 5}
    angle = -40 if max(map(len, ticks)) > 4 else 0
    figure.update_xaxes(**axis, tickangle=angle, constrain="domain", constraintoward="left")
    figure.update_yaxes(**axis, autorange="reversed", scaleanchor="x", constrain="domain")
    width = max(500, size + longest + 150, 6 * len(" · ".join(about)) + 40)
    return figure.update_layout(width=width, height=int(size + 120 + 0.65 * longest), showlegend=False)


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
    tasks = {
        task: rows.sort_values("cpr", kind="stable", na_position="first") for task, rows in frame.groupby("task", sort=False)
    }
    heights, gap = [30 * len(rows) + 20 for rows in tasks.values()], 50
    plot = sum(heights) + gap * (len(heights) - 1)
    spacing = {"horizontal_spacing": 0.03, "vertical_spacing": gap / plot, "row_heights": heights}
    figure = make_subplots(len(tasks), len(MEASURES), shared_xaxes=True, shared_yaxes=True, **spacing)
    titled(figure, title or "Methods of discovery", [f"whiskers: {OVER_FACTS}", "best CPR first"])
    for row, (task, rows) in enumerate(tasks.items(), start=1):
        records, places = rows.to_dict("records"), list(range(len(rows)))
        names = [str(name) for name in rows["method"]]
        colours = [NEUTRAL if name == "random" else POSITIVE for name in names]
        for column, measure in enumerate(MEASURES, start=1):
            at = {"row": row, "col": column, "name": str(task)}
            said = [_measured(record, measure) for record in records]
            text = [f"<b>{html.escape(name)}</b><br>{value}" for name, value in zip(names, said, strict=True)]
            look = marks(text, colours, size=9) | {"meta": measure}
            look |= {} if measure == "seconds" else {"error_x": whiskers(records, measure) | {"color": "#555555"}}
            figure.add_scatter(x=rows[measure].tolist(), y=places, **look, **at)
            start = min(_ends(frame, measure), default=1.0) if measure == "seconds" else 0.0
            ends = [max(_ends(pd.DataFrame([record]), measure), default=start) for record in records]
            look = {"mode": "text", "textposition": "middle right", "hoverinfo": "skip", "meta": "numbers"}
            figure.add_scatter(x=ends, y=places, text=[f"  {value.partition(' [')[0]}" for value in said], **look, **at)
        ticks = [_short(name) for name in names]
        figure.update_yaxes(
            tickvals=places, ticktext=ticks, range=[-0.7, len(rows) - 0.3], ticks="", showgrid=False, row=row
        )
        place = {"x": 0, "xref": "x domain", "xanchor": "left", "y": 1, "yref": "y domain", "yanchor": "bottom"}
        facts = f" (n = {rows['n'].iloc[0]} facts)" if "n" in rows else ""
        name = f"<b>{html.escape(str(task))}</b>{facts}"
        figure.add_annotation(text=name, showarrow=False, font_size=14, row=row, col=1, **place)
    for column, (measure, name) in enumerate(MEASURES.items(), start=1):
        figure.update_xaxes(title_text=name, row=len(tasks), col=column)
        figure.update_xaxes(range=_range(frame, measure), type="log" if measure == "seconds" else "linear", col=column)
    return figure.update_layout(width=1000, height=180 + plot, margin_t=110, showlegend=False)


def verdict_table(verdicts: pd.DataFrame) -> go.Figure:
    """What ``verdict`` returns, as a table: criterion, split, figure with interval, null, bar, verdict, and notes.

    Verdicts are written and coloured: "yes" blue, "no" vermillion, "undefined" grey.

    Raises:
        MethodError: no rows, a missing column, or a verdict of another name.
    """
    missing = [column for column in COLUMNS if column not in verdicts.columns]
    if missing or verdicts.empty:
        raise MethodError(f"the verdicts have no column {missing[0]!r}" if missing else "there are no verdicts to show")
    unknown = set(verdicts["verdict"]) - VERDICTS.keys()
    if unknown:
        raise MethodError(f"unknown verdict {unknown.pop()!r}: use one of {', '.join(VERDICTS)}")
    widths = VERDICT_WIDTHS if (verdicts["note"] != "").any() else {k: w for k, w in VERDICT_WIDTHS.items() if k != "note"}
    rows = verdicts.to_dict("records")
    figures = [{"figure": row["figure"], "figure_low": row["low"], "figure_high": row["high"]} for row in rows]
    columns = {
        "criterion": [[f"<b>{row['criterion']}</b>", *_wrapped(row["measure"], widths["criterion"])] for row in rows],
        "split": [[shown_split(row["split"]) or "none"] for row in rows],
        "figure": [["not measured" if pd.isna(row["figure"]) else figure_text(row, "figure", 3)] for row in figures],
        "null": [["none" if pd.isna(row["null"]) else number(row["null"], 3)] for row in rows],
        "bar": [_wrapped(row["bar"], widths["bar"]) for row in rows],
        "verdict": [[f"<b>{VERDICTS[row['verdict']][0]}</b>"] for row in rows],
        "note": [_wrapped(row["note"], widths.get("note", 1000)) for row in rows],
    }
    heights = [LINE * max(len(columns[name][row]) for name in widths) + 12 for row in range(len(rows))]
    white = ["white"] * len(rows)
    figure = go.Figure()
    figure.add_table(
        columnwidth=list(widths.values()),
        header={"values": [f"<b>{HEADERS.get(name, name)}</b>" for name in widths], "fill_color": "#E4E4E4"}
        | {"align": "left", "height": 32},
        cells={"values": [[f"<span>{'<br>'.join(cell)}</span>" for cell in columns[name]] for name in widths]}
        | {"align": "left", "height": min(heights), "line_color": "#D0D0D0", "font_size": 12}
        | {"fill_color": [[VERDICTS[row["verdict"]][1] for row in rows] if name == "verdict" else white for name in widths]},
    )
    met = f"{(verdicts['verdict'] == 'yes').sum()} of {len(rows)} criteria met"
    yes = "yes: bar cleared (faithful, complete, minimal: by the whole 95% interval)"
    titled(figure, f"Verdict: {met}", [yes, "no: not shown, which is not the opposite shown"])
    size = {"width": sum(widths.values()) + 20, "height": 110 + 32 + sum(heights)}
    return figure.update_layout(margin={"l": 10, "r": 10, "t": 95, "b": 10}, **size)


def _matrix(stability: Stability) -> pd.DataFrame:
    """Overlaps by name, 1 on the diagonal; blank for pairs that were not compared."""
    pairs = stability.pairs
    names = list(dict.fromkeys([*pairs["a"], *pairs["b"]]))
    matrix = pd.DataFrame(np.eye(len(names)), index=names, columns=names).replace(0.0, np.nan)
    for a, b, value in zip(pairs["a"], pairs["b"], pairs["jaccard"], strict=True):
        matrix.loc[a, b] = matrix.loc[b, a] = value
    return matrix


def _measured(record: Row, measure: str) -> str:
    """A method's figure in words, with its interval."""
    if measure != "seconds":
        return figure_text(record, measure)
    seconds = float(record[measure])
    return "not timed" if np.isnan(seconds) else f"{seconds:.2g} s" if seconds < 10 else f"{seconds:,.0f} s"


def _ends(frame: pd.DataFrame, measure: str) -> list[float]:
    """All that is drawn of a measure: values and ends of intervals."""
    columns = [measure] if measure == "seconds" else [f"{measure}{end}" for end in ENDS]
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


def _wrapped(text: Any, width: int) -> list[str]:
    """Lines of a cell ``width`` pixels wide, at 6.6 pixels a letter; one empty line for no text."""
    return [html.escape(line) for line in textwrap.wrap(str(text), int((width - 16) / 6.6))] or [""]
