"""Faithfulness of circuits from a metric's values, and its bootstrap over facts: the figures every judge starts from.

Faithfulness is (m(circuit) - m(empty)) / (m(full) - m(empty)), with m the metric's mean over facts (Hanna et al. 2024,
arXiv:2403.17806, section 2; Mueller et al. 2025, MIB). "empty" is the circuit without edges (with patching: the model on
the corrupted prompts), "full" the model itself. Where the full model's effect is next to nothing it is undefined: NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from kc_lib.stats import MINIMAL_EFFECT, resampled_means


@dataclass(frozen=True)
class Faithfulness:
    """Faithfulness by circuit, with one draw per resample of the facts; a resample serves all circuits."""

    circuits: list[str]
    estimate: Float[np.ndarray, " circuit"]
    draws: Float[np.ndarray, "resample circuit"]

    def of(self, *circuits: str) -> tuple[Float[np.ndarray, " chosen"], Float[np.ndarray, "resample chosen"]]:
        """Estimates and draws of some circuits, in that order."""
        columns = [self.circuits.index(name) for name in circuits]
        return self.estimate[columns], self.draws[:, columns]


def faithfulness_of(values: pd.DataFrame, seed: int = 0) -> Faithfulness:
    """Faithfulness of every column of ``values`` (fact x circuit, with "full" and "empty" among the circuits)."""
    matrix = values.to_numpy(dtype=float)
    names = [str(name) for name in values.columns]
    full, empty = names.index("full"), names.index("empty")
    means = np.concatenate([matrix.mean(0, keepdims=True), resampled_means(matrix, seed)])
    effect = means[:, [full]] - means[:, [empty]]
    if abs(effect[0, 0]) <= MINIMAL_EFFECT:
        ratios = np.full_like(means, np.nan)
    else:
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample may have an effect of 0
            ratios = (means - means[:, [empty]]) / effect
    return Faithfulness(names, ratios[0], ratios[1:])
