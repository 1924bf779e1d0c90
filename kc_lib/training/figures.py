"""Figures of a training: what the model does, its circuits and its heads at every checkpoint, over a logarithm of time.

Time is in tokens read where that is known, else in steps. A logarithm has no place for step 0: it stands half a unit of the
first later checkpoint to the left, and says 0. Lines are means over the draws of prompts, bands run from the lowest
to the highest draw. Where a figure is undefined its line is broken. A figure of what was not measured says so.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from kc_lib import plotting as plot
from kc_lib.errors import MethodError, check_counts
from kc_lib.metrics import METRICS
from kc_lib.training.behaviour import BEHAVIOURS
from kc_lib.training.ioi_algorithm import STEPS as ALGORITHM
from kc_lib.training.result import SHARE, TrainingResult, emergence, over_draws, shown
from kc_lib.training.sizes import CIRCUIT_SIZES, LEAST_MODELS, model_sizes, size_correlations
from kc_lib.training.summary import SIMILARITIES, similarities
from kc_lib.training.swaps import ACCURACY, swap_changes

SHOWN_BEHAVIOURS = ("logit_difference", "probability_difference", "accuracy", "mrr")
NOT_MEASURED = "nothing to show: measure {} as well"
STRONGEST = 3  # heads of a panel
SCORE_COLUMNS = 4
LABEL = 0.07  # of a panel's height, that the name of a head takes
EDGE_TICKS = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]
MOST_TICKS = 10  # of the time axis of a panel of swaps
AXES = {"n_edges": "edges of the circuit", "n_nodes": "nodes of the circuit"}
CIRCUIT_PANELS = {  # quantity -> title, axis
    "n_edges": ("edges of the smallest faithful circuit", "edges"),
    "faithfulness": ("faithfulness, held out", "share of the full model's effect"),
    "effect": ("effect of the prompts", "metric, clean minus corrupted"),
}


def behaviour_over_training(
    result: TrainingResult, behaviours: Sequence[str] = SHOWN_BEHAVIOURS, title: str | None = None
) -> go.Figure:
    """One panel for each behaviour, one line for each task.

    Raises:
        MethodError: no behaviours are asked for, or an unknown one.
    """
    title = title or "Behaviour over training"
    unknown = [name for name in behaviours if name not in BEHAVIOURS]
    if unknown or not behaviours:
        raise MethodError(f"{unknown or 'nothing'}: show some of {', '.join(BEHAVIOURS)}")
    if result.of("behaviour").empty:
        return plot.empty(NOT_MEASURED.format("behaviour"), title)
    averages = _timed(result, result.of("behaviour", *behaviours))
    figure = plot.panels([shown(name) for name in behaviours], horizontal_spacing=0.06)
    for column, name in enumerate(behaviours, start=1):
        for i, (task, rows) in enumerate(averages[averages["quantity"] == name].groupby("task", sort=False)):
            _line(figure, rows, str(task), i, row=1, col=column, showlegend=column == 1)
        figure.update_yaxes(title_text=BEHAVIOURS[name], row=1, col=column)
    size: dict[str, Any] = {"height": 420, "width": max(420, 300 * len(behaviours)), "legend": plot.below(0.28)}
    return _over_time(figure, result, title, [], **size)


def circuit_over_training(result: TrainingResult, title: str | None = None) -> go.Figure:
    """The circuits' size, their held-out faithfulness beside random circuits, and the effect that it is a share of.

    Checkpoints without a circuit (the prompts have next to no effect) are crossed on the lower axis of the faithfulness.
    """
    title = title or "Circuits over training"
    if result.of("circuit").empty:
        return plot.empty(NOT_MEASURED.format("circuit"), title)
    averages = _timed(result, result.of("circuit", *CIRCUIT_PANELS, "null_faithfulness"))
    figure = plot.panels([name for name, _ in CIRCUIT_PANELS.values()], horizontal_spacing=0.07)
    for i, (task, rows) in enumerate(averages.groupby("task", sort=False)):
        quantities = {str(name): own for name, own in rows.groupby("quantity", sort=False)}
        for column, name in enumerate(CIRCUIT_PANELS, start=1):
            _line(figure, quantities[name], str(task), i, row=1, col=column, showlegend=column == 1)
        _line(figure, quantities["null_faithfulness"], f"{task}: random circuits", i, "dot", row=1, col=2)
        hover = f"{html.escape(str(task))}: undefined, next to no effect<extra></extra>"
        _crosses(figure, quantities["faithfulness"], -0.08 - 0.05 * i, plot.OKABE_ITO[i % 6], hover, column=2)
    plot.level_lines(figure, "y", 1.0, dash="dash", colour=plot.NEUTRAL, row=1, col=2)
    for column, (_, name) in enumerate(CIRCUIT_PANELS.values(), start=1):
        figure.update_yaxes(title_text=name, row=1, col=column)
    figure.update_yaxes(type="log", tickvals=EDGE_TICKS, row=1, col=1)
    about = ["crosses: undefined, next to no effect"]
    size: dict[str, Any] = {"height": 460, "width": 1200, "legend": plot.below(0.26)}
    return _over_time(figure, result, title, about, **size)


def similarity_over_training(result: TrainingResult, title: str | None = None) -> go.Figure:
    """Overlap of circuits with the checkpoint before and with the last one, beside what other prompts would give.

    One column for each of ``SIMILARITIES``. Lines are exponentially weighted means, dots single checkpoints. Dotted, for
    edges: one checkpoint's circuits from resampled prompts, which circuits of two checkpoints will hardly exceed.
    """
    title = title or "How much circuits stay the same"
    if result.of("circuit").empty:
        return plot.empty(NOT_MEASURED.format("circuit"), title)
    overlaps = similarities(result).assign(part="")
    resampled = _timed(result, result.of("circuit", "resampled_jaccard"))
    pairs = [(against, name) for against in ("previous", "last") for name in SIMILARITIES]
    spacing: dict[str, Any] = {"horizontal_spacing": 0.05, "vertical_spacing": 0.12}
    titles = [f"{shown(name)}, {against}" for against, name in pairs]
    figure = plot.panels(titles, len(SIMILARITIES), shared_xaxes=True, shared_yaxes=True, **spacing)
    for place, (against, name) in enumerate(pairs):
        at: dict[str, Any] = plot.place(place, len(SIMILARITIES))
        chosen = overlaps[(overlaps["against"] == against) & (overlaps["quantity"] == name)]
        for i, (task, rows) in enumerate(chosen.groupby("task", sort=False)):
            single, colour = _timed(result, rows), plot.OKABE_ITO[i % 6]
            hover = "%{y:.2f}<extra></extra>"
            plot.points(figure, single["time"], single["value"], colour, hover, size=5, showlegend=False, **at)
            smooth = _timed(result, rows.assign(value=rows["ewma"]))
            _line(figure, smooth, str(task), i, showlegend=place == 0, **at)
            if name == "edge_jaccard":
                of_task, label = resampled[resampled["task"] == task], f"{task}: resampled prompts"
                _line(figure, of_task, label, i, "dot", fill=False, showlegend=against == "previous", **at)
    figure.update_yaxes(range=[-0.03, 1.05]).update_yaxes(title_text="overlap", col=1)
    about = ["lines: exponentially weighted, alpha 0.5", "dots: single checkpoints", "dotted: resampled prompts"]
    size: dict[str, Any] = {"height": 640, "width": 1150, "legend": plot.below(0.16)}
    return _over_time(figure, result, title, about, n_rows=2, **size)


def heads_over_training(result: TrainingResult, strongest: int = STRONGEST, title: str | None = None) -> go.Figure:
    """The strongest heads of each score and of each task's direct effect, and when each reaches a third of its maximum.

    A ring marks that checkpoint. Lines are dotted, and have no ring, where the head's score never passes its criterion:
    something has appeared only where there is something. Direct effects have no criterion.

    Raises:
        MethodError: no head of a panel is asked for.
    """
    check_counts(1, strongest=strongest)
    title, appeared = title or "Heads over training", emergence(result)
    appeared = appeared[appeared["measure"].isin(["direct", "heads"])]
    if appeared.empty:
        return plot.empty(NOT_MEASURED.format("heads or direct"), title)
    by_panel = list(appeared.groupby(["measure", "task", "quantity"], sort=False))
    n_columns = min(SCORE_COLUMNS, len(by_panel))
    n_rows = -(-len(by_panel) // n_columns)
    titles = [f"direct effect, {task}" if measure == "direct" else shown(name) for (measure, task, name), _ in by_panel]
    spacing: dict[str, Any] = {"horizontal_spacing": 0.06, "vertical_spacing": 0.24 / n_rows}
    figure = plot.panels(titles, n_columns, shared_xaxes=True, **spacing)
    for place, ((measure, task, name), heads) in enumerate(by_panel):
        at: dict[str, Any] = plot.place(place, n_columns)
        rows = result.of(str(measure), str(name))
        rows = _timed(result, rows[rows["task"] == task])
        ends = []
        for i, head in enumerate(heads.sort_values("maximum", ascending=False).head(strongest).to_dict("records")):
            own, colour = rows[rows["part"] == head["part"]], plot.OKABE_ITO[i % 6]
            dash = "solid" if measure == "direct" or head["passes"] else "dot"
            _line(figure, own, head["part"], i, dash, showlegend=False, **at)
            if dash == "solid":
                reached = own[own["step"] == head["step"]]
                ring = {"symbol": "circle-open", "size": 11, "outline": {"width": 2.5}, "showlegend": False}
                plot.points(figure, reached["time"], reached["value"], colour, None, **ring, **at)
            ends.append(own[own["n"] > 0].tail(1).assign(colour=colour))
        last = pd.concat(ends)
        heights = _apart(last["value"].tolist(), LABEL * float(rows["value_high"].max()))
        for height, end in zip(heights, last.to_dict("records"), strict=True):
            look = {"textposition": "middle right", "textfont": {"size": 10, "color": end["colour"]}, "cliponaxis": False}
            plot.labels(figure, [end["time"]], [height], [f" {end['part']}"], **look, **at)
        figure.update_xaxes(showticklabels=place + n_columns >= len(by_panel), **at)
    figure.update_yaxes(rangemode="tozero")
    about = [f"strongest {strongest}", f"ring: reaches {SHARE:.0%} of its maximum", "dotted: never passes its criterion"]
    size: dict[str, Any] = {"height": 160 + 250 * n_rows, "width": max(480, 300 * n_columns)}
    return _over_time(figure, result, title, about, n_rows=n_rows, room=2.5, **size)


def consistency_over_training(result: TrainingResult, title: str | None = None) -> go.Figure:
    """The share of the IOI circuit's effects that heads of the published kinds have, by step of the algorithm.

    Solid: of absolute effects; dotted: signed. Undefined checkpoints (no circuit, or no receivers of the step) are crossed.
    """
    title = title or "IOI by the published algorithm"
    if result.of("consistency").empty:
        return plot.empty(f"{NOT_MEASURED.format('consistency')}, with the task ioi", title)
    averages = _timed(result, result.of("consistency", "share_absolute", "share_signed"))
    parts = sorted(averages["part"].unique(), key=list(ALGORITHM).index)
    titles = [f"{place}: {part}" for place, part in enumerate(parts, start=1)]
    figure = plot.panels(titles, shared_yaxes=True, horizontal_spacing=0.05)
    for column, part in enumerate(parts, start=1):
        for i, (name, dash) in enumerate((("absolute", "solid"), ("signed", "dot"))):
            rows = averages[(averages["part"] == part) & (averages["quantity"] == f"share_{name}")]
            _line(figure, rows, name, i, dash, row=1, col=column, showlegend=column == 1)
            if name == "absolute":
                _crosses(figure, rows, -0.08, plot.NEUTRAL, "undefined<extra></extra>", column)
    figure.update_yaxes(title_text="share of the effects", row=1, col=1)
    ends = averages[["value_low", "value", "value_high"]].stack()
    figure.update_yaxes(range=[np.nanmin([-0.15, ends.min() - 0.05]), np.nanmax([1.05, ends.max() + 0.05])])
    size: dict[str, Any] = {"height": 420, "width": 1050, "legend": plot.below(0.28)}
    return _over_time(figure, result, title, ["crosses: undefined"], **size)


def model_size_figure(
    results: Sequence[TrainingResult], against: str = "model_parameters", title: str | None = None
) -> go.Figure:
    """Edges and nodes of every model's circuits over its size, both logarithmic, with Pearson's r of the logarithms.

    A point is the mean over checkpoints that have a circuit; its bar runs from the lowest to the highest draw.

    Raises:
        MethodError: as ``size_correlations``, but for too few models: the figure says so.
    """
    title = title or "Circuit size against model size"
    if len(results) < LEAST_MODELS:
        return plot.empty(f"at least {LEAST_MODELS} models are needed, {len(results)} given: compare others", title)
    if any(result.of("circuit").empty for result in results):
        return plot.empty(NOT_MEASURED.format("circuit"), title)
    correlations = size_correlations(results, against)
    correlations = correlations[correlations["statistic"] == "pearson of logarithms"]
    sizes = model_sizes(results)
    figure = plot.panels([""] * len(CIRCUIT_SIZES), horizontal_spacing=0.12)
    for column, quantity in enumerate(CIRCUIT_SIZES, start=1):
        for i, (task, rows) in enumerate(sizes.sort_values(against).groupby("task", sort=False)):
            chosen = (correlations["quantity"] == quantity) & (correlations["task"] == task)
            r = correlations[chosen].rename(columns={"low": "value_low", "high": "value_high"}).iloc[0]
            name = f"{html.escape(str(task))}, {AXES[quantity].split()[0]}: r = {plot.figure_text(r, 'value')}, n = {r['n']}"
            look = {"width": 1, "size": 8, "symbol": plot.SYMBOLS[i % 7], "name": name, "customdata": rows["model"]}
            look |= {"error_y": plot.whiskers(rows.to_dict("records"), quantity), "row": 1, "col": column}
            hover = "%{customdata}: %{y:.4g} of %{x:,}<extra></extra>"
            plot.curve(figure, rows, against, quantity, plot.OKABE_ITO[i % 6], hover, **look)
        figure.update_yaxes(title_text=AXES[quantity], type="log", row=1, col=column)
    figure.update_xaxes(title_text=shown(against), type="log")
    about = [f"n = {sizes['model'].nunique()} models", "mean over checkpoints with a circuit, range of draws"]
    about += ["r: Pearson's of logarithms, 95%"]
    size: dict[str, Any] = {"height": 460, "width": 1000, "legend": plot.below(0.25), "margin": {"b": 130}}
    return plot.titled(figure, title, about, **size)


def swap_grid(result: TrainingResult, accuracy: bool = False, title: str | None = None) -> go.Figure:
    """A column for each task: the metric of host and donor, what each swap changes in each host, and its nulls.

    Colours of both grids of a task mean the same, white nothing; the scale is that of the swaps, and nulls beyond it are
    drawn in its last colour. A dot marks swaps that raise the metric, and more than every null, in every draw.
    """
    donor = str(result.provenance.get("measures", {}).get("swap", {}).get("donor", ["a later checkpoint"])[0])
    title = title or f"Single components of {donor} put into each checkpoint"
    if result.of("swap").empty:
        return plot.empty(NOT_MEASURED.format("swap"), title)
    changes = swap_changes(result)
    changes = changes[(changes["of"] == ACCURACY) == accuracy]
    tasks = changes["task"].unique().tolist()
    grid_height = 60 + 26 * changes["part"].nunique()
    heights = [170, grid_height, grid_height]
    names = ["{task}: host (line), donor (dashed)", "change by the swap", "null: another component there"]
    titles = [name.format(task=html.escape(str(task))) for name in names for task in tasks]
    spacing: dict[str, Any] = {"horizontal_spacing": 0.22 / len(tasks), "vertical_spacing": 0.1}
    figure = plot.panels(titles, len(tasks), row_heights=[height / sum(heights) for height in heights], **spacing)
    for column, task in enumerate(tasks, start=1):
        _add_swaps(figure, changes[changes["task"] == task], -95 / sum(heights), column)
    n_draws, n_pairs = int(changes["n"].max()), result.provenance.get("n_pairs")
    about = [f"n = {n_pairs} pairs" if "n_pairs" in result.provenance else ""]
    about += [f"mean of {n_draws} draws of prompts" if n_draws > 1 else "one draw of prompts"]
    about += ["dot: raises the metric, and more than every null, in every draw"]
    about += ["nulls beyond the scale take its last colour"]
    size: dict[str, Any] = {"height": sum(heights) + 260, "width": 140 + 340 * len(tasks), "margin": {"t": 110, "b": 120}}
    return plot.titled(figure, title, about, showlegend=False, **size)


def _add_swaps(figure: go.Figure, changes: pd.DataFrame, bar_height: float, column: int) -> None:
    """The panels of one task: lines of host and donor, a grid of changes with dots, a grid of nulls, a colour bar."""
    parts, steps = changes["part"].unique().tolist(), sorted(changes["step"].unique().tolist())
    of = str(changes["of"].iloc[0])
    unit = "share of prompts" if of == ACCURACY else METRICS[of].unit
    figure.update_yaxes(title_text=f"{shown(of)} ({unit})" if of == ACCURACY else shown(of), row=1, col=column)
    hosts = changes.drop_duplicates("step").sort_values("step").assign(place=range(len(steps)))
    for name, colour, dash in (("host", plot.POSITIVE, "solid"), ("donor", plot.DARK, "dash")):
        hover = f"{name}, step %{{customdata}}: %{{y:.3g}}<extra></extra>"
        look = {"dash": dash, "name": name, "customdata": hosts["step"], "row": 1, "col": column}
        plot.curve(figure, hosts, "place", name, colour, hover, **look)
    colours = "coloraxis" if column == 1 else f"coloraxis{column}"
    for row, value in enumerate(("change", "null"), start=2):
        texts = changes.assign(text=[_swap_hover(cell, value) for cell in changes.to_dict("records")])
        grid = changes.pivot(index="part", columns="step", values=value).loc[parts].set_axis(range(len(steps)), axis=1)
        words = texts.pivot(index="part", columns="step", values="text").loc[parts].to_numpy()
        look = {"hovertext": words, "coloraxis": colours, "row": row, "col": column}
        plot.heatmap(figure, grid, "%{hovertext}<extra></extra>", **look)
        figure.update_yaxes(autorange="reversed", type="category", mirror=True, showgrid=False, row=row, col=column)
        figure.update_xaxes(mirror=True, row=row, col=column)
    places = np.argwhere(changes.pivot(index="part", columns="step", values="beats_nulls").loc[parts].to_numpy())
    y = [parts[i] for i in places[:, 0]]
    plot.points(figure, places[:, 1].tolist(), y, plot.DARK, None, size=4, row=2, col=column)
    left, right = figure.get_subplot(3, column).xaxis.domain
    bar = {"title": {"text": f"change ({unit})", "side": "bottom", "font": {"size": 12}}, "thickness": 10}
    bar |= {"orientation": "h", "x": left, "xanchor": "left", "len": right - left, "y": bar_height, "yanchor": "top"}
    limit = float(changes["change"].abs().max()) or 1.0
    scale = plot.signed_scale(limit, "c") | {"colorbar": bar | {"tickfont": {"size": 11}}}
    figure.update_layout({colours: scale})
    ticks = range(0, len(steps), -(-len(steps) // MOST_TICKS))
    axis = {"tickvals": list(ticks), "ticktext": [plot.short_number(steps[i]) for i in ticks], "tickangle": 0}
    figure.update_xaxes(range=[-0.5, len(steps) - 0.5], showgrid=False, **axis, col=column)
    figure.update_xaxes(title_text="step of the host", row=3, col=column)


def _swap_hover(cell: plot.Row, value: str) -> str:
    mean, low, high = (plot.number(cell[f"{value}{end}"], 3) for end in plot.ENDS)
    what, ends = ("swap", "draws") if value == "change" else ("another component there", "nulls")
    return f"<b>{cell['part']}</b> into step {cell['step']}<br>{what}: {mean} ({ends} from {low} to {high})"


def _times(result: TrainingResult) -> tuple[str, list[int], float]:
    """The column of time (tokens where every checkpoint has them, else steps), its values, and the place of 0."""
    if result.frame.empty:
        raise MethodError("the result has no checkpoints: there is nothing to show")
    column = "tokens" if result.frame["tokens"].notna().all() else "step"
    times = sorted({int(time) for time in result.frame[column]})
    return column, times, min((time for time in times if time > 0), default=2) / 2


def _timed(result: TrainingResult, rows: pd.DataFrame) -> pd.DataFrame:
    """Means over draws: value, value_low and value_high (range of the draws), and time, its place on the axis."""
    column, _, zero = _times(result)
    averages = over_draws(rows).rename(columns={"low": "value_low", "high": "value_high"})
    return averages.assign(time=[float(time) or zero for time in averages[column]])


def _over_time(
    figure: go.Figure, result: TrainingResult, title: str, about: list[str], n_rows: int = 1, room: float = 1.15, **size: Any
) -> go.Figure:
    """The figure with its title and its axis of time, with ``room`` behind the last checkpoint."""
    column, times, zero = _times(result)
    last, has_zero = max(2, times[-1]), times[0] == 0
    low = np.log10(zero if has_zero else 2 * zero)
    powers = [10.0**power for power in range(int(np.ceil(low - 1e-9)), int(np.log10(last)) + 1)]
    text = [*(["0"] if has_zero else []), *map(plot.short_number, powers)]
    span = [low - 0.1, np.log10(last) + np.log10(room)]
    figure.update_xaxes(type="log", range=span, tickvals=[zero, *powers] if has_zero else powers, ticktext=text)
    figure.update_xaxes(title_text="tokens read" if column == "tokens" else "training step", row=n_rows)
    n_draws, n_pairs = result.frame["seed"].nunique(), result.provenance.get("n_pairs")
    counts = [f"{result.frame['step'].nunique()} checkpoints", f"n = {n_pairs} pairs" if n_pairs else ""]
    counts += [f"mean and range of {n_draws} draws of prompts" if n_draws > 1 else "one draw of prompts"]
    return plot.titled(figure, title, [*counts, *about], margin={"t": 110}, **size)


def _line(
    figure: go.Figure, rows: pd.DataFrame, name: str, i: int, dash: str = "solid", fill: bool = True, **at: Any
) -> None:
    """The ``i``-th line of a panel with its band; broken where it is undefined."""
    colour = plot.OKABE_ITO[i % len(plot.OKABE_ITO)]
    if fill:
        plot.band(figure, rows, "time", "value", colour, legendgroup=name, **at | {"showlegend": False})
    look: dict[str, Any] = {"dash": dash, "size": 5 if dash == "solid" else 0, "symbol": plot.SYMBOLS[i % len(plot.SYMBOLS)]}
    look |= {"name": html.escape(name), "legendgroup": name, "customdata": rows["step"]}
    hover = f"<b>{html.escape(name)}</b><br>step %{{customdata}}: %{{y:.3g}}<extra></extra>"
    plot.curve(figure, rows, "time", "value", colour, hover, **look, **at)


def _crosses(figure: go.Figure, rows: pd.DataFrame, height: float, colour: str, hover: str, column: int) -> None:
    """Crosses where a figure is undefined in every draw."""
    missing = rows[rows["n"] == 0]
    look = {"symbol": "x-thin", "outline": {"color": colour, "width": 1.5}, "showlegend": False, "row": 1, "col": column}
    plot.points(figure, missing["time"], [height] * len(missing), colour, hover, **look)


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Heights of labels, moved upwards where another is nearer than ``least`` below."""
    moved, before = list(heights), -np.inf
    for i in np.argsort(heights, kind="stable").tolist():
        moved[i] = before = max(moved[i], before + least)
    return moved
