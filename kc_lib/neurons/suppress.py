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
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.errors import MethodError
from kc_lib.models.model import Model
from kc_lib.neurons.cloze import ClozeFact
from kc_lib.neurons.cloze_batches import batches_by_length
from kc_lib.neurons.controls import Variant, check_numbers, check_sets, n_empty, sets_of_facts, variants
from kc_lib.neurons.integrate import AnswerStates, answer_states, changed_logits
from kc_lib.neurons.of_facts import OfFacts
from kc_lib.neurons.refine import Neuron, NeuronSets
from kc_lib.residual.encoder import Residual

COLUMNS = ("kind", "draw", "factor", "fact", "on", "of_fact", "prompt", "p", "p_changed", "n_neurons")


@dataclass(frozen=True)
class NeuronChanges(OfFacts):
    """The answer's probability before and after a fact's neurons are changed.

    ``frame`` has one row per fact, prompt, factor, kind ("knowledge", "base", "random") and draw (0 but for random): ``on``
    says whether the prompt is the fact's "own" or that of an "other" relation, ``of_fact`` whose it is and ``prompt`` its
    number there; p and p_changed are of that prompt's gold answer. A fact without neurons has no rows; ``provenance``
    counts such facts, by method.
    """

    columns = COLUMNS
    holds = "changes of neurons; give neuron_changes.parquet"


@dataclass(frozen=True)
class _Row:
    """One token of an answer, to be predicted with the neurons of a fact changed."""

    fact: int
    asked: int  # index of the fact and prompt
    tokens: tuple[int, ...]
    position: int
    target: int


def change_neurons(
    model: Model,
    facts: Sequence[ClozeFact],
    sets: NeuronSets,
    *,
    factors: Sequence[float] = (0.0, 2.0),
    n_other: int = 20,
    n_random: int = 3,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> NeuronChanges:
    """Multiply the neurons of every fact, and see what becomes of the answers of its own and of other relations' prompts.

    Args:
        sets: of these facts, from ``refine``.
        factors: 0 suppresses, 2 amplifies.
        n_other: prompts of other relations' facts per fact, drawn by seed, at most; none where there is one relation.
        n_random: draws of random neurons.
        batch_size: prompts run at once; changes no result.

    Raises:
        MethodError: sets of other facts or of another model, a number out of range, or a layer without enough other
            neurons to draw from.
        ModelError: as ``Model.mlp_residual``.
    """
    check_numbers(n_other=n_other, n_random=n_random, batch_size=batch_size)
    if not factors:
        raise MethodError("no factors to multiply neurons by: give 0 to suppress, 2 to amplify")
    residual = model.mlp_residual
    check_sets(facts, sets, residual)
    chosen = sets_of_facts(sets, residual.parts(0).W_out.shape[0], n_random, seed)
    asked = [
        (fact, *prompt) for fact, own in enumerate(chosen) if own for prompt in _prompts_for(facts, fact, n_other, seed)
    ]
    rows = [
        _Row(fact, i, cloze.tokens, cloze.position, cloze.target)
        for i, (fact, _, of_fact, prompt) in enumerate(asked)
        for cloze in facts[of_fact].prompts[prompt].clozes
    ]
    log_p: dict[tuple[int, Variant | None, float], float] = defaultdict(float)
    with tqdm(total=len(rows), desc="interventions", unit="prompt", disable=not progress) as bar:
        for members, _, _ in batches_by_length(rows, batch_size):
            batch = [rows[i] for i in members]
            states = _states(residual, batch)
            _add(log_p, batch, states.logits, None, 1.0)
            for variant in variants(n_random):
                neurons = [chosen[row.fact].get(variant, ()) for row in batch]
                if not any(neurons):
                    continue
                for factor in factors:
                    _add(log_p, batch, _multiplied(residual, states, neurons, factor), variant, factor)
            bar.update(len(batch))
    found = [
        (*variant, factor, fact, on, of_fact, prompt, *_probabilities(log_p, i, variant, factor), len(neurons))
        for i, (fact, on, of_fact, prompt) in enumerate(asked)
        for variant, neurons in chosen[fact].items()
        for factor in factors
    ]
    provenance = {
        "model": model.name,
        "factors": list(factors),
        "n_other": n_other,
        "n_random": n_random,
        "seed": seed,
        "n_facts": len(facts),
        "empty": n_empty(chosen),
    }
    return NeuronChanges(pd.DataFrame(found, columns=list(COLUMNS)), sets.facts.reset_index(drop=True), provenance)


def _prompts_for(facts: Sequence[ClozeFact], fact: int, n_other: int, seed: int) -> list[tuple[str, int, int]]:
    """Own prompts, and drawn ones of other relations: own or other, whose, its number."""
    own = [("own", fact, prompt) for prompt in range(len(facts[fact].prompts))]
    others = [
        ("other", other, prompt)
        for other, about in enumerate(facts)
        if about.relation != facts[fact].relation
        for prompt in range(len(about.prompts))
    ]
    generator = random.Random(seed * len(facts) + fact)
    return own + sorted(generator.sample(others, min(n_other, len(others))))


def _states(residual: Residual, batch: Sequence[_Row]) -> AnswerStates:
    """The clean run of every row; equal prompts are run once."""
    distinct = {(row.tokens, row.position): i for i, row in enumerate(batch)}
    place = {prompt: i for i, prompt in enumerate(distinct)}
    tokens = torch.tensor([prompt for prompt, _ in distinct])
    states = answer_states(residual, tokens, torch.tensor([position for _, position in distinct]))
    return states.rows(torch.tensor([place[row.tokens, row.position] for row in batch]))


def _multiplied(residual: Residual, states: AnswerStates, neurons: Sequence[Sequence[Neuron]], factor: float) -> Tensor:
    """Logits when in every row its own neurons are multiplied."""
    of_layer: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for row, own in enumerate(neurons):
        for layer, neuron in own:
            of_layer[layer][0].append(row)
            of_layer[layer][1].append(neuron)

    def change(layer: int, values: Tensor) -> Tensor:
        if layer not in of_layer:
            return values
        values = values.clone()
        values[of_layer[layer]] *= factor
        return values

    return changed_logits(residual, states, change, min(of_layer))


def _add(
    log_p: dict[tuple[int, Variant | None, float], float],
    batch: Sequence[_Row],
    logits: Tensor,
    variant: Variant | None,
    factor: float,
) -> None:
    found = logits.log_softmax(-1)[torch.arange(len(batch)), torch.tensor([row.target for row in batch])].tolist()
    for row, value in zip(batch, found, strict=True):
        log_p[row.asked, variant, factor] += value


def _probabilities(
    log_p: Mapping[tuple[int, Variant | None, float], float], asked: int, variant: Variant, factor: float
) -> tuple[float, float]:
    before, after = torch.tensor([log_p[asked, None, 1.0], log_p[asked, variant, factor]], dtype=torch.double).exp().tolist()
    return before, after
