"""Knowledge neurons drawn: where they are, what facts share, and what changing and editing them does, beside controls.

Knowledge neurons are blue, those of the base method orange, random ones of the same layers grey; whiskers are 95% intervals.
A figure that has nothing to show says why in its panel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from kc_lib import plotting as plot
from kc_lib.errors import MethodError
from kc_lib.neurons.activate import SENTENCES, NeuronActivations, activation_means
from kc_lib.neurons.attribute import NeuronAttributions
from kc_lib.neurons.effects import ALL, KINDS, METHODS
from kc_lib.neurons.effects import figure as figure_of
from kc_lib.neurons.erase import RelationErasure, erasure_effects
from kc_lib.neurons.options import RefineOptions
from kc_lib.neurons.refine import coarse_neurons
from kc_lib.neurons.sets import NeuronSets, layer_shares, neurons_per_fact, overlaps, set_sizes
from kc_lib.neurons.suppress import NeuronChanges, change_ratios
from kc_lib.neurons.update import FactUpdates, side_effects, update_rates

COLOURS = {"knowledge": plot.POSITIVE, "base": "#E69F00", "random": plot.NEUTRAL}
SENTENCE_LOOKS = {
    "T1": ("T1: subject and answer", plot.POSITIVE),
    "T2": ("T2: subject alone", plot.HEAD),
    "T3": ("T3: neither", plot.NEUTRAL),
}
KIND_LOOKS = {kind: (kind, COLOURS[kind]) for kind in KINDS}
PROMPTS = {"own": "own prompts", "other": "other relations' prompts", "held_out": "held-out paraphrases"}
RATES = {
    "changed": "rank-1 token<br>changed",
    "success_1": "new answer at<br>rank 1",
    "success_5": "new answer within<br>rank 5",
}
PASSED = {"one paraphrase": plot.NEUTRAL, "several": plot.HEAD, "every one": plot.POSITIVE}
FACTORS = {0.0: "suppressed (times 0)", 2.0: "amplified (times 2)"}
PAIRS = {"intra": "two facts of a relation", "inter": "facts of two relations"}
OTHERS = {"intra": "other facts of the relation", "inter": "facts of other relations"}
ERASED = {"erased": "the erased relation", "others": "all other relations"}
NOTHING = "no fact has neurons: there is nothing to show"


def neuron_layer_figure(sets: NeuronSets, seed: int = 0) -> go.Figure:
    """Share of the facts' neurons by layer, knowledge neurons beside the base method; dotted, neurons of the whole model.

    Random neurons of the same layers, which the other figures compare with, would have the knowledge neurons' bars.
    """
    title = "Neurons by layer"
    if sets.frame.empty:
        return plot.empty(NOTHING, title)
    table = layer_shares(sets, seed)
    figure = go.Figure()
    for method in METHODS:
        rows = table[(table["method"] == method) & table["share"].notna()]
        hover = _hover(rows, "layer {layer}: {neurons} {method} neurons<br>{figure}", "share", ".1%")
        plot.bars(figure, rows, "layer", "share", COLOURS[method], hover, name=method)
    chance, n_layers = table.loc[table["method"] == "random", "share"].iloc[0], int(sets.provenance["n_layers"])
    ends = pd.DataFrame({"layer": [-0.5, n_layers - 0.5], "share": float(chance)})
    dotted = {"width": 1.5, "dash": "dot", "name": "random neurons of the model"}
    plot.curve(figure, ends, "layer", "share", plot.DARK, None, **dotted)
    plot.layer_axis(figure, n_layers, range=[-0.5, n_layers - 0.5])
    figure.update_yaxes(title_text="share of all facts' neurons", tickformat=".0%", rangemode="tozero")
    about = [*_about(sets), plot.OVER_FACTS]
    return plot.titled(figure, title, about, width=900, height=450, barmode="group", legend=plot.below(0.2))


def neurons_per_fact_figure(sets: NeuronSets, seed: int = 0) -> go.Figure:
    """How many facts have how many neurons; facts without any are the bar at 0."""
    sizes, pooled = set_sizes(sets), neurons_per_fact(sets, seed)
    by_method = {row["method"]: row for row in pooled[pooled["relation"] == ALL].to_dict("records")}
    figure = go.Figure()
    for method in METHODS:
        counts = sizes[method].astype(int).value_counts().sort_index()
        rows = pd.DataFrame({"neurons": counts.index, "facts": counts.to_numpy()})
        hover = f"%{{y}} facts with %{{x}} {method} neurons<extra></extra>"
        name = f"{method}, mean {plot.figure_text(by_method[method], 'neurons')}"
        plot.bars(figure, rows, "neurons", "facts", COLOURS[method], hover, name=name)
    figure.update_xaxes(title_text="neurons of a fact", dtick=max(1, int(sizes.max().max()) // 20))
    figure.update_yaxes(title_text="facts", rangemode="tozero")
    about = [*_about(sets), *(f"without any: {by_method[method]['n_empty']} ({method})" for method in METHODS)]
    return plot.titled(figure, "Neurons per fact", about, width=800, height=430, barmode="group", legend=plot.below(0.2))


def neuron_overlap_figure(sets: NeuronSets, n_random: int = 10, seed: int = 0) -> go.Figure:
    """How many neurons two facts share, of one relation and of two, for every kind of neurons."""
    title = "Neurons that two facts share"
    table = overlaps(sets, n_random, seed)
    table = table[table["pairs"].isin(list(PAIRS)) & table["shared"].notna()]
    if sets.frame.empty or table.empty:
        return plot.empty(NOTHING if sets.frame.empty else "there is one fact: it shares its neurons with no other", title)
    table = table.assign(pair=table["pairs"].map(PAIRS))
    figure = go.Figure()
    for kind in KINDS:
        rows = table[table["kind"] == kind]
        hover = _hover(rows, "{kind}, {pair}<br>{figure} ({n_pairs} pairs)", "shared", "z.2f")
        plot.bars(figure, rows, "pair", "shared", COLOURS[kind], hover, name=kind)
    figure.update_yaxes(title_text="shared neurons, mean over pairs", rangemode="tozero")
    about = [*_about(sets), plot.OVER_FACTS, "random: same layers"]
    size = {"width": 720, "height": 450, "barmode": "group", "legend": plot.below(0.2)}
    return plot.titled(figure, title, about, **size)


def attribution_figure(
    attributions: NeuronAttributions, fact: int = 0, method: str = "knowledge", threshold: float | None = None
) -> go.Figure:
    """The neurons that pass the threshold on a fact's paraphrases, by layer, coloured by how many paraphrases they pass on.

    Args:
        threshold: share of a prompt's largest score; by default the method's own.

    Raises:
        MethodError: no such fact.
    """
    if fact not in set(attributions.facts["fact"]):
        raise MethodError(f"there is no fact {fact}: facts are 0 to {len(attributions.facts) - 1}")
    if threshold is None:
        threshold = RefineOptions.threshold if method == "knowledge" else RefineOptions.base_threshold
    rows = coarse_neurons(attributions, method, threshold)
    rows = rows[rows["fact"] == fact]
    about = attributions.facts[attributions.facts["fact"] == fact].iloc[0]
    title = f"Neurons of {about['subject']}: {about['answer']}"
    if rows.empty:
        return plot.empty("no neuron has a positive score: there is nothing to show", title)
    n_prompts, n_layers = int(about["n_prompts"]), int(attributions.provenance["n_layers"])
    n_passed: pd.Series = rows.groupby(["layer", "neuron"])["prompt"].transform("size")
    figure, width = go.Figure(), 0.6
    passed_on = np.select([n_passed == 1, n_passed < n_prompts], list(PASSED)[:2], list(PASSED)[2])
    for name, colour in PASSED.items():
        some = rows[passed_on == name]
        x = some["layer"] + width * ((some["prompt"] + 0.5) / n_prompts - 0.5)  # paraphrases side by side
        hover = "layer %{customdata[0]}, neuron %{customdata[1]}<br>paraphrase %{customdata[2]}: %{y:.4f}<extra></extra>"
        look: dict[str, Any] = {"size": 9, "opacity": 0.75, "outline": {"width": 0.5, "color": "white"}}
        look |= {"name": f"passes on {name} ({some.groupby(['layer', 'neuron']).ngroups} neurons)"}
        plot.points(figure, x, some["value"], colour, hover, customdata=some[["layer", "neuron", "prompt"]], **look)
    plot.layer_axis(figure, n_layers, range=[-0.7, n_layers - 0.3])
    figure.update_yaxes(title_text="value" if method == "base" else "attribution", rangemode="tozero")
    words = [*plot.origin(attributions.provenance), f"{n_prompts} paraphrases"]
    return plot.titled(figure, title, words, width=900, height=430, legend=plot.below(0.2))


def change_ratio_figure(changes: NeuronChanges, on: str = "own", seed: int = 0) -> go.Figure:
    """By how much the answer's probability changes when neurons are suppressed or amplified, per relation and pooled.

    Args:
        on: "own" prompts, or prompts of "other" relations.
    """
    table = change_ratios(changes, seed)
    table = table[table["on"] == on]
    title = "What becomes of the answer without its neurons, and with twice as much"
    if table.empty:
        return plot.empty(f"no neurons were changed on {PROMPTS[on]}: there is nothing to show", title)
    table = table.sort_values("factor", kind="stable")
    names = {factor: FACTORS.get(factor, f"times {factor:g}") for factor in table["factor"]}
    figure = _by_relation(table.assign(panel=table["factor"].map(names)), "ratio", KIND_LOOKS)
    figure.update_xaxes(title_text="change of p(answer), share of p", tickformat="+.0%")
    about = [*_model(changes.provenance, table), PROMPTS[on], plot.OVER_FACTS]
    return plot.titled(figure, title, about, width=520 + 260 * len(names))


def activating_figure(activations: NeuronActivations, kind: str = "knowledge", seed: int = 0) -> go.Figure:
    """Mean activation of facts' neurons on T1, T2 and T3 sentences, per relation and pooled."""
    table = activation_means(activations, seed)
    table = table[(table["kind"] == kind) & table["sentences"].isin(SENTENCES)]
    title = f"Which sentences activate {kind} neurons"
    if table.empty:
        return plot.empty(f"no {kind} neurons were read on sentences: there is nothing to show", title)
    figure = _by_relation(table.assign(panel="", kind=table["sentences"]), "activation", SENTENCE_LOOKS)
    figure.update_xaxes(title_text=f"mean activation of {kind} neurons")
    about = [*_model(activations.provenance, table), plot.OVER_FACTS]
    return plot.titled(figure, title, about, width=820)


