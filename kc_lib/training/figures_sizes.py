"""How large the circuits of several models are, against the size of the model."""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kc_lib.plotting import OKABE_ITO, SYMBOLS, number, titled, whiskers
from kc_lib.training.over_training import TrainingResult
from kc_lib.training.sizes import CIRCUIT_SIZES, model_sizes, size_correlations
from kc_lib.training.summary import shown

AXES = {"n_edges": "edges of the circuit", "n_nodes": "nodes of the circuit"}


def model_size_figure(
    results: Sequence[TrainingResult], against: str = "model_parameters", title: str | None = None
) -> go.Figure:
    """Edges and nodes of every model's circuits over its size, both logarithmic, with Pearson's r of the logarithms.

    A point is the mean over checkpoints that have a circuit; its bar runs from the lowest to the highest draw.

    Raises:
        MethodError: as ``size_correlations``.
    """
    correlations = size_correlations(results, against)
    correlations = correlations[correlations["statistic"] == "pearson of logarithms"]
    sizes = model_sizes(results)
    figure = make_subplots(1, len(CIRCUIT_SIZES), horizontal_spacing=0.12)
    for column, quantity in enumerate(CIRCUIT_SIZES, start=1):
        for i, (task, own) in enumerate(sizes.groupby("task", sort=False)):
            own = own.sort_values(against)
            of = (correlations["quantity"] == quantity) & (correlations["task"] == task)
            (row,) = correlations[of].to_dict("records")
            name = f"{html.escape(str(task))}, {AXES[quantity].split()[0]}: r = {number(row['value'])}"
            name += f" [{number(row['low'])}, {number(row['high'])}], n = {row['n']}"
            line = {"mode": "lines+markers", "line": {"color": OKABE_ITO[i % len(OKABE_ITO)], "width": 1}}
            line |= {"marker": {"size": 8, "symbol": SYMBOLS[i % len(SYMBOLS)]}, "customdata": own["model"]}
            points = go.Scatter(x=own[against], y=own[quantity], name=name, **line)
            points.update(error_y=whiskers(own.to_dict("records"), quantity))
            points.update(hovertemplate="%{customdata}: %{y:.4g} of %{x:,}<extra></extra>")
            figure.add_trace(points, 1, column)
        figure.update_yaxes(title_text=AXES[quantity], type="log", row=1, col=column)
    figure.update_xaxes(title_text=shown(against), type="log")
    legend = {"orientation": "h", "x": 0, "y": -0.25, "yanchor": "top"}
    figure.update_layout(height=460, width=1000, legend=legend, margin={"b": 130})
    about = [
        f"n = {sizes['model'].nunique()} models",
        "mean over checkpoints with a circuit, range of draws",
        "r: Pearson's of logarithms, 95%",
    ]
    return titled(figure, title or "Circuit size against model size", about)
