"""Circuits on facts: faithfulness by size, beside random circuits, and of the model without them.

Intervals are those of the results: 95% bootstraps over facts. A split where the full model has next to no effect has no
faithfulness: the subtitle names it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from kc_lib import plotting as plot
from kc_lib.circuits.baselines import LAYER_MATCHED, RANDOM
from kc_lib.circuits.criteria import completeness
from kc_lib.circuits.evaluate import Evaluation
from kc_lib.circuits.smallest import areas, curves
from kc_lib.errors import MethodError
from kc_lib.stats import empirical_p

PANELS = {
    "hit_at_10": "Hit@10 (share of facts)",
    "probability": "probability of the answer",
    "rank_median": "median rank of the answer (lower is better)",
    "faithfulness": "faithfulness",
}
FAITHFULNESS = "faithfulness (0: no edges, 1: full model)"
BASELINE_NAMES = {RANDOM: "random<br>circuits", LAYER_MATCHED: "heads<br>shuffled<br>in layers"}
LEGEND_NAME = 18  # letters that fit on a line with CPR and CMD
AREAS = {"cpr": "CPR", "cmd": "CMD", "log_area": "log area"}
RUNS = {  # -> shift to the side, colour and symbol
    "the circuit alone": (-0.2, plot.POSITIVE, "circle"),
    "the model without it": (0.2, "#E69F00", "diamond"),
}


def faithfulness_figure(evaluation: Evaluation, title: str | None = None, ranking: str = "top") -> go.Figure:
    """Faithfulness (0 is the empty circuit, 1 the full model) against the number of edges, on a log axis.

    One line with its 95% band per split for the circuits of the ranking; random circuits of the same sizes, with the
    line of their mean, are grey, on the held-out split where there is one.

    Example:
        >>> kc.faithfulness_figure(kc.evaluate(model, circuits_by_size(scores), {"held_out": task.test}))

    Raises:
        MethodError: no circuit of the ranking has edges and a faithfulness.
    """
    random_split = plot.judged_split(evaluation.table)
    table = evaluation.table[evaluation.table["ranking"] == ranking]
    shown = table[(table["n_edges"] > 0) & table["faithfulness"].notna()].sort_values(["n_edges", "circuit"])
    top = shown[shown["kind"] == "ranking"]
    random = shown[(shown["kind"] == RANDOM) & (shown["split"] == random_split)]
    if top.empty:
        raise MethodError(f"the evaluation has no {ranking!r} circuit with edges and a defined faithfulness to show")
    left_out = table[(table["kind"] == "ranking") & ~table.index.isin(shown.index)]["circuit"].unique()
    about = [
        plot.sizes(evaluation.table),
        f"{evaluation.metric.name} ({evaluation.metric.unit})",
        f"bands: {plot.OVER_FACTS}",
    ]
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
        look = {"width": 2.5, "size": 9, "name": f"{ranking}, {split}", "legendgroup": split}
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
    split = plot.judged_split(evaluation.table)
    rows = evaluation.table[evaluation.table["split"] == split].set_index("circuit", drop=False)
    known = rows.index[rows["kind"].isin(["circuit", "ranking"])].tolist()
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
    points, table = (frame.assign(label=_labels(frame)) for frame in (curves(evaluation), areas(evaluation, seed)))
    points, looks = points[points["split"].isin(splits)], _ranking_looks(table)
    two_lines = max(map(len, looks)) > LEGEND_NAME
    about = [f"bands, brackets: {plot.OVER_FACTS}", "CPR: area, CMD: area of |1 - faithfulness|", left_out]
    figure = _panels(evaluation, splits, title or "Faithfulness by share of edges", about)
    plot_height, below = 340, 70 + (38 if two_lines else 22) * len(looks) + 10
    for column, split in enumerate(splits, start=1):
        legend = f"legend{column}" if column > 1 else "legend"
        for label, (colour, look) in looks.items():
            draws = table[(table["label"] == label) & (table["split"] == split)].to_dict("records")
            name = f"{html.escape(label)}:{'<br>' if two_lines else ' '}{_areas_text(draws)}"
            group: dict[str, Any] = {"name": name, "legendgroup": label, "legend": legend, "row": 1, "col": column}
            for i, area in enumerate(draws):
                rows = points[(points[["label", "draw", "split"]] == [label, area["draw"], split]).all(axis=1)]
                meta = f"{label} {area['draw']}" if area["draw"] else label
                sums = "".join(f"<br>{shown} {plot.figure_text(area, key, 3)}" for key, shown in AREAS.items())
                hover = [f"{text}<br><b>{html.escape(meta)}</b>, all sizes{sums}" for text in _hovers(rows)]
                plot.band(figure, rows, "size", "faithfulness", colour, meta=f"band of {meta}", **group)
                line = look | {"size": 7, "meta": meta, "showlegend": i == 0}
                plot.curve(figure, rows, "size", "faithfulness", colour, hover, **line, **group)
        left = figure.layout[f"xaxis{column if column > 1 else ''}"].domain[0]
        place = {"x": left, "y": -65 / plot_height, "yanchor": "top", "tracegroupgap": 0, "font": {"size": 12}}
        figure.update_layout({legend: place})
    first = np.log10(points["size"].min())
    figure.update_xaxes(type="log", dtick=1, tickformat=".4~%", range=[1.04 * first, -0.04 * first])
    figure.update_xaxes(title_text="share of all edges that the ranking keeps")
    figure.update_yaxes(range=plot.faithfulness_range(points, points))
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
    rows = evaluation.table[evaluation.table["split"].isin(splits) & (evaluation.table["of"] == circuit)]
    kinds = _baselines(rows)
    if not kinds and circuit in set(evaluation.table["circuit"]):
        raise MethodError(f"there are no baselines of {circuit!r}: give evaluate random_baselines(circuit, 20) as well")
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
            draws = evaluation.baselines(circuit, row["split"], kind)
            x, look = draws["faithfulness"].tolist(), {"opacity": 0.7, "name": kind, "meta": "baseline"}
            plot.points(figure, x, y + _spread(len(x), 0.12), plot.NEUTRAL, _hovers(draws), **look, **at)
            p = f"p = {empirical_p(value, x):.2g} ({len(x)} draws)"
            above[y] = f"mean {plot.number(np.mean(x))}, best {plot.number(max(x))}, {p}" if x else "no draws"
        for y, text in above.items():
            place = {"x": 0.02, "xref": "x domain", "xanchor": "left", "y": y + 0.36, "showarrow": False}
            figure.add_annotation(text=text, font_size=12, bgcolor="white", borderpad=1, **place, **at)
    drawn = pd.concat([circuit_rows, rows[rows["kind"].isin(kinds)]])
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
    about = [f"whiskers: {plot.OVER_FACTS}", "small dots: random draws, beside their mean" if kinds else "", left_out]
    figure = _panels(evaluation, splits, title or "The circuit alone, and the model without it", about)
    for column, split in enumerate(splits, start=1):
        for run, (shift, colour, symbol) in RUNS.items():
            part = rows[(rows["split"] == split) & (rows["run"] == run)]
            row = part[part["circuit"] == circuit].iloc[0]
            group: dict[str, Any] = {"name": run, "legendgroup": run, "symbol": symbol, "row": 1, "col": column}
            means, hover = [row["faithfulness"]], [_run_hover(row)]
            for place, kind in enumerate(kinds, start=1):
                draws = part[part["kind"] == kind]
                text = [_run_hover(draw) for draw in draws.to_dict("records")]
                x = place + shift - 0.1 + _spread(len(draws), 0.04)
                dots = {"size": 5, "opacity": 0.45, "showlegend": False, "meta": "baseline"}
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


def _hovers(rows: pd.DataFrame) -> list[str]:
    return [plot.circuit_hover(row) for row in rows.to_dict("records")]


def _random_draws(rows: pd.DataFrame, name: str) -> tuple[str, pd.DataFrame]:
    """A circuit's random baselines, or else all random ones of its size, and what to call them."""
    size, n_edges, draws = rows["size"][name], rows["n_edges"][name], rows[rows["kind"] == RANDOM]
    if not (draws["of"] == name).any():
        return f"random<br>{n_edges:,} edges", draws[draws["n_edges"] == n_edges]
    label = f"{size:g}" if pd.notna(size) else "circuits" if name == "circuit" else f"of {html.escape(name)}"
    return f"random<br>{label}", draws[draws["of"] == name]


