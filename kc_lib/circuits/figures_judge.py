"""The judge's results on circuits, as a paper prints them: areas by size, the circuit's nulls, completeness.

There is one panel per split that was judged. Intervals are those of the results: 95% bootstraps over facts. A split where
the full model has next to no effect has no faithfulness: it is named in the subtitle instead of drawn.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kc_lib.circuits.areas import areas
from kc_lib.circuits.baselines import NULL_KINDS, ranking_of
from kc_lib.circuits.completeness import completeness
from kc_lib.circuits.evaluate import Evaluation
from kc_lib.errors import MethodError
from kc_lib.plotting import (
    DARK,
    ENDS,
    NEUTRAL,
    OKABE_ITO,
    OVER_FACTS,
    POSITIVE,
    SYMBOLS,
    Row,
    circuit_hover,
    faithfulness_range,
    figure_text,
    marks,
    number,
    shown_split,
    titled,
    undefined_on,
    whiskers,
)
from kc_lib.stats import empirical_p

FAITHFULNESS = "faithfulness (0: no edges, 1: full model)"
NULL_NAMES = {"connected": "random<br>circuits", "profile": "heads<br>shuffled<br>in layers"}
LEGEND_NAME = 18  # letters that fit on a line with CPR and CMD
AREAS = {"cpr": "CPR", "cmd": "CMD", "log_area": "log area"}
RUNS = {  # -> shift to the side, colour and symbol
    "the circuit alone": (-0.2, POSITIVE, "circle"),
    "the model without it": (0.2, "#E69F00", "diamond"),
}


def area_curves(evaluation: Evaluation, title: str | None = None, seed: int = 0) -> go.Figure:
    """Faithfulness of every ranking against the share of edges it was given (log axis), with its 95% band.

    The legend of each panel has the areas of ``areas(evaluation, seed)`` with their intervals, the mean where there are
    several draws; the area over log10(share) is in the hover. Random rankings are grey. Every curve ends at the whole model.

    Raises:
        MethodError: no ranking was run below share 1, or faithfulness is undefined on every split.
    """
    splits, left_out = _defined_splits(evaluation)
    table = areas(evaluation, seed)
    points = _ranked(evaluation, splits, table["ranking"].unique())
    looks = _ranking_looks(table["kind"].unique().tolist())
    two_lines = max(map(len, looks)) > LEGEND_NAME
    about = [f"bands, brackets: {OVER_FACTS}", "CPR: area, CMD: area of |1 - faithfulness|", left_out]
    figure = _panels(evaluation, splits, title or "Faithfulness by share of edges", about)
    for column, split in enumerate(splits, start=1):
        for kind, look in looks.items():
            rows = table[(table["kind"] == kind) & (table["split"] == split)].to_dict("records")
            name = f"{html.escape(kind)}:{'<br>' if two_lines else ' '}{_areas_text(rows)}"
            group = {"name": name, "legendgroup": kind, "legend": _legend(column), "row": 1, "col": column}
            for i, area in enumerate(rows):
                curve = points[(points["ranking"] == area["ranking"]) & (points["split"] == split)]
                _add_curve(figure, curve, area, look, group | {"showlegend": i == 0})
    first = np.log10(points["at"].min())
    figure.update_xaxes(type="log", dtick=1, tickformat=".4~%", range=[1.04 * first, -0.04 * first])
    figure.update_xaxes(title_text="share of all edges that the ranking keeps")
    figure.update_yaxes(range=faithfulness_range(points, points))
    _mark_levels(figure, "y")
    plot, below = 340, 70 + (38 if two_lines else 22) * len(looks) + 10
    for column in range(1, len(splits) + 1):
        left = figure.layout[f"xaxis{column if column > 1 else ''}"].domain[0]
        place = {"x": left, "y": -65 / plot, "yanchor": "top", "tracegroupgap": 0, "font": {"size": 12}}
        figure.update_layout({_legend(column): place})
    return figure.update_layout(height=115 + plot + below, margin_b=below)


def null_figure(evaluation: Evaluation, circuit: str = "circuit", title: str | None = None) -> go.Figure:
    """Faithfulness of the circuit, with its interval, above every draw of its nulls: random circuits and heads shuffled.

    Above each null are its mean, its best draw, and the empirical p of the circuit among the draws.

    Raises:
        MethodError: no such circuit, no nulls in the evaluation, or faithfulness undefined on every split.
    """
    splits, left_out = _defined_splits(evaluation)
    rows = evaluation.summary[evaluation.summary["split"].isin(splits)]
    kinds = _null_kinds(rows)
    if not kinds:
        raise MethodError("the evaluation has no nulls: give evaluate_circuits random_nulls(circuit, 20) as well")
    about = [f"whiskers, shaded: {OVER_FACTS}", "p: share of draws at least as faithful, the circuit among them", left_out]
    figure = _panels(evaluation, splits, title or "The circuit against random circuits", about)
    own_rows = pd.DataFrame([evaluation.row(circuit, split) for split in splits])
    for column, own in enumerate(own_rows.to_dict("records"), start=1):
        at, value, top = {"row": 1, "col": column}, own["faithfulness"], len(kinds)
        look = marks([circuit_hover(own)], POSITIVE, size=11) | {"error_x": whiskers([own], "faithfulness")}
        figure.add_scatter(x=[value], y=[top], name=html.escape(circuit), meta="circuit", **look, **at)
        if pd.notna(own["faithfulness_low"]):
            ends = own["faithfulness_low"], own["faithfulness_high"]
            figure.add_vrect(*ends, fillcolor=POSITIVE, opacity=0.12, line_width=0, layer="below", **at)
        said = {top: figure_text(own, "faithfulness")}
        for y, kind in zip(reversed(range(top)), kinds, strict=True):
            draws = rows[(rows["kind"] == NULL_KINDS[kind]) & (rows["split"] == own["split"])]
            x, spread = draws["faithfulness"].tolist(), _spread(len(draws), 0.12)
            look = marks([circuit_hover(row) for row in draws.to_dict("records")], NEUTRAL, opacity=0.7)
            figure.add_scatter(x=x, y=(y + spread).tolist(), name=kind, meta="null", **look, **at)
            p = f"p = {empirical_p(value, x):.2g} ({len(x)} draws)"
            said[y] = f"mean {number(np.mean(x))}, best {number(max(x))}, {p}" if x else "no draws"
        for y, text in said.items():
            place = {"x": 0.02, "xref": "x domain", "xanchor": "left", "y": y + 0.36, "showarrow": False}
            figure.add_annotation(text=text, font={"size": 12, "color": DARK}, bgcolor="white", borderpad=1, **place, **at)
    nulls = rows[rows["kind"].isin([NULL_KINDS[kind] for kind in kinds])]
    ticks = [*(NULL_NAMES[kind] for kind in reversed(kinds)), html.escape(circuit)]
    figure.update_xaxes(title_text=FAITHFULNESS, range=faithfulness_range(pd.concat([own_rows, nulls]), own_rows))
    figure.update_yaxes(title_text="", range=[-0.5, len(kinds) + 0.65], showgrid=False)
    figure.update_yaxes(tickvals=list(range(len(ticks))), ticktext=ticks)
    _mark_levels(figure, "x")
    return figure.update_layout(height=185 + 85 * len(ticks), showlegend=False)


def completeness_figure(evaluation: Evaluation, circuit: str = "circuit", title: str | None = None) -> go.Figure:
    """Faithfulness of the circuit alone beside that of the model without it, for the circuit and its nulls.

    A complete circuit is high alone and leaves little (``completeness``). Of nulls every draw is a dot, their mean the mark.

    Raises:
        MethodError: the circuit's complement was not run, or faithfulness is undefined on every split.
    """
    splits, left_out = _defined_splits(evaluation)
    rows = _alone_and_without(evaluation, circuit, splits)
    kinds = _null_kinds(rows)
    about = [f"whiskers: {OVER_FACTS}", "small dots: draws of nulls, beside their mean" if kinds else "", left_out]
    figure = _panels(evaluation, splits, title or "The circuit alone, and the model without it", about)
    for column, split in enumerate(splits, start=1):
        for run, (shift, colour, symbol) in RUNS.items():
            part = rows[(rows["split"] == split) & (rows["run"] == run)]
            own = part[part["circuit"] == circuit].iloc[0]
            draws = [part[part["kind"] == NULL_KINDS[kind]] for kind in kinds]
            group = {"name": run, "legendgroup": run, "row": 1, "col": column}
            for place, nulls in enumerate(draws, start=1):
                text = [_run_hover(row) for row in nulls.to_dict("records")]
                look = marks(text, colour, symbol, 5, opacity=0.45) | {"showlegend": False, "meta": "null"}
                x = place + shift - 0.1 + _spread(len(nulls), 0.04)
                figure.add_scatter(x=x.tolist(), y=nulls["faithfulness"].tolist(), **look, **group)
            means = [own["faithfulness"], *(nulls["faithfulness"].mean() for nulls in draws)]
            averages = zip(draws, means[1:], strict=True)
            text = [f"mean of {len(nulls)} draws, {run}<br>faithfulness {number(mean, 3)}" for nulls, mean in averages]
            look = marks([_run_hover(own), *text], colour, symbol, 11)
            numbers = ["" if pd.isna(mean) else f" {number(mean)}" for mean in means]
            look |= {"mode": "markers+text", "text": numbers, "textposition": _beside(means), "meta": "means"}
            look |= {"error_y": whiskers([own, *({} for _ in draws)], "faithfulness"), "showlegend": column == 1}
            places = [place + shift for place in range(len(means))]
            figure.add_scatter(x=places, y=means, **look, **group)
    ticks = [html.escape(circuit), *(NULL_NAMES[kind] for kind in kinds)]
    figure.update_xaxes(tickvals=list(range(len(ticks))), ticktext=ticks, range=[-0.5, len(ticks) - 0.4], showgrid=False)
    figure.update_yaxes(range=faithfulness_range(rows, rows[rows["circuit"] == circuit]))
    _mark_levels(figure, "y")
    return figure.update_layout(height=530, margin_b=130, legend={"orientation": "h", "x": 0, "y": -0.25, "yanchor": "top"})


def _panels(evaluation: Evaluation, splits: Sequence[str], title: str, about: Iterable[str]) -> go.Figure:
    """One panel of faithfulness per split, side by side on one vertical axis."""
    n = evaluation.summary.groupby("split")["n"].first()
    names = [f"{shown_split(split)}, n = {n[split]} facts" for split in splits]
    figure = make_subplots(1, len(splits), shared_yaxes=True, subplot_titles=names, horizontal_spacing=0.04)
    figure.update_annotations(font_size=14)
    figure.update_yaxes(ticks="")
    figure.update_yaxes(title_text=FAITHFULNESS, ticks="outside", col=1)
    metric = f"{evaluation.metric.name} ({evaluation.metric.unit})"
    return titled(figure, title, [metric, *about]).update_layout(width=max(900, 480 * len(splits)), margin_t=115)


def _defined_splits(evaluation: Evaluation) -> tuple[list[str], str]:
    """Splits with a faithfulness, and what the subtitle says of the others."""
    if evaluation.summary.empty:
        raise MethodError("the evaluation is empty: there is nothing to show")
    known = evaluation.summary.groupby("split", sort=False)["faithfulness"].count()
    splits = [split for split in evaluation.splits if known[split]]
    if not splits:
        raise MethodError("faithfulness is undefined on every split: the full model's effect is next to nothing there")
    return splits, undefined_on([split for split in evaluation.splits if split not in splits])


def _null_kinds(rows: pd.DataFrame) -> list[str]:
    return [kind for kind, name in NULL_KINDS.items() if (rows["kind"] == name).any()]


def _add_curve(
    figure: go.Figure, curve: pd.DataFrame, area: Row, look: Mapping[str, str], group: Mapping[str, object]
) -> None:
    """One ranking on one split: its band, and a point per size."""
    band = curve.dropna(subset=["faithfulness_low", "faithfulness_high"])
    x, y = [*band["at"], *band["at"][::-1]], [*band["faithfulness_low"], *band["faithfulness_high"][::-1]]
    fill = {"mode": "none", "fill": "toself", "fillcolor": look["colour"], "opacity": 0.15, "hoverinfo": "skip"}
    figure.add_scatter(x=x, y=y, meta=f"band of {area['ranking']}", **fill, **{**group, "showlegend": False})
    found = [f"{shown} {figure_text(area, key, 3)}" for key, shown in AREAS.items()]
    about = "<br>".join([f"<b>{html.escape(area['ranking'])}</b>, all sizes", *found])
    text = [f"{circuit_hover(row)}<br>{about}" for row in curve.to_dict("records")]
    line = {"color": look["colour"], "dash": look["dash"], "width": 2}
    points = marks(text, look["colour"], look["symbol"], 7) | {
        "mode": "lines+markers",
        "line": line,
        "meta": area["ranking"],
    }
    figure.add_scatter(x=curve["at"].tolist(), y=curve["faithfulness"].tolist(), **points, **group)


def _ranked(evaluation: Evaluation, splits: Sequence[str], rankings: Iterable[str]) -> pd.DataFrame:
    """Summary rows of every ranking, by share of the edges (``ranking``, ``at``); the full model is at share 1."""
    summary = evaluation.summary[evaluation.summary["split"].isin(splits)]
    places = summary["circuit"].map(ranking_of)
    found = summary[places.notna()].assign(
        ranking=[place[0] for place in places.dropna()], at=[place[1] for place in places.dropna()]
    )
    full = summary[summary["circuit"] == "full"]
    ends = [full.assign(ranking=name, at=1.0) for name in rankings]
    both = pd.concat([found[found["ranking"].isin(list(rankings))], *ends])
    return both.drop_duplicates(["split", "ranking", "at"]).sort_values("at", kind="stable")


def _ranking_looks(kinds: Iterable[str]) -> dict[str, dict[str, str]]:
    """Colour, dash and symbol of every kind of ranking; random ones are grey and last."""
    colours, dashes, looks = cycle(OKABE_ITO), cycle(("dash", "dot", "dashdot")), {}
    for kind, symbol in zip(sorted(kinds, key=_is_random), cycle(SYMBOLS), strict=False):
        colour, dash = (NEUTRAL, next(dashes)) if _is_random(kind) else (next(colours), "solid")
        looks[kind] = {"colour": colour, "dash": dash, "symbol": symbol}
    return looks


def _is_random(kind: str) -> bool:
    return "random" in kind.split()


def _areas_text(rows: Sequence[Row]) -> str:
    """CPR and CMD of one ranking with intervals, or means over several."""
    if len(rows) == 1:
        return ", ".join(f"{AREAS[key]} {figure_text(rows[0], key)}" for key in ("cpr", "cmd"))
    means = ", ".join(f"{AREAS[key]} {number(np.mean([row[key] for row in rows]))}" for key in ("cpr", "cmd"))
    return f"{means} (mean of {len(rows)} draws)"


def _legend(column: int) -> str:
    return f"legend{column}" if column > 1 else "legend"


def _alone_and_without(evaluation: Evaluation, circuit: str, splits: Sequence[str]) -> pd.DataFrame:
    """circuit, kind, split, run (as in RUNS) and faithfulness with its interval, of the circuit and its nulls."""
    without = completeness(evaluation)
    if circuit not in set(without["circuit"]):
        raise MethodError(f"the complement of {circuit!r} was not judged: give evaluate_circuits complements(circuits)")
    figures = [f"faithfulness{end}" for end in ENDS]
    renamed = without.rename(columns={f"completeness{end}": f"faithfulness{end}" for end in ENDS})
    parts = [table.assign(run=run) for run, table in zip(RUNS, (evaluation.summary, renamed), strict=True)]
    rows = pd.concat([part[["circuit", "kind", "split", "run", *figures]] for part in parts])
    wanted = (rows["circuit"] == circuit) | rows["kind"].isin(NULL_KINDS.values())
    return rows[wanted & rows["split"].isin(splits)]


def _beside(values: Iterable[float]) -> list[str]:
    """Where numbers stand beside their marks, clear of the lines at 0 and 1."""
    return [f"{'bottom' if round(value, 2) < 0 or 0.9 < value < 1 else 'top'} right" for value in values]


def _run_hover(row: Row) -> str:
    return f"<b>{html.escape(row['circuit'])}</b>, {row['run']}<br>faithfulness {figure_text(row, 'faithfulness', 3)}"


def _spread(n: int, width: float) -> np.ndarray:
    """Where to set apart points that may coincide: evenly spread, the same every time."""
    return width * (2 * (np.arange(n) * 0.618034 % 1.0) - 1) if n > 1 else np.zeros(n)


def _mark_levels(figure: go.Figure, axis: str) -> None:
    """Lines at the empty circuit (0) and the full model (1)."""
    add = figure.add_hline if axis == "y" else figure.add_vline
    for level in (0, 1):
        add(level, line={"dash": "dot", "color": DARK, "width": 1})
