"""Knowledge neurons drawn: where they are, what facts share, and what changing and editing them does, beside controls.

Knowledge neurons are blue, those of the base method orange, random ones of the same layers grey; whiskers are 95% intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kc_lib.errors import MethodError
from kc_lib.neurons.activate import SENTENCES, NeuronActivations, activation_means
from kc_lib.neurons.effects import ALL, KINDS, METHODS
from kc_lib.neurons.erase import RelationErasure, erasure_effects
from kc_lib.neurons.sets import NeuronSets, layer_shares, neurons_per_fact, overlaps, set_sizes
from kc_lib.neurons.suppress import NeuronChanges, change_ratios
from kc_lib.neurons.update import FactUpdates, side_effects, update_rates
from kc_lib.plotting import DARK, HEAD, NEUTRAL, OKABE_ITO, OVER_FACTS, POSITIVE, figure_text, titled, whiskers

COLOURS = {"knowledge": POSITIVE, "base": OKABE_ITO[1], "random": NEUTRAL}
SENTENCE_LOOKS = {
    "T1": ("T1: subject and answer", POSITIVE),
    "T2": ("T2: subject alone", HEAD),
    "T3": ("T3: neither", NEUTRAL),
}
PROMPTS = {"own": "own prompts", "other": "other relations' prompts", "held_out": "held-out paraphrases"}
RATES = {"changed": "rank-1 token changed", "success_1": "new answer at rank 1", "success_5": "new answer within rank 5"}
BELOW = {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}


def neuron_layer_figure(sets: NeuronSets, seed: int = 0) -> go.Figure:
    """Share of the facts' neurons by layer, knowledge neurons beside the base method; dotted, neurons of the whole model.

    Random neurons of the same layers, which the other figures compare with, would have the knowledge neurons' bars.

    Raises:
        MethodError: no fact has neurons.
    """
    _filled(sets.frame, "no fact has neurons: there is nothing to show")
    table = layer_shares(sets, seed)
    figure = go.Figure()
    for method in METHODS:
        rows = table[(table["method"] == method) & table["share"].notna()]
        hover = [
            f"layer {row['layer']}: {row['neurons']} {method} neurons<br>{_shown(row, 'share')}" for row in _records(rows)
        ]
        _bars(figure, rows["layer"].tolist(), rows, "share", method, COLOURS[method], hover)
    chance = float(table.loc[table["method"] == "random", "share"].iloc[0])
    line = {"mode": "lines", "line": {"color": DARK, "width": 1.5, "dash": "dot"}, "hoverinfo": "skip"}
    n_layers = int(sets.provenance["n_layers"])
    figure.add_scatter(x=[-0.5, n_layers - 0.5], y=[chance] * 2, name="random neurons of the model", **line)
    titled(figure, "Neurons by layer", [*_about(sets), OVER_FACTS])
    figure.update_xaxes(title_text="layer", dtick=max(1, n_layers // 15), range=[-0.5, n_layers - 0.5])
    figure.update_yaxes(title_text="share of all facts' neurons", tickformat=".0%", rangemode="tozero")
    return figure.update_layout(width=900, height=450, barmode="group", legend=BELOW)


def neurons_per_fact_figure(sets: NeuronSets, seed: int = 0) -> go.Figure:
    """How many facts have how many neurons; facts without any are the bar at 0."""
    sizes = set_sizes(sets)
    pooled = neurons_per_fact(sets, seed)
    by_method = {row["method"]: row for row in _records(pooled[pooled["relation"] == ALL])}
    figure = go.Figure()
    for method in METHODS:
        counts = sizes[method].astype(int).value_counts().sort_index()
        figure.add_bar(
            x=counts.index.tolist(),
            y=counts.tolist(),
            name=f"{method}, mean {figure_text(by_method[method], 'neurons')}",
            marker_color=COLOURS[method],
            hovertemplate=f"%{{y}} facts with %{{x}} {method} neurons<extra></extra>",
        )
    without = [f"without any: {by_method[method]['n_empty']} ({method})" for method in METHODS]
    titled(figure, "Neurons per fact", [*_about(sets), *without])
    figure.update_xaxes(title_text="neurons of a fact", dtick=max(1, int(sizes.max().max()) // 20))
    figure.update_yaxes(title_text="facts", rangemode="tozero")
    return figure.update_layout(width=800, height=430, barmode="group", legend=BELOW)


def neuron_overlap_figure(sets: NeuronSets, n_random: int = 10, seed: int = 0) -> go.Figure:
    """How many neurons two facts share, of one relation and of two, for every kind of neurons.

    Raises:
        MethodError: no fact has neurons, or there is but one fact.
    """
    _filled(sets.frame, "no fact has neurons: there is nothing to show")
    table = overlaps(sets, n_random, seed)
    table = table[table["pairs"].isin(["intra", "inter"]) & table["shared"].notna()]
    _filled(table, "there is one fact: it shares its neurons with no other")
    names = {"intra": "two facts of a relation", "inter": "facts of two relations"}
    figure = go.Figure()
    for kind in KINDS:
        rows = table[table["kind"] == kind]
        hover = [
            f"{kind}, {names[row['pairs']]}<br>{figure_text(row, 'shared')} ({row['n_pairs']} pairs)"
            for row in _records(rows)
        ]
        _bars(figure, rows["pairs"].map(names).tolist(), rows, "shared", kind, COLOURS[kind], hover)
    titled(figure, "Neurons that two facts share", [*_about(sets), OVER_FACTS, "random: same layers"])
    figure.update_yaxes(title_text="shared neurons, mean over pairs", rangemode="tozero")
    return figure.update_layout(width=720, height=450, barmode="group", legend=BELOW)


def change_ratio_figure(changes: NeuronChanges, on: str = "own", seed: int = 0) -> go.Figure:
    """By how much the answer's probability changes when neurons are suppressed or amplified, per relation and pooled.

    Args:
        on: "own" prompts, or prompts of "other" relations.

    Raises:
        MethodError: nothing was changed on such prompts.
    """
    table = change_ratios(changes, seed)
    table = table[table["on"] == on]
    _filled(table, f"no neurons were changed on {on} prompts: there is nothing to show")
    factors = sorted(table["factor"].unique())
    names = {0.0: "suppressed (times 0)", 2.0: "amplified (times 2)"}
    figure = make_subplots(
        1, len(factors), subplot_titles=[names.get(factor, f"times {factor:g}") for factor in factors], shared_yaxes=True
    )
    for column, factor in enumerate(factors, start=1):
        own = table[table["factor"] == factor]
        _by_relation(figure, own, "ratio", list(KINDS), "kind", COLOURS, column)
    figure.add_vline(0, line={"color": DARK, "width": 1})
    figure.update_xaxes(title_text="change of p(answer), share of p", tickformat="+.0%")
    n = int(table.loc[table["relation"] == ALL, "n"].max())
    about = [str(changes.provenance.get("model", "")), f"n = {n} facts", PROMPTS[on], OVER_FACTS]
    titled(figure, "What becomes of the answer without its neurons, and with twice as much", about)
    return _tall(figure, table, len(KINDS), 520 + 260 * len(factors))


def activating_figure(activations: NeuronActivations, kind: str = "knowledge", seed: int = 0) -> go.Figure:
    """Mean activation of facts' neurons on T1, T2 and T3 sentences, per relation and pooled.

    Raises:
        MethodError: nothing was read of that kind of neurons.
    """
    table = activation_means(activations, seed)
    table = table[(table["kind"] == kind) & table["sentences"].isin(SENTENCES)]
    _filled(table, f"no {kind} neurons were read on sentences: there is nothing to show")
    figure = make_subplots(1, 1)
    colours = {name: colour for name, (_, colour) in SENTENCE_LOOKS.items()}
    _by_relation(figure, table, "activation", list(SENTENCES), "sentences", colours, 1)
    for trace in figure.data:
        trace.name = SENTENCE_LOOKS[str(trace.name)][0]
    figure.add_vline(0, line={"color": DARK, "width": 1})
    figure.update_xaxes(title_text=f"mean activation of {kind} neurons")
    n = int(table.loc[table["relation"] == ALL, "n"].max())
    titled(
        figure,
        f"Which sentences activate {kind} neurons",
        [str(activations.provenance.get("model", "")), f"n = {n} facts", OVER_FACTS],
    )
    return _tall(figure, table, len(SENTENCES), 820)


def update_figure(updates: FactUpdates) -> go.Figure:
    """How often an updated fact's answer changes, and to the new one, on own prompts and on held-out paraphrases.

    Raises:
        MethodError: no fact was updated.
    """
    table = update_rates(updates)
    table = table[table["relation"] == ALL]
    _filled(table, "no fact was updated: there is nothing to show")
    shown = [on for on in ("own", "held_out") if on in set(table["on"])]
    figure = make_subplots(1, len(shown), subplot_titles=[PROMPTS[on] for on in shown], shared_yaxes=True)
    for column, on in enumerate(shown, start=1):
        for kind in KINDS:
            own = _records(table[(table["on"] == on) & (table["kind"] == kind)])
            if own:
                rows = pd.DataFrame(
                    [
                        {"rate": own[0][name], "rate_low": own[0][f"{name}_low"], "rate_high": own[0][f"{name}_high"]}
                        for name in RATES
                    ]
                )
                hover = [
                    f"{kind}, {text}<br>{_shown(row, 'rate')}"
                    for text, row in zip(RATES.values(), _records(rows), strict=True)
                ]
                x = [text.replace(" rank", "<br>rank").replace(" changed", "<br>changed") for text in RATES.values()]
                at = {"row": 1, "col": column, "showlegend": column == 1, "legendgroup": kind}
                _bars(figure, x, rows, "rate", kind, COLOURS[kind], hover, **at)
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%")
    figure.update_yaxes(title_text="share of facts", col=1)
    about = updates.provenance
    told = [str(about.get("model", "")), f"n = {int(table['n'].max())} facts", f"l1 = {about['l1']:g}, l2 = {about['l2']:g}"]
    told += ["" if about.get("orient", True) else "not oriented"]
    titled(
        figure,
        "Facts given another answer by their neurons",
        [*filter(None, told), "whiskers: 95% Wilson intervals over facts"],
    )
    return figure.update_layout(
        width=420 + 280 * len(shown), height=470, margin={"t": 115}, barmode="group", legend=BELOW | {"y": -0.24}
    )


def side_effect_figure(updates: FactUpdates, seed: int = 0) -> go.Figure:
    """How many times as large updating a fact makes the perplexity of other facts, of its relation and of others.

    On a logarithmic axis: an edit that is too large for a model multiplies perplexities by thousands.

    Raises:
        MethodError: no fact was updated, or there are no others.
    """
    table = side_effects(updates, seed)
    table = table[table["relation"] == ALL]
    _filled(table, "no fact was updated, or there are no other facts: there is nothing to show")
    times = table.assign(**{f"times{end}": 1 + table[f"ratio{end}"] for end in ("", "_low", "_high")})
    names = {"intra": "other facts of the relation", "inter": "facts of other relations"}
    figure = go.Figure()
    for kind in KINDS:
        rows = times[times["kind"] == kind]
        if rows.empty:
            continue
        figure.add_scatter(
            x=rows["on"].map(names).tolist(),
            y=rows["times"].tolist(),
            error_y=whiskers(_records(rows), "times"),
            mode="markers",
            marker={"color": COLOURS[kind], "size": 11},
            name=kind,
            hovertext=[f"{kind}, {names[row['on']]}<br>{figure_text(row, 'times', 3)} times" for row in _records(rows)],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    figure.add_hline(1, line={"color": DARK, "width": 1, "dash": "dot"})
    n = int(table["n"].max())
    titled(
        figure, "What updates do to other facts", [str(updates.provenance.get("model", "")), f"n = {n} facts", OVER_FACTS]
    )
    figure.update_xaxes(range=[-0.5, table["on"].nunique() - 0.5])
    decades = range(-3, 31)
    steps = (1, 2, 5) if times[["times", "times_high"]].to_numpy(dtype=float).max() < 300 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    figure.update_yaxes(title_text="perplexity after / before", type="log", tickvals=ticks)
    figure.update_yaxes(ticktext=[f"{tick:,g}" for tick in ticks])
    return figure.update_layout(width=680, height=450, scattermode="group", scattergap=0.6, legend=BELOW)


def erase_figure(erasures: Sequence[RelationErasure], seed: int = 0) -> go.Figure:
    """What erasing each relation does to its perplexity and to that of all others, for every kind of neurons.

    Raises:
        MethodError: nothing was erased.
    """
    table = erasure_effects(erasures, seed)
    table = table[table["on"].isin(["erased", "others"])]
    _filled(table, "no relation had neurons to erase: there is nothing to show")
    panels = {"erased": "the erased relation", "others": "all other relations"}
    shown = [on for on in panels if on in set(table["on"])]
    figure = make_subplots(1, len(shown), subplot_titles=[panels[on] for on in shown], shared_yaxes=True)
    for column, on in enumerate(shown, start=1):
        own = table[table["on"] == on].assign(relation=lambda rows: rows["erased"])
        _by_relation(figure, own, "ratio", list(KINDS), "kind", COLOURS, column)
    figure.add_vline(0, line={"color": DARK, "width": 1})
    figure.update_xaxes(title_text="change of perplexity", tickformat="+.0%", matches="x")
    model = str(erasures[0].provenance.get("model", ""))
    most = int(table["n_neurons"].max())
    titled(figure, "Relations erased by their most frequent neurons", [model, f"at most {most} neurons", OVER_FACTS])
    return _tall(figure, table.assign(relation=table["erased"]), len(KINDS), 520 + 260 * len(shown))


def _by_relation(
    figure: go.Figure,
    table: pd.DataFrame,
    name: str,
    kinds: Sequence[str],
    column_of_kinds: str,
    colours: Mapping[str, str],
    column: int,
) -> None:
    """Horizontal bars, relations from the top with those of all of them first, one bar per kind."""
    for kind in reversed(kinds):  # bars of a group go up from the bottom
        rows = table[(table[column_of_kinds] == kind) & table[name].notna()]
        if rows.empty:
            continue
        records = _records(rows)
        figure.add_bar(
            x=rows[name].tolist(),
            y=[_label(row["relation"]) for row in records],
            error_x=whiskers(records, name),
            orientation="h",
            name=kind,
            legendgroup=kind,
            showlegend=column == 1,
            marker_color=colours[kind],
            hovertext=[
                f"{_label(row['relation'])}, {kind} (n = {row['n']})<br>{figure_text(row, name, 3)}" for row in records
            ],
            hovertemplate="%{hovertext}<extra></extra>",
            row=1,
            col=column,
        )


def _tall(figure: go.Figure, table: pd.DataFrame, n_kinds: int, width: int) -> go.Figure:
    relations = list(dict.fromkeys(_label(relation) for relation in table["relation"]))
    figure.update_yaxes(categoryorder="array", categoryarray=relations[::-1], ticks="", showgrid=False, ticklabelstandoff=8)
    height = 190 + len(relations) * (16 * n_kinds + 14)
    legend = BELOW | {"traceorder": "reversed", "y": -70 / (height - 190)}
    return figure.update_layout(
        width=width, height=height, margin={"t": 115, "b": 85}, barmode="group", bargap=0.25, legend=legend
    )


def _bars(
    figure: go.Figure,
    x: Sequence[Any],
    rows: pd.DataFrame,
    name: str,
    label: str,
    colour: str,
    hover: Sequence[str],
    **where: Any,
) -> None:
    figure.add_bar(
        x=list(x),
        y=rows[name].tolist(),
        error_y=whiskers(_records(rows), name),
        name=label,
        marker_color=colour,
        hovertext=list(hover),
        hovertemplate="%{hovertext}<extra></extra>",
        **where,
    )


def _label(relation: str) -> str:
    return "all facts" if relation == ALL else relation.replace("_", " ")


def _shown(row: Any, name: str) -> str:
    """A share as a percentage with its interval."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.1%}" + ("" if pd.isna(low) else f" [{low:.1%}, {high:.1%}]")


def _records(rows: pd.DataFrame) -> list[dict[Any, Any]]:
    return rows.to_dict("records")


def _about(sets: NeuronSets) -> list[str]:
    relations = sets.facts["relation"].nunique()
    return [str(sets.provenance.get("model", "")), f"n = {len(sets.facts)} facts of {relations} relations"]


def _filled(table: pd.DataFrame, otherwise: str) -> None:
    if table.empty:
        raise MethodError(otherwise)
