"""What a circuit is held against: random circuits of two kinds, the model without it, and its ranking at other sizes.

All of them go into one evaluation, as a mapping from a name to a ``Labelled`` circuit. A name is only a name: what a circuit
is stands in its label, and from there in the columns of the evaluation's table.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kc_lib.circuits.scores import EdgeScores
from kc_lib.circuits.selection import select
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit, Graph

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # MIB's (Mueller et al. 2025, section 3)
RANDOM, LAYER_MATCHED = "random baseline", "layer-matched baseline"
BASELINES = {"random": RANDOM, "layer-matched": LAYER_MATCHED}  # as ``random_baselines`` is asked for them -> kind


@dataclass(frozen=True)
class Labelled:
    """A circuit with what it is, as an evaluation's table says it in columns of these names.

    ``kind`` is "circuit", "ranking" (a circuit at one size of a ranking), "random baseline", "layer-matched baseline" or
    "complement"; the full model and the empty circuit are of kind "full" and "empty". A plain ``Circuit`` is of kind
    "circuit". ``ranking`` names the ranking that the circuit, or the one it is a baseline of, was cut from; ``size`` is the
    share of the edges that was asked of it, before pruning; ``draw`` counts random draws from 1; ``of`` names the circuit
    whose baseline or complement it is.
    """

    circuit: Circuit
    kind: str = "circuit"
    ranking: str = ""
    size: float = float("nan")
    draw: int = 0
    of: str = ""

    def columns(self) -> dict[str, Any]:
        """The label as columns of a row."""
        return {name: getattr(self, name) for name in LABELS}


LABELS = ("kind", "ranking", "size", "draw", "of")
Circuits = Mapping[str, Circuit | Labelled]


def labelled(circuits: Circuits) -> dict[str, Labelled]:
    """Circuits by name, plain ones labelled as of kind "circuit"."""
    return {name: one if isinstance(one, Labelled) else Labelled(one) for name, one in circuits.items()}


def circuits_by_size(
    scores: EdgeScores,
    selection: str = "absolute",
    shares: Sequence[float] = SHARES,
    n_random: int = 3,
    seed: int = 0,
    label: str = "top",
) -> dict[str, Labelled]:
    """The circuits a ranking gives at each share of the edges (``top 0.005``), and ``n_random`` random baselines of each.

    The whole graph needs no baseline and has none. As in MIB, a share counts the edges before pruning. To evaluate several
    rankings at once give each a ``label`` and merge.

    Example:
        >>> circuits = circuits_by_size(scores) | circuits_by_size(scores, "signed", label="signed")
        >>> areas(evaluate(model, circuits, splits))
    """
    circuits = {}
    for share in map(float, shares):
        circuit = select(scores, selection, share, fill=False)
        circuits[f"{label} {share:g}"] = Labelled(circuit, "ranking", label, share)
    for name, top in list(circuits.items()):
        if top.size < 1.0:
            drawn = random_baselines(top.circuit, n_random, seed, of=name)
            circuits |= {key: replace(one, ranking=label, size=top.size) for key, one in drawn.items()}
    return circuits


def random_baselines(
    circuit: Circuit, n: int, seed: int = 0, kind: str = "random", of: str = "circuit"
) -> dict[str, Labelled]:
    """``n`` random circuits to hold a circuit against, of one of two kinds; ``of`` is the circuit's name.

    - ``random``: any edges, as many, all on paths from the input to the logits (``random_circuit``);
    - ``layer-matched``: the circuit with its heads exchanged within each layer (``layer_matched``), which is harder to beat:
      it keeps every edge between input, MLPs and logits and all counts by layer and type.

    Example:
        >>> circuits = {"circuit": circuit} | kc.random_baselines(circuit, 10)
        >>> kc.evaluate(model, circuits, {"held_out": task.test}).summary()

    Raises:
        MethodError: another kind.
    """
    if kind not in BASELINES:
        raise MethodError(f"unknown kind of baseline {kind!r}: use one of {', '.join(BASELINES)}")
    baselines = {}
    for draw in range(n):
        if kind == "random":
            drawn = random_circuit(circuit.graph, circuit.n_edges, seed + draw)
        else:
            drawn = layer_matched(circuit, seed + draw)
        baselines[f"{BASELINES[kind]} {draw + 1} of {of}"] = Labelled(drawn, BASELINES[kind], draw=draw + 1, of=of)
    return baselines


def complement(circuit: Circuit) -> Circuit:
    """All edges of the graph that are not in the circuit, unpruned."""
    provenance = {**circuit.provenance, "complement": True}
    return replace(circuit, mask=circuit.graph.edges & ~circuit.mask, provenance=provenance)


def complements(circuits: Circuits, n_draws: int | None = None) -> dict[str, Labelled]:
    """The complement of each circuit (``without ...``); of random draws those of the first ``n_draws``, None for all."""
    return {
        f"without {name}": Labelled(complement(one.circuit), "complement", of=name)
        for name, one in labelled(circuits).items()
        if n_draws is None or one.draw <= n_draws
    }


def random_circuit(graph: Graph, n_edges: int, seed: int) -> Circuit:
    """A connected circuit of ``n_edges`` random edges, the random baseline of a circuit of that size.

    Edges are drawn uniformly from the graph, and each is joined to the circuit by random walks, down to the input and up
    to the logits, until they meet a node that is already in it. So every edge lies on a path from the input to the
    logits; edges drawn independently would be pruned to almost nothing, a baseline that is too easy. Its profile over
    layers is close to the graph's. Where the last edges do not fit, a few are missing.
    """
    generator = random.Random(seed)
    possible = graph.edges.nonzero().tolist()
    readers_of = [graph.serves[row].nonzero()[:, 0].tolist() for row in range(len(graph.writers))]
    owners_of = [graph.serves[:, column].nonzero()[:, 0].tolist() for column in range(len(graph.readers))]
    last = len(graph.readers) - 1
    mask = torch.zeros_like(graph.edges)
    nodes, count = {0}, 0
    for _ in range(1000 * max(n_edges, 1)):
        if count == n_edges:
            break
        row, column = generator.choice(possible)
        walk, fresh = [(row, column)], set()
        while row not in nodes:  # down to the input
            fresh.add(row)
            reader = generator.choice(readers_of[row])
            row = generator.randrange(graph.readers[reader].n_writers)
            walk.append((row, reader))
        while column != last:  # up to the logits
            owner = generator.choice(owners_of[column])
            if owner in nodes:
                break
            fresh.add(owner)
            column = generator.choice(graph.edges[owner].nonzero()[:, 0].tolist())
            walk.append((owner, column))
        new = {edge for edge in walk if not mask[edge]}
        if count + len(new) > n_edges:
            continue
        for edge in new:
            mask[edge] = True
        count += len(new)
        nodes |= fresh
    return Circuit(graph, mask, None, {"selection": "random", "size": n_edges, "seed": seed})


def layer_matched(circuit: Circuit, seed: int) -> Circuit:
    """The circuit with its heads exchanged at random within every layer, the baseline of that profile.

    The exchange is a symmetry of the graph: key-value groups change places within a layer, and heads within their group
    (in the ungrouped view every head has keys and values of its own and may take any place). So every writer's and
    reader's layer and type, the number of edges between any two of them, and all connections stay; *which* heads do it
    changes. Edges between input, MLPs and logits stay as they are, and by chance a head may keep its place.
    """
    graph = circuit.graph
    generator = torch.Generator().manual_seed(seed)
    group = graph.n_heads // graph.n_kv_readers
    writers, readers = torch.arange(len(graph.writers)), torch.arange(len(graph.readers))
    for layer in range(graph.n_layers):
        groups = torch.randperm(graph.n_kv_readers, generator=generator)
        within = torch.stack([torch.randperm(group, generator=generator) for _ in range(graph.n_kv_readers)])
        heads = (groups[:, None] * group + within).flatten()
        writers[graph.head_writers(layer)] = graph.head_writers(layer).start + heads
        for kind, order in {"q": heads, "k": groups, "v": groups}.items():
            columns = graph.reader_columns(layer, kind)
            readers[columns] = columns.start + order
    mask = circuit.mask[writers][:, readers]
    return Circuit(graph, mask, None, {"selection": "layer-matched", "size": circuit.n_edges, "seed": seed})
