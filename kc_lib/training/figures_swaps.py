"""Component swap: what single components of a later checkpoint change in earlier ones, as a grid."""

from __future__ import annotations

import html

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kc_lib.metrics import METRICS
from kc_lib.plotting import DARK, ENDS, POSITIVE, SIGNED_SCALE, Row, number, short_number, titled
from kc_lib.training.over_training import TrainingResult
from kc_lib.training.summary import shown
from kc_lib.training.swaps import ACCURACY, swap_changes

MOST_TICKS = 10  # of a panel's time axis


def swap_grid(result: TrainingResult, accuracy: bool = False, title: str | None = None) -> go.Figure:
    """A column for each task: the metric of host and donor, what each swap changes in each host, and its nulls.

    Colours of both grids of a task mean the same, white nothing; the scale is that of the swaps, and nulls beyond it are
    drawn in its last colour. A dot marks swaps that raise the metric, and more than every null, in every draw.

    Raises:
        MethodError: no swaps in the result.
    """
    found = swap_changes(result)
    found = found[(found["of"] == ACCURACY) == accuracy]
    tasks = found["task"].unique().tolist()
    n_parts, n_tasks = found["part"].nunique(), len(tasks)
    heights = [170, 60 + 26 * n_parts, 60 + 26 * n_parts]
    names = ["{task}: host (line), donor (dashed)", "change by the swap", "null: another component there"]
    figure = make_subplots(
        3,
        n_tasks,
        subplot_titles=[name.format(task=html.escape(str(task))) for name in names for task in tasks],
        row_heights=[height / sum(heights) for height in heights],
        horizontal_spacing=0.22 / n_tasks,
        vertical_spacing=0.1,
    )
    figure.update_annotations(font_size=13)
    for column, task in enumerate(tasks, start=1):
        own = found[found["task"] == task]
        of = str(own["of"].iloc[0])
        unit = "share of prompts" if of == ACCURACY else METRICS[of].unit
        _add_lines(figure, own, f"{shown(of)} ({unit})" if of == ACCURACY else shown(of), column)
        _add_grids(figure, own, f"change ({unit})", -95 / sum(heights), column)
        steps = sorted(own["step"].unique().tolist())
        shown_ticks = range(0, len(steps), -(-len(steps) // MOST_TICKS))
        ticks = {"tickvals": list(shown_ticks), "ticktext": [short_number(steps[i]) for i in shown_ticks]}
        figure.update_xaxes(range=[-0.5, len(steps) - 0.5], showgrid=False, tickangle=0, **ticks, col=column)
        figure.update_xaxes(title_text="step of the host", row=3, col=column)
    n_draws = int(found["n"].max())
    about = [
        f"n = {result.provenance['n_pairs']} pairs" if "n_pairs" in result.provenance else "",
        f"mean of {n_draws} draws of prompts" if n_draws > 1 else "one draw of prompts",
        "dot: raises the metric, and more than every null, in every draw",
        "nulls beyond the scale take its last colour",
    ]
    figure.update_layout(height=sum(heights) + 260, width=140 + 340 * n_tasks, showlegend=False, margin={"t": 110, "b": 120})
    return titled(figure, title or f"Single components of {_donor(result)} put into each checkpoint", about)


def _add_lines(figure: go.Figure, own: pd.DataFrame, axis: str, column: int) -> None:
    rows = own.drop_duplicates("step").sort_values("step")
    x = list(range(len(rows)))
    lines = {"host": ("host", POSITIVE, "solid"), "donor": ("donor", DARK, "dash")}
    for whose, (name, colour, dash) in lines.items():
        line = go.Scatter(x=x, y=rows[whose], mode="lines", name=name)
        line.update(line={"color": colour, "width": 2, "dash": dash}, customdata=rows["step"])
        line.update(hovertemplate=f"{name}, step %{{customdata}}: %{{y:.3g}}<extra></extra>")
        figure.add_trace(line, 1, column)
    figure.update_yaxes(title_text=axis, row=1, col=column)


def _add_grids(figure: go.Figure, own: pd.DataFrame, name: str, below: float, column: int) -> None:
    parts = own["part"].unique().tolist()
    limit = float(own["change"].abs().max()) or 1.0
    colours = "coloraxis" if column == 1 else f"coloraxis{column}"
    for row, value in enumerate(("change", "null"), start=2):
        grid = own.pivot(index="part", columns="step", values=value).loc[parts]
        text = own.assign(text=[_hover(cell, value) for cell in own.to_dict("records")])
        cells = go.Heatmap(
            x=list(range(grid.shape[1])),
            y=parts,
            z=grid.to_numpy(),
            hovertext=text.pivot(index="part", columns="step", values="text").loc[parts].to_numpy(),
            hovertemplate="%{hovertext}<extra></extra>",
            coloraxis=colours,
            xgap=1,
            ygap=1,
        )
        figure.add_trace(cells, row, column)
        figure.update_yaxes(autorange="reversed", type="category", mirror=True, showgrid=False, row=row, col=column)
        figure.update_xaxes(mirror=True, row=row, col=column)
    places = np.argwhere(own.pivot(index="part", columns="step", values="beats_nulls").loc[parts].to_numpy())
    dots = go.Scatter(x=places[:, 1], y=[parts[i] for i in places[:, 0]], mode="markers", hoverinfo="skip")
    figure.add_trace(dots.update(marker={"color": DARK, "size": 4}), 2, column)
    left, right = figure.get_subplot(3, column).xaxis.domain
    bar = {"title": {"text": name, "side": "bottom", "font": {"size": 12}}, "thickness": 10, "tickfont": {"size": 11}}
    bar |= {"orientation": "h", "x": left, "xanchor": "left", "len": right - left, "y": below, "yanchor": "top"}
    axis = {"colorscale": SIGNED_SCALE, "cmid": 0, "cmin": -limit, "cmax": limit, "colorbar": bar}
    figure.update_layout({colours: axis})


def _hover(cell: Row, value: str) -> str:
    mean, low, high = (number(cell[f"{value}{end}"], 3) for end in ENDS)
    what = "swap" if value == "change" else "another component there"
    ends = "draws" if value == "change" else "nulls"
    return f"<b>{cell['part']}</b> into step {cell['step']}<br>{what}: {mean} ({ends} from {low} to {high})"


def _donor(result: TrainingResult) -> str:
    """The donor's name, where the result knows it."""
    return str(result.provenance.get("measures", {}).get("swap", {}).get("donor", ["a later checkpoint"])[0])
