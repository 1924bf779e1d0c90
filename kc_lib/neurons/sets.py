"""Sets of neurons by fact, random ones beside them, and both in numbers: how many, in which layers, and how many are shared.

What a fact's knowledge neurons are compared with are those of the base method (the largest values) and as many random
neurons of the same layers, which say what the layers alone would give. All intervals are bootstraps over facts. A fact
without neurons counts as one with none.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from kc_lib.errors import MethodError
from kc_lib.neurons.cloze import ClozeFact
from kc_lib.neurons.effects import KINDS, METHODS, OfFacts, by_relation, ends, figure, means_with_draws
from kc_lib.residual.encoder import Residual
from kc_lib.stats import times_drawn, with_interval

Neuron = tuple[int, int]  # layer, index in the layer
Variant = tuple[str, int]  # kind, draw; only random neurons have several draws


@dataclass(frozen=True)
class NeuronSets(OfFacts):
    """The neurons of every fact, by method, and of every relation.

    ``frame`` has a row per method, fact and neuron, with the number of paraphrases that found it; ``relations`` one per
    method, relation and neuron, with the number of facts; ``facts`` the facts, as in ``NeuronAttributions``.
    """

    columns = ("method", "fact", "layer", "neuron", "prompts")

    frame: pd.DataFrame
    relations: pd.DataFrame
    facts: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def of(self, method: str, fact: int) -> tuple[Neuron, ...]:
        """The neurons of one fact, by layer."""
        return tuple(sorted(neurons_in(self.frame[(self.frame["method"] == method) & (self.frame["fact"] == fact)])))

    def of_relation(self, method: str, relation: str) -> tuple[Neuron, ...]:
        """The neurons of a relation, most frequent first."""
        rows = self.relations[(self.relations["method"] == method) & (self.relations["relation"] == relation)]
        return neurons_in(rows.sort_values(["facts", "layer", "neuron"], ascending=[False, True, True]))

    def without_common(self, method: str, fact: int, share: float = 0.1) -> tuple[Neuron, ...]:
        """The neurons of a fact that at most this share of its relation has: what an update changes (section 5.1)."""
        relation = self.facts.set_index("fact").loc[fact, "relation"]
        members = self.facts.loc[self.facts["relation"] == relation, "fact"]
        counts = Counter(neurons_in(self.frame[(self.frame["method"] == method) & self.frame["fact"].isin(members)]))
        return tuple(neuron for neuron in self.of(method, fact) if counts[neuron] <= max(1.0, share * len(members)))

    def summary(self, seed: int = 0) -> pd.DataFrame:
        """How many neurons a fact has, per relation and pooled: ``neurons_per_fact``."""
        return neurons_per_fact(self, seed)

    def headline(self, seed: int = 0) -> dict[str, str]:
        """Neurons per fact, and how many two facts share."""
        figures = {}
        for row in neurons_per_fact(self, seed).query("relation == 'all'").to_dict("records"):
            without = f" ({row['n_empty']} of {row['n']} facts without any)" if row["n_empty"] else ""
            figures[f"neurons per fact, {row['method']}"] = figure(row, "neurons", ".2f") + without
        if len(self.facts) > 1 and not self.frame.empty:
            for row in overlaps(self, seed=seed).query("pairs in ('intra', 'inter')").to_dict("records"):
                figures[f"shared {row['pairs']}-relation, {row['kind']}"] = figure(row, "shared", ".2f")
        return figures


def neurons_in(rows: pd.DataFrame) -> tuple[Neuron, ...]:
    """The neurons that rows with columns layer and neuron name, in their order."""
    return tuple(zip(rows["layer"].astype(int), rows["neuron"].astype(int), strict=True))


def neurons_per_layer(residual: Residual) -> int:
    """How many neurons an MLP of the model has."""
    return residual.parts(0).W_out.shape[0]


def check_sets(facts: Sequence[ClozeFact], sets: NeuronSets, residual: Residual) -> None:
    """Raise MethodError for sets of other facts, or of another model."""
    given = [(fact.relation, fact.subject, fact.answer) for fact in facts]
    known = list(zip(*(sets.facts[name] for name in ("relation", "subject", "answer")), strict=True))
    if given != known or list(sets.facts["fact"]) != list(range(len(facts))):
        raise MethodError(
            f"the sets of neurons are of {len(known)} facts, and not of these {len(facts)}: give the facts that were "
            "attributed, in their order"
        )
    for name, number in {"n_layers": residual.n_layers, "d_mlp": neurons_per_layer(residual)}.items():
        if sets.provenance.get(name, number) != number:
            raise MethodError(
                f"the sets of neurons are of a model with {name} {sets.provenance[name]}, this one has {number}: give the "
                "model that was attributed"
            )


# ------------------------------------------------------------------------------------------------ random neurons


def random_neurons(
    neurons: Sequence[Neuron], d_mlp: int, seed: int = 0, without: Sequence[Neuron] = ()
) -> tuple[Neuron, ...]:
    """As many neurons of the same layers, drawn from all others: what a set of neurons is to be compared with.

    Raises:
        MethodError: a layer that has not as many others.
    """
    generator = random.Random(seed)
    taken = {*neurons, *without}
    drawn: list[Neuron] = []
    for layer, count in sorted(Counter(layer for layer, _ in neurons).items()):
        others = [i for i in range(d_mlp) if (layer, i) not in taken]
        if len(others) < count:
            raise MethodError(f"layer {layer} has {len(others)} other neurons, fewer than the {count} to draw")
        drawn += [(layer, i) for i in sorted(generator.sample(others, count))]
    return tuple(drawn)


def variants(n_random: int) -> list[Variant]:
    """Every kind of neurons, random ones as often as they are drawn."""
    return [*((method, 0) for method in METHODS), *(("random", draw) for draw in range(n_random))]


def with_random(
    knowledge: Sequence[Neuron], base: Sequence[Neuron], d_mlp: int, n_random: int, seed: int = 0
) -> dict[Variant, tuple[Neuron, ...]]:
    """The sets that are not empty, by variant: random ones are as many as the knowledge neurons, of the same layers."""
    sets = {("knowledge", 0): tuple(knowledge), ("base", 0): tuple(base)}
    for draw in range(n_random if knowledge else 0):
        sets["random", draw] = random_neurons(knowledge, d_mlp, seed * n_random + draw)
    return {variant: neurons for variant, neurons in sets.items() if neurons}


def sets_of_facts(
    sets: NeuronSets, d_mlp: int, n_random: int, seed: int = 0, *, common: bool = True
) -> list[dict[Variant, tuple[Neuron, ...]]]:
    """Of every fact in its order, the sets that are not empty.

    Args:
        common: also the neurons that more than a tenth of the relation's facts have.
    """
    of = sets.of if common else sets.without_common
    numbers = [int(fact) for fact in sets.facts["fact"]]
    return [
        with_random(of("knowledge", fact), of("base", fact), d_mlp, n_random, seed * len(numbers) + fact) for fact in numbers
    ]


def n_empty(neurons_of_facts: Sequence[Mapping[Variant, tuple[Neuron, ...]]]) -> dict[str, int]:
    """How many facts have no neurons, by method."""
    return {method: sum((method, 0) not in of_fact for of_fact in neurons_of_facts) for method in METHODS}


# ------------------------------------------------------------------------------------------------ in numbers


def set_sizes(sets: NeuronSets) -> pd.DataFrame:
    """How many neurons every fact has, by method (columns)."""
    counts = sets.frame.groupby(["fact", "method"]).size().unstack(fill_value=0)
    return counts.reindex(index=sets.facts["fact"], columns=list(METHODS), fill_value=0).astype(float)


def neurons_per_fact(sets: NeuronSets, seed: int = 0) -> pd.DataFrame:
    """Mean number of neurons of a fact with its interval, per relation and pooled: relation, method, n, n_empty, neurons."""
    sizes = set_sizes(sets).melt(ignore_index=False, var_name="method", value_name="neurons")
    by_fact = sizes.set_index("method", append=True)

    def measure(group: pd.DataFrame) -> dict[str, float]:
        means = means_with_draws(group.to_numpy(), seed)[:, 0]
        return {"n_empty": int((group["neurons"] == 0).sum())} | with_interval("neurons", means[0], means[1:])

    return by_relation(by_fact, sets.facts, {"method": METHODS}, measure, ["n_empty", *ends("neurons")])


def layer_shares(sets: NeuronSets, seed: int = 0) -> pd.DataFrame:
    """Share of all facts' neurons that lie in each layer, with intervals: method, layer, neurons, share; n facts.

    ``random`` is one layer's share of neurons drawn from the whole model; shares are NaN where a method found no neurons.
    """
    n_layers, n_facts = int(sets.provenance["n_layers"]), len(sets.facts)
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        of_method = sets.frame[sets.frame["method"] == method]
        sizes = of_method.groupby(["fact", "layer"]).size().unstack(fill_value=0)
        sizes = sizes.reindex(index=sets.facts["fact"], columns=range(n_layers), fill_value=0)
        counts = sizes.to_numpy(dtype=float)
        means = means_with_draws(counts, seed)
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample, or all facts, may have no neurons
            shares = means / means.sum(1, keepdims=True)
        for layer in range(n_layers):
            named = {"method": method, "layer": layer, "n": n_facts, "neurons": int(counts[:, layer].sum())}
            rows.append(named | _finite_interval("share", shares[:, layer]))
    chance = {"n": n_facts, "neurons": 0, "share": 1 / n_layers, "share_low": np.nan, "share_high": np.nan}
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
        raise MethodError("the sets do not say d_mlp, so no random neurons can be drawn: give sets from refine_neurons")
    of_facts = sets_of_facts(sets, int(d_mlp), n_random, seed)
    n_facts, relations = len(of_facts), sets.facts["relation"].to_numpy()
    different = ~np.eye(n_facts, dtype=bool)
    same = relations[:, None] == relations[None]
    masks = {"intra": different & same, "inter": different & ~same, "intra - inter": different}
    counts = np.concatenate([np.ones((1, n_facts)), times_drawn(n_facts, seed)])  # all facts once, then resampled
    rows: list[dict[str, Any]] = []
    for kind in KINDS if n_random else METHODS:
        of_kind = [variant for variant in variants(n_random) if variant[0] == kind]
        tables = [_intersections([neurons.get(variant, ()) for neurons in of_facts]) for variant in of_kind]
        shared = {pairs: _pair_means(np.mean(tables, axis=0), masks[pairs], counts) for pairs in ("intra", "inter")}
        shared["intra - inter"] = shared["intra"] - shared["inter"]
        for pairs, draws in shared.items():
            named = {"kind": kind, "pairs": pairs, "n": n_facts, "n_pairs": int(masks[pairs].sum()) // 2}
            known = draws if n_facts > 1 else draws[:1]  # one fact has no interval
            rows.append(named | _finite_interval("shared", known))
    return pd.DataFrame(rows)


def _finite_interval(name: str, draws: Float[np.ndarray, " draw"]) -> dict[str, float]:
    """The first of the draws with the interval of those of the others that are finite; NaN where it is not, or none is."""
    finite = draws[1:][np.isfinite(draws[1:])]
    return with_interval(name, draws[0], finite if np.isfinite(draws[0]) and len(finite) else np.full(1, np.nan))


def _intersections(neurons_of_facts: Sequence[Sequence[Neuron]]) -> Float[np.ndarray, "fact fact"]:
    columns = {neuron: i for i, neuron in enumerate(sorted({neuron for of_fact in neurons_of_facts for neuron in of_fact}))}
    member = np.zeros((len(neurons_of_facts), len(columns)))
    for fact, neurons in enumerate(neurons_of_facts):
        member[fact, [columns[neuron] for neuron in neurons]] = 1.0
    return member @ member.T


def _pair_means(
    table: Float[np.ndarray, "fact fact"], mask: np.ndarray, counts: Float[np.ndarray, "draw fact"]
) -> Float[np.ndarray, " draw"]:
    """Mean over pairs of facts, each weighted by how often it was drawn; a fact is no pair with its copy."""
    pairs = mask.astype(float)
    total = ((counts @ (table * pairs)) * counts).sum(1)
    number = ((counts @ pairs) * counts).sum(1)
    with np.errstate(invalid="ignore"):
        return np.where(number > 0, total / np.where(number > 0, number, 1.0), np.nan)
