"""A relation erased: the value vectors of its most frequent neurons set to zero (Dai et al. 2022, section 5.2)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from kc_lib.errors import MethodError
from kc_lib.models.model import Model
from kc_lib.neurons.cloze import ClozeFact
from kc_lib.neurons.controls import check_numbers, check_sets, with_random
from kc_lib.neurons.refine import Neuron, NeuronSets
from kc_lib.neurons.value_vectors import Answers, edited_answers, value_vectors
from kc_lib.results import load_table, save_table

COLUMNS = ("kind", "draw", "fact", "relation", "prompt", "held_out", "right_before", "right", "nll_before", "nll")


@dataclass(frozen=True)
class RelationErasure:
    """What zeroing a relation's neurons does to its facts and to those of every other relation.

    ``frame`` has one row per kind of neurons, draw, fact and prompt: right (every token of the answer has rank 1) and nll
    (the mean of -log p over its tokens), before and after; ``held_out`` prompts did not serve to find the neurons.
    ``neurons`` are those zeroed: kind, draw, layer, neuron. ``provenance`` names the relation.
    """

    frame: pd.DataFrame
    neurons: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        return self.frame

    def save(self, path: str | Path) -> Path:
        """Write ``frame`` as parquet; the rest goes into the file's metadata."""
        about = {"neurons": self.neurons.to_dict("list"), "provenance": dict(self.provenance)}
        return save_table(self.frame, path, about)

    @classmethod
    def load(cls, path: str | Path) -> RelationErasure:
        """Read what ``save`` wrote.

        Raises:
            MethodError: the file is not there, or holds no erased relation.
        """
        frame, about = load_table(path)
        if not {"neurons", "provenance"} <= about.keys() or not set(COLUMNS) <= set(frame):
            raise MethodError(f"{path}: holds no erased relation; give relation_erasure.parquet of a run")
        return cls(frame, pd.DataFrame(about["neurons"]), about["provenance"])


def erase_relation(
    model: Model,
    facts: Sequence[ClozeFact],
    sets: NeuronSets,
    relation: str,
    *,
    n_neurons: int = 20,
    n_other: int = 100,
    n_random: int = 3,
    batch_size: int = 32,
    seed: int = 0,
) -> RelationErasure:
    """Zero the value vectors of a relation's most frequent neurons, and see what the model then answers.

    Beside them, as many of the base method, and random ones of the same layers. A relation may have fewer neurons; without
    any, there are no rows, and ``neurons`` is empty. The model's weights are what they were afterwards.

    Args:
        sets: of these facts, from ``refine``.
        n_neurons: neurons zeroed, at most.
        n_other: prompts of every other relation, drawn by seed, at most; of the relation itself all are asked.
        n_random: draws of random neurons.

    Raises:
        MethodError: an unknown relation, sets of other facts or of another model, or a number out of range.
        ModelError: as ``Model.mlp_residual``; or weights that cannot be written in place.
    """
    check_numbers(n_other=n_other, n_random=n_random, batch_size=batch_size)
    residual = model.mlp_residual
    check_sets(facts, sets, residual)
    check_erasing(facts, relation, n_neurons)
    relations = list(dict.fromkeys(fact.relation for fact in facts))
    knowledge, base = (sets.of_relation(method, relation)[:n_neurons] for method in ("knowledge", "base"))
    chosen = with_random(knowledge, base, residual.parts(0).W_out.shape[0], n_random, seed)
    prompts = _asked(facts, relation, relations, n_other, seed)
    clozes = [(i, cloze) for i, (_, _, prompt, _) in enumerate(prompts) for cloze in prompt.clozes]
    tokens = torch.tensor([[cloze.target] for _, cloze in clozes])
    edits = [{}, *(_zeros(value_vectors(residual, neurons), neurons) for neurons in chosen.values())]
    found = (
        edited_answers(residual, [cloze for _, cloze in clozes], tokens, edits, batch_size) if chosen else []
    )  # nothing to erase, nothing to ask
    places: list[list[int]] = [[] for _ in prompts]
    for place, (i, _) in enumerate(clozes):
        places[i].append(place)
    rows = []
    for variant, after in zip(chosen, found[1:], strict=True):
        for (fact, number, _, held_out), own in zip(prompts, places, strict=True):
            (right_before, nll_before), (right, nll) = _told(found[0], own), _told(after, own)
            about = (*variant, fact, facts[fact].relation, number, held_out)
            rows.append((*about, right_before, right, nll_before, nll))
    zeroed = [(*variant, *neuron) for variant, neurons in chosen.items() for neuron in neurons]
    provenance = {
        "model": model.name,
        "relation": relation,
        "n_neurons": n_neurons,
        "n_other": n_other,
        "n_random": n_random,
        "seed": seed,
        "n_found": {"knowledge": len(knowledge), "base": len(base)},
    }
    return RelationErasure(
        pd.DataFrame(rows, columns=list(COLUMNS)),
        pd.DataFrame(zeroed, columns=["kind", "draw", "layer", "neuron"]),
        provenance,
    )


def check_erasing(facts: Sequence[ClozeFact], relation: str, n_neurons: int = 20) -> None:
    """Raise MethodError for a relation or a number that ``erase_relation`` cannot use."""
    check_numbers(neurons=n_neurons)
    relations = list(dict.fromkeys(fact.relation for fact in facts))
    if relation not in relations:
        raise MethodError(f"no fact of the relation {relation!r}: the facts are of {', '.join(relations)}")


def _asked(
    facts: Sequence[ClozeFact], relation: str, relations: Sequence[str], n_other: int, seed: int
) -> list[tuple[int, int, Any, bool]]:
    """Fact, number, prompt, and whether it is held out."""
    chosen = []
    for name in relations:
        own = [
            (i, number, prompt, number >= len(fact.prompts))
            for i, fact in enumerate(facts)
            if fact.relation == name
            for number, prompt in enumerate((*fact.prompts, *fact.held_out))
        ]
        if name != relation:
            drawn = random.Random(f"{seed}: {name}").sample(range(len(own)), min(n_other, len(own)))
            own = [own[i] for i in sorted(drawn)]
        chosen += own
    return chosen


def _zeros(values: torch.Tensor, neurons: Sequence[Neuron]) -> dict[Neuron, torch.Tensor]:
    return dict(zip(neurons, torch.zeros_like(values), strict=True))


def _told(answers: Answers, places: Sequence[int]) -> tuple[bool, float]:
    """Whether all tokens of an answer have rank 1, and their mean -log p."""
    rows = list(places)
    return bool((answers.rank[rows, 0] == 1).all()), -float(answers.log_p[rows, 0].double().mean())
