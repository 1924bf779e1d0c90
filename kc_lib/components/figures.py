"""What every layer, head, MLP and neuron reads and writes: logit lens, direct contributions, promoted tokens, attention.

Attention patterns of single prompts are heatmaps, or circuitsvis's views, which a notebook shows with no network:
circuitsvis asks the internet where to load its script from and, offline, writes all of it into every view. Here the script
of the installed package is shown once per notebook (``attention_bundle``), and views call it.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from importlib.resources import files
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from circuitsvis.utils.convert_props import convert_props
from IPython.display import HTML
from jaxtyping import Float
from torch import Tensor

from kc_lib import plotting as plot
from kc_lib.components.direct import DirectAttribution
from kc_lib.components.lens import LogitLens
from kc_lib.errors import MethodError

NORM_TITLES = {"own": "every stream on its own scale", "final": "every stream on the final stream's scale"}
CURVES = {  # measure of a lens -> row, name, colour, digits
    "answer_rank": (1, "rank of answer, at the last position", plot.POSITIVE, 1),
    "answer_rank_at_subject": (1, "rank of answer, best of the subject's tokens", "#E69F00", 1),
    "answer_probability": (2, "probability of answer, at the last position", plot.POSITIVE, 4),
    "subject_probability": (2, "probability of subject's last token, at the last position", plot.MLP, 4),
}
PARTS = {"attention": ("attention", plot.HEAD), "mlp": ("MLP", plot.MLP), "bias": ("embedding, biases", plot.DARK)}
OF_DIRECTION = {"answer": "the answer's logit", "difference": "the logit difference"}
LETTERS = 72  # that fit on a line of the promoted tokens
NO_BREAK = "\u00a0"  # a space at which no line ends
MOST_HEADS, MOST_TOKENS = 12, 64  # of a view that a browser still turns over smoothly
COLUMNS = 3  # panels side by side
WIDEST = 260  # px of a panel; what is longer gets smaller letters


def lens_figure(lens: LogitLens, title: str | None = None, seed: int = 0) -> go.Figure:
    """Rank (log axis, best on top) and probability along the stream: mean over facts with its 95% band, median dashed.

    The title says which norm the readings went through. Curves over the subject are left out where none is named.

    Example:
        >>> kc.lens_figure(kc.logit_lens(model, task.test))

    Raises:
        MethodError: a lens without facts.
    """
    if lens.facts.empty:
        raise MethodError("the lens has no facts: there is nothing to show")
    summary = lens.summary(seed)
    names = ["rank (1: the model's first choice)", "probability"]
    figure = plot.panels(names, 1, size=14, shared_xaxes=True, vertical_spacing=0.09)
    figure.update_annotations(x=0, xanchor="left")
    for measure, (row, name, colour, digits) in CURVES.items():
        if measure in summary:
            hover = [
                f"<b>{point['point']}</b><br>{name}<br>mean {plot.figure_text(point, measure, digits)}"
                f"<br>median {plot.number(point[f'{measure}_median'], digits)}"
                for point in summary.to_dict("records")
            ]
            group: dict[str, Any] = {"row": row, "col": 1, "legendgroup": name, "meta": measure}
            plot.band(figure, summary, "layer", measure, colour, **group)
            plot.curve(figure, summary, "layer", measure, colour, hover, size=4, name=name, **group)
            dashed = {"dash": "dash", "width": 1.3, "showlegend": False}
            plot.curve(figure, summary, "layer", f"{measure}_median", colour, None, **dashed, **group)
    figure.update_yaxes(type="log", autorange="reversed", dtick=1, exponentformat="none", tickformat=",", row=1)
    figure.update_yaxes(rangemode="tozero", row=2)
    figure.update_xaxes(title_text="blocks passed (halves: between attention and MLP)", row=2)
    about = [*plot.origin({"model": lens.provenance.get("model")}), f"n = {summary['n'].iloc[0]} facts"]
    about += [f"mean, band: {plot.OVER_FACTS}; dashed: median"]
    about += [] if "subject_probability" in summary else ["no subject is named: no curves over it"]
    title = title or f"Logit lens, {NORM_TITLES.get(str(lens.provenance.get('norm')), '')}"
    size = {"width": 920, "height": 680, "margin": {"t": 110, "b": 110}, "legend": plot.below(0.14)}
    return plot.titled(figure, title, about, **size)


def direct_heatmap(direct: DirectAttribution, title: str | None = None, seed: int = 0) -> go.Figure:
    """Mean direct contribution of every head (layers left to right), and of every MLP in a row above: logits, 0 is white."""
    frame = direct.summary(seed)
    frame["hover"] = [f"<b>{row['component']}</b><br>{_logits(row)}" for row in frame.to_dict("records")]
    n_layers, limit = int(frame["layer"].max()) + 1, float(frame["contribution"].abs().max()) or 1.0
    n_heads = int((frame["kind"] == "head").sum()) // n_layers
    figure = go.Figure()
    for kind, n_rows, first in (("head", n_heads, 0.0), ("mlp", 1, n_heads + 0.4)):
        part = frame[frame["kind"] == kind]
        if len(part):
            values, hover = (part[column].to_numpy().reshape(n_layers, n_rows).T for column in ("contribution", "hover"))
            look = {"x0": 0, "dx": 1, "y0": first, "dy": 1, "customdata": hover.tolist(), "limit": limit}
            look |= {"showscale": kind == "head", "colorbar": plot.colour_bar("logits")}
            plot.heatmap(figure, values, "%{customdata}<extra></extra>", **look)
    ticks = {**{float(head): f"head {head}" for head in range(n_heads)}, n_heads + 0.4: "<b>MLP</b>"}
    plot.layer_axis(figure, n_layers, showgrid=False, ticks="")
    figure.update_yaxes(tickvals=list(ticks), ticktext=list(ticks.values()), showgrid=False, ticks="")
    rest = frame[frame["layer"].isna()].to_dict("records")
    about = [*_about(direct), ", ".join(f"{row['component']} {row['contribution']:+.2f}" for row in rest)]
    size = {"width": max(620, 190 + 26 * n_layers), "height": 190 + 26 * (n_heads + 1)}
    return plot.titled(figure, title or f"What adds to {_direction(direct)} directly", about, **size)


def direct_by_layer(direct: DirectAttribution, title: str | None = None, seed: int = 0) -> go.Figure:
    """Contributions of attention and MLP per layer with 95% intervals, and their running total, which ends at the logit."""
    frame = direct.by_layer(seed)
    last = int(frame["layer"].max())
    ends = np.where(frame["kind"] == "embedding", -2, last + 2)
    parts = frame["kind"].replace("embedding", "bias")
    frame = frame.assign(x=frame["layer"].where(frame["layer"].notna(), ends), part=parts)
    figure = go.Figure()
    for part, (name, colour) in PARTS.items():
        rows = frame[frame["part"] == part]
        hover = [f"<b>{row['kind']}</b>, layer {row['layer']:g}<br>{_logits(row)}" for row in rows.to_dict("records")]
        plot.bars(figure, rows, "x", "contribution", colour, hover, name=name, error={"width": 2})
    totals = frame.groupby("x")["accumulated"].last().reset_index()  # a layer's running total, its MLP included
    hover_total = "running total %{y:.3f}<extra></extra>"
    plot.curve(figure, totals, "x", "accumulated", plot.POSITIVE, hover_total, line_shape="hv", name="running total")
    total = float(totals["accumulated"].iloc[-1])
    beside = {"showarrow": False, "yanchor": "bottom", "xanchor": "right"}
    figure.add_annotation(x=last + 2, y=total, text=f"total {plot.number(total)}", **beside)
    layers = {layer: str(layer) for layer in range(0, last + 1, max(1, (last + 1) // 15))}
    ticks = {-2: "embedding", **layers, last + 2: "biases"}
    plot.level_lines(figure, "y", 0, dash="solid")
    figure.update_xaxes(title_text="layer", tickvals=list(ticks), ticktext=list(ticks.values()), showgrid=False, tickangle=0)
    figure.update_yaxes(title_text="logits")
    about = [*_about(direct), f"whiskers: {plot.OVER_FACTS}"]
    size = {"width": max(760, 130 + 28 * last), "height": 500, "margin_b": 110, "legend": plot.below(0.2)}
    return plot.titled(figure, title or f"Where {_direction(direct)} is written", about, barmode="group", **size)


def promoted_table(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """What components write, in words: the tokens each raises and lowers most, with its change of their logits.

    ``frame`` is what ``promoted_tokens`` returns.

    Raises:
        MethodError: no components.
    """
    if frame.empty:
        raise MethodError("there are no components whose tokens could be shown")
    shown = [f"{token!r} {value:+.2f}" for token, value in zip(frame["token"], frame["value"], strict=True)]
    tokens = frame.assign(text=[text.replace(" ", NO_BREAK) for text in shown])
    names = list(dict.fromkeys(frame["component"]))
    columns = {"component": [f"<b>{name}</b>" for name in names]}
    for end, header in (("top", "raises"), ("bottom", "lowers")):
        lists = tokens[tokens["end"] == end].groupby("component")["text"].agg(f"{NO_BREAK} ".join)
        columns[header] = ["<br>".join(map(_plain, textwrap.wrap(lists[name], LETTERS))) for name in names]
    about = [f"{int(frame['place'].max())} tokens at either end of its direct write at the answer position, in logits"]
    return plot.titled(plot.table(columns, [90, 480, 480], font_size=12), title or "What they write", about)


def neuron_bars(frame: pd.DataFrame, title: str | None = None) -> go.Figure:
    """Direct contributions of the top neurons, largest on top, beside what their value vectors write.

    ``frame`` is what ``top_neurons`` returns: means over facts.

    Raises:
        MethodError: no neurons.
    """
    if frame.empty:
        raise MethodError("there are no neurons to show")
    names = [f"m{layer}.n{neuron}" for layer, neuron in zip(frame["layer"], frame["neuron"], strict=True)]
    rows = frame.assign(name=names)
    figure = go.Figure()
    hover = [
        f"<b>{row['name']}</b><br>{plot.number(row['contribution'], 4)} logits<br>mean value {plot.number(row['value'], 3)}"
        f"<br>{_plain(row['tokens'])}"
        for row in rows.to_dict("records")
    ]
    plot.bars(figure, rows, "name", "contribution", plot.MLP, hover, orientation="h")
    beside = {"xref": "x domain", "x": 1.01, "xanchor": "left", "showarrow": False, "font_size": 12, "align": "left"}
    for name, tokens in zip(names, frame["tokens"], strict=True):
        text = _plain(textwrap.shorten(tokens, 90, placeholder=" …"))
        figure.add_annotation(y=name, text=text, **beside)
    heading = "<b>its vector, with the sign of its value, raises</b>"
    figure.add_annotation(yref="paper", y=1, yanchor="bottom", text=heading, **beside)
    figure.update_xaxes(title_text="direct contribution (logits)", domain=[0, 0.42])
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    total = plot.number(float(frame["contribution"].sum()))
    about = ["mean over facts, at the answer position", f"these {len(frame)} together: {total} logits"]
    size = {"width": 1050, "height": 170 + 24 * len(frame), "showlegend": False, "margin_t": 110}
    return plot.titled(figure, title or "Neurons that add most to the answer", about, **size)


def attention_heatmap(
    tokens: Sequence[str],
    pattern: Float[Tensor, "head query key"],
    heads: Sequence[tuple[int, int]],
    with_bos: bool = True,
    title: str | None = None,
) -> go.Figure:
    """One panel per head (layer, head): queries top to bottom, keys left to right, shares from 0 to 1.

    Without ``with_bos`` the first token, on which most heads rest, is left out as query and key and each panel's scale
    ends at its largest share; what remains is not normalised again.

    Raises:
        MethodError: no heads, or tokens and heads that are not those of the pattern.
    """
    _check(tokens, pattern, len(heads))
    first = 0 if with_bos else 1
    shown, names = pattern[:, first:, first:], [_text(token) for token in tokens[first:]]
    columns = min(COLUMNS, len(heads))
    rows = -(-len(heads) // columns)
    size = min(max(150, 21 * len(names)), WIDEST)
    label = 7 * max(map(len, names))
    height = rows * (size + label + 45)
    spacing: dict[str, Any] = {"horizontal_spacing": 0.1 / columns, "vertical_spacing": (label + 45) / height}
    titles = [f"a{layer}.h{head}" for layer, head in heads]
    figure = plot.panels(titles, columns, shared_yaxes=True, **spacing)
    words = [[f"{query} looks at {key}" for key in names] for query in names]
    for i, head in enumerate(shown.float()):
        limit = 1.0 if with_bos else float(head.max()) or 1.0
        look = {"zmin": 0, "zmax": limit, "showscale": with_bos and i == 0, "colorbar": plot.colour_bar("share")}
        seen = head.where(head.new_ones(head.shape).tril().bool(), float("nan"))  # keys after the query are not
        hover = "%{customdata}<br>%{z:.3f}<extra></extra>"
        plot.heatmap(figure, seen.numpy(), hover, customdata=words, **look, **plot.place(i, columns))
    axis = {"tickvals": list(range(len(names))), "ticktext": names, "showgrid": False, "ticks": ""}
    axis |= {"tickfont_size": min(11, max(6, 0.8 * size / len(names)))}
    figure.update_xaxes(**axis, tickangle=-90)
    figure.update_yaxes(**axis, autorange="reversed")
    about = ["rows look at columns"]
    about += [] if with_bos else [f"without the first token ({tokens[0]!r}), each head on its own scale"]
    layout = {"width": max(560, columns * (size + 20) + label + 130), "height": height + 95, "margin_b": 20}
    return plot.titled(figure, title or "Attention patterns", about, **layout)


def attention_bundle() -> HTML:
    """circuitsvis's script from the installed package: show it once per notebook, before the first ``attention_view``."""
    script = files("circuitsvis").joinpath("dist", "cdn", "iife.js").read_text(encoding="utf-8")
    script = script.replace("</script", "<\\/script")  # there is one, as text, and it would end the script on a page
    return HTML(f"<script>{script}\nwindow.CircuitsVis = CircuitsVis;</script>")


