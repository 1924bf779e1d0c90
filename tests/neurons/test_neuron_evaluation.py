"""Statistics of knowledge neurons by hand, and their words and figures from results alone."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from kc_lib.errors import MethodError
from kc_lib.neurons.activate import NeuronActivations, activation_means
from kc_lib.neurons.attribute import NeuronAttributions
from kc_lib.neurons.effects import METHODS, headline
from kc_lib.neurons.erase import RelationErasure, erasure_effects
from kc_lib.neurons.figures import (
    activating_figure,
    attribution_figure,
    change_ratio_figure,
    erase_figure,
    neuron_layer_figure,
    neuron_overlap_figure,
    neurons_per_fact_figure,
    side_effect_figure,
    update_figure,
)
from kc_lib.neurons.sets import NeuronSets, layer_shares, neurons_per_fact, overlaps, random_neurons
from kc_lib.neurons.suppress import NeuronChanges, change_ratios
from kc_lib.neurons.update import FactUpdates, side_effects, update_rates

N_FACTS, N_LAYERS, D_MLP = 12, 6, 40
RELATIONS = ["capital", "colour", "sport"]
Neuron = tuple[int, int]


def facts() -> pd.DataFrame:
    rows = [(i, RELATIONS[i % 3], f"s{i}", f"a{i}", 5) for i in range(N_FACTS)]
    return pd.DataFrame(rows, columns=["fact", "relation", "subject", "answer", "n_prompts"])


def made_sets(members: dict[tuple[str, int], list[Neuron]] | None = None) -> NeuronSets:
    """By default two neurons of the relation in the upper layers and one of the fact; nothing for fact 11."""
    if members is None:
        members = {("knowledge", i): [(4, i % 3), (5, i % 3), (5, 10 + i)] for i in range(N_FACTS - 1)}
        members |= {("base", i): [(0, 1), (1, 2), (1, 3)] for i in range(N_FACTS)}
    rows = [(method, fact, *neuron, 4) for (method, fact), neurons in members.items() for neuron in neurons]
    return NeuronSets(
        pd.DataFrame(rows, columns=["method", "fact", "layer", "neuron", "prompts"]),
        pd.DataFrame(columns=["method", "relation", "layer", "neuron", "facts"]),
        facts(),
        {"model": "tiny", "n_layers": N_LAYERS, "d_mlp": D_MLP},
    )


def made_changes(effect: float = 0.4, seed: int = 0) -> NeuronChanges:
    generator = np.random.default_rng(seed)
    rows = []
    for fact in range(N_FACTS - 1):
        for on, of in (("own", fact), ("other", (fact + 1) % N_FACTS)):
            for prompt in range(3):
                p = generator.uniform(0.2, 0.4)
                for kind, draw in (("knowledge", 0), ("base", 0), ("random", 0), ("random", 1)):
                    for factor in (0.0, 2.0):
                        size = effect if (kind, on) == ("knowledge", "own") else 0.01
                        after = p * (1 + (size + 0.01 * generator.normal()) * (factor - 1))
                        rows.append((kind, draw, factor, fact, on, of, prompt, p, after, 3))
    names = ["kind", "draw", "factor", "fact", "on", "of_fact", "prompt", "p", "p_changed", "n_neurons"]
    provenance = {"model": "tiny", "empty": {"knowledge": 1, "base": 0}}
    return NeuronChanges(pd.DataFrame(rows, columns=names), facts(), provenance)


def made_activations(seed: int = 0) -> NeuronActivations:
    generator = np.random.default_rng(seed)
    rows = [
        (kind, 0, fact, sentences, i, (level if kind == "knowledge" else 0.0) + 0.02 * generator.normal(), 3)
        for fact in range(N_FACTS - 1)
        for kind in ("knowledge", "base", "random")
        for sentences, level in (("T1", 0.5), ("T2", 0.1), ("T3", 0.0))
        for i in range(2)
    ]
    names = ["kind", "draw", "fact", "sentences", "sentence", "activation", "n_neurons"]
    return NeuronActivations(pd.DataFrame(rows, columns=names), facts(), {"model": "tiny"})


def made_updates(seed: int = 0) -> FactUpdates:
    generator = np.random.default_rng(seed)
    rows, others = [], []
    for fact in range(N_FACTS - 1):
        for kind, draw in (("knowledge", 0), ("base", 0), ("random", 0), ("random", 1)):
            for on, prompts in (("own", 4), ("held_out", 2)):
                for prompt in range(prompts):
                    rank = 1 if kind == "knowledge" and (fact + prompt) % 2 else 3 + prompt
                    changed = kind == "knowledge"
                    rows.append((kind, draw, fact, on, prompt, changed, 20, rank, 0.01, 0.3, 0.4, 0.1, 3))
            for on in ("intra", "inter"):
                before = 1 + 0.1 * generator.normal()
                rise = 0.2 if (kind, on) == ("knowledge", "intra") else 0.0
                others.append((kind, draw, fact, on, 10, before, before + rise))
    names = ["kind", "draw", "fact", "on", "prompt", "changed", "rank_before", "rank", "p_before", "p"]
    names += ["p_gold_before", "p_gold", "n_neurons"]
    sides = ["kind", "draw", "fact", "on", "n_prompts", "nll_before", "nll"]
    provenance = {"model": "tiny", "n_facts": 12, "n_updated": 11, "left_out": {"answer of several tokens": 1}}
    provenance["empty"] = {"knowledge": 2, "base": 0}
    about = facts().head(N_FACTS - 1).assign(new_answer="b", new_answer_of="t")
    return FactUpdates(
        pd.DataFrame(rows, columns=names), pd.DataFrame(others, columns=sides), about, provenance | {"l1": 1.0, "l2": 8.0}
    )


def made_erasure(relation: str = "capital", rise: float = 0.7, seed: int = 0) -> RelationErasure:
    generator = np.random.default_rng(seed)
    rows = []
    for fact, name in enumerate(facts()["relation"]):
        for kind, draw in (("knowledge", 0), ("base", 0), ("random", 0), ("random", 1)):
            for prompt in range(3):
                before = 1 + 0.05 * generator.normal()
                more = (rise if name == relation and kind == "knowledge" else 0.05) + 0.01 * generator.normal()
                right = not (name == relation and kind == "knowledge" and prompt)
                rows.append((kind, draw, fact, name, prompt, prompt == 2, True, right, before, before + more))
    names = ["kind", "draw", "fact", "relation", "prompt", "held_out", "right_before", "right", "nll_before", "nll"]
    neurons = [(kind, 0, 5, i) for kind in ("knowledge", "base", "random") for i in range(4)]
    return RelationErasure(
        pd.DataFrame(rows, columns=names),
        pd.DataFrame(neurons, columns=["kind", "draw", "layer", "neuron"]),
        {"model": "tiny", "relation": relation},
    )


def one(table: pd.DataFrame, **about: object) -> pd.Series:
    for name, value in about.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_neurons_per_fact_and_layers_by_hand() -> None:
    sets = made_sets()
    sizes = neurons_per_fact(sets)
    pooled = one(sizes, relation="all", method="knowledge")
    assert pooled["neurons"] == pytest.approx(33 / 12)  # a fact without neurons counts as one with none
    assert (pooled["n"], pooled["n_empty"]) == (12, 1)
    assert pooled["neurons_low"] < pooled["neurons"] < pooled["neurons_high"] <= 3
    assert one(sizes, relation="sport", method="knowledge")["neurons"] == pytest.approx(9 / 4)
    shares = layer_shares(sets)
    assert one(shares, method="knowledge", layer=5)["share"] == pytest.approx(2 / 3)
    assert one(shares, method="knowledge", layer=4)["neurons"] == 11
    assert one(shares, method="base", layer=0)["share"] == pytest.approx(1 / 3)
    assert one(shares, method="random", layer=3)["share"] == pytest.approx(1 / 6)
    for _, rows in shares.groupby("method"):
        assert rows["share"].sum() == pytest.approx(1)


def test_overlaps_by_hand() -> None:
    sets = made_sets()
    table = overlaps(sets, n_random=2, seed=3)
    relations = sets.facts["relation"].tolist()
    for kind in ("knowledge", "base"):
        own = [set(sets.of(kind, i)) for i in range(N_FACTS)]
        for pairs, same in (("intra", True), ("inter", False)):
            shared = [
                len(own[i] & own[j]) for i, j in combinations(range(N_FACTS), 2) if (relations[i] == relations[j]) == same
            ]
            row = one(table, kind=kind, pairs=pairs)
            assert row["shared"] == pytest.approx(np.mean(shared))
            assert row["n_pairs"] == len(shared)
    row = one(table, kind="knowledge", pairs="intra - inter")
    assert row["shared_low"] <= row["shared"] <= row["shared_high"]
    assert row["shared_low"] > 0.5
    assert one(table, kind="base", pairs="intra - inter")["shared"] == pytest.approx(0)
    expected = []
    for draw in range(2):
        drawn = [set(random_neurons(sets.of("knowledge", i), D_MLP, (3 * N_FACTS + i) * 2 + draw)) for i in range(N_FACTS)]
        expected += [len(drawn[i] & drawn[j]) for i, j in combinations(range(N_FACTS), 2) if relations[i] == relations[j]]
    assert one(table, kind="random", pairs="intra")["shared"] == pytest.approx(np.mean(expected))


def test_overlap_interval_draws_facts() -> None:
    """Against a plain bootstrap: facts with replacement, pairs of two different facts, weighted by their copies."""
    sets = made_sets()
    row = one(overlaps(sets, n_random=0, seed=0), kind="knowledge", pairs="intra")
    own, relations = [set(sets.of("knowledge", i)) for i in range(N_FACTS)], sets.facts["relation"].tolist()
    generator, means = np.random.default_rng(5), []
    for _ in range(1500):
        drawn = generator.integers(0, N_FACTS, N_FACTS)
        pairs = [(i, j) for i, j in combinations(drawn, 2) if i != j and relations[i] == relations[j]]
        means.append(np.mean([len(own[i] & own[j]) for i, j in pairs]))
    assert row["shared_low"] == pytest.approx(np.quantile(means, 0.025), abs=0.08)
    assert row["shared_high"] == pytest.approx(np.quantile(means, 0.975), abs=0.08)


def test_change_ratios_by_hand() -> None:
    changes = made_changes()
    table = change_ratios(changes)
    frame = changes.frame
    for relation in ("all", "colour"):
        chosen = frame if relation == "all" else frame[frame["fact"] % 3 == 1]
        for kind in ("knowledge", "base", "random"):
            rows = chosen[(chosen["kind"] == kind) & (chosen["factor"] == 0.0) & (chosen["on"] == "own")]
            row = one(table, relation=relation, kind=kind, factor=0.0, on="own")
            assert row["ratio"] == pytest.approx(rows["p_changed"].mean() / rows["p"].mean() - 1)
            assert row["ratio_low"] < row["ratio"] < row["ratio_high"]
    knowledge, chance = (one(table, relation="all", kind=kind, factor=2.0, on="own") for kind in ("knowledge", "random"))
    assert knowledge["more"] == pytest.approx(knowledge["ratio"] - chance["ratio"])
    assert knowledge["more_low"] > 0.3
    assert np.isnan(chance["more"])
    assert knowledge["n"] == 11


def test_activation_update_and_erasure_tables_by_hand() -> None:
    activations = made_activations()
    table = activation_means(activations)
    frame = activations.frame.query("kind == 'knowledge'")
    t1, t3 = (frame.loc[frame["sentences"] == name, "activation"].mean() for name in ("T1", "T3"))
    assert one(table, relation="all", kind="knowledge", sentences="T1")["activation"] == pytest.approx(t1)
    difference = one(table, relation="all", kind="knowledge", sentences="T1 - T3")
    assert difference["activation"] == pytest.approx(t1 - t3)
    assert difference["activation_low"] > 0.4

    rates = update_rates(made_updates())
    row = one(rates, relation="all", kind="knowledge", on="own")
    # ranks by prompt: 3, 1, 5, 1 of six facts, 1, 4, 1, 6 of five
    assert (row["changed"], row["success_1"], row["success_5"]) == (1.0, 0.5, pytest.approx((6 + 5 * 0.75) / 11))
    low, high = row["success_1_low"], row["success_1_high"]
    z, n = 1.959964, 11
    centre, half = (0.5 + z**2 / (2 * n)) / (1 + z**2 / n), z * np.sqrt(0.25 / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert (low, high) == (pytest.approx(centre - half, abs=1e-6), pytest.approx(centre + half, abs=1e-6))
    sides = side_effects(made_updates())
    assert one(sides, relation="all", kind="knowledge", on="intra")["ratio"] == pytest.approx(np.exp(0.2) - 1)
    assert one(sides, relation="all", kind="random", on="intra")["ratio"] == pytest.approx(0)

    erased = erasure_effects([made_erasure(), made_erasure("sport")])
    row = one(erased, erased="capital", on="erased", kind="knowledge")
    assert row["ratio"] == pytest.approx(np.exp(0.7) - 1, rel=0.05)
    assert row["ratio_low"] < row["ratio"] < row["ratio_high"]
    assert (row["right_before"], row["right"]) == (1.0, pytest.approx(1 / 3))
    assert (row["n"], row["n_neurons"]) == (4, 4)
    assert one(erased, erased="capital", on="others", kind="knowledge")["n"] == 8
    assert one(erased, erased="capital", on="other", relation="colour", kind="base")["n"] == 4


def test_headline_and_summaries() -> None:
    sets, changes, updates, erasure = made_sets(), made_changes(), made_updates(), made_erasure()
    figures = headline(sets, changes, made_activations(), updates, erasure)
    assert figures["suppressed, knowledge"].startswith("-4")
    assert figures["amplified, knowledge"].startswith("+4")
    assert "1 of 12 facts without any" in figures["neurons per fact, knowledge"]
    assert figures["shared intra-relation, base"].startswith("3.00")
    assert [name for name in figures if name.startswith("activation")] == [f"activation on T{i}" for i in (1, 2, 3)]
    assert figures["update success, knowledge, own prompts"].startswith("50.0%")
    assert figures["update success, random, held-out prompts"].startswith("0.0%")
    assert figures["erasing capital: erased"].startswith("perplexity +10")
    assert "erasing capital: others" in figures
    assert not [name for name in figures if "update" in name and "base" in name]
    assert sets.summary().equals(neurons_per_fact(sets))
    assert changes.summary(1).equals(change_ratios(changes, 1))
    assert updates.summary().equals(update_rates(updates))
    assert erasure.summary(2).equals(erasure_effects([erasure], 2))
    assert (updates.first, updates.n_updated) == (0, 11)

    upper = layer_shares(sets).query("method == 'knowledge' and layer >= 3")["share"].sum()
    assert upper == pytest.approx(1.0)
    opposite = change_ratios(made_changes(effect=-0.4)).query("relation == 'all' and on == 'own' and kind == 'knowledge'")
    opposite = opposite.set_index("factor")
    assert opposite.loc[0.0, "more_low"] > 0
    assert opposite.loc[2.0, "more_high"] < 0
    better = one(erasure_effects([made_erasure(rise=-0.3)]), on="erased", kind="knowledge")
    others = one(erasure_effects([made_erasure(rise=-0.3)]), on="others", kind="knowledge")
    assert better["ratio_high"] < others["ratio_low"]


def test_empty_sets_are_said() -> None:
    sets, no_changes = made_sets({}), NeuronChanges(made_changes().frame.head(0), facts(), {"model": "tiny"})
    said = headline(sets, no_changes)
    assert said == {f"neurons per fact, {method}": "0.00 [0.00, 0.00] (12 of 12 facts without any)" for method in METHODS}
    assert change_ratios(no_changes).empty
    assert erasure_effects([]).empty
    updates = made_updates()
    none = FactUpdates(updates.frame.head(0), updates.others.head(0), updates.facts, updates.provenance)
    assert (none.first, none.n_updated) == (0, 0)
    assert none.summary().empty
    erasure = made_erasure()
    nothing = RelationErasure(erasure.frame.head(0), erasure.neurons.head(0), erasure.provenance)
    assert headline(none, nothing) == {}
    for figure in (
        neuron_layer_figure(sets),
        neuron_overlap_figure(sets),
        change_ratio_figure(no_changes),
        update_figure(none),
        side_effect_figure(none),
        erase_figure([nothing]),
    ):
        assert not figure.data
        assert "nothing to show" in figure.layout.annotations[0].text
    assert neurons_per_fact_figure(sets).data[0].y == (12,)


def shown(tmp_path: Path) -> dict[str, go.Figure]:
    """All figures, from files."""
    sets = NeuronSets.load(made_sets().save(tmp_path / "s.parquet"))
    changes = NeuronChanges.load(made_changes().save(tmp_path / "c.parquet"))
    activations = NeuronActivations.load(made_activations().save(tmp_path / "a.parquet"))
    updates = FactUpdates.load(made_updates().save(tmp_path / "u.parquet"))
    erasures = [RelationErasure.load(made_erasure(name).save(tmp_path / "e.parquet")) for name in RELATIONS]
    return {
        "layers": neuron_layer_figure(sets),
        "sizes": neurons_per_fact_figure(sets),
        "overlap": neuron_overlap_figure(sets),
        "own": change_ratio_figure(changes),
        "other": change_ratio_figure(changes, on="other"),
        "activating": activating_figure(activations),
        "update": update_figure(updates),
        "sides": side_effect_figure(updates),
        "erase": erase_figure(erasures),
    }


def test_figures_show_the_tables(tmp_path: Path) -> None:
    drawn = shown(tmp_path)
    assert all("tiny" in figure.layout.title.subtitle.text for figure in drawn.values())
    sides = side_effects(made_updates()).query("relation == 'all'")
    for trace in drawn["sides"].data:
        rows = sides[sides["kind"] == trace.name]
        assert list(trace.y) == pytest.approx((rows["perplexity"] / rows["perplexity_before"]).tolist())
        assert list(trace.error_y.array) == pytest.approx((rows["ratio_high"] - rows["ratio"]).tolist())
    own = {(trace.name, trace.xaxis): trace for trace in drawn["own"].data}
    table = change_ratios(made_changes()).query("on == 'own'")
    for (kind, axis), trace in own.items():
        rows = table[(table["kind"] == kind) & (table["factor"] == (0.0 if axis == "x" else 2.0))]
        assert list(trace.x) == pytest.approx(rows["ratio"].tolist())
        assert list(trace.y) == ["all facts", *RELATIONS]
        assert list(trace.error_x.array) == pytest.approx((rows["ratio_high"] - rows["ratio"]).tolist())
    knowledge = next(trace for trace in drawn["layers"].data if trace.name == "knowledge")
    assert list(knowledge.y) == pytest.approx([0, 0, 0, 0, 1 / 3, 2 / 3])
    assert list(drawn["sizes"].data[0].x) == [0, 3]
    assert list(drawn["sizes"].data[0].y) == [1, 11]
    update = [trace for trace in drawn["update"].data if trace.name == "knowledge"]
    assert list(update[0].y) == pytest.approx([1.0, 0.5, (6 + 5 * 0.75) / 11])
    erase = [trace for trace in drawn["erase"].data if trace.name == "knowledge"]
    assert list(erase[0].y) == RELATIONS
    assert min(erase[0].x) > max(erase[1].x)


def test_scores_of_a_fact_are_shown_by_how_many_paraphrases_share_them() -> None:
    """Neuron (1, 5) passes on all three, (2, 0) on two, (2, 1) on one; (0, 0) is below a fifth of the largest."""
    rows = [(0, prompt, "knowledge", 1, 5, 1.0) for prompt in range(3)]
    rows += [(0, 0, "knowledge", 2, 0, 0.5), (0, 1, "knowledge", 2, 0, 0.5), (0, 2, "knowledge", 2, 1, 0.3)]
    rows += [(0, 0, "knowledge", 0, 0, 0.19)]
    frame = pd.DataFrame(rows, columns=["fact", "prompt", "method", "layer", "neuron", "value"])
    about = pd.DataFrame([{"fact": 0, "relation": "r", "subject": "France", "answer": "Paris", "n_prompts": 3}])
    found = NeuronAttributions(frame, pd.DataFrame(), about, {"model": "tiny", "n_layers": 3, "kept": 0.1})
    figure = attribution_figure(found, 0)
    assert "France: Paris" in figure.layout.title.text
    one, several, every = (set(map(tuple, trace.customdata[:, :2])) for trace in figure.data)
    assert (one, several, every) == ({(2, 1)}, {(2, 0)}, {(1, 5)})
    assert all(round(x) == layer for trace in figure.data for x, (layer, *_) in zip(trace.x, trace.customdata, strict=True))
    with pytest.raises(MethodError, match="there is no fact 1: facts are 0 to 0"):
        attribution_figure(found, 1)
    without = NeuronAttributions(frame.head(0), pd.DataFrame(), about, found.provenance)
    assert "nothing to show" in attribution_figure(without, 0).layout.annotations[0].text
