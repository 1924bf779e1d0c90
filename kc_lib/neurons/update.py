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
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from kc_lib.errors import MethodError
from kc_lib.models.model import Model
from kc_lib.neurons.cloze import Cloze, ClozeFact, ClozePrompt
from kc_lib.neurons.controls import Variant, check_numbers, check_sets, sets_of_facts
from kc_lib.neurons.integrate import answer_states
from kc_lib.neurons.refine import Neuron, NeuronSets
from kc_lib.neurons.value_vectors import Answers, Values, edited_answers, edited_values
from kc_lib.neurons.values import check_update, mean_activations, updated_values
from kc_lib.residual.encoder import Residual
from kc_lib.results import load_table, save_table

__all__ = ["FactUpdates", "update_answers", "update_facts"]

COLUMNS = (
    *("kind", "draw", "fact", "on", "prompt", "changed", "rank_before", "rank", "p_before", "p"),
    *("p_gold_before", "p_gold", "n_neurons"),
)
SIDE_COLUMNS = ("kind", "draw", "fact", "on", "n_prompts", "nll_before", "nll")


@dataclass(frozen=True)
class FactUpdates:
    """What updating every fact does to it and to others.

    ``frame`` has one row per fact, prompt, kind of neurons and draw: ``on`` is "own" (a prompt that found the neurons) or
    "held_out"; changed (the token of rank 1 is another one), and of the new answer's first token rank and p, before and
    after; of the old one p_gold. ``others`` has one row per fact, kind, draw, and "intra" or "inter" (other facts of the
    relation, and of other relations): nll, the mean over n_prompts drawn prompts of -log p per token of the gold answer,
    before and after. ``facts`` has the new answer of every updated fact; ``provenance`` counts those left out, by reason.
    """

    frame: pd.DataFrame
    others: pd.DataFrame
    facts: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """``frame`` with relation, subject, old and new answer of every fact."""
        return self.frame.merge(self.facts[["fact", "relation", "subject", "answer", "new_answer"]], on="fact")

    def save(self, path: str | Path) -> Path:
        """Write ``frame`` as parquet; the rest goes into the file's metadata."""
        about = {"others": self.others.to_dict("list"), "facts": self.facts.to_dict("list")}
        return save_table(self.frame, path, about | {"provenance": dict(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> FactUpdates:
        """Read what ``save`` wrote.

        Raises:
            MethodError: the file is not there, or holds no updates of facts.
        """
        frame, about = load_table(path)
        if not {"others", "facts", "provenance"} <= about.keys() or not set(COLUMNS) <= set(frame):
            raise MethodError(f"{path}: holds no updates of facts; give fact_updates.parquet of a run")
        return cls(frame, pd.DataFrame(about["others"]), pd.DataFrame(about["facts"]), about["provenance"])


def update_facts(
    model: Model,
    facts: Sequence[ClozeFact],
    sets: NeuronSets,
    *,
    l1: float = 1.0,
    l2: float = 8.0,
    scale: str = "code",
    embedding: str = "output",
    orient: bool = True,
    n_other: int = 20,
    n_random: int = 3,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> FactUpdates:
    """Give every fact, one at a time, another answer of its relation, and see what the model then answers.

    Facts whose answer is of several tokens are left out, and those whose relation has no other answer of one token; they
    stay among the others. The model's weights are what they were after every fact.

    Args:
        sets: of these facts, from ``refine``; neurons that more than a tenth of a relation's facts have are not changed.
        l1, l2, scale, embedding, orient: see ``updated_values``; the activations are means over the fact's own prompts.
        n_other: prompts of other facts per fact, drawn by seed, at most: as many of the relation and of other relations.
        n_random: draws of random neurons of the same layers.

    Raises:
        MethodError: sets of other facts or of another model, or a parameter out of range.
        ModelError: as ``Model.mlp_residual``; or weights that cannot be written in place.
    """
    check_numbers(n_other=n_other, n_random=n_random, batch_size=batch_size)
    check_update(l1, l2, scale, embedding)
    residual = model.mlp_residual
    check_sets(facts, sets, residual)
    chosen = sets_of_facts(sets, residual.parts(0).W_out.shape[0], n_random, seed, common=False)
    targets, left_out = _targets(facts, seed)
    before = _unedited(residual, facts, targets, batch_size)
    how: dict[str, Any] = {"l1": float(l1), "l2": float(l2), "scale": scale, "embedding": embedding, "orient": orient}
    frames, sides, rows = [], [], []
    for fact, target in tqdm(targets.items(), desc="updates", unit="fact", disable=not progress):
        about, new = facts[fact], _token(facts[target])
        rows.append(
            {"fact": fact, "relation": about.relation, "subject": about.subject, "answer": about.answer}
            | {"new_answer": facts[target].answer, "new_answer_of": facts[target].subject}
        )
        prompts = _prompts_for(facts, fact, n_other, seed)
        asked = [(i, cloze) for i, (_, of, number) in enumerate(prompts) for cloze in _all(facts[of])[number].clozes]
        tokens = torch.tensor([[cloze.target, new] for _, cloze in asked])
        edits = [_edit(residual, about, neurons, new, how, batch_size) for neurons in chosen[fact].values()]
        after = edited_answers(residual, [cloze for _, cloze in asked], tokens, edits, batch_size)
        unedited = [before[of, number] for _, of, number in prompts]
        for (variant, neurons), answers in zip(chosen[fact].items(), after, strict=True):
            frame, side = _compared(variant, fact, prompts, [i for i, _ in asked], unedited, answers)
            frames.append(frame.assign(n_neurons=len(neurons))[list(COLUMNS)])
            sides.append(side)
    reported = sets.facts[sets.facts["fact"].isin(targets)]
    empty = {
        method: sum((method, 0) not in chosen[int(fact)] for fact in reported["fact"]) for method in ("knowledge", "base")
    }
    provenance = {
        "model": model.name,
        **how,
        "n_other": n_other,
        "n_random": n_random,
        "seed": seed,
        "n_facts": len(facts),
        "n_updated": len(targets),
        "left_out": left_out,
        "empty": empty,
    }
    names = ["fact", "relation", "subject", "answer", "new_answer", "new_answer_of"]
    return FactUpdates(_joined(frames, COLUMNS), _joined(sides, SIDE_COLUMNS), pd.DataFrame(rows, columns=names), provenance)


def update_answers(
    model: Model,
    facts: Sequence[ClozeFact],
    sets: NeuronSets,
    fact: int,
    *,
    l1: float = 1.0,
    l2: float = 8.0,
    scale: str = "code",
    embedding: str = "output",
    orient: bool = True,
    n_answers: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """One of the updates of ``update_facts`` in detail: what the model answers to each of the fact's prompts.

    Columns: on ("own" or "held_out"), prompt, text, edited, rank (up to ``n_answers``), token, p. There are no edited rows
    for a fact that has no neurons of its own, and no rows for one that is left out (see ``update_facts``).

    Raises:
        MethodError, ModelError: as ``update_facts``; MethodError also for a fact that is not there.
    """
    check_numbers(answers=n_answers)
    check_update(l1, l2, scale, embedding)
    residual = model.mlp_residual
    check_sets(facts, sets, residual)
    check_fact(facts, fact)
    targets, _ = _targets(facts, seed)
    rows: list[dict[str, Any]] = []
    neurons = sets.without_common("knowledge", fact)
    if fact in targets:
        how = {"l1": float(l1), "l2": float(l2), "scale": scale, "embedding": embedding, "orient": orient}
        new = _token(facts[targets[fact]])
        rows += _top_answers(residual, facts[fact], {}, n_answers)
        if neurons:
            rows += _top_answers(residual, facts[fact], _edit(residual, facts[fact], neurons, new, how), n_answers)
    return pd.DataFrame(rows, columns=["on", "prompt", "text", "edited", "rank", "token", "p"])


def check_fact(facts: Sequence[ClozeFact], fact: int) -> None:
    """Raise MethodError for a number that is no fact's."""
    if not 0 <= fact < len(facts):
        raise MethodError(f"there is no fact {fact}: the task has facts 0 to {len(facts) - 1}")


def _edit(
    residual: Residual,
    fact: ClozeFact,
    neurons: Sequence[Neuron],
    new: int,
    how: Mapping[str, Any],
    batch_size: int = 32,
) -> Values:
    clozes = [prompt.clozes[0] for prompt in fact.prompts]
    activations = mean_activations(residual, clozes, neurons, batch_size)
    return updated_values(residual, neurons, _token(fact), new, activations=activations, **how)


def _top_answers(residual: Residual, fact: ClozeFact, edit: Values, n_answers: int) -> list[dict[str, Any]]:
    rows = []
    with edited_values(residual, edit):
        for number, prompt in enumerate(_all(fact)):
            cloze = prompt.clozes[0]
            states = answer_states(residual, torch.tensor([cloze.tokens]), torch.tensor([cloze.position]))
            p_all = states.logits[0].softmax(-1)
            top = p_all.topk(min(n_answers, len(p_all)))
            about = {"on": "own" if number < len(fact.prompts) else "held_out", "prompt": number, "text": prompt.text}
            for rank, (p, token) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), start=1):
                word = residual.bridge.tokenizer.decode([token])
                rows.append(about | {"edited": bool(edit), "rank": rank, "token": word, "p": p})
    return rows


def _targets(facts: Sequence[ClozeFact], seed: int) -> tuple[dict[int, int], dict[str, int]]:
    """Of every fact that can be updated the fact whose answer it is to have; and why others are left out."""
    single = [all(len(prompt.clozes) == 1 for prompt in _all(fact)) for fact in facts]
    targets: dict[int, int] = {}
    reasons: Counter[str] = Counter()
    for i, fact in enumerate(facts):
        if not single[i]:
            reasons["answer of several tokens"] += 1
            continue
        # one fact for every other answer, so that a frequent answer is drawn no more often than a rare one
        others = {
            _token(other): j
            for j, other in enumerate(facts)
            if single[j] and other.relation == fact.relation and _token(other) != _token(fact)
        }
        if others:
            targets[i] = random.Random(seed * len(facts) + i).choice(sorted(others.values()))
        else:
            reasons["no other answer in its relation"] += 1
    return targets, dict(reasons)


def _prompts_for(facts: Sequence[ClozeFact], fact: int, n_other: int, seed: int) -> list[tuple[str, int, int]]:
    """(own, held_out, intra or inter; whose; number among all its prompts) of the prompts an update is seen on."""
    about = facts[fact]
    n_own = len(about.prompts)
    prompts = [("own" if i < n_own else "held_out", fact, i) for i in range(len(_all(about)))]
    generator = random.Random(seed * len(facts) + fact)
    for on in ("intra", "inter"):
        others = [
            (on, i, number)
            for i, other in enumerate(facts)
            if i != fact and (other.relation == about.relation) == (on == "intra")
            for number in range(len(other.prompts))
        ]
        prompts += sorted(generator.sample(others, min(n_other, len(others))))
    return prompts


@dataclass(frozen=True)
class _Unedited:
    """Of one prompt: the token of rank 1, p and rank of the fact's new answer, p of the old one, and the mean -log p."""

    predicted: int
    p: float
    rank: int
    p_gold: float
    nll: float


def _unedited(
    residual: Residual, facts: Sequence[ClozeFact], targets: Mapping[int, int], batch_size: int
) -> dict[tuple[int, int], _Unedited]:
    """What the model itself answers to every prompt of every fact."""
    keys = [(i, number) for i, fact in enumerate(facts) for number in range(len(_all(fact)))]
    asked = [(key, cloze) for key in keys for cloze in _all(facts[key[0]])[key[1]].clozes]
    new = {i: _token(facts[target]) for i, target in targets.items()}
    tokens = torch.tensor([[cloze.target, new.get(i, cloze.target)] for (i, _), cloze in asked])
    (answers,) = edited_answers(residual, [cloze for _, cloze in asked], tokens, [{}], batch_size)
    places: dict[tuple[int, int], list[int]] = {key: [] for key in keys}
    for place, (key, _) in enumerate(asked):
        places[key].append(place)
    return {key: _summary(answers, own) for key, own in places.items()}


def _summary(answers: Answers, places: Sequence[int]) -> _Unedited:
    """One prompt's answers, from the places of its clozes; tokens are the gold one and the fact's new one."""
    first = places[0]
    p_gold, p = answers.log_p[first].double().exp().tolist()
    nll = -float(answers.log_p[list(places), 0].double().mean())
    return _Unedited(int(answers.predicted[first]), p, int(answers.rank[first, 1]), p_gold, nll)


def _compared(
    variant: Variant,
    fact: int,
    prompts: Sequence[tuple[str, int, int]],
    prompt_of: Sequence[int],
    unedited: Sequence[_Unedited],
    answers: Answers,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of ``frame`` and of ``others`` for one fact and edit."""
    places: list[list[int]] = [[] for _ in prompts]
    for place, i in enumerate(prompt_of):
        places[i].append(place)
    edited = [_summary(answers, own) for own in places]
    rows = [
        {
            "on": on,
            "prompt": number,
            "changed": before.predicted != after.predicted,
            "rank_before": before.rank,
            "rank": after.rank,
            "p_before": before.p,
            "p": after.p,
            "p_gold_before": before.p_gold,
            "p_gold": after.p_gold,
        }
        for (on, _, number), before, after in zip(prompts, unedited, edited, strict=True)
        if on in ("own", "held_out")
    ]
    sides = []
    for on in ("intra", "inter"):
        pairs = [
            (before.nll, after.nll) for (o, _, _), before, after in zip(prompts, unedited, edited, strict=True) if o == on
        ]
        if pairs:
            before_and_after = pd.DataFrame(pairs).mean()
            numbers = {"n_prompts": len(pairs), "nll_before": before_and_after[0], "nll": before_and_after[1]}
            sides.append({"on": on} | numbers)
    of_sides = pd.DataFrame(sides, columns=list(SIDE_COLUMNS))
    kind, draw = variant
    return pd.DataFrame(rows).assign(kind=kind, draw=draw, fact=fact), of_sides.assign(kind=kind, draw=draw, fact=fact)


def _all(fact: ClozeFact) -> tuple[ClozePrompt, ...]:
    return (*fact.prompts, *fact.held_out)


def _token(fact: ClozeFact) -> int:
    """The first token of the answer."""
    first: Cloze = fact.prompts[0].clozes[0]
    return first.target


def _joined(frames: Sequence[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """One table of those that have rows; without any, an empty one."""
    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=list(columns))