def _panels(evaluation: Evaluation, splits: Sequence[str], title: str, about: Iterable[str]) -> go.Figure:
    """One panel of faithfulness per split, side by side on one vertical axis."""
    n = evaluation.table.groupby("split")["n"].first()
    names = [f"{plot.shown_split(split)}, n = {n[split]} facts" for split in splits]
    figure = plot.panels(names, size=14, shared_yaxes=True, horizontal_spacing=0.04)
    figure.update_yaxes(ticks="")
    figure.update_yaxes(title_text=FAITHFULNESS, ticks="outside", col=1)
    metric = f"{evaluation.metric.name} ({evaluation.metric.unit})"
    return plot.titled(figure, title, [metric, *about], width=max(900, 480 * len(splits)), margin_t=115)


def _defined_splits(evaluation: Evaluation) -> tuple[list[str], str]:
    """Splits with a faithfulness, and what the subtitle says of the others."""
    if evaluation.table.empty:
        raise MethodError("the evaluation is empty: there is nothing to show")
    known = evaluation.table.groupby("split", sort=False)["faithfulness"].count()
    splits = [split for split in evaluation.splits if known[split]]
    if not splits:
        raise MethodError("faithfulness is undefined on every split: the full model's effect is next to nothing there")
    return splits, plot.undefined_on([split for split in evaluation.splits if split not in splits])


