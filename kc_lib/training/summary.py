"""What a training's figures say over time: bands over draws, circuits that stay or change, and what appears when.

Overlap of circuits is Jaccard's, of edges and of nodes, and weighted: sum of the smaller over sum of the larger |score| of
every edge, an edge outside a circuit having none (Tigges et al. 2024, arXiv:2407.10827, section 4). Only draws of one seed
are compared over time. Their exponentially weighted mean is 0.5 times the new value plus 0.5 times the old mean. Where a
checkpoint has no circuit there is no overlap, and the next one has none with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from kc_lib.errors import MethodError
from kc_lib.training.over_training import TrainingResult
from kc_lib.training.sizes import size_over_time
from kc_lib.training.swaps import strongest_swaps, swap_sentence

SHARE = 0.33  # of its maximum, at which a thing has appeared (Tigges et al. 2024, section 3.3)
ALPHA = 0.5
SIMILARITIES = ("edge_jaccard", "node_jaccard", "weighted_jaccard")
FROM_ZERO = ("logit_difference", "probability_difference")  # behaviours that are 0 where the model knows nothing
NAMED = 4  # heads named in a sentence


def over_draws(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean over draws of every figure, and its lowest and highest draw.

    One row per task, quantity, part and step: tokens, value, low, high, n (draws in which it is defined). Undefined in all:
    NaN, n 0. Intervals within draws are left out.
    """
    by = ["task", "quantity", "part", "step"]
    groups = frame.groupby(by, sort=False)
    found = groups["value"].agg(value="mean", low="min", high="max", n="count")
    return found.join(groups["tokens"].first()).reset_index().sort_values(by, kind="stable", ignore_index=True)


def similarities(result: TrainingResult, alpha: float = ALPHA) -> pd.DataFrame:
    """Overlap of every circuit with that of the checkpoint before, of the last checkpoint, and of other draws.

    One row per task, seed, step, against ("previous", "last", "other draws"; the last checkpoint is not held against itself)
    and quantity (``SIMILARITIES``): tokens, value, ewma (by step, of those that are defined; NaN for other draws).

    Raises:
        MethodError: alpha out of range, or a result without circuits.
    """
    if not 0 < alpha <= 1:
        raise MethodError(f"alpha is {alpha!r}; it must be above 0 and at most 1")
    rows = result.of("circuit")
    if rows.empty:
        raise MethodError("the result has no circuits to compare: measure 'circuit' as well")
    circuits = _circuits(rows)
    tokens = rows.groupby("step")["tokens"].first().to_dict()
    steps = result.steps
    found = []
    seeds = rows["seed"].unique().tolist()
    for task in rows["task"].unique().tolist():
        for seed in seeds:
            for place, step in enumerate(steps):
                here = circuits.get((task, seed, step))
                others = {"previous": [circuits.get((task, seed, steps[place - 1]))] if place else []}
                others["last"] = [circuits.get((task, seed, steps[-1]))] if step != steps[-1] else []
                others["other draws"] = [circuits.get((task, other, step)) for other in seeds if other != seed]
                for against, compared in others.items():
                    about = {"task": task, "seed": seed, "step": step, "tokens": tokens[step], "against": against}
                    overlaps = [_overlaps(here, other) for other in compared]
                    for name in SIMILARITIES:
                        found.append(about | {"quantity": name, "value": _mean([values[name] for values in overlaps])})
    frame = pd.DataFrame(found)
    smoothed = frame.groupby(["task", "seed", "against", "quantity"], sort=False)["value"].transform(
        lambda values: values.ewm(alpha=alpha, adjust=False, ignore_na=True).mean().where(values.notna())
    )
    return frame.assign(ewma=smoothed.where(frame["against"] != "other draws"))


def emergence(result: TrainingResult, share: float = SHARE) -> pd.DataFrame:
    """When things appear: the first checkpoint at which a figure reaches a share of its maximum over the training.

    Of heads every score and the direct effects, of behaviours ``FROM_ZERO``. One row per measure, task, quantity and part:
    maximum and step (of the mean over draws), tokens, step_low and step_high (of single draws), passes (a head's score ever
    counts as high, in any draw). What never rises above 0 has no step.

    Raises:
        MethodError: a share out of range.
    """
    if not 0 < share <= 1:
        raise MethodError(f"share is {share!r}; it must be above 0 and at most 1")
    columns = ["measure", "task", "quantity", "part", "maximum", "step", "tokens", "step_low", "step_high", "passes"]
    rows = pd.concat([result.of("behaviour", *FROM_ZERO), result.of("direct"), result.of("heads")])
    found = []
    for (measure, task, quantity, part), own in rows[rows["value"].notna()].groupby(
        ["measure", "task", "quantity", "part"], sort=False
    ):
        by_seed = own.pivot(index="step", columns="seed", values="value").sort_index()
        mean = by_seed.mean(axis=1)
        step = _first(mean, share)
        alone = [at for seed in by_seed if pd.notna(at := _first(by_seed[seed].dropna(), share))]
        tokens = own.set_index("step")["tokens"]
        found.append(
            {
                "measure": measure,
                "task": task,
                "quantity": quantity,
                "part": part,
                "maximum": float(mean.max()),
                "step": step,
                "tokens": tokens[tokens.index == step].iloc[0] if pd.notna(step) else pd.NA,
                "step_low": min(alone, default=np.nan),
                "step_high": max(alone, default=np.nan),
                "passes": bool(own["passes"].fillna(False).any()),
            }
        )
    return pd.DataFrame(found, columns=columns)