def attention_view(tokens: Sequence[str], pattern: Float[Tensor, "head query key"], names: Sequence[str]) -> HTML:
    """circuitsvis's AttentionHeads: point at a head, then at a token, to see what it looks at. Needs ``attention_bundle``.

    Raises:
        MethodError: more than 12 heads or 64 tokens, too much for a browser; or tokens and names not the pattern's.
    """
    _check(tokens, pattern, len(names))
    if len(names) > MOST_HEADS or len(tokens) > MOST_TOKENS:
        raise MethodError(
            f"a view of {len(names)} heads and {len(tokens)} tokens is too much for a browser: show at most {MOST_HEADS} "
            f"heads of at most {MOST_TOKENS} tokens"
        )
    props = {"attention": pattern.float(), "tokens": list(tokens), "attentionHeadNames": list(names), "maxValue": 1.0}
    place = f"attention-{uuid4().hex[:12]}"
    given = convert_props(props | {"minValue": 0.0}).replace("<", "\\u003c")  # a token must not end the script
    return HTML(
        f'<div id="{place}" style="max-width: 900px; margin: 15px 0; background: white; color: black"></div>'
        f'<script>CircuitsVis.render("{place}", CircuitsVis.AttentionHeads, {given})</script>'
    )


def _check(tokens: Sequence[str], pattern: Tensor, n_heads: int) -> None:
    if not n_heads:
        raise MethodError("there are no heads to show")
    if tuple(pattern.shape) != (n_heads, len(tokens), len(tokens)):
        raise MethodError(
            f"the pattern has shape {tuple(pattern.shape)}; {n_heads} heads on {len(tokens)} tokens need "
            f"{(n_heads, len(tokens), len(tokens))}"
        )


def _text(token: str) -> str:
    """A token as a label: spaces seen, and no tag."""
    return html.escape(repr(token)[1:-1].replace(" ", "␣"), quote=False)


def _plain(text: str) -> str:
    """Text that plotly takes for no tag; it shows the entities of quotes as they stand."""
    return html.escape(text, quote=False)


def _logits(row: plot.Row) -> str:
    return f"{plot.figure_text(row, 'contribution', 3)} logits"


def _direction(direct: DirectAttribution) -> str:
    return OF_DIRECTION.get(str(direct.provenance.get("direction")), "the logit")


def _about(direct: DirectAttribution) -> list[str]:
    total = plot.number(float(direct.totals.mean()))
    model = plot.origin({"model": direct.provenance.get("model")})
    return [*model, f"n = {len(direct.values)} facts", f"all together: {total} logits"]
