"""How the scores of a graph's edges are distributed."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from kc_lib.circuits.scores import EdgeScores
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit
from kc_lib.plotting import NEGATIVE, POSITIVE, arrow, check_finite, origin, titled, unit_of, with_unit


def score_distribution(scores: EdgeScores, circuit: Circuit | None = None) -> go.Figure:
    """|score| of every edge (in the scores' unit) against its rank among those of its sign; both axes are log.

    Edges that score exactly 0 are counted in the subtitle. With ``circuit``, its edges are marked.

    Raises:
        MethodError: every edge scores 0, a score is no number, or the circuit is one of another graph.
    """
    graph, unit = scores.graph, unit_of(scores.provenance)
    if circuit is not None and circuit.graph != graph:
        raise MethodError(f"the circuit is one of another graph ({circuit.graph}) than the scores ({graph})")
    rows, columns = graph.edges.nonzero(as_tuple=True)
    values = scores.scores[rows, columns].double().numpy()
    check_finite(values)
    zero, inside = int((values == 0).sum()), np.zeros(len(values), dtype=bool)
    if zero == len(values):
        raise MethodError("every edge scores 0: there is no distribution to show")
    about = [*origin(scores.provenance), f"{len(values):,} edges", f"{zero:,} of them score 0" if zero else ""]
    if circuit is not None:
        inside = circuit.mask[rows, columns].numpy()
        about.append(f"{circuit.n_edges:,} in the circuit (circles)")
    figure = titled(go.Figure(), "Distribution of edge scores", about)
    for sign, name, colour in ((1, "positive", POSITIVE), (-1, "negative", NEGATIVE)):
        order = np.flatnonzero(np.sign(values) == sign)
        order = order[np.argsort(-np.abs(values[order]), kind="stable")]
        kept = np.flatnonzero(inside[order])
        line = {"mode": "lines", "name": f"{name} ({len(order):,})", "line": {"color": colour, "width": 2}}
        marker = {"size": 7, "color": "rgba(255,255,255,0.6)", "line": {"color": colour, "width": 1.5}}
        circles = {"mode": "markers", "name": f"{name}, in the circuit ({len(kept):,})", "marker": marker}
        for ranks, look in ((np.arange(len(order)), line), (kept, circles)):
            ranks = ranks[_thinned(len(ranks))]
            if len(ranks):
                edges = [(graph.writers[rows[i]], graph.readers[columns[i]].name) for i in order[ranks]]
                hover = f"%{{text}}<br>rank %{{x}}: %{{y:.3g}} {unit}<extra>{name}</extra>"
                text, y = [arrow(*edge) for edge in edges], np.abs(values[order[ranks]]).tolist()
                figure.add_scatter(x=(ranks + 1).tolist(), y=y, text=text, hovertemplate=hover, legendgroup=name, **look)
    last = np.log10(max(1, (values > 0).sum(), (values < 0).sum()))
    rank = "rank among edges of the same sign"
    figure.update_xaxes(type="log", dtick=1, title_text=rank, tickformat=",", range=[-0.15, last + 0.15])
    figure.update_yaxes(type="log", dtick=1, title_text=with_unit("|score|", unit), exponentformat="power")
    return figure.update_layout(width=900, height=500, hovermode="closest")


def _thinned(n: int, points: int = 500) -> np.ndarray:
    """At most ``points`` of the positions 0..n-1, evenly spread on a log axis."""
    return np.unique(np.geomspace(1, n, points).round().astype(int)) - 1 if n > points else np.arange(n)