def training_headline(result: TrainingResult) -> dict[str, str]:
    """The figures that matter: per task when the behaviour appears, the last circuit, and how much circuits change."""
    figures = {}
    appeared = emergence(result)
    for row in _behaviours(appeared).to_dict("records"):
        figures[f"{row['task']} appears"] = f"step {_step_text(row)} ({shown(row['quantity'])})"
    if not result.of("circuit").empty:
        found = over_draws(result.of("circuit", "effect", "n_edges", "faithfulness", "null_faithfulness"))
        for task, own in found.groupby("task", sort=False):
            defined = own[(own["quantity"] == "n_edges") & (own["n"] > 0)]
            n_steps = own["step"].nunique()
            figures[f"circuits of {task}"] = f"defined at {len(defined)} of {n_steps} checkpoints"
            if len(defined):
                last = own[own["step"] == defined["step"].max()].set_index("quantity")
                figures[f"last circuit of {task}"] = (
                    f"{last.loc['n_edges', 'value']:.0f} edges, faithfulness {_band(last.loc['faithfulness'])}, random "
                    f"{_band(last.loc['null_faithfulness'])}"
                )
    for task, own in appeared[appeared["measure"] == "direct"].groupby("task", sort=False):
        (row,) = own.sort_values("maximum", ascending=False).head(1).to_dict("records")
        figures[f"strongest head of {task}"] = f"{row['part']} at {_step_text(row)}"
    for quantity, own in appeared[appeared["measure"] == "heads"].groupby("quantity", sort=False):
        passing = own[own["passes"]].sort_values("maximum", ascending=False)
        named = ", ".join(f"{row['part']} at {_step_text(row)}" for row in passing.head(NAMED).to_dict("records"))
        figures[f"{quantity} heads"] = named or "none passes"
    if not result.of("swap").empty:
        for row in strongest_swaps(result).sort_values("change").drop_duplicates("task", keep="last").to_dict("records"):
            figures[f"best swap for {row['task']}"] = (
                f"{row['part']} into step {row['step']}: {row['change']:+.2f} [{row['change_low']:.2f}, "
                f"{row['change_high']:.2f}], others there {row['null']:+.2f}; host {row['host']:.2f}, donor "
                f"{row['donor']:.2f}"
            )
    return figures


def training_conclusion(result: TrainingResult) -> str:
    """Paragraphs (Markdown) that say what appears when, how circuits grow and change, and what is not defined."""
    appeared = emergence(result)
    parts = []
    behaviours = _behaviours(appeared).sort_values("step").to_dict("records")
    if behaviours:
        named = ", ".join(f"{row['task']} at step {_step_text(row)}" for row in behaviours)
        parts.append(
            f"**Behaviours** reach {SHARE:.0%} of their maximum in this order: {named} (in brackets: the earliest and "
            "latest of the draws)."
        )
    if not result.of("circuit").empty:
        similar, growing = similarities(result), size_over_time(result)
        for task in result.of("circuit")["task"].unique():
            parts.append(_circuit_sentence(result, similar, growing, str(task)))
    direct = appeared[appeared["measure"] == "direct"]
    for task in direct["task"].unique().tolist():
        strongest = direct[direct["task"] == task].sort_values("maximum", ascending=False).head(NAMED)
        named = ", ".join(
            f"{row['part']} ({row['maximum']:.2f}) at step {_step_text(row)}" for row in strongest.to_dict("records")
        )
        parts.append(
            f"**Heads with the largest direct effect on {task}** (largest over the training) and when they reach "
            f"{SHARE:.0%} of it: {named}."
        )
    steps = over_draws(result.of("consistency", "share_absolute"))
    if len(steps):
        last = steps[steps["step"] == steps["step"].max()]
        named = ", ".join(f"{row['part']} {'undefined' if not row['n'] else _band(row)}" for row in last.to_dict("records"))
        parts.append(
            "**Published algorithm of IOI.** Share of the circuit's absolute effects that heads of the published kinds have "
            f"at the last checkpoint: {named}."
        )
    if not result.of("swap").empty:
        parts.append(swap_sentence(result))
    heads = appeared[appeared["measure"] == "heads"]
    if len(heads):
        passing = heads[heads["passes"]].sort_values("step")
        some = ", ".join(
            f"{shown(row['quantity'])} {row['part']} at step {_step_text(row)}"
            for row in passing.head(3 * NAMED).to_dict("records")
        )
        none = [shown(name) for name, own in heads.groupby("quantity", sort=False) if not own["passes"].any()]
        sentence = f"**Heads** that pass a criterion at some checkpoint: {some or 'none'}."
        if none:
            sentence += f" No head ever passes for {', '.join(none)}."
        parts.append(sentence)
    rows = result.of("heads")
    undefined = rows[rows["note"] != ""].groupby("quantity", sort=False)["step"].nunique()
    scores = [f"{shown(name)} ({n})" for name, n in undefined.items()]
    if scores:
        parts.append(f"**Not defined** at some checkpoints (how many of {len(result.steps)}): {', '.join(scores)}.")
    return "\n\n".join(parts)


