"""What attribution returns: scores of edges, of edges for each fact, and of nodes; their tables and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kc_lib.errors import MethodError
from kc_lib.graph import Graph, edge_frame, scores_from_frame


@dataclass(frozen=True)
class EdgeScores:
    """One score per edge, in units of the metric; 0 where there is no edge."""

    graph: Graph
    scores: Float[Tensor, "writer reader"]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """Every edge as a row: writer, reader, score."""
        return edge_frame(self.graph, self.scores)

    def save(self, path: str | Path) -> Path:
        """Write ``to_frame`` as parquet; graph and provenance go into the file's metadata."""
        frame = self.to_frame()
        frame.attrs = {"graph": asdict(self.graph), "provenance": dict(self.provenance)}
        frame.to_parquet(path, index=False)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> EdgeScores:
        """Read what ``save`` wrote."""
        frame = pd.read_parquet(path)
        graph = Graph(**frame.attrs["graph"])
        return cls(graph, scores_from_frame(graph, frame), frame.attrs["provenance"])


@dataclass(frozen=True)
class FactScores:
    """Edge scores of each fact by itself, in units of the metric, in the order of the pairs they were found on."""

    graph: Graph
    scores: Float[Tensor, "fact writer reader"]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def mean(self, facts: Sequence[int] | None = None) -> EdgeScores:
        """The mean over all facts, or over those given by index; an index may come more than once (bootstrap).

        Raises:
            MethodError: no facts, or an index out of range.
        """
        n_facts = len(self.scores)
        chosen = range(n_facts) if facts is None else facts
        if not len(chosen) or min(chosen) < 0 or max(chosen) >= n_facts:
            raise MethodError(f"facts must be indices from 0 to {n_facts - 1}, at least one; given were {list(chosen)}")
        counts = torch.bincount(torch.as_tensor(list(chosen)), minlength=n_facts)
        weights = counts.to(self.scores) / len(chosen)
        provenance = {**self.provenance} if facts is None else {**self.provenance, "facts": [int(fact) for fact in facts]}
        return EdgeScores(self.graph, torch.einsum("f,fwr->wr", weights, self.scores), provenance)
