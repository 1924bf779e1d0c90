"""A fact's neurons suppressed and amplified, on its own prompts and on other relations' (Dai et al. 2022, section 4.3).

At the answering position all neurons of the set, in all layers at once, are multiplied by 0 or by 2, and the probability of
the gold answer is read again. Beside them the same is done to the neurons of the base method, and to random neurons of the
same layers. Of an answer of several tokens p is the joint probability, the neurons changed wherever one is predicted.
The published code suppresses where it says that it enhances on other relations' prompts, and draws those without a seed.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.errors import MethodError
from kc_lib.models.model import Model
from kc_lib.neurons.cloze import Cloze, ClozeFact, batches_by_length
from kc_lib.neurons.effects import KINDS, OfFacts, by_relation, ends, figure, means_with_draws, relative_change
from kc_lib.neurons.integrate import AnswerStates, answer_states, changed_logits
from kc_lib.neurons.options import ChangeOptions
from kc_lib.neurons.sets import Neuron, NeuronSets, Variant, check_sets, n_empty, neurons_per_layer, sets_of_facts, variants
from kc_lib.residual.encoder import Residual
from kc_lib.stats import with_interval

FACTORS = {0.0: "suppressed", 2.0: "amplified"}


@dataclass(frozen=True)
class NeuronChanges(OfFacts):
    """The answer's probability before and after a fact's neurons are changed.

    ``frame`` has one row per fact, prompt, factor, kind ("knowledge", "base", "random") and draw (0 but for random): ``on``
    says whether the prompt is the fact's "own" or that of an "other" relation, ``of_fact`` whose it is and ``prompt`` its
    number there; p and p_changed are of that prompt's gold answer. A fact without neurons has no rows; ``provenance``
    counts such facts, by method.
    """

    columns = ("kind", "draw", "factor", "fact", "on", "of_fact", "prompt", "p", "p_changed", "n_neurons")

    frame: pd.DataFrame
    facts: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def summary(self, seed: int = 0) -> pd.DataFrame:
        """What becomes of the answer, per relation and pooled: ``change_ratios``."""
        return change_ratios(self, seed)

    def headline(self, seed: int = 0) -> dict[str, str]:
        """The change of the answer's probability on own prompts."""
        pooled = change_ratios(self, seed).query("relation == 'all' and on == 'own'").to_dict("records")
        named = [(FACTORS.get(row["factor"], f"times {row['factor']:g}"), row) for row in pooled]
        return {f"{name}, {row['kind']}": figure(row, "ratio", "+.1%") for name, row in named}


def change_neurons(
    model: Model, facts: Sequence[ClozeFact], sets: NeuronSets, *, progress: bool = False, **options: Any
) -> NeuronChanges:
    """Multiply the neurons of every fact, and see what becomes of the answers of its own and of other relations' prompts.

    Args:
        sets: of these facts, from ``refine_neurons``.
        options: fields of ``ChangeOptions``. Where there is one relation there are no other prompts.

    Raises:
        MethodError: sets of other facts or of another model, a number out of range, or a layer without enough other
            neurons to draw from.
        ModelError: as ``Model.mlp_residual``.
    """
    asked = ChangeOptions.of(options)
    if not asked.factors:
        raise MethodError("no factors to multiply neurons by: give 0 to suppress, 2 to amplify")
    residual = model.mlp_residual
    check_sets(facts, sets, residual)
    of_facts = sets_of_facts(sets, neurons_per_layer(residual), asked.n_random, asked.seed)
    prompts = [
        (fact, *prompt)
        for fact, neurons in enumerate(of_facts)
        if neurons
        for prompt in _prompts_for(facts, fact, asked.n_other, asked.seed)
    ]
    clozes_of = [facts[of_fact].prompts[number].clozes for _, _, of_fact, number in prompts]
    rows = [(i, cloze) for i, clozes in enumerate(clozes_of) for cloze in clozes]
    # by prompt, of the model itself and of every variant and factor: the sum over the answer's tokens
    log_p_before = np.zeros(len(prompts))
    log_p: dict[tuple[Variant, float], Float[np.ndarray, " prompt"]] = defaultdict(lambda: np.zeros(len(prompts)))
    with tqdm(total=len(rows), desc="interventions", unit="prompt", disable=not progress) as bar:
        for members, _, _ in batches_by_length([cloze for _, cloze in rows], asked.batch_size):
            batch = [rows[i] for i in members]
            states = _states(residual, batch)
            _add(log_p_before, batch, states.logits)
            for variant in variants(asked.n_random):
                neurons = [of_facts[prompts[i][0]].get(variant, ()) for i, _ in batch]
                if any(neurons):
                    for factor in asked.factors:
                        _add(log_p[variant, factor], batch, _multiplied(residual, states, neurons, factor))
            bar.update(len(batch))
    table = [
        (*variant, factor, fact, on, of_fact, number, log_p_before[i], log_p[variant, factor][i], len(neurons))
        for i, (fact, on, of_fact, number) in enumerate(prompts)
        for variant, neurons in of_facts[fact].items()
        for factor in asked.factors
    ]
    frame = pd.DataFrame(table, columns=list(NeuronChanges.columns))
    frame[["p", "p_changed"]] = np.exp(frame[["p", "p_changed"]].astype(float))
    provenance = {"model": model.name, **asked.determining(), "n_facts": len(facts), "empty": n_empty(of_facts)}
    return NeuronChanges(frame, sets.facts.reset_index(drop=True), provenance)


