"""The circuits an evaluation judges, by name: rankings at every size, nulls of both kinds, and complements.

Names say what a circuit is, and every judge reads them: ``circuit`` (or any name of your own), ``top 0.005`` (a ranking at
a share of the edges), ``random 0.005 #1`` (a null of that size), ``null #1`` and ``profile null #1`` (nulls of the circuit),
``without circuit`` (the model without a circuit's edges). "full" and "empty" are always there and cannot be given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from kc_lib.circuits.scores import EdgeScores
from kc_lib.circuits.selection import profile_null, random_circuit, select
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # MIB's (Mueller et al. 2025, section 3)
NULL_KINDS = {"connected": "null", "profile": "profile null"}  # kind of null -> kind of circuit
_NAME = re.compile(r"(?P<kind>.*?)(?: (?P<share>\d\S*))?(?: (?P<draw>#\d+))?")


def kind_of(name: str) -> str:
    """What a circuit is, by its name: the name without its share and draw (``top``, ``random``, ``null``, ``circuit``)."""
    return _parts(name)[0]


def ranking_of(name: str) -> tuple[str, float] | None:
    """The curve a circuit lies on and its share (``top 0.005``: top, 0.005; ``random 0.1 #2``: random #2, 0.1), if any."""
    kind, share, draw = _parts(name)
    try:
        size = float(share)
    except ValueError:
        return None
    return (f"{kind} {draw}".strip(), size) if 0 < size <= 1 else None


def _parts(name: str) -> tuple[str, str, str]:
    found = _NAME.fullmatch(name)
    return (found["kind"], found["share"] or "", found["draw"] or "") if found else (name, "", "")


def circuits_by_size(
    scores: EdgeScores,
    selection: str = "absolute",
    shares: Sequence[float] = SHARES,
    n_random: int = 3,
    seed: int = 0,
    label: str = "top",
) -> dict[str, Circuit]:
    """The circuits a ranking gives at each share of the edges, and random ones of those sizes.

    Named ``top 0.005`` and ``random 0.005 #1``; the whole graph needs no null and has none. As in MIB, a share counts the
    edges before pruning. To judge several rankings in one evaluation give each a ``label`` and merge: ``eap signed``
    makes ``eap signed 0.005`` and ``eap signed random 0.005 #1``.
    """
    circuits = {}
    for share in shares:
        circuits[f"{label} {share:g}"] = select(scores, selection, float(share), fill=False)
    random = "random" if label == "top" else f"{label} random"
    for share in shares:
        if share < 1.0:
            for draw, null in enumerate(random_nulls(circuits[f"{label} {share:g}"], n_random, seed).values(), start=1):
                circuits[f"{random} {share:g} #{draw}"] = null
    return circuits


def random_nulls(circuit: Circuit, n: int, seed: int = 0, kind: str = "connected") -> dict[str, Circuit]:
    """``n`` random circuits to hold a circuit against, of one of two kinds.

    - ``connected``: any edges, as many, all on paths from the input to the logits (``null #1`` ...; ``random_circuit``);
    - ``profile``: the circuit with its heads exchanged within each layer (``profile null #1`` ...; ``profile_null``), a
      harder null: it keeps every edge between input, MLPs and logits and all counts by layer and type.

    Raises:
        MethodError: another kind.
    """
    if kind not in NULL_KINDS:
        raise MethodError(f"unknown kind of null {kind!r}: use one of {', '.join(NULL_KINDS)}")
    if kind == "profile":
        return {f"profile null #{draw + 1}": profile_null(circuit, seed + draw) for draw in range(n)}
    return {f"null #{draw + 1}": random_circuit(circuit.graph, circuit.n_edges, seed + draw) for draw in range(n)}


def complement(circuit: Circuit) -> Circuit:
    """All edges of the graph that are not in the circuit, unpruned."""
    provenance = {**circuit.provenance, "complement": True}
    return replace(circuit, mask=circuit.graph.edges & ~circuit.mask, provenance=provenance)


def complements(circuits: Mapping[str, Circuit]) -> dict[str, Circuit]:
    """The complement of each circuit, named ``without ...``."""
    return {f"without {name}": complement(circuit) for name, circuit in circuits.items()}
