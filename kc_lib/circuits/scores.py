"""What attribution returns: scores of edges, for each fact, for groups of positions, and of neurons; tables and files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kc_lib.circuits.options import GRADIENT_METHODS
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit, Graph, edge_frame, scores_from_frame
from kc_lib.results import Result

N_STRONGEST = 10  # rows of a summary


class _Scores(Result):
    """Scores by a method, of edges or neurons."""

    provenance: Mapping[str, Any]

    def __repr__(self) -> str:
        about = ", ".join(str(self.provenance[key]) for key in ("method", "metric", "model") if self.provenance.get(key))
        return f"{type(self).__name__}({about}, {' x '.join(map(str, self.scores.shape))})"  # type: ignore[attr-defined]  # a tensor in all

    def summary(self) -> pd.DataFrame:
        """The strongest ten, whichever way they work."""
        frame = self.to_frame()
        return frame.loc[frame["score"].abs().nlargest(N_STRONGEST).index].reset_index(drop=True)


@dataclass(frozen=True, repr=False)
class EdgeScores(_Scores):
    """One score per edge, in units of the metric; 0 where there is no edge.

    Example:
        >>> scores = kc.score_edges(model, task.discovery)
        >>> scores.summary()
    """

    columns = ("writer", "reader", "score")

    graph: Graph
    scores: Float[Tensor, "writer reader"]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, circuit: Circuit) -> Self:
        """The scores that a circuit was found by; edges that ACDC did not test score 0."""
        scores = torch.zeros(circuit.mask.shape) if circuit.scores is None else circuit.scores.nan_to_num()
        return cls(circuit.graph, scores, circuit.provenance)

    def to_frame(self) -> pd.DataFrame:
        """Every edge as a row: writer, reader, score."""
        return edge_frame(self.graph, self.scores)

    def about(self) -> dict[str, Any]:
        return {"graph": asdict(self.graph), "provenance": dict(self.provenance)}

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, about: Mapping[str, Any]) -> Self:
        graph = Graph(**about["graph"])
        return cls(graph, scores_from_frame(graph, frame), about["provenance"])

    def node_scores(self) -> pd.DataFrame:
        """The effect of ablating each writer everywhere it is read, to first order: columns node, score.

        A node's output reaches the loss only by its readers, so (ablated - clean) . d loss / d output is the sum of its
        outgoing edges' scores. EAP-IG's code multiplied, until May 2026, the gradient at the *input* of a node with the
        difference of its *output*, which is nobody's effect; we do not follow it.

        Raises:
            MethodError: scores of a method that is not one gradient, of which such a sum says nothing.
        """
        method = self.provenance.get("method")
        if method is not None and method not in GRADIENT_METHODS:
            raise MethodError(
                f"scores of {method!r} do not add up to those of nodes: use one of {', '.join(GRADIENT_METHODS)}"
            )
        return pd.DataFrame({"node": self.graph.writers, "score": self.scores.sum(1).double().numpy()})


@dataclass(frozen=True, repr=False)
class FactScores(_Scores):
    """Edge scores of each fact by itself, in units of the metric, in the order of the pairs they were found on.

    The file is safetensors: as a table every fact would repeat the names of all edges.
    """

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

    def to_frame(self) -> pd.DataFrame:
        """Every edge of every fact as a row: fact, writer, reader, score."""
        return _stacked(self.graph, self.scores, fact=range(len(self.scores)))

    def about(self) -> dict[str, Any]:
        return {"graph": asdict(self.graph), "provenance": dict(self.provenance)}

    def save(self, path: str | Path) -> Path:
        """Write the scores as safetensors; graph and provenance go into the file's metadata."""
        about = {key: json.dumps(value, default=str) for key, value in self.about().items()}
        save_file({"scores": self.scores.contiguous()}, path, about)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            MethodError: the file is not there, or is no such file.
        """
        try:
            with safe_open(path, "pt") as file:
                about, scores = file.metadata(), file.get_tensor("scores")
            return cls(Graph(**json.loads(about["graph"])), scores, json.loads(about["provenance"]))
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise MethodError(f"{path} holds no FactScores ({error}); give a file that it wrote") from error


@dataclass(frozen=True, repr=False)
class PositionScores(_Scores):
    """Edge scores of groups of positions, in units of the metric; their sum over the groups is the edge's score."""

    columns = ("group", "writer", "reader", "score")

    graph: Graph
    groups: tuple[str, ...]
    scores: Float[Tensor, "group writer reader"]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def total(self) -> EdgeScores:
        """Scores over all positions."""
        return EdgeScores(self.graph, self.scores.sum(0), self.provenance)

    def to_frame(self) -> pd.DataFrame:
        """Every edge of every group as a row: group, writer, reader, score."""
        return _stacked(self.graph, self.scores, group=self.groups)

    def about(self) -> dict[str, Any]:
        return {"graph": asdict(self.graph), "groups": list(self.groups), "provenance": dict(self.provenance)}

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, about: Mapping[str, Any]) -> Self:
        graph, groups = Graph(**about["graph"]), tuple(about["groups"])
        scores = [scores_from_frame(graph, frame[frame["group"] == group]) for group in groups]
        return cls(graph, groups, torch.stack(scores), about["provenance"])


@dataclass(frozen=True, repr=False)
class NeuronScores(_Scores):
    """One score per MLP neuron, in units of the metric."""

    columns = ("layer", "neuron", "score")

    scores: Float[Tensor, "layer d_mlp"]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """Every neuron as a row: layer, neuron, score."""
        layers, neurons = torch.meshgrid(*(torch.arange(n) for n in self.scores.shape), indexing="ij")
        table = {"layer": layers, "neuron": neurons, "score": self.scores.double()}
        return pd.DataFrame({column: values.flatten().numpy() for column, values in table.items()})

    def about(self) -> dict[str, Any]:
        return {"shape": list(self.scores.shape), "provenance": dict(self.provenance)}

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, about: Mapping[str, Any]) -> Self:
        scores = torch.zeros(tuple(about["shape"]))
        scores[tuple(torch.tensor(frame[column].to_numpy()) for column in ("layer", "neuron"))] = torch.tensor(
            frame["score"].to_numpy(), dtype=scores.dtype
        )
        return cls(scores, about["provenance"])


def _stacked(graph: Graph, scores: Float[Tensor, "part writer reader"], **labels: Sequence[Any]) -> pd.DataFrame:
    """Tables of edges one below the other, with a first column that says which part a row is of."""
    ((column, values),) = labels.items()
    frames = [edge_frame(graph, part) for part in scores]
    table = pd.concat(frames, keys=list(values), names=[column]).reset_index(column)
    return table.reset_index(drop=True)
