"""Component swap: what single heads and MLPs of a later checkpoint (the donor) do in an earlier one (the host).

The task's metric, on the host with the donor's weights in one component's place, beside the host's and the donor's own
(Tigges et al. 2024, arXiv:2407.10827). The head of ``swapped.py`` says what is moved and what stays.

The null is *another* component of the donor in the same place: a head of the same layer, or the MLP of another layer. The
host loses the same component as in the swap and is given weights of the same age, so what the swap does beyond the
nulls is owed to *which* component came in. A head of step 0, or none at all, would show only that the host misses its
own. That a swap does nothing does not say that the head has learned nothing: it may need others that the host lacks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from kc_lib.errors import MethodError, ModelError, check_counts
from kc_lib.graph import Graph
from kc_lib.metrics import get_metric, is_right
from kc_lib.models.model import Model
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.logits import full_logits
from kc_lib.stats import interval, resampled_means
from kc_lib.tasks.batches import TokenPair, batches
from kc_lib.training.drawn import DrawnTasks, metric_of
from kc_lib.training.measures import direct_rows
from kc_lib.training.options import SwapOptions
from kc_lib.training.over_training import Measure
from kc_lib.training.result import TrainingResult, measured_row, measured_rows
from kc_lib.training.swapped import Swap, check_exchangeable, component_place, swapped_logits

SWAPPED, N_NULL = SwapOptions.swap_heads, SwapOptions.n_null
ACCURACY = "accuracy"
NO_NULL = "the donor has no other component of the kind to put there"


def swap_measures(donor: Model, tasks: DrawnTasks, **options: Any) -> dict[str, Measure]:
    """The measure "swap", to be measured beside those of ``training_measures``; none where no swaps are asked for.

    Args:
        options: fields of ``SwapOptions``.

    Raises:
        MethodError: as ``swap_measure``, or an option out of range.
    """
    asked = SwapOptions.of(options)
    components = asked.swap_heads if asked.components is None else asked.components
    if components == 0:
        return {}
    measure = swap_measure(donor, tasks, components, metric=asked.metric, n_null=asked.n_null, batch_size=asked.batch_size)
    return {"swap": measure}


def swap_measure(
    donor: Model,
    tasks: DrawnTasks,
    components: int | Sequence[str] = SWAPPED,
    *,
    metric: str | None = None,
    n_null: int = N_NULL,
    batch_size: int = 64,
) -> Measure:
    """A measure for ``over_training`` in which every checkpoint is the host, and the donor stays in memory beside it.

    Args:
        components: heads and MLPs by name ("a3.h1", "m2"), or how many of ``strongest_heads`` of the donor.
        metric: None takes the task's own.
        n_null: components that are put in the same place, one at a time; as many as there are, where there are fewer.

    Raises:
        MethodError: a component that the donor does not have or that is named twice, none at all, an unknown metric, or a
            number out of range.
    """
    check_counts(1, n_null=n_null, batch_size=batch_size)
    if metric is not None:
        get_metric(metric)
    if isinstance(components, int):
        components = strongest_heads(donor, tasks, components, metric=metric, batch_size=batch_size)
    graph, named = donor.residual.graph(), tuple(components)
    if not named or len(set(named)) < len(named):
        raise MethodError(f"components to swap are {' '.join(named) or 'none'}: name some, and each once")
    for component in named:
        component_place(graph, component)
    return partial(swap_rows, donor=donor, components=named, metric=metric, n_null=n_null, batch_size=batch_size)


def strongest_heads(
    model: Model, tasks: DrawnTasks, n: int = SWAPPED, *, metric: str | None = None, batch_size: int = 32
) -> tuple[str, ...]:
    """The heads with the largest direct effects, by absolute mean over draws: of every task the first, then the second, ...

    Raises:
        MethodError: n is no whole number, or not between 1 and the number of the model's heads.
    """
    check_counts(1, n=n)
    graph = model.residual.graph()
    if n > graph.n_layers * graph.n_heads:
        raise MethodError(f"{n} heads are asked for; the model has {graph.n_layers * graph.n_heads}")
    effects = direct_rows(model, tasks, metric=metric, batch_size=batch_size)
    means = effects.groupby(["task", "part"], sort=False)["value"].mean().abs()
    ranked = [means[task].sort_values(ascending=False, kind="stable").index for task in tasks.names]
    return tuple(dict.fromkeys(head for same_rank in zip(*ranked, strict=True) for head in same_rank))[:n]


def swap_rows(
    model: Model,
    tasks: DrawnTasks,
    *,
    donor: Model,
    components: Sequence[str],
    metric: str | None = None,
    n_null: int = N_NULL,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Every swap into ``model``, the host, on all prompts of every draw; the part is the component.

    Quantities ``of`` the metric and of ``accuracy`` (share of prompts whose best right token beats all wrong ones):

    - ``host``, ``donor``: their own values, with 95% intervals over prompts;
    - ``change``: swapped minus host on the same prompts, with its interval;
    - ``null_change``: the same with other components of the donor in that place; their mean, lowest and highest.

    Raises:
        ModelError: host and donor are not of one shape.
        MethodError: a component that they do not have.
    """
    host, donor_decoder = model.residual, donor.residual
    try:
        check_exchangeable(host, donor_decoder)
    except ModelError as error:
        raise ModelError(f"{donor.name} into {model.name}: {error}") from error
    graph, rows = host.graph(), []
    for draw in tasks.draws:
        nulls = {name: null_components(graph, name, n_null, draw.seed) for name in components}
        swaps = [(name, source) for name in components for source in (name, *nulls[name])]
        pairs = [*draw.task.discovery, *draw.task.test]
        metric_name = metric_of(draw, metric)
        both_values = _values(host, donor_decoder, swaps, pairs, metric_name, batch_size)
        for of, values in zip((metric_name, ACCURACY), both_values, strict=True):
            figures = np.concatenate([values[:, :2], values[:, 2:] - values[:, :1]], 1)
            host_figures, donor_figures, *changes = zip(
                figures.mean(0), *interval(resampled_means(figures, draw.seed)), strict=True
            )
            change_of = dict(zip(swaps, changes, strict=True))
            rows += [measured_row(draw, "host", *host_figures, of=of), measured_row(draw, "donor", *donor_figures, of=of)]
            for component in components:
                rows.append(measured_row(draw, "change", *change_of[component, component], component, of=of))
                others = [change_of[component, source][0] for source in nulls[component]]
                null: dict[str, Any] = {"note": NO_NULL}
                if others:
                    null = {"value": np.mean(others), "low": min(others), "high": max(others)}
                rows.append(measured_row(draw, "null_change", part=component, of=of, **null))
    return measured_rows(rows)