def update_figure(updates: FactUpdates) -> go.Figure:
    """How often an updated fact's answer changes, and to the new one, on own prompts and on held-out paraphrases."""
    table = update_rates(updates)
    table = table[table["relation"] == ALL]
    title = "Facts given another answer by their neurons"
    if table.empty:
        return plot.empty("no fact has neurons of its own: nothing was updated, there is nothing to show", title)
    shown = [on for on in ("own", "held_out") if on in set(table["on"])]
    figure = plot.panels([PROMPTS[on] for on in shown], size=16, shared_yaxes=True)
    for column, on in enumerate(shown, start=1):
        for row in table[table["on"] == on].to_dict("records"):
            kind = str(row["kind"])
            rates = [{f"rate{end}": row[f"{name}{end}"] for end in plot.ENDS} for name in RATES]
            rows = pd.DataFrame(rates).assign(rate_of=list(RATES.values()), kind=kind)
            rows["words"] = rows["rate_of"].str.replace("<br>", " ")
            hover = _hover(rows, "{kind}, {words}<br>{figure}", "rate", ".1%")
            group: dict[str, Any] = {"row": 1, "col": column, "showlegend": column == 1, "legendgroup": kind}
            plot.bars(figure, rows, "rate_of", "rate", COLOURS[kind], hover, name=kind, **group)
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%").update_yaxes(title_text="share of facts", col=1)
    settings = updates.provenance
    about = [*_model(settings, table), f"l1 = {settings['l1']:g}, l2 = {settings['l2']:g}"]
    about += ["" if settings.get("orient", True) else "not oriented", "whiskers: 95% Wilson intervals over facts"]
    size = {"width": 420 + 280 * len(shown), "height": 470, "margin": {"t": 115}, "legend": plot.below(0.24)}
    return plot.titled(figure, title, about, barmode="group", **size)


