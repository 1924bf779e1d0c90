"""How large circuits are: over the training of a model, and against the size of the model (Tigges et al. 2024, section 4).

Published: circuit size and model size correlate at r = 0.72 for IOI (Pearson's) over the sizes of Pythia. Here Pearson's
r is of logarithms, because sizes span orders of magnitude and the largest model alone would decide otherwise; beside it
stand Pearson's of the sizes as they are, and Spearman's of their ranks. Models are few: p is twice the share of all
pairings of the sizes that correlate as much in that direction, so n models cannot give less than 2 / n!.

An interval is Fisher's, over models as if drawn from many; it is [-1, 1] for three, and undefined where |r| is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from kc_lib.errors import MethodError
from kc_lib.options import names_in
from kc_lib.training.result import TrainingResult

CIRCUIT_SIZES = ("n_edges", "n_nodes")
MODEL_SIZES = ("model_parameters", "model_edges")
LEAST_MODELS = 3
PAIRINGS = 10_000  # up to which all are counted (7 models), else so many drawn


def size_over_time(result: TrainingResult) -> pd.DataFrame:
    """The rank correlation (Spearman's) of the circuit's size with the training step, where there is a circuit.

    One row per task and quantity (``CIRCUIT_SIZES``): value (of the mean over draws), low and high (lowest and highest
    draw), n (checkpoints). NaN below three checkpoints, or where the size never changes.

    Raises:
        MethodError: no circuits in the result.
    """
    correlations = []
    for (task, quantity), sizes in _sizes(result).groupby(["task", "quantity"], sort=False):
        by_seed = sizes.pivot(index="step", columns="seed", values="value").sort_index()
        mean = by_seed.mean(axis=1).dropna()
        draws = [r for seed in by_seed if not np.isnan(r := _spearman(by_seed[seed].dropna()))]
        ends = {"low": min(draws, default=np.nan), "high": max(draws, default=np.nan)}
        correlations.append({"task": task, "quantity": quantity, "value": _spearman(mean)} | ends | {"n": len(mean)})
    return pd.DataFrame(correlations)


def results_of_others(files: str | Sequence[str] | None, model: str) -> list[TrainingResult]:
    """Saved results to compare one of ``model`` (the name of its last checkpoint) with; none where no files are given.

    Args:
        files: paths, as a list or in one text.

    Raises:
        MethodError: files that cannot be read, fewer than two (three models are needed), or that of ``model`` itself.
    """
    files = names_in(files) if isinstance(files, str) else files or []
    results = [TrainingResult.load(file) for file in files]
    if len(results) == 1:
        raise MethodError(
            f"{files[0]} alone cannot be compared with: a correlation over models needs {LEAST_MODELS} of them"
        )
    if results and model in set(model_sizes(results)["model"]):
        raise MethodError(f"one of the results to compare with is of {model!r} itself: give those of other models")
    return results


def model_sizes(results: Sequence[TrainingResult]) -> pd.DataFrame:
    """Every model's size beside that of its circuits, averaged over the checkpoints that have one and over draws.

    One row per model (the name of its last checkpoint) and task: model_parameters, model_edges, n_edges, n_nodes, each of
    these with its lowest and highest draw (``..._low``, ``..._high``), n_checkpoints (with a circuit in some draw).

    Raises:
        MethodError: no circuits in a result, one that does not know its model's size, or two of one model.
    """
    models: list[dict[str, Any]] = []
    for result in results:
        rows = _sizes(result)
        model = str(result.frame.sort_values("step", kind="stable")["checkpoint"].iloc[-1])
        if model in {row["model"] for row in models}:
            raise MethodError(f"two of the results are of {model!r}: give each model once")
        known = {name: result.of("circuit", name)["value"] for name in MODEL_SIZES}
        if any(values.empty for values in known.values()):
            raise MethodError(f"the result of {model!r} does not say how large the model is: measure 'circuit' again")
        size = {name: int(values.iloc[0]) for name, values in known.items()}
        for task, task_rows in rows.groupby("task", sort=False):
            row = {"model": model, "task": task} | size
            for quantity in CIRCUIT_SIZES:
                draws = task_rows[task_rows["quantity"] == quantity].groupby("seed")["value"].mean().dropna()
                row |= {quantity: draws.mean(), f"{quantity}_low": draws.min(), f"{quantity}_high": draws.max()}
            defined = task_rows[task_rows["value"].notna()]
            models.append(row | {"n_checkpoints": defined["step"].nunique()})
    return pd.DataFrame(models)


def size_correlations(results: Sequence[TrainingResult], against: str = "model_parameters") -> pd.DataFrame:
    """How the size of circuits goes with the size of models; see the head of this file.

    One row per task, quantity (``CIRCUIT_SIZES``) and statistic ("pearson of logarithms", "pearson", "spearman"): value,
    low, high, p, n (models that have a circuit of the task). Undefined, NaN, with fewer than three of those.

    Args:
        against: one of ``MODEL_SIZES``.

    Raises:
        MethodError: fewer than three models, all of one size, an unknown ``against``, or what ``model_sizes`` refuses.
    """
    if against not in MODEL_SIZES:
        raise MethodError(f"against {against!r}: the size of a model is {' or '.join(MODEL_SIZES)}")
    if len(results) < LEAST_MODELS:
        raise MethodError(f"{len(results)} results are given: a correlation over models needs at least {LEAST_MODELS}")
    sizes = model_sizes(results)
    if sizes[against].nunique() < 2:
        raise MethodError(f"all models have the same size ({sizes[against].iloc[0]:,} {against}): give models of several")
    correlations: list[dict[str, Any]] = []
    for task, models in sizes.groupby("task", sort=False):
        for quantity in CIRCUIT_SIZES:
            both = models[[against, quantity]].dropna().to_numpy(dtype=float).T
            for name, pair, rank in (
                ("pearson of logarithms", np.log(both), False),
                ("pearson", both, False),
                ("spearman", both, True),
            ):
                row = {"task": task, "quantity": quantity, "statistic": name}
                correlations.append(row | _correlation(pair[0], pair[1], rank) | {"n": both.shape[1]})
    return pd.DataFrame(correlations)


def size_table(result: TrainingResult, others: Sequence[TrainingResult] = ()) -> pd.DataFrame:
    """How circuits' size goes with the training step and, with results of others, with the size of models.

    The rows of ``size_over_time`` and ``size_correlations``, with the column against; empty where there are no circuits.
    """
    tables = []
    if not result.of("circuit", *CIRCUIT_SIZES).empty:
        tables.append(size_over_time(result).assign(against="step", statistic="spearman"))
        if others:
            tables.append(size_correlations([result, *others]).assign(against="model_parameters"))
    columns = ["task", "quantity", "against", "statistic", "value", "low", "high", "p", "n"]
    return pd.concat(tables, ignore_index=True).reindex(columns=columns) if tables else pd.DataFrame(columns=columns)


def _sizes(result: TrainingResult) -> pd.DataFrame:
    rows = result.of("circuit", *CIRCUIT_SIZES)
    if rows.empty:
        raise MethodError("the result has no circuits: measure 'circuit' as well")
    return rows


def _spearman(by_step: pd.Series) -> float:
    if len(by_step) < LEAST_MODELS or by_step.nunique() < 2:
        return float("nan")
    return float(stats.spearmanr(by_step.index, by_step).statistic)


def _correlation(x: np.ndarray, y: np.ndarray, rank: bool) -> dict[str, float]:
    undefined = dict.fromkeys(("value", "low", "high", "p"), float("nan"))
    if len(x) < LEAST_MODELS or len(set(x)) < 2 or len(set(y)) < 2:
        return undefined
    if rank:
        x, y = stats.rankdata(x), stats.rankdata(y)
    r = _r(x, y)
    low, high = _fisher(r, len(x), rank)
    test = stats.permutation_test((y,), partial(_r, x), permutation_type="pairings", n_resamples=PAIRINGS, rng=0)
    return {"value": r, "low": low, "high": high, "p": float(test.pvalue)}


def _r(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def _fisher(r: float, n: int, rank: bool) -> tuple[float, float]:
    """A 95% interval of a correlation; of ranks with the variance of Bonett and Wright (2000)."""
    if n <= LEAST_MODELS:
        return -1.0, 1.0
    if abs(r) > 1 - 1e-12:
        return float("nan"), float("nan")
    spread = stats.norm.ppf(0.975) * np.sqrt((1 + r**2 / 2 if rank else 1.0) / (n - 3))
    return float(np.tanh(np.arctanh(r) - spread)), float(np.tanh(np.arctanh(r) + spread))