def null_components(graph: Graph, component: str, n: int, seed: int = 0) -> list[str]:
    """Other components that can take a component's place, drawn without replacement: heads of its layer, or other MLPs."""
    layer, head = component_place(graph, component)
    if head is None:
        others = [f"m{other}" for other in range(graph.n_layers) if other != layer]
    else:
        others = [f"a{layer}.h{other}" for other in range(graph.n_heads) if other != head]
    return random.Random(f"{seed} {component}").sample(others, min(n, len(others)))


@torch.no_grad()
def _values(
    host: Decoder, donor: Decoder, swaps: Sequence[Swap], pairs: Sequence[TokenPair], metric: str, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The metric and whether it is right, of every prompt (row) in the host, the donor and every swap (columns)."""
    parts = []
    for batch in batches(pairs, batch_size, device=host.device):
        runs = swapped_logits(host, donor, swaps, batch)
        all_logits = (next(runs), full_logits(donor, batch), *runs)
        measured = [(get_metric(metric)(logits, batch), is_right(logits, batch)) for logits in all_logits]
        parts.append(torch.stack([torch.stack([one.double() for one in both]) for both in measured], -1).cpu().numpy())
    values, right = np.concatenate(parts, 1)
    return values, right


def swap_changes(result: TrainingResult) -> pd.DataFrame:
    """What every swap changed, over draws: one row per task, measured thing (``of``), part and step of the host.

    Columns beside these: tokens; host, donor and change (means over draws); change_low and change_high (lowest and highest
    draw); null (mean), null_low and null_high (lowest and highest of all nulls of all draws); n (draws); beats_nulls
    (whether in every draw the change is above that draw's nulls, and its interval over prompts above 0).

    Raises:
        MethodError: no swaps in the result.
    """
    rows = result.of("swap")
    if rows.empty:
        raise MethodError("the result has no swaps: measure them as well (swaps.swap_measure)")
    draw, ends = ["task", "of", "step", "seed"], {"value": "null", "low": "null_low", "high": "null_high"}
    columns = [*draw, "part", "tokens", "value", "low"]
    changes = rows.loc[rows["quantity"] == "change", columns].rename(columns={"value": "change"})
    nulls = rows.loc[rows["quantity"] == "null_change", [*draw, "part", *ends]].rename(columns=ends)
    changes = changes.merge(nulls, on=[*draw, "part"])
    for whose in ("host", "donor"):
        values = rows.loc[rows["quantity"] == whose, [*draw, "value"]].rename(columns={"value": whose})
        changes = changes.merge(values, on=draw)
    changes["beats_nulls"] = (changes["change"] > changes["null_high"]) & (changes["low"] > 0)
    return (
        changes.groupby(["task", "of", "part", "step"], sort=False)
        .agg(
            tokens=("tokens", "first"),
            host=("host", "mean"),
            donor=("donor", "mean"),
            change=("change", "mean"),
            change_low=("change", "min"),
            change_high=("change", "max"),
            null=("null", "mean"),
            null_low=("null_low", "min"),
            null_high=("null_high", "max"),
            n=("change", "count"),
            beats_nulls=("beats_nulls", "all"),
        )
        .reset_index()
    )


def strongest_swaps(result: TrainingResult) -> pd.DataFrame:
    """Of every task and component the host in which the swap raises the metric most: that row of ``swap_changes``.

    Empty where there are no swaps.
    """
    if result.of("swap").empty:
        return pd.DataFrame(columns=["task", "change"])
    changes = swap_changes(result)
    changes = changes[changes["of"] != ACCURACY]
    rows = changes.loc[changes.groupby(["task", "part"], sort=False)["change"].idxmax()]
    return rows.drop(columns="tokens").reset_index(drop=True)
