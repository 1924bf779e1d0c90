"""Circuits run alone, on the facts they were found on and on held-out ones: what every circuit gives on every fact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.circuits.baselines import kind_of
from kc_lib.circuits.faithfulness import faithfulness_of
from kc_lib.circuits.run import run_circuit
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit
from kc_lib.metrics import METRICS, Metric, answer_rank, get_metric
from kc_lib.models.model import Model
from kc_lib.residual.activations import Means, ablation
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.logits import full_logits, reference_means
from kc_lib.residual.prefix_cache import shared_context
from kc_lib.stats import with_interval
from kc_lib.tasks.batches import Batch, TokenPair, batches


@dataclass(frozen=True)
class Evaluation:
    """What every circuit gives on every split.

    ``examples`` has one row per circuit, split and fact: value (of the metric), probability, rank, kl. ``summary`` has one
    row per circuit and split: the means over facts, Hit@10, faithfulness with its 95% interval.
    """

    summary: pd.DataFrame
    examples: pd.DataFrame
    metric: Metric

    def save(self, path: str | Path) -> Path:
        """Write the summary as parquet, and the examples beside it (``..._examples.parquet``)."""
        path = Path(path)
        self.examples.to_parquet(_examples_path(path), index=False)
        self.summary.to_parquet(path, index=False)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what ``save`` wrote."""
        path = Path(path)
        summary = pd.read_parquet(path)
        return cls(summary, pd.read_parquet(_examples_path(path)), get_metric(str(summary["metric"].iloc[0])))

    @property
    def splits(self) -> list[str]:
        return [str(split) for split in self.summary["split"].unique()]

    def row(self, circuit: str, split: str) -> pd.Series:
        """One circuit's summary on one split.

        Raises:
            MethodError: no such circuit was judged on that split.
        """
        found = self.summary[(self.summary["circuit"] == circuit) & (self.summary["split"] == split)]
        if found.empty:
            raise MethodError(f"circuit {circuit!r} was not judged on split {split!r}: run evaluate_circuits on it")
        return found.iloc[0]

    def values(self, split: str) -> pd.DataFrame:
        """The metric on one split, fact x circuit."""
        rows = self.examples[self.examples["split"] == split]
        table = rows.pivot(index="fact", columns="circuit", values="value")
        return table[list(rows["circuit"].unique())]  # pivot sorts by name


def _examples_path(path: Path) -> Path:
    return path.with_name(f"{path.name.lstrip('.').removesuffix('.parquet')}_examples.parquet")


