"""Intervals for what is averaged over facts, and empirical p-values against nulls.

Intervals are percentile bootstraps: facts are drawn with replacement, and everything measured on a fact goes with it, so
that ratios, differences and areas of several circuits keep what they share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import norm

RESAMPLES = 2000
MINIMAL_EFFECT = 1e-6  # ratios to a smaller effect are undefined: NaN


def resampled_means(
    values: Float[np.ndarray, "fact column"], seed: int, n_resamples: int = RESAMPLES
) -> Float[np.ndarray, "resample column"]:
    """Means of every column over facts drawn with replacement, the same facts for all columns; NaN below two facts."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return np.full((n_resamples, values.shape[1]), np.nan)
    return times_drawn(n, seed, n_resamples) @ values / n


def times_drawn(n: int, seed: int, n_resamples: int = RESAMPLES) -> Float[np.ndarray, "resample fact"]:
    """How often each of ``n`` facts is drawn, with replacement, in every resample."""
    drawn = np.random.default_rng(seed).integers(0, n, (n_resamples, n))
    counts = np.zeros((n_resamples, n))
    np.add.at(counts, (np.arange(n_resamples)[:, None], drawn), 1.0)
    return counts


def interval(draws: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper percentile of resampled figures ``[resample, ...]``, over the first axis; NaN where a draw is."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return low, high


def with_interval(name: str, estimate: float, draws: Float[np.ndarray, " resample"]) -> dict[str, float]:
    """A figure and its 95% interval as columns of a table: ``name``, ``name_low``, ``name_high``."""
    low, high = interval(draws)
    return {name: float(estimate), f"{name}_low": float(low), f"{name}_high": float(high)}


def share_interval(count: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a share of ``n`` independent draws; NaN for none. ``count`` may be a sum of shares."""
    if n == 0:
        return float("nan"), float("nan")
    z, share = float(norm.ppf((1 + confidence) / 2)), count / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def empirical_p(value: float, null: Sequence[float]) -> float:
    """Share of null values at least as large, counting the value itself: (1 + #{null >= value}) / (1 + n)."""
    draws = np.asarray(null, dtype=float)
    return float((1 + (draws >= value).sum()) / (1 + len(draws)))
