"""Criteria of a circuit beside faithfulness: is it complete, is every edge needed, would other facts have given the same?

**Completeness** is the faithfulness of the circuit's complement, all edges of the graph that are not in it (Marks et al.
2024, arXiv:2403.19647, section 3.2): *low* means complete, 0 that nothing of the effect is left. Necessity is 1 minus it,
the drop when the circuit's edges are removed from the whole model. Almost any set of edges breaks something: read both
beside random circuits of the same size.

**Minimality.** The drop of an edge e of the circuit C is faithfulness(C) - faithfulness(C without e). Positive: the circuit
needs the edge. Negative: the edge works against the answer. Zero within its interval: it could as well be left out. The
baseline is what a circuit gains from an edge that nobody selected: faithfulness(C with e') - faithfulness(C), for random
edges e' outside the circuit between two of its nodes, the drop when e' is removed again from C with e'. Shi et al. 2024
(arXiv:2410.13032, minimality test) inflate the circuit by a random path of nodes and remove one of its edges; an edge
between the circuit's own nodes is the harder comparison, since both ends are known to matter. Edges of random circuits
would be no baseline: those circuits do nothing that a removal could take away.

**Stability** is Jaccard's overlap of edge sets, edges in both over edges in either, of circuits that other facts, another
method or another sentence give. A published analysis of EAP-IG (Méloux et al. 2025, arXiv:2510.00845) reports it over
bootstrap resamples of the examples; the bar there is 0.8 with at least 100 examples, and GPT-2 small on IOI reaches 0.67. A
bootstrap resample holds about 63% of the facts, so its circuit differs from the full one by more than a new sample of the
same size would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kc_lib.circuits.evaluate import Evaluation, estimated, faithfulness_of, metric_values
from kc_lib.circuits.options import EvaluateOptions
from kc_lib.circuits.scores import FactScores
from kc_lib.circuits.selection import select, select_bootstrap
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit
from kc_lib.models.model import Model
from kc_lib.results import Result
from kc_lib.stats import interval, share_interval, with_interval
from kc_lib.tasks.batches import TokenPair


def completeness(evaluation: Evaluation, seed: int = 0) -> pd.DataFrame:
    """Completeness and necessity, with 95% intervals over facts, of every circuit whose complement was run too.

    Run them with ``evaluate(model, circuits | complements(circuits), splits)``, where ``circuits`` holds the circuit and its
    baselines. Columns circuit, kind and of (as the evaluation's table has them), split, n (facts), completeness,
    completeness_low, completeness_high, necessity, necessity_low, necessity_high.

    Raises:
        MethodError: no complement was run.
    """
    table = evaluation.table
    complements = table[table["kind"] == "complement"]
    if complements.empty:
        raise MethodError("no complement was evaluated: give evaluate circuits | complements(circuits)")
    kinds = {name: (kind, of) for name, kind, of in table[["circuit", "kind", "of"]].itertuples(index=False)}
    rows = []
    for split, group in complements.groupby("split", sort=False):
        values = evaluation.values(str(split))
        faithfulness = faithfulness_of(values, seed)
        for name, circuit in group[["circuit", "of"]].itertuples(index=False):
            kind, of = kinds.get(circuit, ("circuit", ""))
            row = {"circuit": circuit, "kind": kind, "of": of, "split": split, "n": len(values)}
            row |= estimated("completeness", faithfulness[name]) | estimated("necessity", 1 - faithfulness[name])
            rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Minimality(Result):
    """Drops by edge, and what they come to.

    ``edges`` has one row per sampled edge and split: split, kind ("circuit", or "random" for edges that were added), edge,
    writer, reader, drop with its 95% interval over facts, and relative (drop / faithfulness of the circuit). ``totals`` has
    one row per split and kind: n_edges (of the circuit, or of those that random ones are drawn from), n_sampled, n (facts),
    faithfulness (of the circuit), mean_drop and sum_drop over the sampled edges with intervals over facts, and shares of
    the sampled edges: share (whose drop's interval excludes 0; with Wilson's interval over edges), of which share_lowers
    (the circuit needs them) and share_raises (they work against it).
    """

    edges: pd.DataFrame
    totals: pd.DataFrame

    columns = ("split", "kind", "edge", "drop")

    def summary(self) -> pd.DataFrame:
        """One row per split and kind of edge (``totals``)."""
        return self.totals


def minimality(
    model: Model,
    circuit: Circuit,
    splits: Mapping[str, Sequence[TokenPair]],
    *,
    n: int = 50,
    reference: Sequence[TokenPair] = (),
    progress: bool = False,
    **options: Any,
) -> Minimality:
    """Drops of ``n`` random edges of the circuit and of as many random edges added to it (see the head of this file).

    A circuit, or a choice of edges to add, with fewer than ``n`` is taken whole. Other arguments are those of ``evaluate``;
    the seed draws the edges too.

    Raises:
        MethodError: a circuit without edges, n below 1, or an option out of range.
    """
    if n < 1 or not circuit.n_edges:
        raise MethodError(
            f"{n} of {circuit.n_edges} edges to take out: minimality needs at least one of a circuit with edges"
        )
    asked, graph = EvaluateOptions.of(options), circuit.graph
    generator = np.random.default_rng(asked.seed)
    masks = {"circuit": circuit.mask, "random": edges_between_nodes(circuit)}
    circuits, sampled = {"circuit": circuit}, {}
    for kind, mask in masks.items():
        positions = _sample(mask, n, generator)
        ends = [(graph.writers[row], graph.readers[column].name) for row, column in positions]
        frame = pd.DataFrame(ends, columns=["writer", "reader"], dtype="str")
        sampled[kind] = frame.assign(kind=kind, edge=frame["writer"] + "->" + frame["reader"])
        for edge, position in zip(sampled[kind]["edge"], positions, strict=True):
            changed = circuit.mask.clone()
            changed[position] = kind == "random"
            circuits[f"{kind} {edge}"] = replace(circuit, mask=changed)
    edges, totals = [], []
    for split, pairs in splits.items():
        values = metric_values(model, circuits, pairs, reference=reference, progress=progress, **asked)
        faithfulness = faithfulness_of(values, asked.seed)
        whole = faithfulness["circuit"]
        for kind, frame in sampled.items():
            sign = 1 if kind == "circuit" else -1
            drops = -sign * faithfulness[kind + " " + frame["edge"]].sub(whole, axis=0).to_numpy()
            low, high = interval(drops[1:])
            relative = drops[0] / (whole[0] or np.nan)
            edges.append(frame.assign(split=split, drop=drops[0], drop_low=low, drop_high=high, relative=relative))
            row = {"split": split, "kind": kind, "n_edges": int(masks[kind].sum()), "n_sampled": len(frame)}
            totals.append(row | {"n": len(values), "faithfulness": whole[0]} | _totals(edges[-1], drops))
    columns = ["split", "kind", "edge", "writer", "reader", "drop", "drop_low", "drop_high", "relative"]
    return Minimality(pd.concat(edges, ignore_index=True)[columns], pd.DataFrame(totals))


def edges_between_nodes(circuit: Circuit) -> Bool[Tensor, "writer reader"]:
    """Edges of the graph outside the circuit, from a node of the circuit to an input of another (or the logits)."""
    graph = circuit.graph
    alive = circuit.mask.any(1)
    reading = (alive.float() @ graph.serves.float()) > 0
    reading[-1] = True
    return graph.edges & ~circuit.mask & alive[:, None] & reading


def _sample(mask: Bool[Tensor, "writer reader"], n: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    positions = mask.nonzero()
    chosen = generator.choice(len(positions), min(n, len(positions)), replace=False)
    return [(int(row), int(column)) for row, column in positions[torch.from_numpy(np.sort(chosen))]]


def _totals(edges: pd.DataFrame, drops: Float[np.ndarray, "drawn edge"]) -> dict[str, float]:
    """Mean and sum over the sampled edges, and the shares whose interval lies on one side of 0; NaN where undefined."""
    n = len(edges)
    if not n:
        return {}
    lowers, raises = int((edges["drop_low"] > 0).sum()), int((edges["drop_high"] < 0).sum())
    low, high = share_interval(lowers + raises, n)
    shares = {"share": (lowers + raises) / n, "share_low": low, "share_high": high}
    shares |= {"share_lowers": lowers / n, "share_raises": raises / n}
    if edges["drop_low"].isna().any():
        shares = dict.fromkeys(shares, float("nan"))
    return estimated("mean_drop", drops.mean(1)) | estimated("sum_drop", drops.sum(1)) | shares


@dataclass(frozen=True)
class Stability(Result):
    """Overlap of circuits found in different ways.

    ``pairs`` has one row per pair: a, b, against ("each other" or "reference"), jaccard. ``n_facts`` is how many facts
    the circuits were found on, where they say so (``n_pairs`` of their provenance) and agree.
    """

    pairs: pd.DataFrame
    n_facts: int | None = None

    columns = ("a", "b", "against", "jaccard")

    def summary(self) -> pd.DataFrame:
        """Mean overlap, and the range that holds 95% of the pairs (pairs share circuits: it is no interval of the mean).

        One row per kind of comparison: against, n_pairs, jaccard, jaccard_low, jaccard_high.
        """
        rows = []
        for against, group in self.pairs.groupby("against", sort=False):
            row = {"against": against, "n_pairs": len(group)}
            rows.append(row | with_interval("jaccard", group["jaccard"].mean(skipna=False), group["jaccard"].to_numpy()))
        return pd.DataFrame(rows)


def stability(circuits: Mapping[str, Circuit], reference: Circuit | None = None) -> Stability:
    """Overlap of circuits with each other and, where there is one, with a reference (the circuit of all facts).

    Raises:
        MethodError: nothing to compare, or circuits of different graphs.
    """
    compared = [(a, b, "each other", jaccard(circuits[a], circuits[b])) for a, b in combinations(circuits, 2)]
    if reference is not None:
        compared += [(name, "reference", "reference", jaccard(one, reference)) for name, one in circuits.items()]
    if not compared:
        raise MethodError("stability compares circuits: give at least two, or one and a reference")
    n_facts = {circuit.provenance.get("n_pairs") for circuit in circuits.values()}
    return Stability(pd.DataFrame(compared, columns=Stability.columns), n_facts.pop() if len(n_facts) == 1 else None)


def jaccard(a: Circuit, b: Circuit) -> float:
    """Edges in both circuits over edges in either; NaN where neither has one.

    Raises:
        MethodError: circuits of different graphs.
    """
    if a.graph != b.graph:
        raise MethodError(f"circuits of different graphs have no common edges to count: {a.graph} and {b.graph}")
    either = int((a.mask | b.mask).sum())
    return int((a.mask & b.mask).sum()) / either if either else float("nan")


def jaccard_matrix(circuits: Mapping[str, Circuit]) -> pd.DataFrame:
    """Jaccard overlap of every circuit with every other, by name: over methods, templates, seeds."""
    matrix = [[jaccard(a, b) for b in circuits.values()] for a in circuits.values()]
    return pd.DataFrame(matrix, index=list(circuits), columns=list(circuits))


def resampled_circuits(
    fact_scores: FactScores,
    n: int = 10,
    seed: int = 0,
    selection: str = "absolute",
    size: int | float | None = 0.005,
    threshold: float | None = None,
    fill: bool = True,
) -> dict[str, Circuit]:
    """The circuits that ``n`` bootstrap resamples of the facts give (``select`` on their mean scores; ``resample #1`` ...).

    ``bootstrap`` selects within every resample by resamples of its own, and it alone knows a size of None.

    Raises:
        MethodError: what ``select`` raises.
    """
    generator = np.random.default_rng(seed)
    n_facts = len(fact_scores.scores)
    circuits = {}
    for draw in range(1, n + 1):
        facts = generator.integers(0, n_facts, n_facts).tolist()
        if selection == "bootstrap":
            again = FactScores(fact_scores.graph, fact_scores.scores[facts], fact_scores.provenance)
            circuits[f"resample #{draw}"] = select_bootstrap(again, seed=seed + draw, size=size)
        elif size is None:
            raise MethodError(f"selection {selection!r} needs a size: a number of edges or a share of them")
        else:
            circuits[f"resample #{draw}"] = select(fact_scores.mean(facts), selection, size, threshold, fill)
    return circuits