def side_effect_figure(updates: FactUpdates, seed: int = 0) -> go.Figure:
    """How many times as large updating a fact makes the perplexity of other facts, of its relation and of others.

    On a logarithmic axis: an edit that is too large for a model multiplies perplexities by thousands.
    """
    table = side_effects(updates, seed)
    table = table[table["relation"] == ALL]
    title = "What updates do to other facts"
    if table.empty:
        return plot.empty("no fact was updated, or there are no other facts: there is nothing to show", title)
    times = table.assign(others=table["on"].map(OTHERS), **{f"times{end}": 1 + table[f"ratio{end}"] for end in plot.ENDS})
    figure = go.Figure()
    for kind in KINDS:
        rows = times[times["kind"] == kind]
        if len(rows):
            hover = _hover(rows, "{kind}, {others}<br>{figure} times", "times", "z.3f")
            look = {"size": 11, "name": kind, "error_y": plot.whiskers(rows.to_dict("records"), "times")}
            plot.points(figure, rows["others"], rows["times"], COLOURS[kind], hover, **look)
    plot.level_lines(figure, "y", 1)
    figure.update_xaxes(range=[-0.5, table["on"].nunique() - 0.5])
    steps = (1, 2, 5) if times[["times", "times_high"]].to_numpy(dtype=float).max() < 300 else (1,)
    ticks = [step * 10.0**decade for decade in range(-3, 31) for step in steps]
    figure.update_yaxes(title_text="perplexity after / before", type="log")
    figure.update_yaxes(tickvals=ticks, ticktext=[f"{tick:,g}" for tick in ticks])
    about = [*_model(updates.provenance, table), plot.OVER_FACTS]
    size = {"width": 680, "height": 450, "scattermode": "group", "scattergap": 0.6, "legend": plot.below(0.2)}
    return plot.titled(figure, title, about, **size)