def _baselines(rows: pd.DataFrame) -> list[str]:
    return [kind for kind in BASELINE_NAMES if (rows["kind"] == kind).any()]


def _labels(rows: pd.DataFrame) -> pd.Series:
    """What a curve is called in the legend: draws of one ranking's random baselines alike."""
    return rows["ranking"].where(rows["kind"] == "ranking", rows["ranking"] + ", random")


def _ranking_looks(table: pd.DataFrame) -> dict[str, tuple[str, dict[str, str]]]:
    """Colour, dash and symbol of every curve by its label; random ones are grey and last."""
    colours, dashes, looks = cycle(plot.OKABE_ITO), cycle(("dash", "dot", "dashdot")), {}
    kinds = table.drop_duplicates("label").sort_values("kind", key=lambda kind: kind == RANDOM, kind="stable")
    for label, kind, symbol in zip(kinds["label"], kinds["kind"], cycle(plot.SYMBOLS), strict=False):
        colour, dash = (plot.NEUTRAL, next(dashes)) if kind == RANDOM else (next(colours), "solid")
        looks[label] = (colour, {"dash": dash, "symbol": symbol})
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
        raise MethodError(f"the complement of {circuit!r} was not evaluated: give evaluate complements(circuits)")
    renamed = without.rename(columns={f"completeness{end}": f"faithfulness{end}" for end in plot.ENDS})
    parts = [table.assign(run=run) for run, table in zip(RUNS, (evaluation.table, renamed), strict=True)]
    columns = ["circuit", "kind", "of", "split", "run", *(f"faithfulness{end}" for end in plot.ENDS)]
    rows = pd.concat([part[columns] for part in parts])
    wanted = (rows["circuit"] == circuit) | (rows["kind"].isin(list(BASELINE_NAMES)) & (rows["of"] == circuit))
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