def change_ratios(changes: NeuronChanges, seed: int = 0) -> pd.DataFrame:
    """(mean p_changed - mean p) / mean p of the gold answer, per relation and pooled, factor, prompts and kind.

    Columns: relation ("all" pooled), factor, on, kind, n (facts), p, p_changed, ratio, and ``more``, the ratio less that of
    random neurons on the same facts; ratio and more with their intervals. Facts without neurons are in none.
    """
    p = ["p", "p_changed"]
    levels = {"factor": sorted(changes.frame["factor"].unique()), "on": ("other", "own"), "kind": KINDS}
    prompts = changes.frame.groupby(["factor", "on", "kind", "fact", "of_fact", "prompt"])[p].mean()
    by_fact = prompts.groupby(["factor", "on", "kind", "fact"]).mean()
    is_random = by_fact.index.get_level_values("kind") == "random"
    by_random = by_fact[is_random].droplevel("kind").add_suffix("_random")
    by_fact = by_fact.join(by_random, on=["factor", "on", "fact"])
    by_fact.loc[is_random, list(by_random.columns)] = np.nan  # compared with themselves they say nothing

    def measure(group: pd.DataFrame) -> dict[str, float]:
        means = means_with_draws(group[p].to_numpy(), seed)
        both = means_with_draws(group.dropna().to_numpy(), seed)
        ratio = relative_change(means[:, 0], means[:, 1])
        more = relative_change(both[:, 0], both[:, 1]) - relative_change(both[:, 2], both[:, 3])
        intervals = with_interval("ratio", ratio[0], ratio[1:]) | with_interval("more", more[0], more[1:])
        return {"p": means[0, 0], "p_changed": means[0, 1]} | intervals

    return by_relation(by_fact, changes.facts, levels, measure, [*p, *ends("ratio", "more")])


def _prompts_for(facts: Sequence[ClozeFact], fact: int, n_other: int, seed: int) -> list[tuple[str, int, int]]:
    """Own prompts, and drawn ones of other relations: own or other, whose, its number."""
    own = [("own", fact, prompt) for prompt in range(len(facts[fact].prompts))]
    others = [
        ("other", i, prompt)
        for i, other in enumerate(facts)
        if other.relation != facts[fact].relation
        for prompt in range(len(other.prompts))
    ]
    generator = random.Random(seed * len(facts) + fact)
    return own + sorted(generator.sample(others, min(n_other, len(others))))


def _states(residual: Residual, batch: Sequence[tuple[int, Cloze]]) -> AnswerStates:
    """The clean run of every row; equal prompts are run once."""
    place: dict[tuple[tuple[int, ...], int], int] = {}
    for _, cloze in batch:
        place.setdefault((cloze.tokens, cloze.position), len(place))
    tokens, positions = (torch.tensor(part) for part in zip(*place, strict=True))
    states = answer_states(residual, tokens, positions)
    return states.rows(torch.tensor([place[cloze.tokens, cloze.position] for _, cloze in batch]))


def _multiplied(residual: Residual, states: AnswerStates, neurons: Sequence[Sequence[Neuron]], factor: float) -> Tensor:
    """Logits when in every row its own neurons are multiplied."""
    of_layer: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for row, of_row in enumerate(neurons):
        for layer, neuron in of_row:
            of_layer[layer][0].append(row)
            of_layer[layer][1].append(neuron)

    def change(layer: int, values: Tensor) -> Tensor:
        if layer not in of_layer:
            return values
        values = values.clone()
        values[of_layer[layer]] *= factor
        return values

    return changed_logits(residual, states, change, min(of_layer))


def _add(log_p: Float[np.ndarray, " prompt"], batch: Sequence[tuple[int, Cloze]], logits: Tensor) -> None:
    """Add each row's log probability of its target, from logits ``[row, vocab]``, to that of its prompt."""
    of_targets = logits.log_softmax(-1)[torch.arange(len(batch)), torch.tensor([cloze.target for _, cloze in batch])]
    np.add.at(log_p, [i for i, _ in batch], of_targets.cpu().double().numpy())
