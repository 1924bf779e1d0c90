"""Do heads of a class matter more than others, and are they the same heads for every relation?

Ablation: the class beside as many random heads of the same layers. A head is ablated in all it writes: every edge that
leaves it carries its mean over the reference facts (those of discovery), and everything after it runs again. What counts is
the answer's probability on facts that were not used to find the class.

Recurrence: in how many relations a head is of a class, beside heads drawn at random, as many for every relation.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kc_lib.components.attention import check_heads
from kc_lib.components.node_ablation import ablated_values
from kc_lib.errors import MethodError
from kc_lib.graph import Graph
from kc_lib.metrics import Metric
from kc_lib.models.model import Model
from kc_lib.results import load_table, save_table
from kc_lib.stats import empirical_p, interval, resampled_means
from kc_lib.tasks.batches import TokenPair

Head = tuple[int, int]  # layer, head


@dataclass(frozen=True)
class HeadAblation:
    """The metric of every fact (row) in the full model, without the heads, and without each random set (columns)."""

    values: pd.DataFrame
    n_heads: int
    metric: str

    def summary(self, seed: int = 0) -> pd.DataFrame:
        """The drop of the metric by the heads and by the random sets, with 95% bootstrap intervals over facts.

        ``more`` is how much more the heads cost than the random sets' mean, on the same facts; ``p`` the share of sets that
        cost at least as much, the heads themselves counted.
        """
        drops = pd.DataFrame({name: self.values["full"] - self.values[name] for name in self.values if name != "full"})
        null = drops.drop(columns="heads")
        columns = pd.DataFrame({"heads": drops["heads"], "random": null.mean(axis=1)})
        columns["more"] = columns["heads"] - columns["random"]
        low, high = interval(resampled_means(columns.to_numpy(), seed))
        p = empirical_p(float(drops["heads"].mean()), null.mean().tolist())
        rows = {"drop": columns.mean().to_numpy(), "drop_low": low, "drop_high": high}
        frame = pd.DataFrame(rows | {"n_heads": self.n_heads, "n_facts": len(drops), "n_random": null.shape[1]})
        frame.insert(0, "ablated", columns.columns)
        frame["p"] = [p, float("nan"), float("nan")]
        return frame

    def save(self, path: str | Path) -> Path:
        """Write the values as parquet, the rest in its metadata."""
        return save_table(self.values, path, {"n_heads": self.n_heads, "metric": self.metric})

    @classmethod
    def load(cls, path: str | Path) -> HeadAblation:
        """Read what ``save`` wrote."""
        frame, about = load_table(path)
        return cls(frame, about["n_heads"], about["metric"])


def ablate_heads(
    model: Model,
    heads: Sequence[Head],
    pairs: Sequence[TokenPair],
    reference: Sequence[TokenPair],
    *,
    metric: str | Metric = "probability",
    n_random: int = 19,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> HeadAblation:
    """The metric on ``pairs`` without some heads, and without as many random other heads of the same layers.

    Raises:
        MethodError: no heads, a head the model does not have, or layers with no other head to draw.
    """
    decoder = model.residual
    graph = decoder.graph()
    if not heads:
        raise MethodError("no heads to ablate: the class is empty")
    check_heads(graph.n_layers, graph.n_heads, heads)
    sets = {"heads": node_names(heads)}
    sets |= {f"random #{draw + 1}": node_names(random_heads(graph, heads, seed + draw)) for draw in range(n_random)}
    values = ablated_values(
        model,
        sets,
        pairs,
        metric=metric,
        intervention="mean",
        reference=reference,
        batch_size=batch_size,
        progress=progress,
    )
    return HeadAblation(values, len(heads), metric if isinstance(metric, str) else metric.name)


def random_heads(graph: Graph, heads: Sequence[Head], seed: int) -> list[Head]:
    """As many other heads of the same layers; where a class takes over half a layer, as many as the layer has left.

    Raises:
        MethodError: layers whose heads are all in the class.
    """
    generator = random.Random(seed)
    drawn: list[Head] = []
    for layer, n in sorted(Counter(layer for layer, _ in heads).items()):
        others = [head for head in range(graph.n_heads) if (layer, head) not in heads]
        drawn += [(layer, head) for head in generator.sample(others, min(n, len(others)))]
    if not drawn:
        raise MethodError("the class takes every head of its layers: there is none to compare it with")
    return drawn


def node_names(heads: Sequence[Head]) -> list[str]:
    """Heads as nodes of the graph."""
    return [f"a{layer}.h{head}" for layer, head in heads]


def recurrence(classes: Mapping[str, Sequence[Head]], n_heads: int, n_null: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """How many heads are of a class in at least so many relations, and how many would be by chance.

    ``classes`` gives each relation's heads, ``n_heads`` is how many heads the model has. One row per number of relations:
    ``heads`` that are in at least so many, ``expected`` by chance, ``p``.
    """
    sizes = [len(set(heads)) for heads in classes.values()]
    counts = Counter(head for heads in classes.values() for head in set(heads))
    generator = np.random.default_rng(seed)
    drawn = np.zeros((n_null, n_heads), dtype=int)
    for size in sizes:
        chosen = generator.random((n_null, n_heads)).argpartition(max(size - 1, 0), 1)[:, :size]
        np.put_along_axis(drawn, chosen, np.take_along_axis(drawn, chosen, 1) + 1, 1)
    rows = []
    for least in range(1, len(sizes) + 1):
        found = sum(count >= least for count in counts.values())
        null = (drawn >= least).sum(1)
        rows.append((least, found, float(null.mean()), empirical_p(found, null.tolist())))
    return pd.DataFrame(rows, columns=["relations", "heads", "expected", "p"])
