"""Is a circuit faithful? Circuits run alone, on the facts they were found on and on held-out ones, beside their nulls.

Faithfulness is (m(circuit) - m(empty)) / (m(full) - m(empty)), with m the metric's mean over facts, "empty" the circuit
without edges (with patching: the model on the corrupted prompts) and "full" the model itself. Its interval resamples the
facts. Where the full model's effect is next to nothing, faithfulness is undefined and reported as NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from kc_lib.graph import Circuit
from kc_lib.kernels.circuit_run import run_circuit
from kc_lib.kernels.runs import full_logits, reference_means
from kc_lib.kernels.writers import ablation
from kc_lib.methods.attribution import EdgeScores
from kc_lib.methods.selection import random_circuit, select
from kc_lib.metrics import METRICS, Metric, answer_rank, get_metric
from kc_lib.stats import bootstrap_ratio
from kc_lib.tasks import Batch, TokenPair, batches
from kc_lib.wiring import wiring_of

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # MIB's (Mueller et al. 2025, section 3)
MINIMAL_EFFECT = 1e-6


@dataclass(frozen=True)
class Evaluation:
    """What every circuit gives on every split.

    ``examples`` has one row per circuit, split and fact: value (of the metric), probability, rank, kl. ``summary`` has one
    row per circuit and split: the means over facts, Hit@10, faithfulness with its 95% interval.
    """

    summary: pd.DataFrame
    examples: pd.DataFrame
    metric: Metric

    def save(self, folder: str | Path) -> None:
        """Write ``evaluation.parquet`` (summary) and ``evaluation_examples.parquet``."""
        self.summary.to_parquet(Path(folder) / "evaluation.parquet", index=False)
        self.examples.to_parquet(Path(folder) / "evaluation_examples.parquet", index=False)

    def row(self, circuit: str, split: str) -> pd.Series:
        """One circuit's summary on one split."""
        found = self.summary[(self.summary["circuit"] == circuit) & (self.summary["split"] == split)]
        return found.iloc[0]


def evaluate_circuits(
    model: TransformerBridge,
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
        MethodError: unknown metric or intervention.
    """
    metric = get_metric(metric)
    wiring = wiring_of(model)
    means = reference_means(wiring, intervention, reference, batch_size, full_answer)
    frames = []
    total = sum(len(pairs) for pairs in splits.values()) * (len(circuits) + 1)
    with tqdm(total=total, desc="running circuits", unit="run", disable=not progress) as bar:
        for split, pairs in splits.items():
            for batch in batches(pairs, batch_size, full_answer, wiring.device):
                ablated = ablation(wiring, intervention, batch, means)
                full = full_logits(wiring, batch)
                frames.append(_measure("full", split, full, full, batch, metric))
                for name, circuit in (("empty", None), *circuits.items()):
                    graph = wiring.graph() if circuit is None else circuit.graph
                    mask = torch.zeros_like(graph.edges) if circuit is None else circuit.mask
                    logits = run_circuit(wiring, graph, mask, batch, ablated)
                    frames.append(_measure(name, split, logits, full, batch, metric))
                    bar.update(len(batch))
    examples = pd.concat(frames, ignore_index=True)
    examples["fact"] = examples.groupby(["circuit", "split"]).cumcount()
    sizes = {name: (circuit.n_edges, circuit.share) for name, circuit in circuits.items()}
    n_edges = wiring.graph().n_edges
    sizes |= {"full": (n_edges, 1.0), "empty": (0, 0.0)}
    return Evaluation(_summarise(examples, sizes, metric, seed), examples, metric)


def faithfulness_over_sizes(
    model: TransformerBridge,
    scores: EdgeScores,
    splits: Mapping[str, Sequence[TokenPair]],
    *,
    selection: str = "absolute",
    shares: Sequence[float] = SHARES,
    n_random: int = 3,
    metric: str | Metric = "logit_difference",
    intervention: str = "patching",
    reference: Sequence[TokenPair] = (),
    full_answer: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Faithfulness of the circuits a ranking gives at each share of the edges, beside random circuits of those sizes.

    Rows are named ``top 0.005`` and ``random 0.005 #1``; the whole graph needs no null and has none.
    """
    circuits = {}
    for share in shares:
        circuit = select(scores, selection, float(share))
        circuits[f"top {share:g}"] = circuit
        if share < 1.0:
            for draw in range(n_random):
                null = random_circuit(scores.graph, circuit.n_edges, seed=seed + draw)
                circuits[f"random {share:g} #{draw + 1}"] = null
    return evaluate_circuits(
        model,
        circuits,
        splits,
        metric=metric,
        intervention=intervention,
        reference=reference,
        full_answer=full_answer,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )


def _measure(name: str, split: str, logits: Tensor, full: Tensor, batch: Batch, metric: Metric) -> pd.DataFrame:
    values = {
        "value": metric(logits, batch, full),
        "probability": METRICS["probability"](logits, batch),
        "rank": answer_rank(logits, batch),
        "kl": METRICS["kl"](logits, batch, full),
    }
    frame = pd.DataFrame({key: value.double().cpu().numpy() for key, value in values.items()})
    return frame.assign(circuit=name, split=split)


def _summarise(
    examples: pd.DataFrame, sizes: Mapping[str, tuple[int, float]], metric: Metric, seed: int
) -> pd.DataFrame:
    rows = []
    by_circuit = {key: group.sort_values("fact") for key, group in examples.groupby(["circuit", "split"], sort=False)}
    for (name, split), group in by_circuit.items():
        full = by_circuit[("full", split)]["value"].to_numpy()
        empty = by_circuit[("empty", split)]["value"].to_numpy()
        value = group["value"].to_numpy()
        ratio = (float("nan"),) * 3
        if abs(np.mean(full - empty)) > MINIMAL_EFFECT:
            ratio = bootstrap_ratio(value - empty, full - empty, seed)
        rows.append(
            {
                "circuit": name,
                "kind": name.partition(" ")[0],
                "split": split,
                "n_edges": sizes[name][0],
                "share": sizes[name][1],
                "n": len(group),
                "metric": metric.name,
                "value": value.mean(),
                "faithfulness": ratio[0],
                "faithfulness_low": ratio[1],
                "faithfulness_high": ratio[2],
                "hit_at_10": (group["rank"] <= 10).mean(),
                "rank_median": group["rank"].median(),
                "probability": group["probability"].mean(),
                "kl": group["kl"].mean(),
            }
        )
    return pd.DataFrame(rows)
