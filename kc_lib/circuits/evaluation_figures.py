"""Circuits on facts: faithfulness by size, beside random circuits, without single edges, and beside each other.

Intervals are those of the results: 95% bootstraps over facts. A split where the full model has next to no effect has no
faithfulness: the subtitle names it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from kc_lib import plotting as plot
from kc_lib.circuits.areas import areas
from kc_lib.circuits.baselines import NULL_KINDS, ranking_of
from kc_lib.circuits.completeness import completeness
from kc_lib.circuits.evaluate import Evaluation
from kc_lib.circuits.minimality import Minimality
from kc_lib.circuits.stability import Stability
from kc_lib.errors import MethodError
from kc_lib.stats import empirical_p

RANDOM_KINDS = ("random", "null")
PANELS = {
    "hit_at_10": "Hit@10 (share of facts)",
    "probability": "probability of the answer",
    "rank_median": "median rank of the answer (lower is better)",
    "faithfulness": "faithfulness",
}
FAITHFULNESS = "faithfulness (0: no edges, 1: full model)"
BASELINE_NAMES = {"connected": "random<br>circuits", "profile": "heads<br>shuffled<br>in layers"}
LEGEND_NAME = 18  # letters that fit on a line with CPR and CMD
AREAS = {"cpr": "CPR", "cmd": "CMD", "log_area": "log area"}
RUNS = {  # -> shift to the side, colour and symbol
    "the circuit alone": (-0.2, plot.POSITIVE, "circle"),
    "the model without it": (0.2, "#E69F00", "diamond"),
}
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


def faithfulness_figure(evaluation: Evaluation, title: str | None = None) -> go.Figure:
    """Faithfulness (0 is the empty circuit, 1 the full model) against the number of edges, on a log axis.

    One line with its 95% band per split for the circuits of kind "top"; random circuits of the same sizes, with the
    line of their mean, are grey, on the held-out split where there is one.

    Raises:
        MethodError: no "top" circuit has edges and a faithfulness.
    """
    summary, random_split = evaluation.summary, plot.judged_split(evaluation.summary)
    shown = summary[(summary["n_edges"] > 0) & summary["faithfulness"].notna()].sort_values(["n_edges", "circuit"])
    top = shown[shown["kind"] == "top"]
    random = shown[(shown["kind"] == "random") & (shown["split"] == random_split)]
    if top.empty:
        raise MethodError("the evaluation has no 'top' circuit with edges and a defined faithfulness to show")
    left_out = summary[(summary["kind"] == "top") & ~summary.index.isin(shown.index)]["circuit"].unique()
    about = [plot.sizes(summary), f"{evaluation.metric.name} ({evaluation.metric.unit})", f"bands: {plot.OVER_FACTS}"]
    about += [f"not shown (no edges, or undefined): {', '.join(left_out)}"] if len(left_out) else []
    figure = go.Figure()
    for level, name in ((0, "empty circuit"), (1, "full model")):
        plot.level_lines(figure, "y", level, annotation_text=name, annotation_position="top left")
    of_split = {plot.shown_split(split): rows for split, rows in top.groupby("split", sort=False)}
    colours = dict(zip(of_split, cycle(plot.OKABE_ITO), strict=False))
    for split, rows in of_split.items():
        group = {"name": f"95% band, {split}", "legendgroup": split}
        plot.band(figure, rows, "n_edges", "faithfulness", colours[split], **group)
    if len(random):
        mean = random.groupby("n_edges")["faithfulness"].mean().reset_index()
        group = {"name": "mean of random", "legendgroup": "random"}
        plot.curve(figure, mean, "n_edges", "faithfulness", plot.NEUTRAL, None, showlegend=False, **group)
        group["name"] = f"random, {plot.shown_split(random_split)}<br>(line: mean)"
        plot.points(figure, random["n_edges"], random["faithfulness"], plot.NEUTRAL, _hovers(random), size=7, **group)
    for split, rows in of_split.items():
        look = {"width": 2.5, "size": 9, "name": f"top, {split}", "legendgroup": split}
        plot.curve(figure, rows, "n_edges", "faithfulness", colours[split], _hovers(rows), **look)
    figure.update_xaxes(type="log", title_text="edges in the circuit", dtick=1, tickformat=",", minor_ticks="outside")
    figure.update_yaxes(title_text="faithfulness", range=plot.faithfulness_range(shown, top))
    size = {"width": 900, "height": 520, "hovermode": "closest"}
    return plot.titled(figure, title or "Faithfulness of circuits by size", about, **size)


def comparison_bars(evaluation: Evaluation, circuits: list[str] | None = None) -> go.Figure:
    """Circuits beside random circuits, the full model and the empty circuit, on held-out facts where there are any.

    Panels: Hit@10 (share of facts), probability of the answer, its median rank (log axis), faithfulness. The bar of random
    circuits is the mean over draws, its whisker their range. Without ``circuits`` it is that of name "circuit", or all.

    Raises:
        MethodError: a circuit that was not evaluated, or none at all.
    """
    split = plot.judged_split(evaluation.summary)
    rows = evaluation.summary[evaluation.summary["split"] == split].set_index("circuit", drop=False)
    others = rows["kind"].isin(["full", "empty", *RANDOM_KINDS, "profile null"]) | rows["kind"].str.startswith("without ")
    known = rows.index[~others].tolist()
    names = list(circuits) if circuits is not None else [name for name in known if name == "circuit"] or known
    unknown = [name for name in names if name not in rows.index]
    if unknown or not names:
        problem = f"no circuit {unknown[0]!r}" if unknown else "no circuit to compare"
        raise MethodError(f"{problem} in the evaluation: it has {', '.join(known) or 'none'}")
    bars = {"empty<br>circuit": (rows[rows["kind"] == "empty"], "#C8C8C8")}
    for name in names:
        label, draws = _random_draws(rows, name)
        bars[label] = (draws, plot.NEUTRAL)
        bars[html.escape(name).replace(" ", "<br>", 1)] = (rows.loc[[name]], plot.POSITIVE)
    bars["full<br>model"] = (rows[rows["kind"] == "full"], plot.DARK)
    bars = {label: bar for label, bar in bars.items() if len(bar[0])}
    parts, colours = zip(*bars.values(), strict=True)
    figure = plot.panels(list(PANELS.values()), 2, size=16, vertical_spacing=0.2, horizontal_spacing=0.08)
    for i, column in enumerate(PANELS):
        at = plot.place(i, 2)
        heights = pd.DataFrame([part[column].agg(["mean", "min", "max"]).to_dict() for part in parts]).assign(label=[*bars])
        mean, low, high = heights[["mean", "min", "max"]].to_numpy(dtype=float).T
        hover = [
            plot.circuit_hover(part.iloc[0]) if len(part) == 1 else f"mean {m:.3g}, range {a:.3g} to {b:.3g}"
            for part, m, a, b in zip(parts, mean, low, high, strict=True)
        ]
        plot.bars(figure, heights, "label", "mean", list(colours), hover, name=PANELS[column], **at)
        drawn = [(label, *ends) for label, part, *ends in zip(bars, parts, low, high, strict=True) if len(part) > 1]
        x = [value for label, _, _ in drawn for value in (label, label, None)]
        y = [value for _, *ends in drawn for value in (*ends, None)]
        line = {"mode": "lines", "line": {"color": plot.DARK, "width": 3}, "hoverinfo": "skip"}
        figure.add_scatter(x=x, y=y, name="range", **line, **at)
        text = [f"{round(value, 6) + 0.0:.3g}" if value < 1000 else f"{value:,.0f}" for value in mean]
        above = {"textposition": "top center", "cliponaxis": False}
        plot.labels(figure, bars, np.maximum(high, column == "rank_median").tolist(), text, **above, **at)
        ends = np.nan_to_num([0.0, *low, *high, float(column == "hit_at_10")])
        figure.update_yaxes(range=[1.15 * min(ends), 1.15 * max(ends) or 1.0], **at)
        if column == "rank_median":
            figure.update_yaxes(type="log", range=[0, 1.15 * np.log10(max(10, *ends))], dtick=1, tickformat=",", **at)
    figure.update_xaxes(tickangle=0)
    about = [f"random: mean and range of {n} draws" for n in {len(part) for part in parts} - {1}]
    about = [plot.sizes(rows), *about, f"faithfulness of {evaluation.metric.name} ({evaluation.metric.unit})"]
    size = {"width": max(900, 160 + 140 * len(bars)), "height": 660, "margin_t": 120, "bargap": 0.35, "showlegend": False}
    return plot.titled(figure, "Circuits against random circuits and the full model", about, **size)


def area_curves(evaluation: Evaluation, title: str | None = None, seed: int = 0) -> go.Figure:
    """Faithfulness of every ranking against the share of edges it was given (log axis), with its 95% band.

    The legend of each panel has the areas of ``areas(evaluation, seed)`` with their intervals, the mean where there are
    several draws; the area over log10(share) is in the hover. Random rankings are grey. Every curve ends at the whole model.

    Raises:
        MethodError: no ranking was run below share 1, or faithfulness is undefined on every split.
    """
    splits, left_out = _defined_splits(evaluation)
    table = areas(evaluation, seed)
    curves = _ranked(evaluation, splits, table["ranking"].unique())
    looks = _ranking_looks(table["kind"].unique().tolist())
    two_lines = max(map(len, looks)) > LEGEND_NAME
    about = [f"bands, brackets: {plot.OVER_FACTS}", "CPR: area, CMD: area of |1 - faithfulness|", left_out]
    figure = _panels(evaluation, splits, title or "Faithfulness by share of edges", about)
    plot_height, below = 340, 70 + (38 if two_lines else 22) * len(looks) + 10
    for column, split in enumerate(splits, start=1):
        legend = f"legend{column}" if column > 1 else "legend"
        for kind, (colour, look) in looks.items():
            rankings = table[(table["kind"] == kind) & (table["split"] == split)].to_dict("records")
            name = f"{html.escape(kind)}:{'<br>' if two_lines else ' '}{_areas_text(rankings)}"
            group: dict[str, Any] = {"name": name, "legendgroup": kind, "legend": legend, "row": 1, "col": column}
            for i, area in enumerate(rankings):
                rows = curves[(curves["ranking"] == area["ranking"]) & (curves["split"] == split)]
                sums = "".join(f"<br>{shown} {plot.figure_text(area, key, 3)}" for key, shown in AREAS.items())
                hover = [f"{text}<br><b>{html.escape(area['ranking'])}</b>, all sizes{sums}" for text in _hovers(rows)]
                plot.band(figure, rows, "at", "faithfulness", colour, meta=f"band of {area['ranking']}", **group)
                line = look | {"size": 7, "meta": area["ranking"], "showlegend": i == 0}
                plot.curve(figure, rows, "at", "faithfulness", colour, hover, **line, **group)
        left = figure.layout[f"xaxis{column if column > 1 else ''}"].domain[0]
        place = {"x": left, "y": -65 / plot_height, "yanchor": "top", "tracegroupgap": 0, "font": {"size": 12}}
        figure.update_layout({legend: place})
    first = np.log10(curves["at"].min())
    figure.update_xaxes(type="log", dtick=1, tickformat=".4~%", range=[1.04 * first, -0.04 * first])
    figure.update_xaxes(title_text="share of all edges that the ranking keeps")
    figure.update_yaxes(range=plot.faithfulness_range(curves, curves))
    plot.level_lines(figure, "y", 0, 1)
    return figure.update_layout(height=115 + plot_height + below, margin_b=below)


def baseline_figure(evaluation: Evaluation, circuit: str = "circuit", title: str | None = None) -> go.Figure:
    """Faithfulness of the circuit, with its interval, above every draw of its random baselines.

    Above each baseline (random circuits, heads shuffled in their layers) are its mean, its best draw, and the empirical p
    of the circuit among the draws.

    Raises:
        MethodError: no such circuit, no random circuits in the evaluation, or faithfulness undefined on every split.
    """
    splits, left_out = _defined_splits(evaluation)
    rows = evaluation.summary[evaluation.summary["split"].isin(splits)]
    kinds = _baselines(rows)
    if not kinds:
        raise MethodError("the evaluation has no nulls: give evaluate_circuits random_nulls(circuit, 20) as well")
    about = [f"whiskers, shaded: {plot.OVER_FACTS}"]
    about += ["p: share of draws at least as faithful, the circuit among them", left_out]
    figure = _panels(evaluation, splits, title or "The circuit against random circuits", about)
    circuit_rows = pd.DataFrame([evaluation.row(circuit, split) for split in splits])
    for column, row in enumerate(circuit_rows.to_dict("records"), start=1):
        at, value, top = {"row": 1, "col": column}, row["faithfulness"], len(kinds)
        look: dict[str, Any] = {"size": 11, "error_x": plot.whiskers([row], "faithfulness"), "meta": "circuit"}
        name = html.escape(circuit)
        plot.points(figure, [value], [top], plot.POSITIVE, [plot.circuit_hover(row)], name=name, **look, **at)
        if pd.notna(row["faithfulness_low"]):
            ends = row["faithfulness_low"], row["faithfulness_high"]
            figure.add_vrect(*ends, fillcolor=plot.POSITIVE, opacity=0.12, line_width=0, layer="below", **at)
        above = {top: plot.figure_text(row, "faithfulness")}
        for y, kind in zip(reversed(range(top)), kinds, strict=True):
            draws = rows[(rows["kind"] == NULL_KINDS[kind]) & (rows["split"] == row["split"])]
            x, look = draws["faithfulness"].tolist(), {"opacity": 0.7, "name": kind, "meta": "null"}
            plot.points(figure, x, y + _spread(len(x), 0.12), plot.NEUTRAL, _hovers(draws), **look, **at)
            p = f"p = {empirical_p(value, x):.2g} ({len(x)} draws)"
            above[y] = f"mean {plot.number(np.mean(x))}, best {plot.number(max(x))}, {p}" if x else "no draws"
        for y, text in above.items():
            place = {"x": 0.02, "xref": "x domain", "xanchor": "left", "y": y + 0.36, "showarrow": False}
            figure.add_annotation(text=text, font_size=12, bgcolor="white", borderpad=1, **place, **at)
    drawn = pd.concat([circuit_rows, rows[rows["kind"].isin([NULL_KINDS[kind] for kind in kinds])]])
    ticks = [*(BASELINE_NAMES[kind] for kind in reversed(kinds)), html.escape(circuit)]
    figure.update_xaxes(title_text=FAITHFULNESS, range=plot.faithfulness_range(drawn, circuit_rows))
    figure.update_yaxes(title_text="", range=[-0.5, len(kinds) + 0.65], showgrid=False)
    figure.update_yaxes(tickvals=list(range(len(ticks))), ticktext=ticks)
    plot.level_lines(figure, "x", 0, 1)
    return figure.update_layout(height=185 + 85 * len(ticks), showlegend=False)


def completeness_figure(evaluation: Evaluation, circuit: str = "circuit", title: str | None = None) -> go.Figure:
    """Faithfulness of the circuit alone beside that of the model without it, for the circuit and its random baselines.

    A complete circuit is high alone and leaves little (``completeness``). Every random draw is a dot, their mean the mark.

    Raises:
        MethodError: the circuit's complement was not run, or faithfulness is undefined on every split.
    """
    splits, left_out = _defined_splits(evaluation)
    rows = _alone_and_without(evaluation, circuit, splits)
    kinds = _baselines(rows)
    about = [f"whiskers: {plot.OVER_FACTS}", "small dots: draws of nulls, beside their mean" if kinds else "", left_out]
    figure = _panels(evaluation, splits, title or "The circuit alone, and the model without it", about)
    for column, split in enumerate(splits, start=1):
        for run, (shift, colour, symbol) in RUNS.items():
            part = rows[(rows["split"] == split) & (rows["run"] == run)]
            row = part[part["circuit"] == circuit].iloc[0]
            group: dict[str, Any] = {"name": run, "legendgroup": run, "symbol": symbol, "row": 1, "col": column}
            means, hover = [row["faithfulness"]], [_run_hover(row)]
            for place, kind in enumerate(kinds, start=1):
                draws = part[part["kind"] == NULL_KINDS[kind]]
                text = [_run_hover(draw) for draw in draws.to_dict("records")]
                x = place + shift - 0.1 + _spread(len(draws), 0.04)
                dots = {"size": 5, "opacity": 0.45, "showlegend": False, "meta": "null"}
                plot.points(figure, x, draws["faithfulness"], colour, text, **dots, **group)
                means.append(draws["faithfulness"].mean())
                mean = plot.number(means[-1], 3)
                hover.append(f"mean of {len(draws)} draws, {run}<br>faithfulness {mean}")
            numbers = ["" if pd.isna(mean) else f" {plot.number(mean)}" for mean in means]
            look = {"mode": "markers+text", "text": numbers, "textposition": _beside(means), "meta": "means", "size": 11}
            look |= {"error_y": plot.whiskers([row, *({} for _ in kinds)], "faithfulness"), "showlegend": column == 1}
            plot.points(figure, [place + shift for place in range(len(means))], means, colour, hover, **look, **group)
    ticks = [html.escape(circuit), *(BASELINE_NAMES[kind] for kind in kinds)]
    figure.update_xaxes(tickvals=list(range(len(ticks))), ticktext=ticks, range=[-0.5, len(ticks) - 0.4], showgrid=False)
    figure.update_yaxes(range=plot.faithfulness_range(rows, rows[rows["circuit"] == circuit]))
    plot.level_lines(figure, "y", 0, 1)
    return figure.update_layout(height=530, margin_b=130, legend=plot.below(0.25))


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
    shown = [(split, kind) for split in splits for kind in kinds]
    spacing: dict[str, Any] = {"horizontal_spacing": 0.03, "vertical_spacing": 0.2 / len(splits), "shared_yaxes": True}
    figure = plot.panels([_sample_text(summary[panel]) for panel in shown], len(kinds), **spacing)
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
    left_out = plot.undefined_on([split for split in minimality.summary["split"].unique() if split not in splits])
    about = [f"whiskers: {plot.OVER_FACTS}", "null edges join nodes of the circuit and were not selected", left_out]
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
    about = [f"{n} circuits"]
    if isinstance(overlap, Stability):
        about += [f"found on n = {overlap.n_facts} facts"] if overlap.n_facts else []
        summary = overlap.summary.to_dict("records")
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


def _hovers(rows: pd.DataFrame) -> list[str]:
    return [plot.circuit_hover(row) for row in rows.to_dict("records")]


def _random_draws(rows: pd.DataFrame, name: str) -> tuple[str, pd.DataFrame]:
    """Its random ones: ``random 0.005 #1`` for ``top 0.005``, ``null #1`` for ``circuit``; else those of its size."""
    draws, size = rows[rows["kind"].isin(RANDOM_KINDS)], name.partition(" ")[2]
    of_name = [re.sub(r"^(random|null) ?|\s*#\d+$", "", draw) == size for draw in draws.index]
    if any(of_name) and (size or name == "circuit"):
        return f"random<br>{html.escape(size) or 'circuits'}", draws[of_name]
    same_size = draws[draws["n_edges"] == rows["n_edges"][name]]
    return f"random<br>{rows['n_edges'][name]:,} edges", same_size


