"""What every layer, head, MLP and neuron reads and writes: the layer lens, direct contributions, and promoted tokens."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kc_lib.components.direct import DirectAttribution
from kc_lib.components.lens import LogitLens
from kc_lib.errors import MethodError
from kc_lib.plotting import (
    DARK,
    HEAD,
    MLP,
    OVER_FACTS,
    POSITIVE,
    SIGNED_SCALE,
    figure_text,
    marks,
    number,
    origin,
    titled,
    whiskers,
)

NORM_TITLES = {"own": "every stream on its own scale", "final": "every stream on the final stream's scale"}
RANKS = {  # measure -> name and colour
    "answer_rank": ("answer, at the last position", POSITIVE),
    "answer_rank_at_subject": ("answer, best of the subject's tokens", "#E69F00"),
}
PROBABILITIES = {
    "answer_probability": ("answer, at the last position", POSITIVE),
    "subject_probability": ("subject's last token, at the last position", MLP),
}
OF_DIRECTION = {"answer": "the answer's logit", "difference": "the logit difference"}
LETTERS = 72  # that fit on a line of the promoted tokens
NO_BREAK = "\u00a0"  # a space at which no line ends
LINE = 18  # px


def lens_figure(lens: LogitLens, title: str | None = None, seed: int = 0) -> go.Figure:
    """Rank (log axis, best on top) and probability along the stream: mean over facts with its 95% band, median dashed.

    The title says which norm the readings went through. Curves over the subject are left out where none is named.

    Raises:
        MethodError: a lens without facts.
    """
    if lens.facts.empty:
        raise MethodError("the lens has no facts: there is nothing to show")
    summary = lens.summary(seed)
    norm = NORM_TITLES.get(str(lens.provenance.get("norm")), "")
    names = ["rank (1: the model's first choice)", "probability"]
    figure = make_subplots(2, 1, shared_xaxes=True, subplot_titles=names, vertical_spacing=0.09)
    figure.update_annotations(font_size=14, x=0, xanchor="left")
    unnamed = "" if "subject_probability" in summary else "no subject is named: no curves over it"
    about = [*origin({"model": lens.provenance.get("model")}), f"n = {summary['n'].iloc[0]} facts"]
    about += [f"mean, band: {OVER_FACTS}; dashed: median", unnamed]
    titled(figure, title or f"Logit lens, {norm}", about)
    for row, curves in enumerate((RANKS, PROBABILITIES), start=1):
        for measure, (name, colour) in curves.items():
            if measure in summary:
                _add_curve(figure, summary, measure, f"{'rank' if row == 1 else 'probability'} of {name}", colour, row)
    figure.update_yaxes(type="log", autorange="reversed", dtick=1, exponentformat="none", tickformat=",", row=1)
    figure.update_yaxes(rangemode="tozero", row=2)
    figure.update_xaxes(title_text="blocks passed (halves: between attention and MLP)", row=2)
    legend = {"orientation": "h", "x": 0, "y": -0.14, "yanchor": "top"}
    return figure.update_layout(width=920, height=680, margin={"t": 110, "b": 110}, legend=legend)


def _add_curve(figure: go.Figure, summary: pd.DataFrame, measure: str, name: str, colour: str, row: int) -> None:
    at = {"row": row, "col": 1, "legendgroup": name, "meta": measure}
    x, low, high = (summary[column].tolist() for column in ("layer", f"{measure}_low", f"{measure}_high"))
    band = {"mode": "none", "fill": "toself", "fillcolor": colour, "opacity": 0.15, "hoverinfo": "skip"}
    figure.add_scatter(x=[*x, *x[::-1]], y=[*low, *high[::-1]], showlegend=False, **band, **at)
    digits = 1 if row == 1 else 4
    text = [
        f"<b>{point['point']}</b><br>{name}<br>mean {figure_text(point, measure, digits)}"
        f"<br>median {number(point[f'{measure}_median'], digits)}"
        for point in summary.to_dict("records")
    ]
    look = marks(text, colour, size=4) | {"mode": "lines+markers", "line": {"color": colour, "width": 2}}
    figure.add_scatter(x=x, y=summary[measure].tolist(), name=name, **look, **at)
    dashed = {"mode": "lines", "line": {"color": colour, "width": 1.3, "dash": "dash"}, "hoverinfo": "skip"}
    figure.add_scatter(x=x, y=summary[f"{measure}_median"].tolist(), showlegend=False, **dashed, **at)


def direct_heatmap(direct: DirectAttribution, title: str | None = None, seed: int = 0) -> go.Figure:
    """Mean direct contribution of every head (layers left to right), and of every MLP in a row above: logits, 0 is white."""
    frame = direct.summary(seed)
    heads, mlps = frame[frame["kind"] == "head"], frame[frame["kind"] == "mlp"]
    n_layers = int(frame["layer"].max()) + 1
    n_heads = len(heads) // n_layers
    rest = frame[frame["layer"].isna()]
    about = [
        *_about(direct),
        ", ".join(f"{row['component']} {_signed(row['contribution'])}" for row in rest.to_dict("records")),
    ]
    figure = titled(go.Figure(), title or f"What adds to {_direction(direct)} directly", about)
    limit = float(frame["contribution"].abs().max()) or 1.0
    scale = {"colorscale": SIGNED_SCALE, "zmin": -limit, "zmid": 0, "zmax": limit, "xgap": 1, "ygap": 1}
    colorbar = {"title": "logits", "thickness": 14, "outlinewidth": 0}
    for part, rows, first in ((heads, n_heads, 0.0), (mlps, 1, n_heads + 0.4)):
        if part.empty:
            continue
        z = part["contribution"].to_numpy().reshape(n_layers, rows).T
        text = [
            f"<b>{row['component']}</b><br>{figure_text(row, 'contribution', 3)} logits" for row in part.to_dict("records")
        ]
        hover = np.array(text, dtype=object).reshape(n_layers, rows).T.tolist()
        place = {"x0": 0, "dx": 1, "y0": first, "dy": 1, "customdata": hover, "showscale": first == 0, "colorbar": colorbar}
        figure.add_heatmap(z=z.tolist(), hovertemplate="%{customdata}<extra></extra>", **place, **scale)
    ticks = {**{float(head): f"head {head}" for head in range(n_heads)}, n_heads + 0.4: "<b>MLP</b>"}
    figure.update_xaxes(title_text="layer", dtick=max(1, n_layers // 15), showgrid=False, ticks="")
    figure.update_yaxes(tickvals=list(ticks), ticktext=list(ticks.values()), showgrid=False, ticks="")
    return figure.update_layout(width=max(620, 190 + 26 * n_layers), height=190 + 26 * (n_heads + 1))


def direct_by_layer(direct: DirectAttribution, title: str | None = None, seed: int = 0) -> go.Figure:
    """Contributions of attention and MLP per layer with 95% intervals, and their running total, which ends at the logit."""
    frame = direct.by_layer(seed)
    last = int(frame["layer"].max())
    kinds = frame["kind"].where(frame["kind"] != "embedding", "bias")
    x = frame["layer"].where(frame["layer"].notna(), np.where(frame["kind"] == "embedding", -2, last + 2))
    frame = frame.assign(x=x, part=kinds)
    title = title or f"Where {_direction(direct)} is written"
    figure = titled(go.Figure(), title, [*_about(direct), f"whiskers: {OVER_FACTS}"])
    for part, name, colour in (("attention", "attention", HEAD), ("mlp", "MLP", MLP), ("bias", "embedding, biases", DARK)):
        own = frame[frame["part"] == part]
        rows = own.to_dict("records")
        text = [
            f"<b>{row['kind']}</b>, layer {row['layer']:g}<br>{figure_text(row, 'contribution', 3)} logits" for row in rows
        ]
        look = {"marker_color": colour, "error_y": whiskers(rows, "contribution") | {"width": 2}, "hovertext": text}
        bars = own["contribution"].tolist()
        figure.add_bar(x=own["x"].tolist(), y=bars, name=name, hovertemplate="%{hovertext}<extra></extra>", **look)
    ends = frame.groupby("x")["accumulated"].last()  # a layer's running total, its MLP included
    line = {"mode": "lines", "line": {"color": POSITIVE, "width": 2, "shape": "hv"}, "name": "running total"}
    figure.add_scatter(x=ends.index.tolist(), y=ends.tolist(), hovertemplate="running total %{y:.3f}<extra></extra>", **line)
    total = float(ends.iloc[-1])
    figure.add_annotation(
        x=last + 2, y=total, text=f"total {number(total)}", showarrow=False, yanchor="bottom", xanchor="right"
    )
    step = max(1, (last + 1) // 15)
    ticks = {-2: "embedding", **{layer: str(layer) for layer in range(0, last + 1, step)}, last + 2: "biases"}
    figure.add_hline(0, line={"color": DARK, "width": 1})
    figure.update_xaxes(title_text="layer", tickvals=list(ticks), ticktext=list(ticks.values()), showgrid=False, tickangle=0)
    figure.update_yaxes(title_text="logits")
    legend = {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}
    return figure.update_layout(width=max(760, 130 + 28 * last), height=500, margin_b=110, barmode="group", legend=legend)


def promoted_table(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """What components write, in words: the tokens each raises and lowers most, with its change of their logits.

    ``frame`` is what ``promoted_tokens`` returns.

    Raises:
        MethodError: no components.
    """
    if frame.empty:
        raise MethodError("there are no components whose tokens could be shown")
    rows = frame.to_dict("records")
    shown = [f"{row['token']!r} {_signed(row['value'])}".replace(" ", NO_BREAK) for row in rows]
    tokens = frame.assign(text=shown)
    names = list(dict.fromkeys(frame["component"]))
    columns: dict[str, Sequence[str]] = {"component": [f"<b>{name}</b>" for name in names]}
    for end, header in (("top", "raises"), ("bottom", "lowers")):
        lists = tokens[tokens["end"] == end].groupby("component")["text"].agg(f"{NO_BREAK} ".join)
        columns[header] = [_wrapped(lists[name]) for name in names]
    k = int(frame["place"].max())
    about = [f"{k} tokens at either end of its direct write at the answer position, in logits"]
    return _table(title or "What they write", about, columns, [90, 480, 480])


def neuron_bars(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """Direct contributions of the top neurons, largest on top, beside what their value vectors write.

    ``frame`` is what ``top_neurons`` returns: means over facts.

    Raises:
        MethodError: no neurons.
    """
    if frame.empty:
        raise MethodError("there are no neurons to show")
    rows = frame.to_dict("records")
    names = [f"m{row['layer']}.n{row['neuron']}" for row in rows]
    shown = [_plain(textwrap.shorten(row["tokens"], 90, placeholder=" …")) for row in rows]
    total = float(frame["contribution"].sum())
    about = ["mean over facts, at the answer position", f"these {len(frame)} together: {number(total)} logits"]
    figure = titled(go.Figure(), title or "Neurons that add most to the answer", about)
    hover = [
        f"<b>{name}</b><br>{number(row['contribution'], 4)} logits<br>mean value {number(row['value'], 3)}"
        f"<br>{_plain(row['tokens'])}"
        for name, row in zip(names, rows, strict=True)
    ]
    bars = {"orientation": "h", "marker_color": MLP, "hovertext": hover, "hovertemplate": "%{hovertext}<extra></extra>"}
    figure.add_bar(x=frame["contribution"].tolist(), y=names, **bars)
    beside = {"xref": "x domain", "x": 1.01, "xanchor": "left", "showarrow": False, "font_size": 12, "align": "left"}
    for name, text in zip(names, shown, strict=True):
        figure.add_annotation(y=name, text=text, **beside)
    figure.add_annotation(
        yref="paper", y=1, yanchor="bottom", text="<b>its vector, with the sign of its value, raises</b>", **beside
    )
    figure.update_xaxes(title_text="direct contribution (logits)", domain=[0, 0.42])
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    return figure.update_layout(width=1050, height=170 + 24 * len(frame), showlegend=False, margin_t=110)


def _table(title: str, about: Sequence[str], columns: Mapping[str, Sequence[str]], widths: Sequence[int]) -> go.Figure:
    """Rows of text as high as their longest cell."""
    lines = sum(max(cell.count("<br>") + 1 for cell in row) for row in zip(*columns.values(), strict=True))
    n = len(next(iter(columns.values())))
    figure = titled(go.Figure(), title, about)
    stripes = [[("white", "#F5F5F5")[row % 2] for row in range(n)]]
    header = {"values": [f"<b>{name}</b>" for name in columns], "align": "left", "fill_color": "#E4E4E4", "height": 30}
    body = {"values": list(columns.values()), "align": "left", "fill_color": stripes, "height": LINE, "font_size": 12}
    figure.add_table(header=header, cells=body, columnwidth=list(widths))
    height = 140 + LINE * lines + 10 * n
    return figure.update_layout(width=sum(widths) + 40, height=height, margin={"l": 10, "r": 10, "t": 80, "b": 20})


def _wrapped(text: str) -> str:
    return "<br>".join(_plain(line) for line in textwrap.wrap(text, LETTERS))


def _plain(text: str) -> str:
    """Text that plotly takes for no tag; it shows the entities of quotes as they stand."""
    return html.escape(text, quote=False)


def _direction(direct: DirectAttribution) -> str:
    return OF_DIRECTION.get(str(direct.provenance.get("direction")), "the logit")


def _about(direct: DirectAttribution) -> list[str]:
    total = number(float(direct.totals.mean()))
    return [
        *origin({"model": direct.provenance.get("model")}),
        f"n = {len(direct.values)} facts",
        f"all together: {total} logits",
    ]


def _signed(value: float) -> str:
    return f"{value:+.2f}"
