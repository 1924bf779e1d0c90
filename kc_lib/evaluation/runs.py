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
from kc_lib.kernels.context import shared_context
from kc_lib.kernels.runs import full_logits, reference_means
from kc_lib.kernels.writers import ablation
from kc_lib.methods.attribution import EdgeScores
from kc_lib.methods.selection import random_circuit, select
from kc_lib.metrics import METRICS, Metric, answer_rank, get_metric
from kc_lib.stats import bootstrap_ratio, empirical_p
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

    def row(self, circuit: str, split: str) -> pd.Series:
        """One circuit's summary on one split."""
        found = self.summary[(self.summary["circuit"] == circuit) & (self.summary["split"] == split)]
        return found.iloc[0]


def _examples_path(path: Path) -> Path:
    return path.with_name(f"{path.name.lstrip('.').removesuffix('.parquet')}_examples.parquet")


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
                context = shared_context(wiring, batch, intervention)
                ablated = ablation(wiring, intervention, batch, means, context)
                full = full_logits(wiring, batch, context)
                frames.append(_measure("full", split, full, full, batch, metric))
                for name, circuit in (("empty", None), *circuits.items()):
                    graph = wiring.graph() if circuit is None else circuit.graph
                    mask = torch.zeros_like(graph.edges) if circuit is None else circuit.mask
                    logits = run_circuit(wiring, graph, mask, batch, ablated, context)
                    frames.append(_measure(name, split, logits, full, batch, metric))
                    bar.update(len(batch))
    examples = pd.concat(frames, ignore_index=True)
    examples["fact"] = examples.groupby(["circuit", "split"]).cumcount()
    sizes = {name: (circuit.n_edges, circuit.share) for name, circuit in circuits.items()}
    n_edges = wiring.graph().n_edges
    sizes |= {"full": (n_edges, 1.0), "empty": (0, 0.0)}
    return Evaluation(_summarise(examples, sizes, metric, seed), examples, metric)


def circuits_by_size(
    scores: EdgeScores,
    selection: str = "absolute",
    shares: Sequence[float] = SHARES,
    n_random: int = 3,
    seed: int = 0,
) -> dict[str, Circuit]:
    """The circuits a ranking gives at each share of the edges, and random ones of those sizes.

    Named ``top 0.005`` and ``random 0.005 #1``; the whole graph needs no null and has none. As in MIB, a share counts the
    edges before pruning.
    """
    circuits = {}
    for share in shares:
        circuits[f"top {share:g}"] = select(scores, selection, float(share), fill=False)
    for share in shares:
        if share < 1.0:
            for draw, null in enumerate(random_nulls(circuits[f"top {share:g}"], n_random, seed).values(), start=1):
                circuits[f"random {share:g} #{draw}"] = null
    return circuits


def random_nulls(circuit: Circuit, n: int, seed: int = 0) -> dict[str, Circuit]:
    """``n`` random connected circuits of the circuit's size, named ``null #1`` and so on."""
    return {f"null #{draw + 1}": random_circuit(circuit.graph, circuit.n_edges, seed + draw) for draw in range(n)}


def headline(evaluation: Evaluation, circuit: Circuit, split: str) -> dict[str, str]:
    """The figures that matter: size, faithfulness with its interval, and that of random circuits of the same size."""
    own, nulls = evaluation.row("circuit", split), _nulls(evaluation, split)
    edges, nodes = circuit.graph.n_edges, len(circuit.nodes)
    random = "none drawn"
    if len(nulls):
        mean, low, high = (round(value, 3) + 0.0 for value in (nulls.mean(), nulls.min(), nulls.max()))  # no -0.000
        random = f"{mean:.3f} ({low:.3f} to {high:.3f}, n = {len(nulls)})"
    return {
        "size": f"{circuit.n_edges} of {edges} edges ({circuit.share:.2%}), {nodes} nodes",
        f"faithfulness, {split}": (
            f"{own.faithfulness:.3f} [{own.faithfulness_low:.3f}, {own.faithfulness_high:.3f}] (95%, n = {own.n} facts)"
        ),
        "faithfulness, random circuits": random,
    }


def conclusion(evaluation: Evaluation, circuit: Circuit, split: str) -> str:
    """One paragraph (Markdown) that says what was found and what it does not say."""
    own, nulls = evaluation.row("circuit", split), _nulls(evaluation, split)
    facts = f"{own.n} {'held-out' if split == 'held_out' else split} facts"
    if np.isnan(own.faithfulness):
        return (
            f"On {facts} the corrupted prompts change the metric by next to nothing, so faithfulness is undefined: choose "
            "another task, metric or intervention."
        )
    against = "No random circuits were drawn."
    if len(nulls):
        p = empirical_p(own.faithfulness, nulls.tolist())
        against = (
            f"Random circuits of that size have {nulls.mean():.2f} on average and {nulls.max():.2f} at most "
            f"(p = {p:.2f}, {len(nulls)} draws)."
        )
    held_out = "" if split == "held_out" else " No facts were held out, so the circuit is judged on those it was found on."
    return (
        f"On {facts} the circuit of **{circuit.n_edges:,} edges ({circuit.share:.2%})** has a faithfulness of "
        f"**{own.faithfulness:.2f}** (95% interval {own.faithfulness_low:.2f} to {own.faithfulness_high:.2f}).{held_out} "
        f"{against} The right answer is among its first ten tokens for {own.hit_at_10:.0%} of the facts.\n\n"
        "Faithful means that these edges *suffice* for this metric under this intervention. It does not mean that no other "
        "set would, or that every edge in it is needed."
    )


def _nulls(evaluation: Evaluation, split: str) -> pd.Series:
    summary = evaluation.summary
    return summary.loc[(summary["kind"] == "null") & (summary["split"] == split), "faithfulness"]


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
    groups = examples.groupby(["circuit", "split"], sort=False)
    by_circuit = {(str(name), str(split)): group.sort_values("fact") for (name, split), group in groups}
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
