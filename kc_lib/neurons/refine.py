"""Refining: which neurons the paraphrases of a fact share (Dai et al. 2022, section 3.3).

1. *Coarse*: of every paraphrase, the neurons with at least ``threshold`` times the largest score (0.2; for the base method
   0.5), or above an absolute value, or in a percentile of the stored ones.
2. *Refined*: of every fact, those in at least ``share`` of its paraphrases, and in three at least.
3. The share starts at 0.7 and is moved by 0.05 per relation, at most six times, until a fact has two to five neurons on
   average. (The published code moves it once more after the last look and then keeps sets of the share before; here the
   share that is reported is the one that was used.)
4. *Relation*: the neurons in at least a tenth of the relation's facts.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pandas as pd

from kc_lib.errors import MethodError
from kc_lib.neurons.attribute import NeuronAttributions
from kc_lib.neurons.effects import METHODS
from kc_lib.neurons.options import RefineOptions
from kc_lib.neurons.sets import Neuron, NeuronSets, neurons_in

LEAST_PROMPTS = 3
SIZES = (2.0, 5.0)
STEP, ROUNDS = 0.05, 6


def refine_neurons(
    attributions: NeuronAttributions, *, negatives: NeuronAttributions | None = None, **options: Any
) -> NeuronSets:
    """The neurons that paraphrases share, per fact and per relation, for knowledge attributions and the base method.

    Example:
        >>> attributions = kc.knowledge_neurons(model, task.facts)
        >>> sets = kc.refine_neurons(attributions, share=0.7)
        >>> sets.of("knowledge", 0)
        ((14, 1021), (23, 88), (27, 1440))

    Args:
        negatives: attributions of unrelated facts; a neuron that as large a share of any one's paraphrases found is dropped.
        options: fields of ``RefineOptions``; ``adapt`` moves ``share`` per relation and method.

    A fact may end with no neurons: that is a finding, and is kept as such.

    Raises:
        MethodError: a parameter out of range, or facts with fewer paraphrases than three.
    """
    asked = RefineOptions.of(options)
    thresholds = {"knowledge": asked.threshold, "base": asked.base_threshold}
    few = attributions.facts[attributions.facts["n_prompts"] < LEAST_PROMPTS]
    if len(few):
        raise MethodError(
            f"{few['subject'].iloc[0]!r} has {few['n_prompts'].iloc[0]} paraphrases; refining needs at least "
            f"{LEAST_PROMPTS}: give the relation more templates, or n_prompts a larger number"
        )
    if negatives is not None and negatives.provenance.get("model") != attributions.provenance.get("model"):
        raise MethodError("the negative examples were attributed with another model: attribute them with this one")
    rows: list[tuple[Any, ...]] = []
    common: list[tuple[Any, ...]] = []
    shares: dict[str, dict[str, float]] = {method: {} for method in METHODS}
    for method in METHODS:
        coarse = coarse_neurons(attributions, method, thresholds[method], asked.criterion)
        unwanted = None if negatives is None else coarse_neurons(negatives, method, thresholds[method], asked.criterion)
        for relation, facts in attributions.facts.groupby("relation", sort=False):
            refined, used = _adapted(coarse, facts, asked.share, asked.adapt)
            if negatives is not None and unwanted is not None:
                taken = {neuron for counts in _refined(unwanted, negatives.facts, used).values() for neuron in counts}
                refined = {fact: {n: c for n, c in counts.items() if n not in taken} for fact, counts in refined.items()}
            shares[method][str(relation)] = used
            rows += [(method, fact, *n, c) for fact, counts in refined.items() for n, c in sorted(counts.items())]
            n_facts = Counter(neuron for counts in refined.values() for neuron in counts)
            enough = asked.relation_share * len(facts)
            common += [(method, relation, *neuron, n) for neuron, n in sorted(n_facts.items()) if n >= enough]
    settings = {"thresholds": thresholds, "criterion": asked.criterion, "share": asked.share, "adapt": asked.adapt}
    provenance = dict(attributions.provenance) | settings | {"relation_share": asked.relation_share, "shares": shares}
    frame = pd.DataFrame(rows, columns=list(NeuronSets.columns))
    relations = pd.DataFrame(common, columns=["method", "relation", "layer", "neuron", "facts"])
    numbers = dict.fromkeys(("fact", "layer", "neuron", "prompts"), int)
    return NeuronSets(frame.astype(numbers), relations, attributions.facts, provenance)


def coarse_neurons(
    attributions: NeuronAttributions, method: str, threshold: float, criterion: str = "share of maximum"
) -> pd.DataFrame:
    """Rows of the neurons that pass the threshold on their prompt: fact, prompt, layer, neuron, value.

    Raises:
        MethodError: a share of the maximum below the one that was stored.
    """
    rows = attributions.frame[attributions.frame["method"] == method]
    values = rows.groupby(["fact", "prompt"])["value"]
    if criterion == "absolute":
        return rows[rows["value"] >= threshold]
    if criterion == "percentile":
        return rows[rows["value"] >= values.transform(lambda stored: stored.quantile(threshold / 100))]
    stored = attributions.provenance.get("kept", 0.0)
    if threshold < stored:
        raise MethodError(
            f"the threshold {threshold} is below the stored share {stored}: attribute again with kept={threshold}"
        )
    return rows[rows["value"] >= threshold * values.transform("max")]


def _adapted(
    coarse: pd.DataFrame, facts: pd.DataFrame, share: float, adapt: bool
) -> tuple[dict[int, dict[Neuron, int]], float]:
    """Refined sets of a relation's facts, and the share of paraphrases they were made with."""
    refined, used = _refined(coarse, facts, share), share
    for _ in range(ROUNDS - 1 if adapt else 0):
        mean = sum(map(len, refined.values())) / len(refined)
        if SIZES[0] <= mean <= SIZES[1]:
            break
        moved = round(used + (-STEP if mean < SIZES[0] else STEP), 10)
        if not 0.0 < moved <= 1.0:
            break
        used, refined = moved, _refined(coarse, facts, moved)
    return refined, used


def _refined(coarse: pd.DataFrame, facts: pd.DataFrame, share: float) -> dict[int, dict[Neuron, int]]:
    """Of every fact, the neurons that enough of its paraphrases found, and how many did."""
    of_fact = {fact: neurons_in(rows) for fact, rows in coarse.groupby("fact")}
    refined: dict[int, dict[Neuron, int]] = {}
    for fact, n_prompts in zip(facts["fact"], facts["n_prompts"], strict=True):
        # a share of a number of prompts is often a whole number, which rounding must not lift above itself
        needed = max(math.ceil(share * n_prompts - 1e-9), LEAST_PROMPTS)
        counts = Counter(of_fact.get(fact, ()))
        refined[int(fact)] = {neuron: count for neuron, count in counts.items() if count >= needed}
    return refined