def erase_figure(erasures: Sequence[RelationErasure], seed: int = 0) -> go.Figure:
    """What erasing each relation does to its perplexity and to that of all others, for every kind of neurons."""
    table = erasure_effects(erasures, seed)
    table = table[table["on"].isin(list(ERASED))]
    title = "Relations erased by their most frequent neurons"
    if table.empty:
        return plot.empty("no relation had neurons to erase: there is nothing to show", title)
    panels = table["on"].map(ERASED)
    table = table.assign(relation=table["erased"], panel=panels).sort_values("on", kind="stable")  # erased, others
    figure = _by_relation(table, "ratio", KIND_LOOKS)
    figure.update_xaxes(title_text="change of perplexity", tickformat="+.0%", matches="x")
    about = [str(erasures[0].provenance.get("model", "")), f"at most {int(table['n_neurons'].max())} neurons"]
    return plot.titled(figure, title, [*about, plot.OVER_FACTS], width=520 + 260 * panels.nunique())


def _by_relation(table: pd.DataFrame, value: str, looks: Mapping[str, tuple[str, str]]) -> go.Figure:
    """Horizontal bars of every ``panel``: relations from the top with all of them first, one bar per ``kind``.

    Args:
        looks: name and colour of each kind.
    """
    names = ["all facts" if relation == ALL else relation.replace("_", " ") for relation in table["relation"]]
    table = table.assign(name=names)
    panels = table["panel"].unique().tolist()
    figure = plot.panels(panels, size=16, shared_yaxes=True)
    for column, panel in enumerate(panels, start=1):
        for kind in reversed(list(looks)):  # bars of a group go up from the bottom
            rows = table[(table["panel"] == panel) & (table["kind"] == kind) & table[value].notna()]
            texts = _hover(rows, "{name}, {kind} (n = {n})<br>{figure}", value, "z.3f")
            if texts:
                look = {"orientation": "h", "name": looks[kind][0], "legendgroup": kind, "showlegend": column == 1}
                plot.bars(figure, rows, "name", value, looks[kind][1], texts, row=1, col=column, **look)
    plot.level_lines(figure, "x", 0, dash="solid")
    order = list(dict.fromkeys(names))[::-1]
    figure.update_yaxes(categoryorder="array", categoryarray=order, ticks="", showgrid=False, ticklabelstandoff=8)
    height = len(order) * (16 * len(looks) + 14)
    legend = plot.below(70 / height, traceorder="reversed")
    return figure.update_layout(height=190 + height, margin={"t": 115, "b": 85}, barmode="group", bargap=0.25, legend=legend)


def _hover(rows: pd.DataFrame, text: str, name: str, form: str) -> list[str]:
    """A text for every row from its columns; ``figure`` is the column ``name`` with its interval, written as ``form``."""
    records: list[dict[Any, Any]] = rows.to_dict("records")
    return [text.format_map(row | {"figure": figure_of(row, name, form)}) for row in records]


def _about(sets: NeuronSets) -> list[str]:
    relations = sets.facts["relation"].nunique()
    return [str(sets.provenance.get("model", "")), f"n = {len(sets.facts)} facts of {relations} relations"]


def _model(provenance: Mapping[str, Any], table: pd.DataFrame) -> list[str]:
    """The model, and how many facts the table has of all relations together."""
    return [str(provenance.get("model", "")), f"n = {int(table.loc[table['relation'] == ALL, 'n'].max())} facts"]
