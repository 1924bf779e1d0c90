"""Do heads of a class matter more than others, and are they the same heads for every relation?

Ablation: the class beside as many random heads of the same layers. A head is ablated in all it writes: every edge that
leaves it carries its mean over the reference facts (those of discovery), and everything after it runs again. What counts is
the answer's probability on facts that were not used to find the class.

Recurrence: in how many relations a head is of a class, beside heads drawn at random, as many for every relation.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from kc_lib.components.attention import Head, check_heads, head_names
from kc_lib.components.circuit_table import ablated_values
from kc_lib.errors import MethodError
from kc_lib.graph import Graph
from kc_lib.heads.classes import HeadClasses
from kc_lib.heads.head_scores import GeneralHeadScores
from kc_lib.heads.options import AblationOptions
from kc_lib.metrics import Metric
from kc_lib.models.model import Model
from kc_lib.results import Result
from kc_lib.stats import empirical_p, interval, resampled_means
from kc_lib.tasks.batches import TokenPair
from kc_lib.tasks.task import Task

KINDS = ("mover", "relation")  # the classes that are ablated
NAMED = 6  # heads named in a headline


@dataclass(frozen=True)
class HeadAblation(Result):
    """The metric of every fact (row) in the full model, without the heads, and without each random set (columns)."""

    columns = ("full", "heads")

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


def ablate_heads(
    model: Model,
    heads: Sequence[Head],
    pairs: Sequence[TokenPair],
    reference: Sequence[TokenPair],
    *,
    metric: str | Metric = "probability",
    progress: bool = False,
    **options: Any,
) -> HeadAblation:
    """The metric on ``pairs`` without some heads, and without as many random other heads of the same layers.

    Args:
        reference: facts over which a head's mean output is taken, those of discovery.
        options: fields of ``AblationOptions``.

    Raises:
        MethodError: no heads, a head the model does not have, or layers with no other head to draw.
    """
    asked = AblationOptions.of(options)
    if not heads:
        raise MethodError("no heads to ablate: the class is empty")
    check_heads(model.residual, heads)
    graph = model.residual.graph()
    sets = {"heads": head_names(heads)}
    sets |= {f"random #{i + 1}": head_names(random_heads(graph, heads, asked.seed + i)) for i in range(asked.n_random)}
    values = ablated_values(
        model,
        sets,
        pairs,
        metric=metric,
        intervention="mean",
        reference=reference,
        batch_size=asked.batch_size,
        progress=progress,
    )
    return HeadAblation(values, len(heads), metric if isinstance(metric, str) else metric.name)


def ablate_classes(
    model: Model,
    classes: Mapping[str, HeadClasses],
    tasks: Mapping[str, Task],
    keep: Callable[..., HeadAblation],
    **options: Any,
) -> dict[str, HeadAblation]:
    """Every class that has heads, ablated on the facts that did not find it, by "relation: class".

    Args:
        keep: ``run.keep``, which keeps each ablation in ``ablation_<task>_<class>.parquet``.
        options: as ``ablate_heads``.
    """
    ablations = {}
    for kind in KINDS:
        for name, found in classes.items():
            task, heads = tasks[name], found.of_class(kind)
            if heads:
                facts, kept = task.test or task.discovery, f"ablation_{task.name}_{kind}.parquet"
                ablations[f"{name}: {kind}"] = keep(kept, ablate_heads, model, heads, facts, task.discovery, **options)
    return ablations


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
        n_recurring = sum(count >= least for count in counts.values())
        null = (drawn >= least).sum(1)
        rows.append((least, n_recurring, float(null.mean()), empirical_p(n_recurring, null.tolist())))
    return pd.DataFrame(rows, columns=["relations", "heads", "expected", "p"])


def head_headline(
    classes: Mapping[str, HeadClasses], ablations: Mapping[str, HeadAblation], general: GeneralHeadScores, seed: int = 0
) -> dict[str, str]:
    """The figures that matter, by relation and class (``ablations`` are named "relation: class"), and by general score."""
    figures = {}
    for name, found in classes.items():
        for kind in KINDS:
            figures[f"{kind} heads, {name}"] = _listed(found.of_class(kind))
            ablation = ablations.get(f"{name}: {kind}")
            if ablation is not None:
                lost, random, _ = ablation.summary(seed).to_dict("records")
                figures[f"without them, {name}, {kind}"] = (
                    f"{ablation.metric} {-lost['drop']:+.3f} [{-lost['drop_high']:+.3f}, {-lost['drop_low']:+.3f}], "
                    f"random heads {-random['drop']:+.3f} (p = {lost['p']:.2f}, n = {lost['n_facts']} facts)"
                )
    return figures | {f"{name} heads": _listed(scores.heads()) for name, scores in general.scores.items()}


def _listed(heads: list[Head]) -> str:
    more = f" and {len(heads) - NAMED} more" if len(heads) > NAMED else ""
    return ", ".join(head_names(heads[:NAMED])) + more or "none"
