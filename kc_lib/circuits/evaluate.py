"""Circuits run alone, on the facts they were found on and on held-out ones: what every circuit gives on every fact.

Faithfulness is (m(circuit) - m(empty)) / (m(full) - m(empty)), with m the metric's mean over facts (Hanna et al. 2024,
arXiv:2403.17806, section 2; Mueller et al. 2025, MIB). "empty" is the circuit without edges (with patching: the model on
the corrupted prompts), "full" the model itself. Where the full model's effect is next to nothing it is undefined: NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.circuits.baselines import LABELS, RANDOM, Circuits, Labelled, labelled
from kc_lib.circuits.options import EvaluateOptions
from kc_lib.circuits.run import run_circuit
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit
from kc_lib.metrics import METRICS, Metric, answer_rank, get_metric
from kc_lib.models.model import Model
from kc_lib.residual.activations import Means, ablation, shared_prefix
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.logits import full_logits, reference_means
from kc_lib.results import Result, load_table, save_table
from kc_lib.stats import MINIMAL_EFFECT, resampled_means, with_interval
from kc_lib.tasks.batches import Batch, TokenPair, batches


@dataclass(frozen=True)
class Evaluation(Result):
    """What every circuit gives on every split.

    ``table`` has one row per circuit and split: what the circuit is (``Labelled``), n_edges, share (of the graph's edges),
    n (facts), the means over facts of value (of the metric), probability and kl, Hit@10, the median rank, and faithfulness
    with its 95% interval. ``examples`` has one row per circuit, split and fact: value, probability, rank, kl.
    """

    table: pd.DataFrame
    examples: pd.DataFrame
    metric: Metric

    columns = ("circuit", *LABELS, "split", "faithfulness")

    def summary(self) -> pd.DataFrame:
        """The full model, every circuit with the mean of its baselines, and the empty circuit, by split.

        faithfulness_low and _high are the 95% interval over facts; of baselines they are the lowest and the highest draw.
        """
        rows = self.table[(self.table["ranking"] == "") & (self.table["kind"] != "complement")]
        drawn = rows["draw"] > 0
        ends = {end: rows[end].mask(drawn, rows["faithfulness"]) for end in ("faithfulness_low", "faithfulness_high")}
        named = rows.assign(circuit=rows["circuit"].mask(drawn, rows["kind"] + "s of " + rows["of"]), **ends)
        how = {"draw": "max", "n_edges": "max", "n": "max", "value": "mean", "faithfulness": "mean"}
        how |= {"faithfulness_low": "min", "faithfulness_high": "max"}
        how |= dict.fromkeys(("hit_at_10", "rank_median", "probability", "kl"), "mean")
        means = named.groupby(["split", "circuit"], sort=False).agg(how).reset_index()
        return means.rename(columns={"draw": "draws"})

    @property
    def splits(self) -> list[str]:
        return [str(split) for split in self.table["split"].unique()]

    def row(self, circuit: str, split: str) -> pd.Series:
        """One circuit's row on one split.

        Raises:
            MethodError: no such circuit was evaluated on that split.
        """
        rows = self.table[(self.table["circuit"] == circuit) & (self.table["split"] == split)]
        if rows.empty:
            raise MethodError(f"circuit {circuit!r} was not evaluated on split {split!r}: give it to evaluate")
        return rows.iloc[0]

    def baselines(self, circuit: str, split: str, kind: str = RANDOM) -> pd.DataFrame:
        """Rows of a circuit's baselines of one kind, a row per draw."""
        table = self.table
        return table[(table["kind"] == kind) & (table["of"] == circuit) & (table["split"] == split)]

    def values(self, split: str) -> pd.DataFrame:
        """The metric on one split, fact x circuit."""
        rows = self.examples[self.examples["split"] == split]
        table = rows.pivot(index="fact", columns="circuit", values="value")
        return table[list(rows["circuit"].unique())]  # pivot sorts by name

    def about(self) -> dict[str, Any]:
        return {"metric": self.metric.name}

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, about: Mapping[str, Any]) -> Self:
        return cls(frame, pd.DataFrame(), get_metric(str(about["metric"])))

    def save(self, path: str | Path) -> Path:
        """Write the table as parquet, and the examples beside it (``..._examples.parquet``)."""
        save_table(self.examples, _examples_path(Path(path)), {})
        return super().save(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            MethodError: a file is not there, is no table, or holds another result.
        """
        examples, _ = load_table(_examples_path(Path(path)))
        return replace(super().load(path), examples=examples)


def _examples_path(path: Path) -> Path:
    return path.with_name(f"{path.name.lstrip('.').removesuffix('.parquet')}_examples.parquet")


def faithfulness_of(values: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Faithfulness of every column of ``values`` (fact x circuit, with "full" and "empty" among the circuits).

    Row 0 is the estimate. The other rows are one per resample of the facts; a resample serves all circuits.
    """
    matrix = values.to_numpy(dtype=float)
    means = pd.DataFrame(
        np.concatenate([matrix.mean(0, keepdims=True), resampled_means(matrix, seed)]), columns=values.columns
    )
    effect = means["full"] - means["empty"]
    if abs(effect[0]) <= MINIMAL_EFFECT:
        return means * np.nan
    return means.sub(means["empty"], axis=0).div(effect, axis=0)  # a resample may have an effect of 0


def estimated(name: str, drawn: pd.Series | Float[np.ndarray, " drawn"]) -> dict[str, float]:
    """A figure and its 95% interval as columns of a table; ``drawn`` is the estimate and then its resamples."""
    values = np.asarray(drawn)
    return with_interval(name, values[0], values[1:])


def evaluate(
    model: Model,
    circuits: Circuits,
    splits: Mapping[str, Sequence[TokenPair]],
    *,
    reference: Sequence[TokenPair] = (),
    progress: bool = False,
    **options: Any,
) -> Evaluation:
    """Run each circuit alone on each split; "full" and "empty" are always among the rows.

    Args:
        circuits: by name, plain or ``Labelled`` (``random_baselines``, ``circuits_by_size``, ``complements``).
        reference: pairs whose clean prompts give the means of a mean intervention (those of discovery, not held-out ones).
        options: fields of ``EvaluateOptions``.

    Example:
        >>> circuits = {"circuit": circuit} | kc.random_baselines(circuit, 10)
        >>> evaluation = kc.evaluate(model, circuits, {"discovery": task.discovery, "held_out": task.test})
        >>> evaluation.row("circuit", "held_out")["faithfulness"]

    Raises:
        MethodError: an option out of range, or a circuit of the name "full" or "empty".
    """
    asked, decoder, named = EvaluateOptions.of(options), model.residual, labelled(circuits)
    metric = get_metric(asked.metric)
    means = reference_means(decoder, asked.intervention, reference, asked.batch_size, asked.full_answer)
    frames = [
        _measure(logits, full, batch, metric).assign(circuit=name, split=split)
        for split, pairs in splits.items()
        for name, logits, full, batch in _runs(decoder, named, pairs, means, asked, progress)
    ]
    examples = pd.concat(frames, ignore_index=True)
    examples["fact"] = examples.groupby(["circuit", "split"]).cumcount()
    edges = decoder.graph().edges
    named |= {"full": Labelled(Circuit(decoder.graph(), edges), "full")}
    named |= {"empty": Labelled(Circuit(decoder.graph(), torch.zeros_like(edges)), "empty")}
    return Evaluation(_table(examples, named, metric, asked.seed), examples, metric)


def metric_values(
    model: Model,
    circuits: Circuits,
    pairs: Sequence[TokenPair],
    *,
    reference: Sequence[TokenPair] = (),
    progress: bool = False,
    **options: Any,
) -> pd.DataFrame:
    """The metric alone, fact x circuit, with "full" and "empty" among the circuits; as ``evaluate`` otherwise.

    For many circuits of which nothing else is asked.
    """
    asked = EvaluateOptions.of(options)
    metric = get_metric(asked.metric)
    means = reference_means(model.residual, asked.intervention, reference, asked.batch_size, asked.full_answer)
    values: dict[str, list[Tensor]] = {}
    for name, logits, full, batch in _runs(model.residual, labelled(circuits), pairs, means, asked, progress):
        values.setdefault(name, []).append(metric(logits, batch, full).double().cpu())
    return pd.DataFrame({name: torch.cat(parts).numpy() for name, parts in values.items()})


def _runs(
    decoder: Decoder,
    circuits: Mapping[str, Labelled],
    pairs: Sequence[TokenPair],
    means: Means | None,
    asked: EvaluateOptions,
    progress: bool,
) -> Iterator[tuple[str, Tensor, Tensor, Batch]]:
    """Name, logits, the full model's logits and batch of every run: per batch "full", "empty" and every circuit."""
    taken = {"full", "empty"} & circuits.keys()
    if taken:
        raise MethodError(f"a circuit is named {taken.pop()!r}, as the full model or the empty circuit: rename it")
    graph = decoder.graph()
    masks = {"empty": (graph, torch.zeros_like(graph.edges))}
    masks |= {name: (one.circuit.graph, one.circuit.mask) for name, one in circuits.items()}
    with tqdm(total=len(pairs) * len(masks), desc="running circuits", unit="run", disable=not progress) as bar:
        for batch in batches(pairs, asked.batch_size, asked.full_answer, decoder.device):
            prefix = shared_prefix(decoder, batch, asked.intervention)
            ablated = ablation(decoder, asked.intervention, batch, means, prefix)
            full = full_logits(decoder, batch, prefix)
            yield "full", full, full, batch
            for name, (graph, mask) in masks.items():
                yield name, run_circuit(decoder, graph, mask, batch, ablated, prefix), full, batch
                bar.update(len(batch))


def _measure(logits: Tensor, full: Tensor, batch: Batch, metric: Metric) -> pd.DataFrame:
    values = {
        "value": metric(logits, batch, full),
        "probability": METRICS["probability"](logits, batch),
        "rank": answer_rank(logits, batch),
        "kl": METRICS["kl"](logits, batch, full),
    }
    return pd.DataFrame({key: value.double().cpu().numpy() for key, value in values.items()})


def _table(examples: pd.DataFrame, circuits: Mapping[str, Labelled], metric: Metric, seed: int) -> pd.DataFrame:
    rows = []
    for split, facts in examples.groupby("split", sort=False):
        faithfulness = faithfulness_of(facts.pivot(index="fact", columns="circuit", values="value"), seed)
        for name, group in facts.groupby("circuit", sort=False):
            one = circuits[str(name)]
            rows.append(
                {
                    "circuit": name,
                    **one.columns(),
                    "split": split,
                    "n_edges": one.circuit.n_edges,
                    "share": one.circuit.share,
                    "n": len(group),
                    "metric": metric.name,
                    "value": group["value"].mean(),
                    **estimated("faithfulness", faithfulness[name]),
                    "hit_at_10": (group["rank"] <= 10).mean(),
                    "rank_median": group["rank"].median(),
                    "probability": group["probability"].mean(),
                    "kl": group["kl"].mean(),
                }
            )
    return pd.DataFrame(rows)
