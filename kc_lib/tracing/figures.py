"""Causal tracing drawn: effects over tokens and layers of a fact, their averages by position class, and severings."""

from __future__ import annotations

import html
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kc_lib.errors import MethodError
from kc_lib.plotting import DARK, OKABE_ITO, OVER_FACTS, SIGNED_SCALE, figure_text, number, titled, whiskers
from kc_lib.tracing.effects import SUBJECT, average_effects, position_classes, severing, total_effect
from kc_lib.tracing.trace import TracingResult

NAMES = {
    "state": "hidden state",
    "attention_severed": "attention severed",
    "mlp_severed": "MLP severed",
    "attention": "attention outputs",
    "mlp": "MLP outputs",
}
EFFECT = "AIE (probability)"
PANEL = 330  # px


def fact_heatmap(result: TracingResult, fact: int = 0, mediators: Sequence[str] = ()) -> go.Figure:
    """The indirect effect at every traced token and layer of one fact, one panel per mediator; subject tokens have a star.

    Raises:
        MethodError: no such fact, or a mediator that was not traced.
    """
    rows = result.to_frame()
    rows = rows[rows["fact"] == fact]
    if rows.empty:
        raise MethodError(f"fact {fact} was not traced: facts are 0 to {len(result.facts) - 1}")
    shown = _mediators(result, mediators)
    about = result.facts.set_index("fact").loc[fact]
    tokens = rows.drop_duplicates("position").sort_values("position")
    star = ["*" if "subject" in name else "" for name in tokens["position_class"]]
    labels = [
        html.escape(f"{token.strip() or repr(token)}{mark}") for token, mark in zip(tokens["token"], star, strict=True)
    ]
    tables = {
        mediator: rows[rows["mediator"] == mediator].pivot_table(index="position", columns="layer", values="indirect_effect")
        for mediator in shown
    }
    effects = (
        f"p(answer): clean {about['p_clean']:.3g}, corrupted {about['p_corrupted']:.3g}",
        f"indirect effect, mean of {about['n_samples']} noise samples",
        "* subject",
    )
    figure = _heatmaps(result, tables, labels, "indirect effect (probability)")
    title = f"Restored states: {about['prompt']} → {about['answer']}"
    return titled(figure, title, effects).update_layout(height=230 + 24 * len(labels))


def class_heatmap(result: TracingResult, mediators: Sequence[str] = ()) -> go.Figure:
    """The average indirect effect of every position class and layer, mediators side by side.

    Raises:
        MethodError: a mediator that was not traced.
    """
    shown, classes, averages = _mediators(result, mediators), position_classes(result), average_effects(result)
    counts = averages.drop_duplicates("position_class").set_index("position_class")["n"]
    tables = {}
    for mediator in shown:
        own = averages[averages["mediator"] == mediator]
        tables[mediator] = own.pivot_table(index="position_class", columns="layer", values="aie").loc[classes]
    figure = _heatmaps(result, tables, [f"{name} ({counts[name]})" for name in classes], EFFECT)
    return titled(
        figure, "Where restoring a state brings the answer back", [*_about(result), "(n) facts of a class"]
    ).update_layout(height=230 + 34 * len(classes))


def class_lines(result: TracingResult, mediators: Sequence[str] = ()) -> go.Figure:
    """The average indirect effect over layers with its 95% band, one line per position class, one panel per mediator.

    Raises:
        MethodError: a mediator that was not traced.
    """
    shown, classes, averages = _mediators(result, mediators), position_classes(result), average_effects(result)
    figure = make_subplots(1, len(shown), shared_yaxes=True, subplot_titles=[NAMES[name] for name in shown])
    for column, mediator in enumerate(shown, start=1):
        for name in classes:
            colour = _colour(name)
            rows = averages[(averages["mediator"] == mediator) & (averages["position_class"] == name)]
            at = {"row": 1, "col": column}
            band = rows.dropna(subset=["aie_low", "aie_high"])
            x, y = [*band["layer"], *band["layer"][::-1]], [*band["aie_low"], *band["aie_high"][::-1]]
            fill = {"mode": "none", "fill": "toself", "fillcolor": colour, "opacity": 0.2, "hoverinfo": "skip"}
            figure.add_scatter(x=x, y=y, showlegend=False, legendgroup=name, name=f"95% band, {name}", **fill, **at)
            hover = [
                f"<b>{name}</b>, layer {row['layer']}<br>AIE {figure_text(row, 'aie', 3)}" for _, row in rows.iterrows()
            ]
            look = {"mode": "lines", "line": {"color": colour, "width": 2.5}, "legendgroup": name, "showlegend": column == 1}
            figure.add_scatter(
                x=rows["layer"].tolist(),
                y=rows["aie"].tolist(),
                name=f"{name} (n = {rows['n'].iloc[0]})",
                hovertext=hover,
                hovertemplate="%{hovertext}<extra></extra>",
                **look,
                **at,
            )
    figure.add_hline(0, line={"color": DARK, "width": 1, "dash": "dot"})
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text=EFFECT, col=1)
    titled(figure, "Average indirect effect by layer", [*_about(result), f"bands: {OVER_FACTS}"])
    legend = {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}
    return figure.update_layout(width=max(700, 120 + PANEL * len(shown)), height=470, margin={"t": 115}, legend=legend)