def _panels(evaluation: Evaluation, splits: Sequence[str], title: str, about: Iterable[str]) -> go.Figure:
    """One panel of faithfulness per split, side by side on one vertical axis."""
    n = evaluation.summary.groupby("split")["n"].first()
    names = [f"{plot.shown_split(split)}, n = {n[split]} facts" for split in splits]
    figure = plot.panels(names, size=14, shared_yaxes=True, horizontal_spacing=0.04)
    figure.update_yaxes(ticks="")
    figure.update_yaxes(title_text=FAITHFULNESS, ticks="outside", col=1)
    metric = f"{evaluation.metric.name} ({evaluation.metric.unit})"
    return plot.titled(figure, title, [metric, *about], width=max(900, 480 * len(splits)), margin_t=115)


def _defined_splits(evaluation: Evaluation) -> tuple[list[str], str]:
    """Splits with a faithfulness, and what the subtitle says of the others."""
    if evaluation.summary.empty:
        raise MethodError("the evaluation is empty: there is nothing to show")
    known = evaluation.summary.groupby("split", sort=False)["faithfulness"].count()
    splits = [split for split in evaluation.splits if known[split]]
    if not splits:
        raise MethodError("faithfulness is undefined on every split: the full model's effect is next to nothing there")
    return splits, plot.undefined_on([split for split in evaluation.splits if split not in splits])


