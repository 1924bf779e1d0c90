"""Causal tracing over facts: average total and indirect effects, where they peak, and what severing costs.

Positions of one class are averaged within a fact before facts are averaged, so that a long subject counts as one fact. Of
every average the interval is a bootstrap over facts; facts are drawn once for all layers and mediators, so that peaks,
differences and ratios keep what these share. Facts without a position of a class are left out of that class alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from kc_lib.errors import MethodError
from kc_lib.stats import MINIMAL_EFFECT, resampled_means, with_interval
from kc_lib.tasks.facts import POSITION_CLASSES
from kc_lib.tracing.trace import TracingResult

SUBJECT, LAST = "last subject token", "last token"
SEVERED = ("attention_severed", "mlp_severed")


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
            about = {"mediator": column[0], "position_class": name, "layer": column[1], "n": len(values)}
            rows.append(about | with_interval("aie", means[i], draws[:, i]))
    return pd.DataFrame(rows)


def peaks(result: TracingResult, seed: int = 0) -> pd.DataFrame:
    """The layer at which each mediator's AIE is largest, per position class, and the AIE there.

    ``layer_low`` and ``layer_high`` are the 95% range of the peak over resamples of the facts.
    """
    rows: list[dict[str, Any]] = []
    for name in position_classes(result):
        values = _by_fact(result, name)
        for mediator in values.columns.unique("mediator"):
            own = values[mediator].to_numpy()
            means, draws = own.mean(0), resampled_means(own, seed)
            peak = int(means.argmax())
            low, high = np.quantile(draws.argmax(1), [0.025, 0.975], method="nearest") if len(own) > 1 else (np.nan, np.nan)
            about = {"mediator": mediator, "position_class": name, "n": len(values), "layer": peak}
            rows.append(about | {"layer_low": low, "layer_high": high} | with_interval("aie", means[peak], draws[:, peak]))
    return pd.DataFrame(rows)


def severing(result: TracingResult, seed: int = 0) -> pd.DataFrame:
    """What severed attention or MLPs cost, per position class.

    One row per class and severed mediator, at the layer where the state's own AIE peaks: ``state`` and ``severed`` (AIE
    there), ``cost`` (their difference) and ``kept`` (severed / state); and ``peak_kept``, the severed curve's own peak over
    the state's, as published bar charts compare them. Shares are NaN where the state's AIE is next to nothing.

    Raises:
        MethodError: states, or no severed mediator, were traced.
    """
    mediators = set(result.frame["mediator"])
    severed = [name for name in SEVERED if name in mediators]
    if "state" not in mediators or not severed:
        raise MethodError(f"severing compares state with {' or '.join(SEVERED)}: trace both")
    rows: list[dict[str, Any]] = []
    for name in position_classes(result):
        values = _by_fact(result, name)
        curves = {mediator: _with_draws(values[mediator].to_numpy(), seed) for mediator in ("state", *severed)}
        state = curves["state"]
        peak = int(state[0].argmax())
        for mediator in severed:
            own = curves[mediator]
            kept, peak_kept = _share(own[:, peak], state[:, peak]), _share(own.max(1), state.max(1))
            rows.append(
                {"position_class": name, "mediator": mediator, "n": len(values), "layer": peak}
                | with_interval("state", state[0, peak], state[1:, peak])
                | with_interval("severed", own[0, peak], own[1:, peak])
                | with_interval("cost", state[0, peak] - own[0, peak], state[1:, peak] - own[1:, peak])
                | with_interval("kept", kept[0], kept[1:])
                | with_interval("peak_kept", peak_kept[0], peak_kept[1:])
            )
    return pd.DataFrame(rows)


def position_classes(result: TracingResult) -> list[str]:
    """The classes that were traced, in the order of the prompt."""
    present = set(result.frame["position_class"])
    return [name for name in POSITION_CLASSES if name in present]


def tracing_headline(result: TracingResult, seed: int = 0) -> dict[str, Any]:
    """The figures that a run is remembered by."""
    total = total_effect(result, seed)
    told: dict[str, Any] = {"facts": int(total["n"]), "ATE": round(float(total["ate"]), 3)}
    found = peaks(result, seed).set_index(["mediator", "position_class"])
    for mediator in found.index.unique("mediator"):
        for name in (SUBJECT, LAST):
            if (mediator, name) in found.index:
                row = found.loc[(mediator, name)]
                told[f"{mediator}, {name}"] = f"AIE {row['aie']:.3f} at layer {row['layer']:.0f}"
    return told


def tracing_conclusion(result: TracingResult, seed: int = 0) -> str:
    """What came out, in sentences with their intervals (Markdown)."""
    total = total_effect(result, seed)
    lines = [
        f"- {result.provenance['n_traced']} of {result.provenance['n_given']} facts were traced"
        + "".join(f"; {count} dropped: {reason}" for reason, count in result.provenance["dropped"].items())
        + ".",
        f"- **Total effect**: p(answer) falls from {_figure(total, 'p_clean')} to {_figure(total, 'p_corrupted')}: ATE "
        f"{_figure(total, 'ate')}.",
    ]
    if abs(total["ate"]) <= MINIMAL_EFFECT:
        return "\n".join(
            [*lines, "- The corruption changes nothing (TE = 0), so there is no effect to restore: use more noise."]
        )
    found = peaks(result, seed)
    for row in found[found["position_class"].isin([SUBJECT, LAST])].to_dict("records"):
        lines.append(
            f"- **{row['mediator']}, {row['position_class']}**: AIE peaks at layer {row['layer']} (95% of resamples: "
            f"{row['layer_low']:.0f} to {row['layer_high']:.0f}) with {_figure(row, 'aie')}, n = {row['n']}."
        )
    if "state" in set(found["mediator"]) and set(SEVERED) & set(found["mediator"]):
        costs = severing(result, seed)
        for row in costs[costs["position_class"] == SUBJECT].to_dict("records"):
            what = row["mediator"].removesuffix("_severed")
            lines.append(
                f"- Severing **{what}** at the last subject token leaves {_figure(row, 'kept')} of the state's AIE at its "
                f"peak (layer {row['layer']}); peak over peak {_figure(row, 'peak_kept')}."
            )
    return "\n".join(lines)


def _by_fact(result: TracingResult, position_class: str) -> pd.DataFrame:
    """Indirect effects, fact x (mediator, layer), of one class."""
    rows = result.to_frame()
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
    with np.errstate(divide="ignore", invalid="ignore"):
        return part / whole


def _figure(row: Any, name: str) -> str:
    if pd.isna(row[name]):
        return "undefined"
    interval = "" if pd.isna(row[f"{name}_low"]) else f" [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"
    return f"{row[name]:.3f}{interval}"
