"""Is every edge of the circuit needed? The drop in faithfulness when one is taken out, for a sample of them.

The drop of an edge e of the circuit C is faithfulness(C) - faithfulness(C without e). Positive: the circuit needs the
edge. Negative: the edge works against the answer. Zero within its interval: it could as well be left out.

The null is what a circuit gains from an edge that nobody selected: faithfulness(C with e') - faithfulness(C), for random
edges e' outside the circuit between two of its nodes, the drop when e' is removed again from C with e'. Shi et al. 2024
(arXiv:2410.13032, minimality test) inflate the circuit by a random path of nodes and remove one of its edges; an edge
between the circuit's own nodes is the harder comparison, since both ends are known to matter. Edges of random circuits
would be no null: those circuits do nothing that a removal could take away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from kc_lib.circuits.evaluate import metric_values
from kc_lib.circuits.faithfulness import faithfulness_of
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit
from kc_lib.metrics import Metric
from kc_lib.models.model import Model
from kc_lib.stats import share_interval, with_interval
from kc_lib.tasks.batches import TokenPair


@dataclass(frozen=True)
class Minimality:
    """Drops by edge, and what they come to.

    ``edges`` has one row per sampled edge and split: split, kind ("circuit" or "null"), edge, writer, reader, drop with
    its 95% interval over facts, and relative (drop / faithfulness of the circuit). ``summary`` has one row per split
    and kind: n_edges (of the circuit, or of those a null is drawn from), n_sampled, n (facts), faithfulness (of the
    circuit), mean_drop and sum_drop over the sampled edges with intervals over facts, and shares of the sampled edges: share
    (whose drop's interval excludes 0; with Wilson's interval over edges), of which share_lowers (the circuit needs
    them) and share_raises (they work against it).
    """

    edges: pd.DataFrame
    summary: pd.DataFrame

    def save(self, path: str | Path) -> Path:
        """Write ``edges`` as parquet; the summary goes into the file's metadata."""
        frame = self.edges.copy()
        frame.attrs = {"summary": self.summary.to_dict("list")}
        frame.to_parquet(path, index=False)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Minimality:
        """Read what ``save`` wrote."""
        frame = pd.read_parquet(path)
        summary = pd.DataFrame(frame.attrs.pop("summary"))
        return cls(frame, summary)


def minimality(
    model: Model,
    circuit: Circuit,
    splits: Mapping[str, Sequence[TokenPair]],
    *,
    n: int = 50,
    seed: int = 0,
    metric: str | Metric = "logit_difference",
    intervention: str = "patching",
    reference: Sequence[TokenPair] = (),
    full_answer: bool = False,
    batch_size: int = 16,
    progress: bool = False,
) -> Minimality:
    """Drops of ``n`` random edges of the circuit and of as many null edges (see the head of this file).

    A circuit, or a choice of null edges, with fewer than ``n`` is taken whole. All runs of a batch share its context and
    ablated values. Other arguments are those of ``evaluate_circuits``.

    Raises:
        MethodError: a circuit without edges, n below 1, unknown metric or intervention.
    """
    if n < 1 or not circuit.n_edges:
        raise MethodError(
            f"{n} of {circuit.n_edges} edges to take out: minimality needs at least one of a circuit with edges"
        )
    generator = np.random.default_rng(seed)
    graph, outside = circuit.graph, edges_between_nodes(circuit)
    kinds = {"circuit": circuit.mask, "null": outside}
    sampled = {kind: _sample(mask, n, generator) for kind, mask in kinds.items()}
    circuits = {"circuit": circuit}
    names: dict[str, list[str]] = {}
    for kind, positions in sampled.items():
        names[kind] = [f"{kind} {graph.writers[row]}->{graph.readers[column].name}" for row, column in positions]
        for name, position in zip(names[kind], positions, strict=True):
            mask = circuit.mask.clone()
            mask[position] = kind == "null"
            circuits[name] = replace(circuit, mask=mask)
    edges, summary = [], []
    for split, pairs in splits.items():
        values = metric_values(
            model,
            circuits,
            pairs,
            metric=metric,
            intervention=intervention,
            reference=reference,
            full_answer=full_answer,
            batch_size=batch_size,
            progress=progress,
        )
        found = faithfulness_of(values, seed)
        (own,), own_draws = found.of("circuit")
        for kind, chosen in names.items():
            sign = 1 if kind == "circuit" else -1
            estimate, draws = found.of(*chosen)
            drops, drop_draws = sign * (own - estimate), sign * (own_draws - draws)
            rows = [_edge_row(split, name, own, drops[i], drop_draws[:, i]) for i, name in enumerate(chosen)]
            edges += rows
            about = {
                "split": split,
                "kind": kind,
                "n_edges": int(kinds[kind].sum()),
                "n_sampled": len(rows),
                "n": len(values),
            }
            summary.append(about | {"faithfulness": float(own)} | _totals(rows, drops, drop_draws))
    return Minimality(pd.DataFrame(edges), pd.DataFrame(summary))


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


def _edge_row(split: str, name: str, own: float, drop: float, draws: np.ndarray) -> dict[str, object]:
    kind, _, edge = name.partition(" ")
    writer, _, reader = edge.partition("->")
    row: dict[str, object] = {"split": split, "kind": kind, "edge": edge, "writer": writer, "reader": reader}
    return row | with_interval("drop", drop, draws) | {"relative": float(drop / own) if own else float("nan")}


def _totals(rows: list[dict[str, object]], drops: np.ndarray, draws: np.ndarray) -> dict[str, float]:
    """Mean and sum over the sampled edges, and the shares whose interval lies on one side of 0; NaN where undefined."""
    frame = pd.DataFrame(rows, columns=["drop_low", "drop_high"])
    n = len(frame)
    if not n or frame.isna().any(axis=None):
        nothing = float("nan")
        names = ["mean_drop", "sum_drop", "share"]
        columns = [f"{name}{end}" for name in names for end in ("", "_low", "_high")] + ["share_lowers", "share_raises"]
        known = {"mean_drop": float(drops.mean()), "sum_drop": float(drops.sum())} if n else {}
        return dict.fromkeys(columns, nothing) | known
    lowers, raises = int((frame["drop_low"] > 0).sum()), int((frame["drop_high"] < 0).sum())
    low, high = share_interval(lowers + raises, n)
    return {
        **with_interval("mean_drop", drops.mean(), draws.mean(1)),
        **with_interval("sum_drop", drops.sum(), draws.sum(1)),
        "share": (lowers + raises) / n,
        "share_low": low,
        "share_high": high,
        "share_lowers": lowers / n,
        "share_raises": raises / n,
    }
