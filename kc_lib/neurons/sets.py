"""Sets of knowledge neurons in numbers: how many a fact has, in which layers, and how many two facts share.

All intervals are bootstraps over facts. A fact without neurons counts as one with none. The random control has as many
neurons of the same layers for every fact, so it says what overlap the layers alone make.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from kc_lib.errors import MethodError
from kc_lib.neurons.controls import KINDS, sets_of_facts, variants
from kc_lib.neurons.refine import NeuronSets
from kc_lib.stats import RESAMPLES, resampled_means, with_interval

METHODS = ("knowledge", "base")
ALL = "all"  # relations pooled


def neurons_per_fact(sets: NeuronSets, seed: int = 0) -> pd.DataFrame:
    """Mean number of neurons of a fact with its interval, per relation and pooled: relation, method, n, n_empty, neurons."""
    sizes = set_sizes(sets)
    rows: list[dict[str, Any]] = []
    for relation, facts in relations_of(sets.facts):
        own = sizes.loc[facts]
        draws = resampled_means(own.to_numpy(), seed)
        for i, method in enumerate(METHODS):
            about = {"relation": relation, "method": method, "n": len(own), "n_empty": int((own[method] == 0).sum())}
            rows.append(about | with_interval("neurons", own[method].mean(), draws[:, i]))
    return pd.DataFrame(rows)


def set_sizes(sets: NeuronSets) -> pd.DataFrame:
    """How many neurons every fact has, by method (columns)."""
    counts = sets.frame.groupby(["fact", "method"]).size().unstack(fill_value=0)
    return counts.reindex(index=sets.facts["fact"], columns=list(METHODS), fill_value=0).astype(float)


def layer_shares(sets: NeuronSets, seed: int = 0) -> pd.DataFrame:
    """Share of all facts' neurons that lie in each layer, with intervals: method, layer, neurons, share; n facts.

    ``random`` is one layer's share of neurons drawn from the whole model; shares are NaN where a method found no neurons.
    """
    n_layers = int(sets.provenance["n_layers"])
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        own = sets.frame[sets.frame["method"] == method]
        counts = own.groupby(["fact", "layer"]).size().unstack(fill_value=0)
        table = counts.reindex(index=sets.facts["fact"], columns=range(n_layers), fill_value=0).to_numpy(dtype=float)
        means = np.concatenate([table.mean(0, keepdims=True), resampled_means(table, seed)])
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample, or all facts, may have no neurons
            shares = means / means.sum(1, keepdims=True)
        for layer in range(n_layers):
            about = {"method": method, "layer": layer, "n": len(table), "neurons": int(table[:, layer].sum())}
            drawn = shares[1:, layer]
            drawn = drawn[np.isfinite(drawn)] if np.isfinite(shares[0, layer]) else drawn
            rows.append(about | with_interval("share", shares[0, layer], drawn if len(drawn) else np.full(1, np.nan)))
    chance = {"neurons": 0, "share": 1 / n_layers, "share_low": np.nan, "share_high": np.nan, "n": len(sets.facts)}
    rows += [{"method": "random", "layer": layer} | chance for layer in range(n_layers)]
    return pd.DataFrame(rows)


def overlaps(sets: NeuronSets, n_random: int = 10, seed: int = 0) -> pd.DataFrame:
    """Mean size of the intersection of two facts' sets: kind, pairs, n (facts), n_pairs, shared with its interval.

    ``pairs`` is "intra" (two facts of a relation), "inter" (of two relations) or "intra - inter"; random neurons are the
    mean over draws. A pair that no two facts form is NaN.

    Raises:
        MethodError: the sets do not say how many neurons a layer has.
    """
    d_mlp = sets.provenance.get("d_mlp")
    if d_mlp is None:
        raise MethodError("the sets do not say d_mlp, so no random neurons can be drawn: give sets from refine")
    chosen = sets_of_facts(sets, int(d_mlp), n_random, seed)
    relations = sets.facts["relation"].to_numpy()
    same = relations[:, None] == relations[None]
    counts = _counts(len(chosen), seed)
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        tables = [
            _intersections([own.get(variant, ()) for own in chosen]) for variant in variants(n_random) if variant[0] == kind
        ]
        if not tables:
            continue
        table = np.mean(tables, axis=0)
        values = {pairs: _pair_means(table, mask, counts) for pairs, mask in (("intra", same), ("inter", ~same))}
        values["intra - inter"] = values["intra"] - values["inter"]
        for pairs, own in values.items():
            off = ~np.eye(len(chosen), dtype=bool)
            n_pairs = int((off & {"intra": same, "inter": ~same}.get(pairs, off)).sum()) // 2
            drawn = own[1:][np.isfinite(own[1:])]
            about = {"kind": kind, "pairs": pairs, "n": len(chosen), "n_pairs": n_pairs}
            usable = np.isfinite(own[0]) and len(chosen) > 1 and len(drawn)
            rows.append(about | with_interval("shared", own[0], drawn if usable else np.full(1, np.nan)))
    return pd.DataFrame(rows)


def relations_of(facts: pd.DataFrame) -> list[tuple[str, list[int]]]:
    """All facts pooled, then those of every relation: name and numbers of the facts."""
    by_relation = [(str(name), own["fact"].tolist()) for name, own in facts.groupby("relation", sort=False)]
    return [(ALL, facts["fact"].tolist()), *by_relation]


def empty_sets(sets: NeuronSets) -> dict[str, int]:
    """How many facts have no neurons, by method."""
    sizes = set_sizes(sets)
    return {method: int((sizes[method] == 0).sum()) for method in METHODS}


def _intersections(chosen: list[tuple[tuple[int, int], ...]]) -> Float[np.ndarray, "fact fact"]:
    neurons = {neuron: i for i, neuron in enumerate(sorted({neuron for own in chosen for neuron in own}))}
    member = np.zeros((len(chosen), len(neurons)))
    for fact, own in enumerate(chosen):
        member[fact, [neurons[neuron] for neuron in own]] = 1.0
    return member @ member.T


def _counts(n_facts: int, seed: int) -> Float[np.ndarray, "draw fact"]:
    """How often every fact is drawn: once in the first row, by the bootstrap in the others."""
    drawn = np.random.default_rng(seed).integers(0, n_facts, (RESAMPLES, n_facts))
    counts = np.zeros((RESAMPLES, n_facts))
    np.add.at(counts, (np.arange(RESAMPLES)[:, None], drawn), 1.0)
    return np.concatenate([np.ones((1, n_facts)), counts])


def _pair_means(
    table: Float[np.ndarray, "fact fact"], mask: np.ndarray, counts: Float[np.ndarray, "draw fact"]
) -> Float[np.ndarray, " draw"]:
    """Mean over pairs of two different facts, each weighted by how often it was drawn; a fact is no pair with its copy."""
    pairs = (mask & ~np.eye(len(table), dtype=bool)).astype(float)
    total = ((counts @ (table * pairs)) * counts).sum(1)
    number = ((counts @ pairs) * counts).sum(1)
    with np.errstate(invalid="ignore"):
        return np.where(number > 0, total / np.where(number > 0, number, 1.0), np.nan)