def shown(name: object) -> str:
    """A measure's or quantity's name in a sentence."""
    return str(name).replace("_", " ")


def _circuit_sentence(result: TrainingResult, similar: pd.DataFrame, growing: pd.DataFrame, task: str) -> str:
    rows = result.of("circuit")
    found = over_draws(rows[rows["task"] == task])
    sizes = found[(found["quantity"] == "n_edges") & (found["n"] > 0)]
    n_steps = len(result.steps)
    sentence = f"**The circuit of {task}** is defined at {len(sizes)} of {n_steps} checkpoints"
    if sizes.empty:
        return f"{sentence}: the prompts have next to no effect anywhere."
    sentence += f", first at step {sizes['step'].min()}; at the others the prompts have next to no effect."
    last = found[found["step"] == sizes["step"].max()].set_index("quantity")
    sentence += (
        f" The last one has {last.loc['n_edges', 'value']:.0f} edges and a held-out faithfulness of "
        f"{_band(last.loc['faithfulness'])}, random ones of that size {_band(last.loc['null_faithfulness'])}."
    )
    (growth,) = growing[(growing["task"] == task) & (growing["quantity"] == "n_edges")].to_dict("records")
    if pd.notna(growth["value"]):
        sentence += f" Its size goes with time at a rank correlation of {_band(growth)} (n = {growth['n']})."
    own = similar[(similar["task"] == task) & (similar["quantity"] == "edge_jaccard") & similar["value"].notna()]
    previous, draws = (own.loc[own["against"] == name, "value"].mean() for name in ("previous", "other draws"))
    noise = rows.loc[(rows["task"] == task) & (rows["quantity"] == "resampled_jaccard"), "value"].mean()
    if pd.notna(previous):
        sentence += (
            f" Neighbouring checkpoints share {previous:.2f} of their edges (Jaccard), circuits of one checkpoint from "
            f"resampled prompts {noise:.2f}" + (f" and from other draws {draws:.2f}." if pd.notna(draws) else ".")
        )
    return sentence


def _behaviours(appeared: pd.DataFrame) -> pd.DataFrame:
    """One behaviour of each task: the logit difference where it rises, else the probability difference."""
    rows = appeared[(appeared["measure"] == "behaviour") & appeared["step"].notna()]
    return rows.sort_values("quantity", key=lambda names: names.map(FROM_ZERO.index), kind="stable").drop_duplicates("task")


def _circuits(rows: pd.DataFrame) -> dict[tuple[str, int, int], tuple[dict[str, float], set[str]]]:
    """Edges with |score|, and nodes, by task, seed and step."""
    parts = rows[rows["quantity"].isin(["edge", "node"])]
    found: dict[tuple[str, int, int], tuple[dict[str, float], set[str]]] = {}
    columns = ["task", "seed", "step", "quantity", "part", "value"]
    for task, seed, step, quantity, part, value in parts[columns].itertuples(index=False):
        edges, nodes = found.setdefault((task, seed, step), ({}, set()))
        if quantity == "edge":
            edges[part] = abs(value)
        else:
            nodes.add(part)
    return found


def _overlaps(
    a: tuple[dict[str, float], set[str]] | None, b: tuple[dict[str, float], set[str]] | None
) -> Mapping[str, float]:
    if a is None or b is None:
        return dict.fromkeys(SIMILARITIES, float("nan"))
    (edges, nodes), (other_edges, other_nodes) = a, b
    either = edges.keys() | other_edges.keys()
    pairs = np.array([[edges.get(edge, 0.0), other_edges.get(edge, 0.0)] for edge in either])
    larger = pairs.max(1).sum()
    return {
        "edge_jaccard": len(edges.keys() & other_edges.keys()) / len(either),
        "node_jaccard": len(nodes & other_nodes) / len(nodes | other_nodes),
        "weighted_jaccard": float(pairs.min(1).sum() / larger) if larger else float("nan"),
    }


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _first(values: pd.Series, share: float) -> float:
    """The first step at which values by step reach a share of their maximum; NaN where that is not above 0."""
    if values.empty or not values.max() > 0:
        return float("nan")
    return float(values.index[(values >= share * values.max()).to_numpy()][0])


def _step_text(row: Mapping[Any, Any]) -> str:
    low, high, step = (float(row[name]) for name in ("step_low", "step_high", "step"))
    return f"{step:.0f}" if low == high == step or np.isnan(low) else f"{step:.0f} [{low:.0f}, {high:.0f}]"


def _band(row: Mapping[Any, Any] | pd.Series) -> str:
    return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