def _baselines(rows: pd.DataFrame) -> list[str]:
    return [kind for kind, name in NULL_KINDS.items() if (rows["kind"] == name).any()]


def _ranked(evaluation: Evaluation, splits: Sequence[str], rankings: Iterable[str]) -> pd.DataFrame:
    """Summary rows of every ranking, by share of the edges (``ranking``, ``at``); the full model is at share 1."""
    summary = evaluation.summary[evaluation.summary["split"].isin(splits)]
    places = summary["circuit"].map(ranking_of)
    ranked = summary[places.notna()].assign(ranking=places.dropna().str[0], at=places.dropna().str[1].astype(float))
    full = summary[summary["circuit"] == "full"]
    ends = [full.assign(ranking=name, at=1.0) for name in rankings]
    both = pd.concat([ranked[ranked["ranking"].isin(list(rankings))], *ends])
    return both.drop_duplicates(["split", "ranking", "at"]).sort_values("at", kind="stable")


def _ranking_looks(kinds: Iterable[str]) -> dict[str, tuple[str, dict[str, str]]]:
    """Colour, dash and symbol of every kind of ranking; random ones are grey and last."""
    is_random = {kind: "random" in kind.split() for kind in kinds}
    colours, dashes, looks = cycle(plot.OKABE_ITO), cycle(("dash", "dot", "dashdot")), {}
    for kind, symbol in zip(sorted(is_random, key=is_random.__getitem__), cycle(plot.SYMBOLS), strict=False):
        colour, dash = (plot.NEUTRAL, next(dashes)) if is_random[kind] else (next(colours), "solid")
        looks[kind] = (colour, {"dash": dash, "symbol": symbol})
    return looks


