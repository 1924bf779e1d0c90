"""Intervals for what is averaged over facts, and empirical p-values against nulls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 2000


def bootstrap_ratio(
    numerator: Sequence[float] | np.ndarray,
    denominator: Sequence[float] | np.ndarray,
    seed: int,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Ratio of means over facts, with its percentile bootstrap interval (facts resampled in pairs).

    Returns ``(ratio, low, high)``; the interval is NaN for fewer than two facts, the ratio where its denominator is 0.
    """
    top, bottom = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    mean_bottom = bottom.mean()
    if mean_bottom == 0:
        return float("nan"), float("nan"), float("nan")
    ratio = float(top.mean() / mean_bottom)
    if len(top) < 2:
        return ratio, float("nan"), float("nan")

    def ratio_of_means(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(a.mean(axis=axis) / b.mean(axis=axis))

    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may have a denominator of 0
        interval = stats.bootstrap(
            (top, bottom),
            ratio_of_means,
            paired=True,
            n_resamples=RESAMPLES,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return ratio, float(interval.low), float(interval.high)


def empirical_p(value: float, null: Sequence[float]) -> float:
    """Share of null values at least as large, counting the value itself: (1 + #{null >= value}) / (1 + n)."""
    draws = np.asarray(null, dtype=float)
    return float((1 + (draws >= value).sum()) / (1 + len(draws)))
