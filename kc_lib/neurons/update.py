"""A fact updated by its neurons' value vectors (Dai et al. 2022, section 5.1).

Every neuron of the fact that is not common in its relation has its value vector v changed to v - l1 e_old + l2 e_new, e the
embeddings of the old and of another answer of the same relation. The paper subtracts embeddings as they are; its code scales
them to the length of v, which is the default here. The paper's model has one matrix for embedding and unembedding; where
there are two it is the unembedding that the logits are read with, so that is the default. Gated MLPs need one thing more:
the change is turned to the sign of the neuron's activation (``values.py``).
What the model then answers is seen on the prompts that found the neurons and on those that did not, and on other facts.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from kc_lib.errors import check_counts
from kc_lib.models.model import Model
from kc_lib.neurons.cloze import ClozeFact, check_fact
from kc_lib.neurons.effects import KINDS, METHODS, PERPLEXITIES, OfFacts, by_relation, ends, figure, perplexities, rate
from kc_lib.neurons.integrate import answer_states
from kc_lib.neurons.options import UpdateOptions
from kc_lib.neurons.sets import Neuron, NeuronSets, check_sets, neurons_per_layer, sets_of_facts
from kc_lib.neurons.values import Answers, Values, edited_answers, edited_values, mean_activations, updated_values
from kc_lib.residual.encoder import Residual

RATES = ("changed", "success_1", "success_5")
ANSWER = (
    "predicted",
    "p",
    "rank",
    "p_gold",
    "nll",
)  # p and rank of the new answer, p of the old one, mean -log p


@dataclass(frozen=True)
class FactUpdates(OfFacts):
    """What updating every fact does to it and to others.

    ``frame`` has one row per fact, prompt, kind of neurons and draw: ``on`` is "own" (a prompt that found the neurons) or
    "held_out"; changed (the token of rank 1 is another one), and of the new answer's first token rank and p, before and
    after; of the old one p_gold. ``others`` has one row per fact, kind, draw, and "intra" or "inter" (other facts of the
    relation, and of other relations): nll, the mean over n_prompts drawn prompts of -log p per token of the gold answer,
    before and after. ``facts`` has the new answer of every updated fact; ``provenance`` counts those left out, by reason.
    """

    columns = (
        *("kind", "draw", "fact", "on", "prompt", "changed", "rank_before", "rank", "p_before", "p"),
        *("p_gold_before", "p_gold", "n_neurons"),
    )

    frame: pd.DataFrame
    others: pd.DataFrame
    facts: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """The first fact that was updated by knowledge neurons of its own; 0 where none was."""
        return int(self.frame.loc[self.frame["kind"] == "knowledge", "fact"].min()) if self.n_updated else 0

    @property
    def n_updated(self) -> int:
        """How many facts were updated by knowledge neurons of their own."""
        return self.frame.loc[self.frame["kind"] == "knowledge", "fact"].nunique()

    def summary(self) -> pd.DataFrame:
        """How often updates take, per relation and pooled: ``update_rates``."""
        return update_rates(self)

    def headline(self, seed: int = 0) -> dict[str, str]:
        """How often the new answer has rank 1, by knowledge neurons and by random ones."""
        pooled = update_rates(self).query("relation == 'all' and kind != 'base'").to_dict("records")
        return {
            f"update success, {row['kind']}, {row['on'].replace('_', '-')} prompts": figure(row, "success_1", ".1%")
            for row in pooled
        }


@dataclass(frozen=True)
class _Seen:
    """A prompt that an update is seen on: own, held_out, intra or inter; whose it is; its number among all its prompts."""

    on: str
    fact: int
    number: int


def update_facts(
    model: Model, facts: Sequence[ClozeFact], sets: NeuronSets, *, progress: bool = False, **options: Any
) -> FactUpdates:
    """Give every fact, one at a time, another answer of its relation, and see what the model then answers.

    Facts whose answer is of several tokens are left out, and those whose relation has no other answer of one token; they
    stay among the others. The model's weights are what they were after every fact.

    Example:
        >>> sets = kc.refine_neurons(kc.knowledge_neurons(model, task.facts))
        >>> updates = kc.update_facts(model, task.facts, sets, l1=0.5, l2=1.0)
        >>> updates.summary()

    Args:
        sets: of these facts, from ``refine_neurons``; neurons that more than a tenth of a relation's facts have are not
            changed.
        options: fields of ``UpdateOptions``; the activations are means over the fact's own prompts.

    Raises:
        MethodError: sets of other facts or of another model, or a parameter out of range.
        ModelError: as ``Model.mlp_residual``; or weights that cannot be written in place.
    """
    asked = UpdateOptions.of(options)
    residual = model.mlp_residual
    check_sets(facts, sets, residual)
    of_facts = sets_of_facts(sets, neurons_per_layer(residual), asked.n_random, asked.seed, common=False)
    targets, left_out = _targets(facts, asked.seed)
    before = _unedited(residual, facts, targets, asked.batch_size)
    rows: list[tuple[Any, ...]] = []
    for fact, target in tqdm(targets.items(), desc="updates", unit="fact", disable=not progress):
        prompts, new = _seen_on(facts, fact, asked), facts[target].first_token
        clozes = [cloze for seen in prompts for cloze in facts[seen.fact].all_prompts[seen.number].clozes]
        n_clozes = [len(facts[seen.fact].all_prompts[seen.number].clozes) for seen in prompts]
        tokens = torch.tensor([[cloze.target, new] for cloze in clozes])
        edits = [_edit(residual, facts[fact], neurons, new, asked) for neurons in of_facts[fact].values()]
        of_edits = edited_answers(residual, clozes, tokens, edits, asked.batch_size)
        for (variant, neurons), answers in zip(of_facts[fact].items(), of_edits, strict=True):
            for seen, after in zip(prompts, _by_prompt(answers, n_clozes), strict=True):
                named = (*variant, fact, seen.on, seen.number, len(neurons))
                rows.append((*named, *before[seen.fact, seen.number], *after))
    empty = {method: sum((method, 0) not in of_facts[fact] for fact in targets) for method in METHODS}
    provenance = {
        **{"model": model.name, **asked.determining()},
        "n_facts": len(facts),
        "n_updated": len(targets),
        "left_out": left_out,
        "empty": empty,
    }
    updated = [
        (fact, facts[fact].relation, facts[fact].subject, facts[fact].answer, facts[target].answer, facts[target].subject)
        for fact, target in targets.items()
    ]
    new_answers = pd.DataFrame(updated, columns=["fact", "relation", "subject", "answer", "new_answer", "new_answer_of"])
    return FactUpdates(*_own_and_others(rows), new_answers, provenance)


def update_answers(
    model: Model, facts: Sequence[ClozeFact], sets: NeuronSets, fact: int, *, n_answers: int = 5, **options: Any
) -> pd.DataFrame:
    """One of the updates of ``update_facts`` in detail: what the model answers to each of the fact's prompts.

    Columns: on ("own" or "held_out"), prompt, text, edited, rank (up to ``n_answers``), token, p. There are no edited rows
    for a fact that has no neurons of its own, and no rows for one that is left out (see ``update_facts``).

    Raises:
        MethodError, ModelError: as ``update_facts``; MethodError also for a fact that is not there.
    """
    check_counts(1, n_answers=n_answers)
    asked = UpdateOptions.of(options)
    residual = model.mlp_residual
    check_sets(facts, sets, residual)
    check_fact(facts, fact)
    targets, _ = _targets(facts, asked.seed)
    neurons = sets.without_common("knowledge", fact)
    rows: list[tuple[Any, ...]] = []
    if fact in targets:
        rows += _top_answers(residual, facts[fact], {}, n_answers)
        if neurons:
            edit = _edit(residual, facts[fact], neurons, facts[targets[fact]].first_token, asked)
            rows += _top_answers(residual, facts[fact], edit, n_answers)
    return pd.DataFrame(rows, columns=["on", "prompt", "text", "edited", "rank", "token", "p"])


def answers_side_by_side(answers: pd.DataFrame, n_answers: int = 3) -> pd.DataFrame:
    """What ``update_answers`` gives, a row for each prompt: the most probable tokens with their p, before and after."""
    top = answers[answers["rank"] <= n_answers]
    words = top["token"].str.strip() + top["p"].map(" {:.0%}".format)
    top = top.assign(answers=words, when=top["edited"].map({False: "before", True: "after"}))
    return top.pivot_table(index=["on", "text"], columns="when", values="answers", aggfunc=", ".join, sort=False)


def update_rates(updates: FactUpdates) -> pd.DataFrame:
    """How often an update takes: per relation and pooled, kind, and own or held-out prompts.

    Columns: relation, on, kind, n (facts), changed (another token has rank 1), success_1 and success_5 (the new answer has
    rank 1, or at most 5) with Wilson intervals; p_before, p, rank_before and rank of the new answer (ranks are medians).
    """
    frame = updates.frame.assign(success_1=updates.frame["rank"] == 1, success_5=updates.frame["rank"] <= 5)
    numbers = ["p_before", "p", "rank_before", "rank"]
    frame = frame.astype(dict.fromkeys([*RATES, *numbers], float))
    by_fact = frame.groupby(["on", "kind", "fact"])[[*RATES, *numbers]].mean()

    def measure(group: pd.DataFrame) -> dict[str, float]:
        rates = {column: value for name in RATES for column, value in rate(name, group[name]).items()}
        means = {name: group[name].mean() for name in ("p_before", "p")}
        return rates | means | {name: group[name].median() for name in ("rank_before", "rank")}

    levels = {"on": ("own", "held_out"), "kind": KINDS}
    return by_relation(by_fact, updates.facts, levels, measure, [*ends(*RATES), *numbers])


def side_effects(updates: FactUpdates, seed: int = 0) -> pd.DataFrame:
    """Perplexity of other facts' gold answers before and after updates, per relation of the updated fact and pooled.

    Columns: relation, on ("intra", "inter"), kind, n (updated facts), perplexity_before, perplexity, and ratio, their
    quotient less 1, with its interval.
    """
    by_fact = updates.others.groupby(["on", "kind", "fact"])[["nll_before", "nll"]].mean()
    levels = {"on": ("intra", "inter"), "kind": KINDS}
    return by_relation(by_fact, updates.facts, levels, lambda group: perplexities(group, seed), PERPLEXITIES)


def _edit(residual: Residual, fact: ClozeFact, neurons: Sequence[Neuron], new: int, asked: UpdateOptions) -> Values:
    clozes = [prompt.clozes[0] for prompt in fact.prompts]
    activations = mean_activations(residual, clozes, neurons, asked.batch_size)
    return updated_values(residual, neurons, fact.first_token, new, activations, asked)


def _top_answers(residual: Residual, fact: ClozeFact, edit: Values, n_answers: int) -> list[tuple[Any, ...]]:
    rows = []
    with edited_values(residual, edit):
        for number, prompt in enumerate(fact.all_prompts):
            cloze, on = prompt.clozes[0], "own" if number < len(fact.prompts) else "held_out"
            states = answer_states(residual, torch.tensor([cloze.tokens]), torch.tensor([cloze.position]))
            p_all = states.logits[0].softmax(-1)
            top = p_all.topk(min(n_answers, len(p_all)))
            for rank, (p, token) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), start=1):
                rows.append((on, number, prompt.text, bool(edit), rank, residual.bridge.tokenizer.decode([token]), p))
    return rows


def _targets(facts: Sequence[ClozeFact], seed: int) -> tuple[dict[int, int], dict[str, int]]:
    """Of every fact that can be updated the fact whose answer it is to have; and why others are left out."""
    single = [all(len(prompt.clozes) == 1 for prompt in fact.all_prompts) for fact in facts]
    targets: dict[int, int] = {}
    reasons: Counter[str] = Counter()
    for i, fact in enumerate(facts):
        if not single[i]:
            reasons["answer of several tokens"] += 1
            continue
        # one fact for every other answer, so that a frequent answer is drawn no more often than a rare one
        others = {
            other.first_token: j
            for j, other in enumerate(facts)
            if single[j] and other.relation == fact.relation and other.first_token != fact.first_token
        }
        if others:
            targets[i] = random.Random(seed * len(facts) + i).choice(sorted(others.values()))
        else:
            reasons["no other answer in its relation"] += 1
    return targets, dict(reasons)


def _seen_on(facts: Sequence[ClozeFact], fact: int, asked: UpdateOptions) -> list[_Seen]:
    """All prompts of the fact, and drawn ones of other facts of its relation and of other relations."""
    n_own = len(facts[fact].prompts)
    prompts = [_Seen("own" if i < n_own else "held_out", fact, i) for i in range(len(facts[fact].all_prompts))]
    generator = random.Random(asked.seed * len(facts) + fact)
    for on in ("intra", "inter"):
        others = [
            (i, number)
            for i, other in enumerate(facts)
            if i != fact and (other.relation == facts[fact].relation) == (on == "intra")
            for number in range(len(other.prompts))
        ]
        prompts += [_Seen(on, *other) for other in sorted(generator.sample(others, min(asked.n_other, len(others))))]
    return prompts


def _unedited(
    residual: Residual, facts: Sequence[ClozeFact], targets: Mapping[int, int], batch_size: int
) -> dict[tuple[int, int], tuple[Any, ...]]:
    """What the model itself answers to every prompt of every fact."""
    prompts = {(i, number): prompt for i, fact in enumerate(facts) for number, prompt in enumerate(fact.all_prompts)}
    clozes = [(i, cloze) for (i, _), prompt in prompts.items() for cloze in prompt.clozes]
    new = {i: facts[target].first_token for i, target in targets.items()}
    tokens = torch.tensor([[cloze.target, new.get(i, cloze.target)] for i, cloze in clozes])
    (answers,) = edited_answers(residual, [cloze for _, cloze in clozes], tokens, [{}], batch_size)
    by_prompt = _by_prompt(answers, [len(prompt.clozes) for prompt in prompts.values()])
    return dict(zip(prompts, by_prompt, strict=True))


def _by_prompt(answers: Answers, n_clozes: Sequence[int]) -> list[tuple[Any, ...]]:
    """``ANSWER`` of prompts that have so many clozes; tokens are the gold one and the fact's new one."""
    by_prompt = []
    for predicted, log_p, rank in answers.split(n_clozes):
        p_gold, p = log_p[0].double().exp().tolist()
        by_prompt.append((int(predicted[0]), p, int(rank[0, 1]), p_gold, -float(log_p[:, 0].double().mean())))
    return by_prompt


def _own_and_others(rows: Sequence[tuple[Any, ...]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``frame`` and ``others`` from what was answered to every prompt, before and after every edit."""
    columns = ["kind", "draw", "fact", "on", "prompt", "n_neurons", *(f"{name}_before" for name in ANSWER), *ANSWER]
    answers = pd.DataFrame(rows, columns=columns)
    answers.insert(0, "changed", answers["predicted_before"] != answers["predicted"])
    is_own = answers["on"].isin(["own", "held_out"])
    others = answers[~is_own].groupby(["kind", "draw", "fact", "on"], sort=False)
    means = {"n_prompts": ("nll", "size"), "nll_before": ("nll_before", "mean"), "nll": ("nll", "mean")}
    frame = answers.loc[is_own, list(FactUpdates.columns)].reset_index(drop=True)
    return frame, others.agg(**means).reset_index()
