"""What was traced: total and indirect effects of facts, their averages, where they peak, and what severing costs.

Positions of one class are averaged within a fact before facts are averaged, so that a long subject counts as one fact. Of
every average the interval is a bootstrap over facts; facts are drawn once for all layers and mediators, so that peaks,
differences and ratios keep what these share. Facts without a position of a class are left out of that class alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from kc_lib.errors import MethodError
from kc_lib.results import Result
from kc_lib.stats import MINIMAL_EFFECT, resampled_means, with_interval
from kc_lib.tasks.options import POSITION_CLASSES

SUBJECT, LAST = "last subject token", "last token"
SEVERED = ("attention_severed", "mlp_severed")
COLUMNS = ("fact", "mediator", "layer", "position", "token", "position_class", "p", "std", "p_clean", "p_corrupted")
NO_EFFECT = "the corruption changes nothing: there is no effect to restore, use more noise"


@dataclass(frozen=True)
class TracingResult(Result):
    """What every restoration gives on every fact.

    ``frame`` has one row per fact, mediator, layer and position: the token, its class (``FactPrompt.position_class``), p
    (the mean over noise samples of the answer's probability), std (over samples, NaN for a single one), and the fact's
    p_clean and p_corrupted. ``facts`` has one row per fact: prompt, subject, answer, n_samples, p_clean, p_corrupted and
    total_effect. ``provenance`` says with what it was computed, how many facts were dropped, and why.

    Example:
        >>> result = kc.trace(model, facts.facts, max_facts=5)
        >>> result.summary()
    """

    columns = COLUMNS
    frame: pd.DataFrame
    facts: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def indirect_effects(self) -> pd.DataFrame:
        """``frame`` with the indirect effect of every row."""
        return self.frame.assign(indirect_effect=self.frame["p"] - self.frame["p_corrupted"])

    def summary(self, seed: int = 0) -> pd.DataFrame:
        """Where each mediator's AIE peaks at the last subject token and at the last token, beside the total effect.

        Columns: those of ``peaks``; kept and peak_kept of ``severing``, where attention or MLPs were severed; ate (the
        average total effect); note (why there is nothing to restore).
        """
        ate = float(total_effect(self, seed)["ate"])
        kept = [f"{name}{end}" for name in ("kept", "peak_kept") for end in ("", "_low", "_high")]
        shares = pd.DataFrame(_severing_rows(self, seed), columns=["mediator", "position_class", *kept])
        highest = peaks(self, seed).merge(shares, how="left", on=["mediator", "position_class"])
        shown = highest[highest["position_class"].isin([SUBJECT, LAST])].reset_index(drop=True)
        return shown.assign(ate=ate, note=NO_EFFECT if abs(ate) <= MINIMAL_EFFECT else "")


def total_effect(result: TracingResult, seed: int = 0) -> pd.Series:
    """Means over facts of p_clean, p_corrupted and the total effect (ATE), with intervals; n facts."""
    values = result.facts[["p_clean", "p_corrupted", "total_effect"]].to_numpy(dtype=float)
    means, draws = values.mean(0), resampled_means(values, seed)
    row: dict[str, float] = {"n": len(values)}
    for i, name in enumerate(("p_clean", "p_corrupted", "ate")):
        row |= with_interval(name, means[i], draws[:, i])
    return pd.Series(row)


def average_effects(result: TracingResult, seed: int = 0) -> pd.DataFrame:
    """The average indirect effect (AIE) with its interval: one row per mediator, position class and layer; n facts."""
    rows: list[dict[str, Any]] = []
    for name in position_classes(result):
        values = _by_fact(result, name)
        means, draws = values.to_numpy().mean(0), resampled_means(values.to_numpy(), seed)
        for i, column in enumerate(values.columns.to_list()):
            row = {"mediator": column[0], "position_class": name, "layer": column[1], "n": len(values)}
            rows.append(row | with_interval("aie", means[i], draws[:, i]))
    return pd.DataFrame(rows)


def peaks(result: TracingResult, seed: int = 0) -> pd.DataFrame:
    """The layer at which each mediator's AIE is largest, per position class, and the AIE there.

    ``layer_low`` and ``layer_high`` are the 95% range of the peak over resamples of the facts.
    """
    rows: list[dict[str, Any]] = []
    for name in position_classes(result):
        values = _by_fact(result, name)
        for mediator in values.columns.unique("mediator"):
            effects = values[mediator].to_numpy()
            means, draws = effects.mean(0), resampled_means(effects, seed)
            peak = int(means.argmax())
            low, high = (
                np.quantile(draws.argmax(1), [0.025, 0.975], method="nearest") if len(effects) > 1 else (np.nan, np.nan)
            )
            row = {"mediator": mediator, "position_class": name, "n": len(values), "layer": peak}
            rows.append(row | {"layer_low": low, "layer_high": high} | with_interval("aie", means[peak], draws[:, peak]))
    return pd.DataFrame(rows)


def severing(result: TracingResult, seed: int = 0) -> pd.DataFrame:
    """What severed attention or MLPs cost, per position class.

    One row per class and severed mediator, at the layer where the state's own AIE peaks: ``state`` and ``severed`` (AIE
    there), ``cost`` (their difference) and ``kept`` (severed / state); and ``peak_kept``, the severed curve's own peak over
    the state's, as published bar charts compare them. Shares are NaN where the state's AIE is next to nothing.

    Raises:
        MethodError: states, or no severed mediator, were traced.
    """
    rows = _severing_rows(result, seed)
    if not rows:
        raise MethodError(f"severing compares state with {' or '.join(SEVERED)}: trace both")
    return pd.DataFrame(rows)


@np.errstate(divide="ignore", invalid="ignore")  # shares of resamples without an effect
def _severing_rows(result: TracingResult, seed: int) -> list[dict[str, Any]]:
    """The rows of ``severing``; none where states, or no severed mediator, were traced."""
    mediators = set(result.frame["mediator"])
    severed = [name for name in SEVERED if name in mediators]
    rows: list[dict[str, Any]] = []
    for name in position_classes(result) if severed and "state" in mediators else ():
        values = _by_fact(result, name)
        curves = {mediator: _with_draws(values[mediator].to_numpy(), seed) for mediator in ("state", *severed)}
        state = curves["state"]
        peak = int(state[0].argmax())
        for mediator in severed:
            severed_curve = curves[mediator]
            kept = _share(severed_curve[:, peak], state[:, peak])
            peak_kept = _share(severed_curve.max(1), state.max(1))
            rows.append(
                {"position_class": name, "mediator": mediator, "n": len(values), "layer": peak}
                | with_interval("state", state[0, peak], state[1:, peak])
                | with_interval("severed", severed_curve[0, peak], severed_curve[1:, peak])
                | with_interval("cost", state[0, peak] - severed_curve[0, peak], state[1:, peak] - severed_curve[1:, peak])
                | with_interval("kept", kept[0], kept[1:])
                | with_interval("peak_kept", peak_kept[0], peak_kept[1:])
            )
    return rows


def position_classes(result: TracingResult) -> list[str]:
    """The classes that were traced, in the order of the prompt."""
    present = set(result.frame["position_class"])
    return [name for name in POSITION_CLASSES if name in present]


def tracing_headline(result: TracingResult, seed: int = 0) -> dict[str, Any]:
    """The figures that a run is remembered by."""
    total = total_effect(result, seed)
    figures: dict[str, Any] = {"facts": int(total["n"]), "ATE": round(float(total["ate"]), 3)}
    highest = peaks(result, seed).set_index(["mediator", "position_class"])
    for mediator in highest.index.unique("mediator"):
        for name in (SUBJECT, LAST):
            if (mediator, name) in highest.index:
                row = highest.loc[(mediator, name)]
                figures[f"{mediator}, {name}"] = f"AIE {row['aie']:.3f} at layer {row['layer']:.0f}"
    return figures


def _by_fact(result: TracingResult, position_class: str) -> pd.DataFrame:
    """Indirect effects, fact x (mediator, layer), of one class."""
    rows = result.indirect_effects()
    rows = rows[rows["position_class"] == position_class]
    table = rows.pivot_table(index="fact", columns=["mediator", "layer"], values="indirect_effect", aggfunc="mean")
    return table[list(dict.fromkeys(rows["mediator"]))]  # pivot sorts by name


def _with_draws(values: np.ndarray, seed: int) -> np.ndarray:
    """Means over facts in the first row, then those of every resample."""
    return np.concatenate([values.mean(0, keepdims=True), resampled_means(values, seed)])


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """``part / whole`` of the estimate and its resamples; undefined where the estimate's whole is next to nothing."""
    if abs(whole[0]) <= MINIMAL_EFFECT:
        return np.full_like(part, np.nan)
    return part / whole
