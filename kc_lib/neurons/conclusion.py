"""What was found about knowledge neurons, in words: the figures that matter, and which published patterns hold here.

A pattern holds where the whole 95% interval is on its side, does not hold where it is on the other, and is undecided where
it has 0 inside. The patterns are those of Dai et al. (2022): top layers, more neurons shared within a relation than between
two, more by changing knowledge neurons than by changing others, facts that fire their neurons, edits that take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from kc_lib.neurons.activate import NeuronActivations
from kc_lib.neurons.controls import KINDS
from kc_lib.neurons.effects import activation_means, change_ratios, erasure_effects, side_effects, update_rates
from kc_lib.neurons.erase import RelationErasure
from kc_lib.neurons.refine import NeuronSets
from kc_lib.neurons.sets import ALL, METHODS, layer_shares, neurons_per_fact, overlaps
from kc_lib.neurons.suppress import NeuronChanges
from kc_lib.neurons.update import FactUpdates

PUBLISHED_UPDATES = (
    "Published (BERT, own prompts): changed 48.5%, success 34.4%; random neurons 4.7%, 0.0%; perplexity of other facts +8.4 "
    "within the relation, +7.2 outside."
)
FACTORS = {0.0: "suppressed", 2.0: "amplified"}


def neurons_headline(
    sets: NeuronSets,
    changes: NeuronChanges | None = None,
    activations: NeuronActivations | None = None,
    updates: FactUpdates | None = None,
    erasures: Sequence[RelationErasure] = (),
    seed: int = 0,
) -> dict[str, str]:
    """The figures that a run is remembered by."""
    told = {}
    for row in neurons_per_fact(sets, seed).query("relation == @ALL").to_dict("records"):
        told[f"neurons per fact, {row['method']}"] = _figure(row, "neurons", 2) + _without(row["n_empty"], row["n"])
    if _has_pairs(sets):
        for row in overlaps(sets, seed=seed).query("pairs != 'intra - inter'").to_dict("records"):
            told[f"shared {row['pairs']}-relation, {row['kind']}"] = _figure(row, "shared", 2)
    if changes is not None:
        for row in change_ratios(changes, seed).query("relation == @ALL and on == 'own'").to_dict("records"):
            told[f"{_factor(row['factor'])}, {row['kind']}"] = _percent(row, "ratio")
    if activations is not None:
        for row in activation_means(activations, seed).query("relation == @ALL and kind == 'knowledge'").to_dict("records"):
            if " - " not in row["sentences"]:
                told[f"activation on {row['sentences']}"] = _figure(row, "activation", 3)
    if updates is not None:
        for row in update_rates(updates).query("relation == @ALL and kind != 'base'").to_dict("records"):
            told[f"update success, {row['kind']}, {row['on'].replace('_', '-')} prompts"] = _percent(
                row, "success_1", sign=False
            )
    for row in erasure_effects(erasures, seed).query("kind == 'knowledge' and on != 'other'").to_dict("records"):
        told[f"erasing {row['erased']}: {row['on']}"] = f"perplexity {_percent(row, 'ratio')}"
    return told


def neurons_conclusion(
    sets: NeuronSets,
    changes: NeuronChanges | None = None,
    activations: NeuronActivations | None = None,
    updates: FactUpdates | None = None,
    erasures: Sequence[RelationErasure] = (),
    seed: int = 0,
) -> str:
    """What came out, and whether the published patterns hold, in sentences with intervals (Markdown)."""
    lines = _about_sets(sets, seed)
    if sets.frame.empty:
        return "\n".join([*lines, "- Without neurons there is nothing to change or to edit."])
    if changes is not None:
        lines += _about_changes(changes, seed)
    if activations is not None:
        lines += _about_activations(activations, seed)
    if updates is not None:
        lines += _about_updates(updates, seed)
    for erasure in erasures:
        lines += _about_erasure(erasure, seed)
    return "\n".join(lines)


def _about_sets(sets: NeuronSets, seed: int) -> list[str]:
    pooled = _keyed(neurons_per_fact(sets, seed).query("relation == @ALL"), "method")
    knowledge, base = (pooled[method] for method in METHODS)
    lines = [
        f"- **Neurons per fact** (n = {knowledge['n']}): {_figure(knowledge, 'neurons', 2)} knowledge neurons"
        f"{_without(knowledge['n_empty'], knowledge['n'])}; the base method has {_figure(base, 'neurons', 2)}"
        f"{_without(base['n_empty'], base['n'])}."
    ]
    shares = layer_shares(sets, seed).query("method == 'knowledge'")
    if shares["neurons"].sum():
        top = shares["layer"] >= len(shares) / 2
        upper = float(shares.loc[top, "share"].sum())
        most = shares.nlargest(1, "share").to_dict("records")[0]
        verdict = (
            "as published, most are in the upper half" if upper > 0.5 else "unlike published, most are in the lower half"
        )
        lines.append(
            f"- **Layers**: {upper:.0%} lie in the upper half of the {len(shares)} layers ({verdict}); most in layer "
            f"{most['layer']}, {_percent(most, 'share', sign=False)}."
        )
    if _has_pairs(sets):
        table = _keyed(overlaps(sets, seed=seed), "kind", "pairs")
        for kind in (kind for kind in KINDS if (kind, "intra") in table):
            intra, inter = table[kind, "intra"], table[kind, "inter"]
            about = f"two facts of a relation share {_figure(intra, 'shared', 2)} of their {kind} neurons"
            if pd.notna(inter["shared"]):
                about += f", facts of two relations {_figure(inter, 'shared', 2)}"
                if kind == "knowledge":
                    about += f": more within a relation {_holds(table[kind, 'intra - inter'], 'shared')}"
            lines.append(f"- **Overlap**: {about}.")
    return lines


def _about_changes(changes: NeuronChanges, seed: int) -> list[str]:
    if changes.frame.empty:
        return ["- **Suppress, amplify**: no fact has neurons, so nothing was changed."]
    table = change_ratios(changes, seed)
    pooled = _keyed(table[table["relation"] == ALL], "factor", "on", "kind")
    lines = []
    for factor in sorted(table["factor"].unique()):
        told = [
            f"{kind} {_percent(pooled[factor, 'own', kind], 'ratio')}" for kind in KINDS if (factor, "own", kind) in pooled
        ]
        line = (
            f"- **{_factor(factor).capitalize()}**, the answer's probability on own prompts changes by: {'; '.join(told)}."
        )
        if (factor, "own", "knowledge") in pooled:
            more = pooled[factor, "own", "knowledge"]
            line += (
                f" A larger {'fall' if factor < 1 else 'rise'} than by random neurons of the same layers "
                f"{_holds(more, 'more', negative=factor < 1)} (difference {_percent(more, 'more')})."
            )
        if (factor, "other", "knowledge") in pooled:
            line += f" On other relations' prompts: {_percent(pooled[factor, 'other', 'knowledge'], 'ratio')}."
        lines.append(line)
    return lines


def _about_activations(activations: NeuronActivations, seed: int) -> list[str]:
    table = activation_means(activations, seed)
    own = _keyed(table[(table["relation"] == ALL) & (table["kind"] == "knowledge")], "sentences")
    if not own:
        return ["- **Activating prompts**: no fact has both neurons and sentences."]
    told = "; ".join(f"{name} {_figure(own[name], 'activation', 3)}" for name in own if " - " not in name)
    line = f"- **Activating prompts**, mean activation of knowledge neurons: {told}."
    for name, what in (("T1 - T2", "the subject alone"), ("T1 - T3", "neither")):
        if name in own:
            line += f" More with subject and answer than with {what} {_holds(own[name], 'activation')}."
    return [line]


def _about_updates(updates: FactUpdates, seed: int) -> list[str]:
    left_out = "".join(f"; {count} left out: {reason}" for reason, count in updates.provenance["left_out"].items())
    counted = updates.provenance
    n_without = counted["empty"]["knowledge"]
    without = f"; {n_without} have no neurons of their own" if n_without else ""
    about = f"{counted['n_updated'] - n_without} of {counted['n_facts']} facts{left_out}{without}"
    if updates.frame.empty:
        return [f"- **Update** ({about}): no fact has neurons of its own, so nothing was updated."]
    rates = update_rates(updates)
    pooled = rates[rates["relation"] == ALL]
    lines = []
    for on in ("own", "held_out"):
        told = [
            f"{row['kind']} changed {_percent(row, 'changed', sign=False)}, success {_percent(row, 'success_1', sign=False)}"
            for row in pooled[pooled["on"] == on].to_dict("records")
        ]
        if told:
            lines.append(f"- **Update** ({about}), {on.replace('_', '-')} prompts: {'; '.join(told)}.")
    sides = side_effects(updates, seed)
    sides = sides[(sides["relation"] == ALL) & (sides["kind"] == "knowledge")]
    names = {"intra": "of the relation", "inter": "of other relations"}
    told = [f"{names[row['on']]} {_percent(row, 'ratio')}" for row in sides.to_dict("records")]
    if told:
        lines.append(f"- **Side effects of updates**, perplexity of other facts: {'; '.join(told)}.")
    return [*lines, f"- {PUBLISHED_UPDATES}"]


def _about_erasure(erasure: RelationErasure, seed: int) -> list[str]:
    name = erasure.provenance["relation"]
    table = erasure_effects([erasure], seed)
    own = _keyed(table[(table["kind"] == "knowledge") & (table["on"] != "other")], "on")
    if "erased" not in own:
        return [f"- **Erasing {name}**: the relation has no knowledge neurons, so nothing was erased."]
    erased = own["erased"]
    line = (
        f"- **Erasing {name}** ({erased['n_neurons']} neurons): its perplexity {_percent(erased, 'ratio')}, accuracy "
        f"{erased['right_before']:.0%} to {_percent(erased, 'right', sign=False)}"
    )
    random = table[(table["kind"] == "random") & (table["on"] == "erased")].to_dict("records")
    line += "".join(f"; random neurons {_percent(row, 'ratio')}" for row in random)
    if "others" not in own:
        return [f"{line}. There is no other relation to compare with."]
    others = own["others"]
    line += f"; other relations {_percent(others, 'ratio')}"
    if erased["ratio_low"] > others["ratio_high"]:
        return [f"{line}. As published, the relation suffers more than others."]
    if erased["ratio_high"] < others["ratio_low"]:
        return [f"{line}. Unlike published, the relation suffers less than others."]
    return [f"{line}. The intervals overlap or are undefined: that the relation suffers more is not shown."]


def _keyed(table: pd.DataFrame, *names: str) -> dict[Any, dict[Any, Any]]:
    """Rows by the value of a column, or by the values of several."""
    rows = table.to_dict("records")
    return {row[names[0]] if len(names) == 1 else tuple(row[name] for name in names): row for row in rows}


def _has_pairs(sets: NeuronSets) -> bool:
    return len(sets.facts) > 1 and not sets.frame.empty


def _factor(factor: float) -> str:
    return FACTORS.get(factor, f"times {factor:g}")


def _holds(row: Any, name: str, negative: bool = False) -> str:
    """Whether the interval is on the side that was published."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if pd.isna(low) or pd.isna(high):
        return "cannot be told from so few facts"
    low, high = (-high, -low) if negative else (low, high)
    return "holds" if low > 0 else "does not hold" if high < 0 else "is undecided"


def _without(n_empty: int, n: int) -> str:
    return f" ({n_empty} of {n} facts without any)" if n_empty else ""


def _figure(row: Any, name: str, digits: int = 3) -> str:
    if pd.isna(row[name]):
        return "undefined"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.{digits}f}" + ("" if pd.isna(low) else f" [{low:.{digits}f}, {high:.{digits}f}]")


def _percent(row: Any, name: str, sign: bool = True) -> str:
    if pd.isna(row[name]):
        return "undefined"
    form = "+.1%" if sign else ".1%"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:{form}}" + ("" if pd.isna(low) else f" [{low:{form}}, {high:{form}}]")
