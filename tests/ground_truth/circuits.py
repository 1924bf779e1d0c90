"""The hand-wired models: which heads and neurons do what, the prompts that show it, and the edges that follow.

What "the true edges" are. A *minimal circuit* restores the metric when it runs alone (every other edge patched from the
corrupted prompts), and no edge can be taken from it without losing that. ``minimal`` lists all of them; ``circuit`` is
their union, the edges that are in any. In all models but one there is exactly one. ``others`` names edges that have a part
in the model but in no minimal circuit:

- ``unseen``: edges of the mechanism that carry the same in clean and corrupted prompts (which position came before,
  where the subject stands). No patching of these prompts can find them; zero ablation can.
- ``cancelling``: edges of two paths that undo each other. Each edge alone changes the metric, all together they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ground_truth.prompts import CAPITALS, COUNTRIES, FACT_WORDS, LETTERS, fact_pairs, induction_pairs, unknown_fact_pairs
from ground_truth.wires import (
    Reading,
    Wires,
    boot,
    joined,
    noisy_gpt2,
    read_any,
    read_space,
    set_head,
    set_neurons,
    with_rest,
)
from kc_lib.errors import ModelError
from kc_lib.graph import Circuit, Graph
from kc_lib.models.model import Model
from kc_lib.tasks.batches import TokenPair

SOFT, HARD = 5.0, 30.0  # attention score of a match, BOS having half of it: attention 0.9, or 1 - 3e-7
MOVER = 12.0
DISTRACTION = 2.5  # how much of the answer a cancelling path writes; not 1, which would make it an answer of its own


@dataclass(frozen=True)
class HandWired:
    """A model whose circuit is known by construction; see the head of this file for what its edge sets mean."""

    name: str
    model: Model
    pairs: tuple[TokenPair, ...]
    circuit: Circuit
    note: str
    minimal: tuple[Circuit, ...]
    others: Mapping[str, Circuit] = field(default_factory=dict)


def hand_wired(name: str) -> HandWired:
    """A hand-wired model by name, built anew.

    Raises:
        ModelError: the name is none of ``HAND_WIRED``.
    """
    if name not in HAND_WIRED:
        raise ModelError(f"unknown hand-wired model {name!r}: use one of {', '.join(HAND_WIRED)}")
    return HAND_WIRED[name]()


def induction() -> HandWired:
    """Copying by two heads (Olsson et al. 2022, arXiv:2209.11895): ``A B c D E A`` is continued with ``B``.

    a0.h2 writes at every token which token came before it; a1.h1 looks for the place whose predecessor is the present
    token (composition through its keys) and copies the token there to the answer. Three kinds of corrupted prompts, all
    answered with E: followers swapped (seen by the values), predecessors swapped (keys), the last token D (queries). With
    swapped followers alone the edges of a0.h2 carry nothing and belong to no circuit.
    """
    return _induction("induction", SOFT, "all edges are seen by first-order scores, those of the pattern underrated")


def saturated() -> HandWired:
    """``induction`` with a match score of 30: the softmax is flat wherever clean or corrupted prompts put it.

    Gradients through the pattern vanish at both ends of the path between them, so the queries, the keys and the
    previous-token head score about 0 under EAP and clean-corrupted. Single-edge patching sees them; finite differences of
    the pattern see queries and keys, not what lies below; integrated gradients do if a step falls into the narrow middle.
    """
    return _induction("saturated", HARD, "queries, keys and the previous-token head have vanishing gradients")


def fact() -> HandWired:
    """A fact look-up: m1 holds capital cities, a2.h0 moves them (Geva et al. 2023, arXiv:2304.14767; Meng et al. 2022).

    m1 turns a country, at its own position, into its capital; a2.h0 attends from "is" to the country and copies the
    capital to the answer. Corrupted prompts name another country.
    """
    wires = _fact_wires(layer=1)
    _set_mover(wires, 2, 0, "answer")
    return _finish(
        "fact",
        wires,
        fact_pairs(wires.words),
        "a chain through one MLP; every method should find it",
        minimal=[["input->m1", "m1->a2.h0<v>", "a2.h0->logits"]],
        unseen=["input->a2.h0<q>", "input->a2.h0<k>"],
    )


def cancelling() -> HandWired:
    """``fact``, and beside it two heads that write 2.5 times the answer and minus 2.5 times the answer.

    The real path is m0, a2.h0. a1.h1 and a1.h3 attend and read alike and write opposite things, so together they write
    nothing. Every edge of theirs changes the metric by more than the real ones when it alone is patched, which is what
    all single-edge scores measure or estimate, and rightly so; but no minimal circuit needs them.
    """
    wires = _fact_wires(layer=0)
    _set_mover(wires, 2, 0, "answer")
    _set_mover(wires, 1, 1, "answer", DISTRACTION)
    _set_mover(wires, 1, 3, "answer", -DISTRACTION)
    heads = ("a2.h0", "a1.h1", "a1.h3")
    return _finish(
        "cancelling",
        wires,
        fact_pairs(wires.words),
        "two heads cancel: their edges outscore the true ones for every method that looks at one edge at a time",
        minimal=[["input->m0", "m0->a2.h0<v>", "a2.h0->logits"]],
        unseen=[f"input->{head}<{kind}>" for head in heads for kind in "qk"],
        cancelling=[edge for head in heads[1:] for edge in (f"m0->{head}<v>", f"{head}->logits")],
    )


def redundant() -> HandWired:
    """An OR: two heads bring the fact to an MLP that answers as soon as one has.

    m0 holds the facts, a1.h2 and a2.h1 both move them to the last position, m3 writes the answer for one helping or two
    alike. Corrupted prompts name a country no fact is known of, so that a corrupted path brings nothing, not another answer.
    Each head alone is a minimal circuit; ``circuit`` is the union of the two. Removing one edge of a path does nothing to
    the full model, so single-edge patching scores it 0; m3 is flat at two helpings, so gradients at the clean input vanish
    too, even for the one edge into m0. A search that removes edges in turn finds one path.
    """
    wires = _fact_wires(layer=0, spaces=("fact", "moved"))
    _set_mover(wires, 1, 2, "moved")
    _set_mover(wires, 2, 1, "moved")
    _set_or(wires, 3, "moved", "answer")
    ends = ["input->m0", "m3->logits"]
    paths = [[*ends, f"m0->{head}<v>", f"{head}->m3"] for head in ("a1.h2", "a2.h1")]
    return _finish(
        "redundant",
        wires,
        unknown_fact_pairs(wires.words),
        "either of two paths suffices: patching one edge of a path does nothing, and gradients vanish at the clean input",
        minimal=paths,
        unseen=[f"input->{head}<{kind}>" for head in ("a1.h2", "a2.h1") for kind in "qk"],
    )


HAND_WIRED: dict[str, Callable[[], HandWired]] = {
    build.__name__: build for build in (induction, saturated, fact, cancelling, redundant)
}


def _induction(name: str, sharpness: float, note: str) -> HandWired:
    wires = noisy_gpt2(LETTERS, ("previous",), seed=0)
    here, one_on = read_space(wires, "position"), read_space(wires, "position", shift=1)
    set_head(wires, 0, 2, here, one_on, value="token", output="previous", gain=1.0, sharpness=HARD)
    now, before = with_rest(wires, read_space(wires, "token"), read_space(wires, "previous"), score=0.5)
    set_head(wires, 1, 1, now, before, value="token", output="answer", gain=1.0, sharpness=sharpness)
    keys = ["input->a0.h2<v>", "a0.h2->a1.h1<k>"]
    return _finish(
        name,
        wires,
        induction_pairs(wires.words),
        note,
        minimal=[[*keys, "input->a1.h1<q>", "input->a1.h1<v>", "a1.h1->logits"]],
        unseen=["input->a0.h2<q>", "input->a0.h2<k>"],
    )


def _fact_wires(layer: int, spaces: Sequence[str] = ("fact",)) -> Wires:
    """A model whose MLP of a layer writes a country's capital into "fact": one neuron per country, on or off."""
    wires = noisy_gpt2(FACT_WORDS, spaces, seed=1)
    countries = wires.spaces["token"][list(wires.token_ids(list(CAPITALS)))]
    capitals = wires.spaces["fact"][list(wires.token_ids(list(CAPITALS.values())))]
    on = Reading(8.0 * countries.T, torch.full((len(CAPITALS),), -4.0))  # GELU(4) = 4.000, GELU(-4) = -0.000
    set_neurons(wires, layer, on, capitals / 4.0)
    return wires


