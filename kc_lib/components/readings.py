"""The figures that matter of a component analysis, in short texts."""

from __future__ import annotations

import pandas as pd

from kc_lib.components.circuit_table import CircuitTable
from kc_lib.components.direct import DirectAttribution
from kc_lib.components.lens import LogitLens
from kc_lib.stats import interval, resampled_means

NEAR = 10  # a rank that counts as near the top
WHAT = {"answer": "answer's logit", "difference": "logit difference"}


def reading_headline(lens: LogitLens, direct: DirectAttribution, table: CircuitTable, seed: int = 0) -> dict[str, str]:
    """Where the answer comes near the top, what writes it, and how much of a circuit that tells."""
    what = WHAT.get(str(direct.provenance.get("direction")), "logit")
    effects = direct.summary(seed)
    heads = effects[effects["kind"] == "head"].sort_values("contribution")
    counts = table.counts()
    return {
        f"answer among the first {NEAR}": _arrival(lens, NEAR),
        "answer first": _arrival(lens, 1),
        what: f"{direct.totals.mean():.2f} logits (n = {len(direct.values)} facts)",
        f"{what}, attention": _sum_of(direct, effects["kind"] == "head", seed),
        f"{what}, MLPs": _sum_of(direct, effects["kind"] == "mlp", seed),
        "head that adds most": _effect(heads.iloc[-1]),
        "head that takes most": _effect(heads.iloc[0]),
        "nodes of the circuit": f"{len(table.nodes)}: {counts['direct']} with a direct effect, {counts['through others']} "
        f"through others only, {counts['none']} with none",
    }


def _arrival(lens: LogitLens, rank: int) -> str:
    """From where on the median rank stays within ``rank``."""
    summary = lens.summary()
    beyond = (summary["answer_rank_median"] > rank).to_numpy().nonzero()[0]
    first = int(beyond[-1]) + 1 if len(beyond) else 0
    if first == len(summary):
        return "never"
    layer = summary["layer"].iloc[first]
    if layer == 0:
        return "at the embedding"
    return f"after layer {int(layer)}'s attention" if layer % 1 else f"after layer {int(layer) - 1}"


def _sum_of(direct: DirectAttribution, chosen: pd.Series, seed: int) -> str:
    """What some components add together, with its interval over facts."""
    values = direct.values[:, chosen.tolist()].sum(1).double().numpy()
    low, high = interval(resampled_means(values[:, None], seed))
    return f"{values.mean():.2f} [{low[0]:.2f}, {high[0]:.2f}]"


def _effect(row: pd.Series) -> str:
    return f"{row['component']} ({row['contribution']:+.2f} [{row['contribution_low']:.2f}, {row['contribution_high']:.2f}])"