def evaluate_circuits(
    model: Model,
    circuits: Mapping[str, Circuit],
    splits: Mapping[str, Sequence[TokenPair]],
    *,
    metric: str | Metric = "logit_difference",
    intervention: str = "patching",
    reference: Sequence[TokenPair] = (),
    full_answer: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Run each circuit alone on each split; "full" and "empty" are always among the rows.

    Args:
        reference: pairs whose clean prompts give the means of a mean intervention (those of discovery, not the judged).

    Raises:
        MethodError: unknown metric or intervention, or a circuit of the name "full" or "empty".
    """
    metric = get_metric(metric)
    decoder = model.residual
    means = reference_means(decoder, intervention, reference, batch_size, full_answer)
    frames = []
    total = sum(len(pairs) for pairs in splits.values()) * (len(circuits) + 1)
    with tqdm(total=total, desc="running circuits", unit="run", disable=not progress) as bar:
        for split, pairs in splits.items():
            for name, logits, full, batch in _runs(decoder, circuits, pairs, intervention, means, full_answer, batch_size):
                frames.append(_measure(name, split, logits, full, batch, metric))
                bar.update(len(batch) if name != "full" else 0)
    examples = pd.concat(frames, ignore_index=True)
    examples["fact"] = examples.groupby(["circuit", "split"]).cumcount()
    sizes = {name: (circuit.n_edges, circuit.share) for name, circuit in circuits.items()}
    n_edges = decoder.graph().n_edges
    sizes |= {"full": (n_edges, 1.0), "empty": (0, 0.0)}
    return Evaluation(_summarise(examples, sizes, metric, seed), examples, metric)


def metric_values(
    model: Model,
    circuits: Mapping[str, Circuit],
    pairs: Sequence[TokenPair],
    *,
    metric: str | Metric = "logit_difference",
    intervention: str = "patching",
    reference: Sequence[TokenPair] = (),
    full_answer: bool = False,
    batch_size: int = 16,
    progress: bool = False,
) -> pd.DataFrame:
    """The metric alone, fact x circuit, with "full" and "empty" among the circuits; as ``evaluate_circuits`` otherwise.

    For many circuits of which nothing else is asked: one pass per batch, context and ablated values computed once.
    """
    metric = get_metric(metric)
    decoder = model.residual
    means = reference_means(decoder, intervention, reference, batch_size, full_answer)
    values: dict[str, list[Tensor]] = {}
    with tqdm(total=len(pairs) * (len(circuits) + 1), desc="running circuits", unit="run", disable=not progress) as bar:
        for name, logits, full, batch in _runs(decoder, circuits, pairs, intervention, means, full_answer, batch_size):
            values.setdefault(name, []).append(metric(logits, batch, full).double().cpu())
            bar.update(len(batch) if name != "full" else 0)
    return pd.DataFrame({name: torch.cat(parts).numpy() for name, parts in values.items()})


def _runs(
    decoder: Decoder,
    circuits: Mapping[str, Circuit],
    pairs: Sequence[TokenPair],
    intervention: str,
    means: Means | None,
    full_answer: bool,
    batch_size: int,
) -> Iterator[tuple[str, Tensor, Tensor, Batch]]:
    """Name, logits, the full model's logits and batch of every run: per batch "full", "empty" and every circuit."""
    taken = {"full", "empty"} & circuits.keys()
    if taken:
        raise MethodError(f"a circuit is named {taken.pop()!r}, as the full model or the empty circuit: rename it")
    for batch in batches(pairs, batch_size, full_answer, decoder.device):
        context = shared_context(decoder, batch, intervention)
        ablated = ablation(decoder, intervention, batch, means, context)
        full = full_logits(decoder, batch, context)
        yield "full", full, full, batch
        graph = decoder.graph()
        yield "empty", run_circuit(decoder, graph, torch.zeros_like(graph.edges), batch, ablated, context), full, batch
        for name, circuit in circuits.items():
            yield name, run_circuit(decoder, circuit.graph, circuit.mask, batch, ablated, context), full, batch


def _measure(name: str, split: str, logits: Tensor, full: Tensor, batch: Batch, metric: Metric) -> pd.DataFrame:
    values = {
        "value": metric(logits, batch, full),
        "probability": METRICS["probability"](logits, batch),
        "rank": answer_rank(logits, batch),
        "kl": METRICS["kl"](logits, batch, full),
    }
    frame = pd.DataFrame({key: value.double().cpu().numpy() for key, value in values.items()})
    return frame.assign(circuit=name, split=split)


def _summarise(examples: pd.DataFrame, sizes: Mapping[str, tuple[int, float]], metric: Metric, seed: int) -> pd.DataFrame:
    rows = []
    for split, facts in examples.groupby("split", sort=False):
        values = facts.pivot(index="fact", columns="circuit", values="value")
        found = faithfulness_of(values, seed)
        for name, group in facts.groupby("circuit", sort=False):
            (estimate,), draws = found.of(str(name))
            rows.append(
                {
                    "circuit": name,
                    "kind": kind_of(str(name)),
                    "split": split,
                    "n_edges": sizes[str(name)][0],
                    "share": sizes[str(name)][1],
                    "n": len(group),
                    "metric": metric.name,
                    "value": group["value"].mean(),
                    **with_interval("faithfulness", estimate, draws[:, 0]),
                    "hit_at_10": (group["rank"] <= 10).mean(),
                    "rank_median": group["rank"].median(),
                    "probability": group["probability"].mean(),
                    "kl": group["kl"].mean(),
                }
            )
    return pd.DataFrame(rows)
