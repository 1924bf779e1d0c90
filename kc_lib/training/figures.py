"""Figures of a training: what the model does, its circuits and its heads at every checkpoint, over a logarithm of time.

Time is in tokens read where that is known, else in steps. A logarithm has no place for step 0: it stands half a unit of the
first later checkpoint to the left, and says 0. Lines are means over the draws of prompts, bands run from the lowest
to the highest draw. Where a figure is undefined its line is broken.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from kc_lib.errors import MethodError
from kc_lib.plotting import DARK, NEUTRAL, OKABE_ITO, SYMBOLS, short_number, titled
from kc_lib.training.behaviour import BEHAVIOURS
from kc_lib.training.ioi_algorithm import STEPS as ALGORITHM
from kc_lib.training.over_training import TrainingResult
from kc_lib.training.summary import SHARE, SIMILARITIES, emergence, over_draws, shown, similarities

SHOWN_BEHAVIOURS = ("logit_difference", "probability_difference", "accuracy", "mrr")
STRONGEST = 3  # heads of a panel
SCORE_COLUMNS = 4
LABEL = 0.07  # of a panel's height, that the name of a head takes
EDGE_TICKS = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]


def behaviour_over_training(
    result: TrainingResult, behaviours: Sequence[str] = SHOWN_BEHAVIOURS, title: str | None = None
) -> go.Figure:
    """One panel for each behaviour, one line for each task.

    Raises:
        MethodError: no behaviours in the result, or an unknown one.
    """
    unknown = [name for name in behaviours if name not in BEHAVIOURS]
    if unknown or not behaviours:
        raise MethodError(f"{unknown or 'nothing'}: show some of {', '.join(BEHAVIOURS)}")
    found = _averaged(result, "behaviour", behaviours)
    axis = _Time(result)
    texts = [shown(name) for name in behaviours]
    figure = make_subplots(1, len(behaviours), subplot_titles=texts, horizontal_spacing=0.06)
    for column, name in enumerate(behaviours, start=1):
        for i, (task, own) in enumerate(found[found["quantity"] == name].groupby("task", sort=False)):
            _line(figure, axis, own, str(task), i, 1, column, legend=column == 1)
        figure.update_yaxes(title_text=BEHAVIOURS[name], row=1, col=column)
    axis.draw(figure, 1)
    figure.update_annotations(font_size=13)
    figure.update_layout(height=420, width=max(420, 300 * len(behaviours)), legend=_below(0.28), margin={"t": 110})
    return titled(figure, title or "Behaviour over training", axis.about())


def circuit_over_training(result: TrainingResult, title: str | None = None) -> go.Figure:
    """The circuits' size, their held-out faithfulness beside random circuits, and the effect that it is a share of.

    Checkpoints without a circuit (the prompts have next to no effect) are crossed on the lower axis of the faithfulness.

    Raises:
        MethodError: no circuits in the result.
    """
    found = _averaged(result, "circuit", ("effect", "n_edges", "faithfulness", "null_faithfulness"))
    axis = _Time(result)
    titles = ["edges of the smallest faithful circuit", "faithfulness, held out", "effect of the prompts"]
    figure = make_subplots(1, 3, subplot_titles=titles, horizontal_spacing=0.07)
    for i, (task, rows) in enumerate(found.groupby("task", sort=False)):
        of = {str(name): own for name, own in rows.groupby("quantity", sort=False)}
        for column, name in enumerate(("n_edges", "faithfulness", "effect"), start=1):
            _line(figure, axis, of[name], str(task), i, 1, column, legend=column == 1)
        _line(figure, axis, of["null_faithfulness"], f"{task}: random circuits", i, 1, 2, dash="dot", legend=True)
        missing = of["faithfulness"][of["faithfulness"]["n"] == 0]
        mark = {"symbol": "x-thin", "size": 8, "line": {"color": _colour(i), "width": 1.5}}
        hover = f"{html.escape(str(task))}: undefined, next to no effect<extra></extra>"
        crosses = go.Scatter(
            x=axis.of(missing), y=[-0.08 - 0.05 * i] * len(missing), mode="markers", marker=mark, showlegend=False
        )
        figure.add_trace(crosses.update(hovertemplate=hover), 1, 2)
    figure.add_hline(y=1.0, line={"color": NEUTRAL, "width": 1, "dash": "dash"}, row=1, col=2)
    figure.update_yaxes(type="log", title_text="edges", tickvals=EDGE_TICKS, row=1, col=1)
    figure.update_yaxes(title_text="share of the full model's effect", row=1, col=2)
    figure.update_yaxes(title_text="metric, clean minus corrupted", row=1, col=3)
    axis.draw(figure, 1)
    figure.update_annotations(font_size=13)
    figure.update_layout(height=460, width=1200, legend=_below(0.26), margin={"t": 110})
    about = [*axis.about(), "crosses: undefined, next to no effect"]
    return titled(figure, title or "Circuits over training", about)


def similarity_over_training(result: TrainingResult, title: str | None = None) -> go.Figure:
    """Overlap of circuits with the checkpoint before and with the last one, beside what other prompts would give.

    One column for each of ``SIMILARITIES``. Lines are exponentially weighted means, dots single checkpoints. Dotted, for
    edges: one checkpoint's circuits from resampled prompts, which circuits of two checkpoints will hardly exceed.

    Raises:
        MethodError: no circuits in the result.
    """
    found = similarities(result)
    noise = _averaged(result, "circuit", ("resampled_jaccard",))
    axis = _Time(result)
    titles = [f"{shown(name)}, {against}" for against in ("previous", "last") for name in SIMILARITIES]
    spacing = {"horizontal_spacing": 0.05, "vertical_spacing": 0.12}
    figure = make_subplots(2, 3, subplot_titles=titles, shared_xaxes=True, shared_yaxes=True, **spacing)
    for row, against in enumerate(("previous", "last"), start=1):
        for column, name in enumerate(SIMILARITIES, start=1):
            chosen = found[(found["against"] == against) & (found["quantity"] == name)]
            for i, (task, own) in enumerate(chosen.groupby("task", sort=False)):
                plain = over_draws(own.assign(part=""))
                smooth = over_draws(own.assign(part="", value=own["ewma"]))
                thin = go.Scatter(
                    x=axis.of(plain), y=plain["value"], mode="markers", marker={"color": _colour(i), "size": 5}
                )
                figure.add_trace(thin.update(showlegend=False, hovertemplate="%{y:.2f}<extra></extra>"), row, column)
                _line(figure, axis, smooth, str(task), i, row, column, legend=row == column == 1)
                if name == "edge_jaccard":
                    of_task = noise[noise["task"] == task]
                    label = f"{task}: resampled prompts"
                    _line(figure, axis, of_task, label, i, row, column, dash="dot", legend=row == 1, fill=False)
    figure.update_yaxes(range=[-0.03, 1.05])
    for row in (1, 2):
        figure.update_yaxes(title_text="overlap", row=row, col=1)
    axis.draw(figure, 2)
    figure.update_annotations(font_size=13)
    figure.update_layout(height=640, width=1150, legend=_below(0.16), margin={"t": 110})
    about = [
        *axis.about(),
        "lines: exponentially weighted, alpha 0.5",
        "dots: single checkpoints",
        "dotted: resampled prompts",
    ]
    return titled(figure, title or "How much circuits stay the same", about)


def heads_over_training(result: TrainingResult, strongest: int = STRONGEST, title: str | None = None) -> go.Figure:
    """The strongest heads of each score and of each task's direct effect, and when each reaches a third of its maximum.

    A ring marks that checkpoint. Lines are dotted, and have no ring, where the head's score never passes its criterion:
    something has appeared only where there is something. Direct effects have no criterion.

    Raises:
        MethodError: no head scores and no direct effects in the result.
    """
    appeared = emergence(result)
    appeared = appeared[appeared["measure"].isin(["direct", "heads"])]
    if appeared.empty or strongest < 1:
        raise MethodError("there are no heads to show: measure 'heads' or 'direct' as well, and show at least one")
    axis = _Time(result)
    panels = list(appeared.groupby(["measure", "task", "quantity"], sort=False))
    n_columns = min(SCORE_COLUMNS, len(panels))
    n_rows = -(-len(panels) // n_columns)
    titles = [f"direct effect, {task}" if measure == "direct" else shown(name) for (measure, task, name), _ in panels]
    spacing = {"horizontal_spacing": 0.06, "vertical_spacing": 0.24 / n_rows}
    figure = make_subplots(n_rows, n_columns, subplot_titles=titles, shared_xaxes=True, **spacing)
    figure.update_annotations(font_size=13)
    for place, ((measure, task, name), heads) in enumerate(panels):
        row, column = divmod(place, n_columns)
        rows = result.of(str(measure), str(name))
        rows = over_draws(rows[rows["task"] == task])
        ends = {}
        for i, head in enumerate(heads.sort_values("maximum", ascending=False).head(strongest).to_dict("records")):
            own = rows[rows["part"] == head["part"]]
            dash = "solid" if measure == "direct" or head["passes"] else "dot"
            _line(figure, axis, own, head["part"], i, row + 1, column + 1, dash=dash, legend=False)
            if dash == "solid":
                at = own[own["step"] == head["step"]]
                mark = {"symbol": "circle-open", "size": 11, "color": _colour(i), "line": {"width": 2.5}}
                ring = go.Scatter(x=axis.of(at), y=at["value"], mode="markers", marker=mark, showlegend=False)
                figure.add_trace(ring.update(hoverinfo="skip"), row + 1, column + 1)
            ends[head["part"]] = own[own["n"] > 0].tail(1)
        heights = _apart([float(end["value"].iloc[0]) for end in ends.values()], LABEL * float(rows["high"].max()))
        for i, ((head_name, end), height) in enumerate(zip(ends.items(), heights, strict=True)):
            label = go.Scatter(x=axis.of(end), y=[height], mode="text", text=[f" {head_name}"], showlegend=False)
            label.update(
                textposition="middle right", textfont={"size": 10, "color": _colour(i)}, hoverinfo="skip", cliponaxis=False
            )
            figure.add_trace(label, row + 1, column + 1)
        lowest = place + n_columns >= len(panels)
        figure.update_xaxes(showticklabels=lowest, row=row + 1, col=column + 1)
    figure.update_yaxes(rangemode="tozero")
    axis.draw(figure, n_rows, room=2.5)
    figure.update_layout(height=160 + 250 * n_rows, width=max(480, 300 * n_columns), margin={"t": 110})
    about = [f"strongest {strongest}", f"ring: reaches {SHARE:.0%} of its maximum", "dotted: never passes its criterion"]
    return titled(figure, title or "Heads over training", [*axis.about(), *about])


def consistency_over_training(result: TrainingResult, title: str | None = None) -> go.Figure:
    """The share of the IOI circuit's effects that heads of the published kinds have, by step of the algorithm.

    Solid: of absolute effects; dotted: signed. Undefined checkpoints (no circuit, or no receivers of the step) are crossed.

    Raises:
        MethodError: no such shares in the result.
    """
    found = _averaged(result, "consistency", ("share_absolute", "share_signed"))
    axis = _Time(result)
    parts = found["part"].unique().tolist()
    parts.sort(key=list(ALGORITHM).index)
    titles = [f"{place}: {part}" for place, part in enumerate(parts, start=1)]
    figure = make_subplots(1, len(parts), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.05)
    for column, part in enumerate(parts, start=1):
        own = found[found["part"] == part]
        absolute, signed = (own[own["quantity"] == f"share_{name}"] for name in ("absolute", "signed"))
        _line(figure, axis, absolute, "absolute", 0, 1, column, legend=column == 1)
        _line(figure, axis, signed, "signed", 1, 1, column, dash="dot", legend=column == 1)
        missing = absolute[absolute["n"] == 0]
        mark = {"symbol": "x-thin", "size": 8, "line": {"color": NEUTRAL, "width": 1.5}}
        crosses = go.Scatter(x=axis.of(missing), y=[-0.08] * len(missing), mode="markers", marker=mark, showlegend=False)
        figure.add_trace(crosses.update(hovertemplate="undefined<extra></extra>"), 1, column)
    figure.update_yaxes(title_text="share of the effects", row=1, col=1)
    axis.draw(figure, 1)
    ends = [found[["low", "value"]].min().min(), found[["high", "value"]].max().max()]
    figure.update_yaxes(range=[np.nanmin([-0.15, ends[0] - 0.05]), np.nanmax([1.05, ends[1] + 0.05])])
    figure.update_annotations(font_size=13)
    figure.update_layout(height=420, width=1050, legend=_below(0.28), margin={"t": 110})
    return titled(figure, title or "IOI by the published algorithm", [*axis.about(), "crosses: undefined"])


class _Time:
    """The axis of time: tokens where every checkpoint has them, else steps, with a place for 0."""

    def __init__(self, result: TrainingResult) -> None:
        frame = result.frame
        if frame.empty:
            raise MethodError("the result has no checkpoints: there is nothing to show")
        self.column = "tokens" if frame["tokens"].notna().all() else "step"
        times = sorted({int(time) for time in frame[self.column]})
        positive = [time for time in times if time > 0]
        self.zero = min(positive, default=2) / 2
        self.last = max(positive, default=2)
        self.has_zero = times[0] == 0
        self.n_checkpoints = frame["step"].nunique()
        self.n_draws = frame["seed"].nunique()
        self.n_pairs = result.provenance.get("n_pairs")

    def of(self, rows: pd.DataFrame) -> list[float]:
        return [float(time) or self.zero for time in rows[self.column]]

    def draw(self, figure: go.Figure, n_rows: int, room: float = 1.15) -> None:
        low = np.log10(self.zero if self.has_zero else 2 * self.zero)
        places = [10.0**power for power in range(int(np.ceil(low - 1e-9)), int(np.log10(self.last)) + 1)]
        ticks = [self.zero, *places] if self.has_zero else places
        text = ["0", *map(short_number, places)] if self.has_zero else list(map(short_number, places))
        span = [low - 0.1, np.log10(self.last) + np.log10(room)]
        figure.update_xaxes(type="log", range=span, tickvals=ticks, ticktext=text)
        figure.update_xaxes(title_text="tokens read" if self.column == "tokens" else "training step", row=n_rows)

    def about(self) -> list[str]:
        bands = f"mean and range of {self.n_draws} draws of prompts" if self.n_draws > 1 else "one draw of prompts"
        return [f"{self.n_checkpoints} checkpoints", f"n = {self.n_pairs} pairs" if self.n_pairs else "", bands]


def _averaged(result: TrainingResult, measure: str, quantities: Sequence[str]) -> pd.DataFrame:
    rows = result.of(measure, *quantities)
    if rows.empty:
        raise MethodError(f"the result has nothing of {measure!r} to show: measure it as well")
    return over_draws(rows)


def _colour(i: int) -> str:
    return OKABE_ITO[i % len(OKABE_ITO)]


def _line(
    figure: go.Figure,
    axis: _Time,
    rows: pd.DataFrame,
    name: str,
    i: int,
    row: int,
    column: int,
    *,
    dash: str = "solid",
    legend: bool = True,
    fill: bool = True,
) -> None:
    """A line with its band; broken where it is undefined."""
    x, colour = axis.of(rows), _colour(i)
    if fill:
        for run in _runs(rows["value"].notna().tolist()):
            band = rows.iloc[run]
            edge = [x[place] for place in run]
            ends = [*band["low"], *band["high"][::-1]]
            shape = go.Scatter(
                x=[*edge, *edge[::-1]], y=ends, fill="toself", mode="none", hoverinfo="skip", showlegend=False
            )
            red, green, blue = hex_to_rgb(colour)
            figure.add_trace(shape.update(fillcolor=f"rgba({red},{green},{blue},0.16)", legendgroup=name), row, column)
    mode = "lines+markers" if dash == "solid" else "lines"
    trace = go.Scatter(x=x, y=rows["value"], mode=mode, name=html.escape(name), legendgroup=name, showlegend=legend)
    trace.update(line={"color": colour, "width": 2, "dash": dash}, connectgaps=False)
    trace.update(marker={"size": 5, "symbol": SYMBOLS[i % len(SYMBOLS)]})
    hover = f"<b>{html.escape(name)}</b><br>step %{{customdata}}: %{{y:.3g}}<extra></extra>"
    figure.add_trace(trace.update(customdata=rows["step"], hovertemplate=hover), row, column)


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Heights of labels, moved upwards where another is nearer than ``least`` below."""
    moved, before = list(heights), -np.inf
    for i in np.argsort(heights, kind="stable").tolist():
        moved[i] = before = max(moved[i], before + least)
    return moved


def _runs(defined: Sequence[bool]) -> list[list[int]]:
    """Stretches of places that are defined."""
    runs: list[list[int]] = []
    for place, yes in enumerate(defined):
        if yes and (not place or not defined[place - 1]):
            runs.append([])
        if yes:
            runs[-1].append(place)
    return runs


def _below(depth: float) -> dict[str, object]:
    return {"orientation": "h", "y": -depth, "yanchor": "top", "x": 0.0, "font": {"color": DARK}}
