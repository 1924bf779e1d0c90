"""What a fact's neurons are compared with: those of the base method, and random ones of the same layers."""

from __future__ import annotations

from collections.abc import Sequence

from kc_lib.errors import MethodError, check_counts
from kc_lib.neurons.cloze import ClozeFact
from kc_lib.neurons.refine import Neuron, NeuronSets, random_neurons
from kc_lib.residual.encoder import Residual

KINDS = ("knowledge", "base", "random")
Variant = tuple[str, int]  # kind, draw; only random neurons have several draws


def variants(n_random: int) -> list[Variant]:
    """Every kind of neurons, random ones as often as they are drawn."""
    return [("knowledge", 0), ("base", 0), *(("random", draw) for draw in range(n_random))]


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


def n_empty(found: Sequence[dict[Variant, tuple[Neuron, ...]]]) -> dict[str, int]:
    """How many facts have no neurons, by method."""
    return {method: sum((method, 0) not in own for own in found) for method in ("knowledge", "base")}


def check_sets(facts: Sequence[ClozeFact], sets: NeuronSets, residual: Residual) -> None:
    """Raise MethodError for sets of other facts, or of another model."""
    given = [(fact.relation, fact.subject, fact.answer) for fact in facts]
    known = list(zip(*(sets.facts[name] for name in ("relation", "subject", "answer")), strict=True))
    if given != known or list(sets.facts["fact"]) != list(range(len(facts))):
        raise MethodError(
            f"the sets of neurons are of {len(known)} facts, and not of these {len(facts)}: give the facts that were "
            "attributed, in their order"
        )
    shape = {"n_layers": residual.n_layers, "d_mlp": residual.parts(0).W_out.shape[0]}
    for name, number in shape.items():
        if sets.provenance.get(name, number) != number:
            raise MethodError(
                f"the sets of neurons are of a model with {name} {sets.provenance[name]}, this one has {number}: give the "
                "model that was attributed"
            )


def check_numbers(**numbers: int) -> None:
    """Raise MethodError for what is no count: ``n_...`` may be 0, all others are 1 or more."""
    for name, number in numbers.items():
        check_counts(0 if name.startswith("n_") else 1, **{name: number})