def severing_bars(result: TracingResult, position_class: str = SUBJECT) -> go.Figure:
    """The average indirect effect by layer at one position class, severed and not, side by side; whiskers are intervals.

    Raises:
        MethodError: the class, states or severed mediators were not traced.
    """
    costs = severing(result)
    costs = costs[costs["position_class"] == position_class]
    if costs.empty:
        raise MethodError(f"{position_class!r} was not traced: classes are {', '.join(position_classes(result))}")
    averages = average_effects(result)
    averages = averages[averages["position_class"] == position_class]
    figure = go.Figure()
    for mediator, colour in zip(("state", *costs["mediator"]), (OKABE_ITO[0], OKABE_ITO[5], OKABE_ITO[2]), strict=False):
        rows = averages[averages["mediator"] == mediator]
        error = whiskers(rows.to_dict("records"), "aie") | {"width": 0, "thickness": 1}
        hover = [f"layer {row['layer']}<br>AIE {figure_text(row, 'aie', 3)}" for _, row in rows.iterrows()]
        figure.add_bar(
            x=rows["layer"].tolist(),
            y=rows["aie"].tolist(),
            error_y=error,
            name=NAMES[mediator],
            marker_color=colour,
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
        )
    kept = [
        f"{NAMES[row['mediator']]} leaves {figure_text(row, 'kept')} of the peak (layer {row['layer']})"
        for _, row in costs.iterrows()
    ]
    titled(figure, f"What severing costs: {position_class}", [f"n = {costs['n'].iloc[0]} facts", *kept])
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text=EFFECT)
    legend = {"orientation": "h", "x": 0, "y": -0.18, "yanchor": "top"}
    return figure.update_layout(width=960, height=450, barmode="group", bargap=0.25, legend=legend)


def _heatmaps(result: TracingResult, tables: dict[str, pd.DataFrame], labels: Sequence[str], unit: str) -> go.Figure:
    """Tables of row x layer side by side, on one zero-centred scale."""
    figure = make_subplots(1, len(tables), shared_yaxes=True, subplot_titles=[_panel(result, name) for name in tables])
    size = max(float(table.abs().max().max()) for table in tables.values()) or 1.0
    for column, table in enumerate(tables.values(), start=1):
        figure.add_heatmap(
            z=table.to_numpy().tolist(),
            x=table.columns.tolist(),
            y=list(range(len(labels))),
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            customdata=[[label] * table.shape[1] for label in labels],
            hovertemplate="%{customdata}, layer %{x}<br>%{z:.3f}<extra></extra>",
            row=1,
            col=column,
        )
    figure.update_xaxes(title_text="layer", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    figure.update_yaxes(tickvals=list(range(len(labels))), ticktext=list(labels), col=1)
    scale = {"colorscale": SIGNED_SCALE, "cmin": -size, "cmax": size, "colorbar": {"title": {"text": unit, "side": "right"}}}
    return figure.update_layout(width=max(620, 240 + PANEL * len(tables)), margin={"t": 115}, coloraxis=scale)


def _panel(result: TracingResult, mediator: str) -> str:
    windowed = mediator in ("attention", "mlp")
    return NAMES[mediator] + (f", window of {result.provenance['window']}" if windowed else "")


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
    return [model, f"n = {int(total['n'])} facts", f"ATE {figure_text(total, 'ate')}", _noise(result)]


def _noise(result: TracingResult) -> str:
    about = result.provenance
    if about.get("noise") == "replacement":
        return "subjects replaced"
    size = about.get("scale")
    return f"{about.get('noise', '')} noise" + (f" {number(size)}" if size is not None else "")


def _colour(position_class: str) -> str:
    order = ("last subject token", "first token after", "first subject token", "further tokens", "middle subject tokens")
    return OKABE_ITO[order.index(position_class)] if position_class in order else OKABE_ITO[5]
