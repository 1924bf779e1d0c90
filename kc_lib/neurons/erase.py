"""A relation erased: the value vectors of its most frequent neurons set to zero (Dai et al. 2022, section 5.2)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from kc_lib.errors import MethodError
from kc_lib.models.model import Model
from kc_lib.neurons.cloze import ClozeFact, ClozePrompt
from kc_lib.neurons.effects import KINDS, METHODS, PERPLEXITIES, ends, figure, perplexities, rate
from kc_lib.neurons.options import EraseOptions
from kc_lib.neurons.sets import NeuronSets, check_sets, neurons_per_layer, with_random
from kc_lib.neurons.values import Answers, edited_answers, value_vectors
from kc_lib.results import Result


@dataclass(frozen=True)
class RelationErasure(Result):
    """What zeroing a relation's neurons does to its facts and to those of every other relation.

    ``frame`` has one row per kind of neurons, draw, fact and prompt: right (every token of the answer has rank 1) and nll
    (the mean of -log p over its tokens), before and after; ``held_out`` prompts did not serve to find the neurons.
    ``neurons`` are those zeroed: kind, draw, layer, neuron. ``provenance`` names the relation.
    """

    columns = ("kind", "draw", "fact", "relation", "prompt", "held_out", "right_before", "right", "nll_before", "nll")

    frame: pd.DataFrame
    neurons: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def summary(self, seed: int = 0) -> pd.DataFrame:
        """What becomes of the relation and of others: ``erasure_effects``."""
        return erasure_effects([self], seed)

    def headline(self, seed: int = 0) -> dict[str, str]:
        """The change of perplexity of the relation and of all others."""
        effects = erasure_effects([self], seed).query("kind == 'knowledge' and on != 'other'").to_dict("records")
        return {f"erasing {row['erased']}: {row['on']}": f"perplexity {figure(row, 'ratio', '+.1%')}" for row in effects}


@dataclass(frozen=True)
class _Seen:
    """A prompt that an erasure is seen on: whose it is, and its number among all its prompts."""

    fact: int
    number: int
    prompt: ClozePrompt
    held_out: bool


def erase_relation(
    model: Model, facts: Sequence[ClozeFact], sets: NeuronSets, relation: str, **options: Any
) -> RelationErasure:
    """Zero the value vectors of a relation's most frequent neurons, and see what the model then answers.

    Beside them, as many of the base method, and random ones of the same layers. A relation may have fewer neurons; without
    any, there are no rows, and ``neurons`` is empty. The model's weights are what they were afterwards.

    Args:
        sets: of these facts, from ``refine_neurons``.
        options: fields of ``EraseOptions``; of the relation itself all prompts are asked.

    Raises:
        MethodError: an unknown relation, sets of other facts or of another model, or a number out of range.
        ModelError: as ``Model.mlp_residual``; or weights that cannot be written in place.
    """
    asked = EraseOptions.of(options)
    residual = model.mlp_residual
    check_sets(facts, sets, residual)
    relations_to_erase(facts, [relation])
    knowledge, base = (sets.of_relation(method, relation)[: asked.n_neurons] for method in METHODS)
    to_zero = with_random(knowledge, base, neurons_per_layer(residual), asked.n_random, asked.seed)
    prompts = _seen_on(facts, relation, asked)
    clozes = [cloze for seen in prompts for cloze in seen.prompt.clozes]
    tokens = torch.tensor([[cloze.target] for cloze in clozes])
    edits = [dict(zip(n, torch.zeros_like(value_vectors(residual, n)), strict=True)) for n in to_zero.values()]
    rows: list[tuple[Any, ...]] = []
    if to_zero:
        unedited, *edited = edited_answers(residual, clozes, tokens, [{}, *edits], asked.batch_size)
        before = _right_and_nll(unedited, prompts)
        for variant, answers in zip(to_zero, edited, strict=True):
            after = _right_and_nll(answers, prompts)
            for seen, (right_before, nll_before), (right, nll) in zip(prompts, before, after, strict=True):
                named = (*variant, seen.fact, facts[seen.fact].relation, seen.number, seen.held_out)
                rows.append((*named, right_before, right, nll_before, nll))
    zeroed = [(*variant, *neuron) for variant, neurons in to_zero.items() for neuron in neurons]
    found = {"knowledge": len(knowledge), "base": len(base)}
    provenance = {"model": model.name, "relation": relation, "n_found": found, **asked.determining()}
    frame = pd.DataFrame(rows, columns=list(RelationErasure.columns))
    return RelationErasure(frame, pd.DataFrame(zeroed, columns=["kind", "draw", "layer", "neuron"]), provenance)


def relations_to_erase(facts: Sequence[ClozeFact], given: Sequence[str] | None = None) -> list[str]:
    """The relations given, or all that the facts are of.

    Raises:
        MethodError: no fact of a relation.
    """
    relations = list(dict.fromkeys(fact.relation for fact in facts))
    for relation in given or ():
        if relation not in relations:
            raise MethodError(f"no fact of the relation {relation!r}: the facts are of {', '.join(relations)}")
    return relations if given is None else list(given)


def erasure_effects(erasures: Sequence[RelationErasure], seed: int = 0) -> pd.DataFrame:
    """What erasing each relation does to it, to all others together ("others"), and to every other one.

    Columns: erased, on ("erased", "others", "other"), relation, kind, n_neurons, n (facts), right_before and right (with
    Wilson intervals), perplexity_before, perplexity, and ratio, their quotient less 1, with its interval.
    """
    numbers = ["right_before", "right", "nll_before", "nll"]
    rows: list[dict[str, Any]] = []
    for erasure in erasures:
        erased = str(erasure.provenance["relation"])
        sizes = erasure.neurons.groupby(["kind", "draw"]).size().groupby("kind").first().to_dict()
        frame = erasure.frame.astype(dict.fromkeys(numbers, float))
        by_fact = frame.groupby(["kind", "relation", "fact"], sort=False, as_index=False)[numbers].mean()
        of_erased, others = (by_fact[(by_fact["relation"] == erased) == is_erased] for is_erased in (True, False))
        every = [of_erased.assign(on="erased"), others.assign(on="others", relation="others"), others.assign(on="other")]
        groups = pd.concat(every).sort_values("kind", key=lambda kinds: kinds.map(KINDS.index), kind="stable")
        for (kind, on, relation), group in groups.groupby(["kind", "on", "relation"], sort=False):
            named = {"erased": erased, "on": on, "relation": relation, "kind": kind}
            counts = {"n_neurons": sizes[kind], "n": len(group)}
            rates = rate("right_before", group["right_before"]) | rate("right", group["right"])
            rows.append(named | counts | rates | perplexities(group, seed))
    columns = ["erased", "on", "relation", "kind", "n_neurons", "n", *ends("right_before", "right"), *PERPLEXITIES]
    return pd.DataFrame(rows, columns=columns)


def _seen_on(facts: Sequence[ClozeFact], relation: str, asked: EraseOptions) -> list[_Seen]:
    """All prompts of the relation, and drawn ones of every other."""
    prompts: list[_Seen] = []
    for name in relations_to_erase(facts):
        of_relation = [
            _Seen(i, number, prompt, number >= len(fact.prompts))
            for i, fact in enumerate(facts)
            if fact.relation == name
            for number, prompt in enumerate(fact.all_prompts)
        ]
        if name != relation:
            n_drawn = min(asked.n_other, len(of_relation))
            drawn = random.Random(f"{asked.seed}: {name}").sample(range(len(of_relation)), n_drawn)
            of_relation = [of_relation[i] for i in sorted(drawn)]
        prompts += of_relation
    return prompts


def _right_and_nll(answers: Answers, prompts: Sequence[_Seen]) -> list[tuple[bool, float]]:
    """Of every prompt whether all tokens of its answer have rank 1, and their mean -log p."""
    by_prompt = answers.split([len(seen.prompt.clozes) for seen in prompts])
    return [(bool((rank[:, 0] == 1).all()), -float(log_p[:, 0].double().mean())) for _, log_p, rank in by_prompt]
