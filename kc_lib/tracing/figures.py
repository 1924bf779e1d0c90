"""Causal tracing drawn: effects over tokens and layers of a fact, their averages by position class, and severings."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from kc_lib import plotting as plot
from kc_lib.errors import MethodError
from kc_lib.tracing.effects import SEVERED, SUBJECT, TracingResult, average_effects, position_classes, severing, total_effect
from kc_lib.tracing.options import WINDOWED

NAMES = {
    "state": "hidden state",
    "attention_severed": "attention severed",
    "mlp_severed": "MLP severed",
    "attention": "attention outputs",
    "mlp": "MLP outputs",
}
COLOURS = {
    "last subject token": plot.POSITIVE,
    "first token after": "#E69F00",
    "first subject token": plot.HEAD,
    "further tokens": plot.MLP,
    "middle subject tokens": "#56B4E9",
}  # of classes; the rest is vermillion
EFFECT = "AIE (probability)"
PANEL = 330  # px


def fact_heatmap(result: TracingResult, fact: int = 0, mediators: Sequence[str] = ()) -> go.Figure:
    """The indirect effect at every traced token and layer of one fact, one panel per mediator; subject tokens have a star.

    Raises:
        MethodError: no such fact, or a mediator that was not traced.
    """
    rows = result.indirect_effects()
    rows = rows[rows["fact"] == fact]
    if rows.empty:
        raise MethodError(f"fact {fact} was not traced: facts are 0 to {len(result.facts) - 1}")
    shown = _mediators(result, mediators)
    about = result.facts.set_index("fact").loc[fact]
    tokens = rows.drop_duplicates("position").sort_values("position").to_dict("records")
    words = [html.escape(row["token"].strip() or repr(row["token"])) for row in tokens]
    labels = [f"{word}*" if "subject" in row["position_class"] else word for word, row in zip(words, tokens, strict=True)]
    effects = [
        f"p(answer): clean {about['p_clean']:.3g}, corrupted {about['p_corrupted']:.3g}",
        f"indirect effect, mean of {about['n_samples']} noise samples",
        "* subject",
    ]
    tables = {name: _layers(rows, name, "position", "indirect_effect") for name in shown}
    figure = _heatmaps(result, tables, labels, "indirect effect (probability)")
    title = f"Restored states: {about['prompt']} → {about['answer']}"
    return plot.titled(figure, title, effects, height=230 + 24 * len(labels))


def class_heatmap(result: TracingResult, mediators: Sequence[str] = ()) -> go.Figure:
    """The average indirect effect of every position class and layer, mediators side by side.

    Raises:
        MethodError: a mediator that was not traced.
    """
    shown, classes, averages = _mediators(result, mediators), position_classes(result), average_effects(result)
    counts = averages.drop_duplicates("position_class").set_index("position_class")["n"]
    tables = {name: _layers(averages, name, "position_class", "aie").loc[classes] for name in shown}
    figure = _heatmaps(result, tables, [f"{name} ({counts[name]})" for name in classes], EFFECT)
    title, about = "Where restoring a state brings the answer back", [*_about(result), "(n) facts of a class"]
    return plot.titled(figure, title, about, height=230 + 34 * len(classes))


def tracing_figure(result: TracingResult, mediators: Sequence[str] = ()) -> go.Figure:
    """The average indirect effect over layers with its 95% band, one line per position class, one panel per mediator.

    Example:
        >>> kc.tracing_figure(kc.trace(model, facts.facts, max_facts=5))

    Raises:
        MethodError: a mediator that was not traced.
    """
    shown, classes, averages = _mediators(result, mediators), position_classes(result), average_effects(result)
    figure = plot.panels([NAMES[name] for name in shown], size=16, shared_yaxes=True)
    for column, mediator in enumerate(shown, start=1):
        for name in classes:
            rows = averages[(averages["mediator"] == mediator) & (averages["position_class"] == name)]
            group, colour = {"row": 1, "col": column, "legendgroup": name}, COLOURS.get(name, plot.NEGATIVE)
            plot.band(figure, rows, "layer", "aie", colour, name=f"95% band, {name}", **group)
            look = {"width": 2.5, "showlegend": column == 1, "name": f"{name} (n = {rows['n'].iloc[0]})"}
            plot.curve(figure, rows, "layer", "aie", colour, _hovers(rows, f"<b>{name}</b>, "), **look, **group)
    plot.level_lines(figure, "y", 0)
    figure.update_xaxes(title_text="layer").update_yaxes(title_text=EFFECT, col=1)
    about = [*_about(result), f"bands: {plot.OVER_FACTS}"]
    size = {"width": max(700, 120 + PANEL * len(shown)), "height": 470, "margin": {"t": 115}, "legend": plot.below(0.2)}
    return plot.titled(figure, "Average indirect effect by layer", about, **size)


def severing_bars(result: TracingResult, position_class: str | None = None) -> go.Figure:
    """The average indirect effect by layer at one position class, severed and not, side by side; whiskers are intervals.

    Says so where states, or no severed mediators, were traced.

    Args:
        position_class: none takes the last subject token, or where it was not traced the first class that was.

    Raises:
        MethodError: the class was not traced.
    """
    traced, classes = set(result.frame["mediator"]), position_classes(result)
    position_class = position_class or (SUBJECT if SUBJECT in classes else classes[0])
    title = f"What severing costs: {position_class}"
    if position_class not in classes:
        raise MethodError(f"{position_class!r} was not traced: classes are {', '.join(classes)}")
    if "state" not in traced or not traced & set(SEVERED):
        return plot.empty(f"nothing to compare: trace state and {' or '.join(SEVERED)}", title)
    costs = severing(result)
    costs = costs[costs["position_class"] == position_class]
    averages = average_effects(result)
    averages = averages[averages["position_class"] == position_class]
    figure = go.Figure()
    for mediator, colour in zip(("state", *costs["mediator"]), (plot.POSITIVE, plot.NEGATIVE, plot.HEAD), strict=False):
        rows = averages[averages["mediator"] == mediator]
        look = {"name": NAMES[mediator], "error": {"width": 0, "thickness": 1}}
        plot.bars(figure, rows, "layer", "aie", colour, _hovers(rows), **look)
    kept = [
        f"{NAMES[row['mediator']]} leaves {plot.figure_text(row, 'kept')} of the peak (layer {row['layer']})"
        for row in costs.to_dict("records")
    ]
    figure.update_xaxes(title_text="layer").update_yaxes(title_text=EFFECT)
    about = [f"n = {costs['n'].iloc[0]} facts", *kept]
    size = {"width": 960, "height": 450, "barmode": "group", "bargap": 0.25, "legend": plot.below(0.18)}
    return plot.titled(figure, title, about, **size)


def _layers(rows: pd.DataFrame, mediator: str, index: str, values: str) -> pd.DataFrame:
    return rows[rows["mediator"] == mediator].pivot_table(index=index, columns="layer", values=values)


def _heatmaps(result: TracingResult, tables: Mapping[str, pd.DataFrame], labels: Sequence[str], unit: str) -> go.Figure:
    """Tables of row x layer side by side, on one zero-centred scale."""
    figure = plot.panels([_panel(result, name) for name in tables], size=16, shared_yaxes=True)
    limit = max(float(table.abs().max().max()) for table in tables.values()) or 1.0
    for column, table in enumerate(tables.values(), start=1):
        words = [[label] * table.shape[1] for label in labels]
        look = {"coloraxis": "coloraxis", "customdata": words, "row": 1, "col": column}
        numbered = table.set_axis(range(len(labels)), axis=0)
        plot.heatmap(figure, numbered, "%{customdata}, layer %{x}<br>%{z:.3f}<extra></extra>", **look)
    figure.update_xaxes(title_text="layer", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    figure.update_yaxes(tickvals=list(range(len(labels))), ticktext=list(labels), col=1)
    scale = plot.signed_scale(limit, "c") | {"colorbar": plot.colour_bar(unit)}
    return figure.update_layout(width=max(620, 240 + PANEL * len(tables)), margin={"t": 115}, coloraxis=scale)


def _hovers(rows: pd.DataFrame, start: str = "") -> list[str]:
    return [f"{start}layer {row['layer']}<br>AIE {plot.figure_text(row, 'aie', 3)}" for row in rows.to_dict("records")]


def _panel(result: TracingResult, mediator: str) -> str:
    return NAMES[mediator] + (f", window of {result.provenance['window']}" if mediator in WINDOWED else "")


def _mediators(result: TracingResult, wanted: Sequence[str]) -> list[str]:
    traced = list(dict.fromkeys(result.frame["mediator"]))
    missing = [name for name in wanted if name not in traced]
    if missing or not traced:
        raise MethodError(
            f"mediator {(missing or ['any'])[0]!r} was not traced: the result has {', '.join(traced) or 'none'}"
        )
    return list(wanted) or traced


def _about(result: TracingResult) -> list[str]:
    total = total_effect(result)
    model = str(result.provenance.get("model", ""))
    return [model, f"n = {int(total['n'])} facts", f"ATE {plot.figure_text(total, 'ate')}", _noise(result)]


def _noise(result: TracingResult) -> str:
    about = result.provenance
    if about.get("noise") == "replacement":
        return "subjects replaced"
    size = about.get("scale")
    return f"{about.get('noise', '')} noise" + (f" {plot.number(size)}" if size is not None else "")
