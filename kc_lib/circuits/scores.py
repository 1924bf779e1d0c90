"""What edge attribution returns: scores of edges, for each fact, for groups of positions; their tables and files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kc_lib.circuits.options import GRADIENT_RULES
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

    def node_scores(self) -> pd.DataFrame:
        """The effect of ablating each writer everywhere it is read, to first order: columns node, score.

        A node's output reaches the loss only by its readers, so (ablated - clean) . d loss / d output is the sum of its
        outgoing edges' scores. EAP-IG's code multiplied, until May 2026, the gradient at the *input* of a node with the
        difference of its *output*, which is nobody's effect; we do not follow it.

        Raises:
            MethodError: scores of a method that is not one gradient, of which such a sum says nothing.
        """
        method = self.provenance.get("method")
        if method is not None and method not in GRADIENT_RULES:
            raise MethodError(
                f"scores of {method!r} do not add up to those of nodes: use one of {', '.join(GRADIENT_RULES)}"
            )
        return pd.DataFrame({"node": self.graph.writers, "score": self.scores.sum(1).double().numpy()})

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

    def save(self, path: str | Path) -> Path:
        """Write the scores as safetensors; graph and provenance go into the file's metadata."""
        about = {"graph": json.dumps(asdict(self.graph)), "provenance": json.dumps(dict(self.provenance), default=str)}
        save_file({"scores": self.scores.contiguous()}, path, about)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> FactScores:
        """Read what ``save`` wrote."""
        with safe_open(path, "pt") as file:
            about = file.metadata()
            scores = file.get_tensor("scores")
        return cls(Graph(**json.loads(about["graph"])), scores, json.loads(about["provenance"]))


@dataclass(frozen=True)
class PositionScores:
    """Edge scores of groups of positions, in units of the metric; their sum over the groups is the edge's score."""

    graph: Graph
    groups: tuple[str, ...]
    scores: Float[Tensor, "group writer reader"]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def total(self) -> EdgeScores:
        """Scores over all positions."""
        return EdgeScores(self.graph, self.scores.sum(0), self.provenance)

    def to_frame(self) -> pd.DataFrame:
        """Every edge of every group as a row: group, writer, reader, score."""
        frames = [
            edge_frame(self.graph, scores).assign(group=group)
            for group, scores in zip(self.groups, self.scores, strict=True)
        ]
        return pd.concat(frames, ignore_index=True)[["group", "writer", "reader", "score"]]

    def save(self, path: str | Path) -> Path:
        """Write ``to_frame`` as parquet; graph, groups and provenance go into the file's metadata."""
        frame = self.to_frame()
        frame.attrs = {"graph": asdict(self.graph), "groups": list(self.groups), "provenance": dict(self.provenance)}
        frame.to_parquet(path, index=False)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> PositionScores:
        """Read what ``save`` wrote."""
        frame = pd.read_parquet(path)
        graph, groups = Graph(**frame.attrs["graph"]), tuple(frame.attrs["groups"])
        scores = [scores_from_frame(graph, frame[frame["group"] == group]) for group in groups]
        return cls(graph, groups, torch.stack(scores), frame.attrs["provenance"])