def _set_mover(wires: Wires, layer: int, head: int, output: str, gain: float = 1.0) -> None:
    """A head that attends from "is" to the country and copies the fact there."""
    asked, subject = read_any(wires, ["is"]), read_any(wires, COUNTRIES)
    set_head(wires, layer, head, asked, subject, value="fact", output=output, gain=gain, sharpness=MOVER)


def _set_or(wires: Wires, layer: int, source: str, output: str) -> None:
    """An MLP that writes 1 for 1 or 2 in a direction and 0 for 0: the difference of two GELUs, flat on either side."""
    capitals = list(wires.token_ids(list(CAPITALS.values())))
    read, write = 16.0 * wires.spaces[source][capitals].T, wires.spaces[output][capitals] / 8.0
    starts, ends = (Reading(read, torch.full((len(capitals),), -bias)) for bias in (4.0, 12.0))
    set_neurons(wires, layer, joined(starts, ends), torch.cat([write, -write]))


def _finish(
    name: str,
    wires: Wires,
    pairs: Sequence[TokenPair],
    note: str,
    minimal: Sequence[Sequence[str]],
    **others: Sequence[str],
) -> HandWired:
    model = boot(wires, f"handwired/{name}")
    graph = model.residual.graph()

    def circuit_of(edges: Sequence[str]) -> Circuit:
        return edge_set(graph, edges, {"model": f"handwired/{name}"})

    circuits = tuple(circuit_of(edges) for edges in minimal)
    union = circuit_of([edge for edges in minimal for edge in edges])
    return HandWired(name, model, tuple(pairs), union, note, circuits, {k: circuit_of(v) for k, v in others.items()})


def edge_set(graph: Graph, edges: Sequence[str], provenance: Mapping[str, str] | None = None) -> Circuit:
    """The circuit of the named edges (``"a3.h5->m7"``).

    Raises:
        GraphError: an edge the graph does not have.
    """
    mask = torch.zeros_like(graph.edges)
    for edge in edges:
        mask[graph.edge_positions(edge)] = True
    return Circuit(graph, mask, provenance=provenance or {})