def _areas_text(rows: Sequence[plot.Row]) -> str:
    """CPR and CMD of one ranking with intervals, or means over several."""
    if len(rows) == 1:
        return ", ".join(f"{AREAS[key]} {plot.figure_text(rows[0], key)}" for key in ("cpr", "cmd"))
    means = ", ".join(f"{AREAS[key]} {plot.number(np.mean([row[key] for row in rows]))}" for key in ("cpr", "cmd"))
    return f"{means} (mean of {len(rows)} draws)"


def _alone_and_without(evaluation: Evaluation, circuit: str, splits: Sequence[str]) -> pd.DataFrame:
    """circuit, kind, split, run (as in RUNS) and faithfulness with its interval, of the circuit and its baselines."""
    without = completeness(evaluation)
    if circuit not in set(without["circuit"]):
        raise MethodError(f"the complement of {circuit!r} was not judged: give evaluate_circuits complements(circuits)")
    renamed = without.rename(columns={f"completeness{end}": f"faithfulness{end}" for end in plot.ENDS})
    parts = [table.assign(run=run) for run, table in zip(RUNS, (evaluation.summary, renamed), strict=True)]
    columns = ["circuit", "kind", "split", "run", *(f"faithfulness{end}" for end in plot.ENDS)]
    rows = pd.concat([part[columns] for part in parts])
    wanted = (rows["circuit"] == circuit) | rows["kind"].isin(NULL_KINDS.values())
    return rows[wanted & rows["split"].isin(splits)]


def _beside(values: Iterable[float]) -> list[str]:
    """Where numbers stand beside their marks, clear of the lines at 0 and 1."""
    return [f"{'bottom' if round(value, 2) < 0 or 0.9 < value < 1 else 'top'} right" for value in values]


def _run_hover(row: plot.Row) -> str:
    faithfulness = plot.figure_text(row, "faithfulness", 3)
    return f"<b>{html.escape(row['circuit'])}</b>, {row['run']}<br>faithfulness {faithfulness}"


def _spread(n: int, width: float) -> np.ndarray:
    """Where to set apart points that may coincide: evenly spread, the same every time."""
    return width * (2 * (np.arange(n) * 0.618034 % 1.0) - 1) if n > 1 else np.zeros(n)


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
