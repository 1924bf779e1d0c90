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
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from kc_lib.errors import MethodError
from kc_lib.neurons.attribute import METHODS, NeuronAttributions
from kc_lib.results import load_table, save_table

Neuron = tuple[int, int]  # layer, index in the layer
THRESHOLDS = {"knowledge": 0.2, "base": 0.5}
LEAST_PROMPTS = 3
SIZES = (2.0, 5.0)
STEP, ROUNDS = 0.05, 6
CRITERIA = ("share of maximum", "absolute", "percentile")
COLUMNS = ("method", "fact", "layer", "neuron", "prompts")


@dataclass(frozen=True)
class NeuronSets:
    """The neurons of every fact, by method, and of every relation.

    ``frame`` has a row per method, fact and neuron, with the number of paraphrases that found it; ``relations`` one per
    method, relation and neuron, with the number of facts; ``facts`` the facts, as in ``NeuronAttributions``.
    """

    frame: pd.DataFrame
    relations: pd.DataFrame
    facts: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def of(self, method: str, fact: int) -> tuple[Neuron, ...]:
        """The neurons of one fact, by layer."""
        rows = self.frame[(self.frame["method"] == method) & (self.frame["fact"] == fact)]
        return tuple(sorted(zip(rows["layer"].astype(int), rows["neuron"].astype(int), strict=True)))

    def of_relation(self, method: str, relation: str) -> tuple[Neuron, ...]:
        """The neurons of a relation, most frequent first."""
        rows = self.relations[(self.relations["method"] == method) & (self.relations["relation"] == relation)]
        rows = rows.sort_values(["facts", "layer", "neuron"], ascending=[False, True, True])
        return tuple(zip(rows["layer"].astype(int), rows["neuron"].astype(int), strict=True))

    def without_common(self, method: str, fact: int, share: float = 0.1) -> tuple[Neuron, ...]:
        """The neurons of a fact that at most this share of its relation has: what an update changes (section 5.1)."""
        relation = self.facts.set_index("fact").loc[fact, "relation"]
        members = self.facts.loc[self.facts["relation"] == relation, "fact"]
        rows = self.frame[(self.frame["method"] == method) & self.frame["fact"].isin(members)]
        counts = Counter(zip(rows["layer"].astype(int), rows["neuron"].astype(int), strict=True))
        return tuple(neuron for neuron in self.of(method, fact) if counts[neuron] <= max(1.0, share * len(members)))

    def to_frame(self) -> pd.DataFrame:
        """``frame`` with subject, answer and relation of every fact."""
        return self.frame.merge(self.facts[["fact", "relation", "subject", "answer"]], on="fact")

    def save(self, path: str | Path) -> Path:
        """Write ``frame`` as parquet; the rest goes into the file's metadata."""
        about = {"relations": self.relations.to_dict("list"), "facts": self.facts.to_dict("list")}
        return save_table(self.frame, path, about | {"provenance": dict(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> NeuronSets:
        """Read what ``save`` wrote.

        Raises:
            MethodError: the file is not there, or holds no sets of neurons.
        """
        frame, about = load_table(path)
        if not {"relations", "facts", "provenance"} <= about.keys() or not set(COLUMNS) <= set(frame):
            raise MethodError(f"{path}: holds no sets of neurons; give neurons.parquet of a run")
        return cls(frame, pd.DataFrame(about["relations"]), pd.DataFrame(about["facts"]), about["provenance"])


def refine(
    attributions: NeuronAttributions,
    *,
    thresholds: Mapping[str, float] = THRESHOLDS,
    criterion: str = "share of maximum",
    share: float = 0.7,
    adapt: bool = True,
    relation_share: float = 0.1,
    negatives: NeuronAttributions | None = None,
) -> NeuronSets:
    """The neurons that paraphrases share, per fact and per relation, for knowledge attributions and the base method.

    Args:
        thresholds: of each method; by ``criterion`` a share of the prompt's largest score, a score, or the percentile
            (0 to 100) of the prompt's stored scores that a neuron must reach.
        share: of a fact's paraphrases that must have found a neuron; ``adapt`` moves it per relation and method.
        relation_share: of a relation's facts that must have a neuron for it to be one of the relation's.
        negatives: attributions of unrelated facts; a neuron that as large a share of any one's paraphrases found is dropped.

    A fact may end with no neurons: that is a finding, and is kept as such.

    Raises:
        MethodError: a parameter out of range, or facts with fewer paraphrases than three.
    """
    check_refining(thresholds, criterion, share, relation_share)
    few = attributions.facts[attributions.facts["n_prompts"] < LEAST_PROMPTS]
    if len(few):
        raise MethodError(
            f"{few['subject'].iloc[0]!r} has {few['n_prompts'].iloc[0]} paraphrases; refining needs at least "
            f"{LEAST_PROMPTS}: give the relation more templates, or n_prompts a larger number"
        )
    if negatives is not None and negatives.provenance.get("model") != attributions.provenance.get("model"):
        raise MethodError("the negative examples were attributed with another model: attribute them with this one")
    rows: list[pd.DataFrame] = []
    common: list[dict[str, Any]] = []
    shares: dict[str, dict[str, float]] = {}
    for method in METHODS:
        coarse = coarse_neurons(attributions, method, thresholds[method], criterion)
        unwanted = None if negatives is None else coarse_neurons(negatives, method, thresholds[method], criterion)
        shares[method] = {}
        for relation, facts in attributions.facts.groupby("relation", sort=False):
            found, used = _adapted(coarse, facts, share, adapt)
            if unwanted is not None and negatives is not None:
                taken = {pair for refined in _refined(unwanted, negatives.facts, used).values() for pair in refined}
                found = {fact: {n: c for n, c in refined.items() if n not in taken} for fact, refined in found.items()}
            shares[method][str(relation)] = used
            rows += [_rows(method, fact, refined) for fact, refined in found.items()]
            counts = Counter(neuron for refined in found.values() for neuron in refined)
            common += [
                {"method": method, "relation": relation, "layer": layer, "neuron": neuron, "facts": count}
                for (layer, neuron), count in sorted(counts.items())
                if count >= relation_share * len(facts)
            ]
    settings = {"thresholds": dict(thresholds), "criterion": criterion, "share": share, "adapt": adapt}
    provenance = dict(attributions.provenance) | settings | {"relation_share": relation_share, "shares": shares}
    frame = pd.concat([_rows("", 0, {}), *rows], ignore_index=True).astype({"fact": int, "layer": int, "neuron": int})
    relations = pd.DataFrame(common, columns=["method", "relation", "layer", "neuron", "facts"])
    return NeuronSets(frame, relations, attributions.facts, provenance)


def check_refining(
    thresholds: Mapping[str, float] = THRESHOLDS,
    criterion: str = "share of maximum",
    share: float = 0.7,
    relation_share: float = 0.1,
) -> None:
    """Raise MethodError for a parameter that ``refine`` cannot use."""
    if criterion not in CRITERIA:
        raise MethodError(f"unknown criterion {criterion!r}: use one of {', '.join(CRITERIA)}")
    if set(thresholds) != set(METHODS):
        raise MethodError(
            f"thresholds are for {', '.join(thresholds) or 'nothing'}; give one for each of {', '.join(METHODS)}"
        )
    for name, number in {"share": share, "relation_share": relation_share}.items():
        if not 0.0 < number <= 1.0:
            raise MethodError(f"{name} is {number!r}; it must be above 0 and at most 1")


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


def _adapted(
    coarse: pd.DataFrame, facts: pd.DataFrame, share: float, adapt: bool
) -> tuple[dict[int, dict[Neuron, int]], float]:
    """Refined sets of a relation's facts, and the share of paraphrases they were made with."""
    found, used = _refined(coarse, facts, share), share
    for _ in range(ROUNDS - 1 if adapt else 0):
        mean = sum(map(len, found.values())) / len(found)
        if SIZES[0] <= mean <= SIZES[1]:
            break
        moved = round(used + (-STEP if mean < SIZES[0] else STEP), 10)
        if not 0.0 < moved <= 1.0:
            break
        used, found = moved, _refined(coarse, facts, moved)
    return found, used


def _refined(coarse: pd.DataFrame, facts: pd.DataFrame, share: float) -> dict[int, dict[Neuron, int]]:
    """Of every fact, the neurons that enough of its paraphrases found, and how many did."""
    by_fact = dict(tuple(coarse.groupby("fact")))
    refined: dict[int, dict[Neuron, int]] = {}
    for fact, n_prompts in zip(facts["fact"], facts["n_prompts"], strict=True):
        rows = by_fact.get(fact)
        pairs = () if rows is None else zip(rows["layer"].astype(int), rows["neuron"].astype(int), strict=True)
        # a share of a number of prompts is often a whole number, which rounding must not lift above itself
        needed = max(math.ceil(share * n_prompts - 1e-9), LEAST_PROMPTS)
        refined[int(fact)] = {neuron: count for neuron, count in Counter(pairs).items() if count >= needed}
    return refined


def _rows(method: str, fact: int, refined: Mapping[Neuron, int]) -> pd.DataFrame:
    ordered = sorted(refined.items())
    about = {"layer": [n[0] for n, _ in ordered], "neuron": [n[1] for n, _ in ordered], "prompts": [c for _, c in ordered]}
    return pd.DataFrame(about).assign(method=method, fact=fact)[list(COLUMNS)]
