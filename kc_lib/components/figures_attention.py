"""Attention patterns of single prompts: heatmaps, and circuitsvis's views, which a notebook shows with no network.

circuitsvis asks the internet where to load its script from and, offline, writes all of it into every view. Here the script
of the installed package is shown once per notebook (``attention_bundle``), and views call it.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files
from uuid import uuid4

import plotly.graph_objects as go
from circuitsvis.utils.convert_props import convert_props
from IPython.display import HTML
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from kc_lib.errors import MethodError
from kc_lib.plotting import SHADES, titled

MOST_HEADS, MOST_TOKENS = 12, 64  # of a view that a browser still turns over smoothly
COLUMNS = 3  # panels side by side
WIDEST = 260  # px of a panel; what is longer gets smaller letters


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
    titles = [f"a{layer}.h{head}" for layer, head in heads]
    size = min(max(150, 21 * len(names)), WIDEST)
    label = 7 * max(map(len, names))
    spacing = {"horizontal_spacing": 0.1 / columns, "vertical_spacing": (label + 45) / (rows * (size + label + 45))}
    figure = make_subplots(rows, columns, shared_yaxes=True, subplot_titles=titles, **spacing)
    figure.update_annotations(font_size=13)
    about = ["rows look at columns"]
    about += [] if with_bos else [f"without the first token ({tokens[0]!r}), each head on its own scale"]
    titled(figure, title or "Attention patterns", about)
    places = list(range(len(names)))
    for i, head in enumerate(shown.float()):
        row, column = divmod(i, columns)
        limit = 1.0 if with_bos else float(head.max()) or 1.0
        look = {"colorscale": SHADES, "zmin": 0, "zmax": limit, "xgap": 1, "ygap": 1, "showscale": with_bos and i == 0}
        look |= {"colorbar": {"title": "share", "thickness": 14, "outlinewidth": 0}}
        hover = [[f"{query} looks at {key}" for key in names] for query in names]
        text = {"customdata": hover, "hovertemplate": "%{customdata}<br>%{z:.3f}<extra></extra>"}
        above = head.where(head.new_ones(head.shape).tril().bool(), float("nan"))  # keys after the query are not seen
        figure.add_heatmap(z=above.tolist(), row=row + 1, col=column + 1, hoverongaps=False, **look, **text)
    axis = {
        "tickvals": places,
        "ticktext": names,
        "showgrid": False,
        "ticks": "",
        "tickfont_size": min(11, max(6, 0.8 * size / len(names))),
    }
    figure.update_xaxes(**axis, tickangle=-90)
    figure.update_yaxes(**axis, autorange="reversed")
    width, height = columns * (size + 20) + label + 130, rows * (size + label + 45) + 95
    return figure.update_layout(width=max(560, width), height=height, margin_b=20)


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
