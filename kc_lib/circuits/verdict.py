"""One table that says of a circuit what was shown, against which bar, and what was not.

A criterion is met ("yes") where the whole 95% interval of its figure clears the bar, so "no" means *not shown*, not the
opposite shown. "undefined" means that the figure was not measured, is not defined, or that too little was drawn to
tell; the note says which.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from kc_lib.circuits.baselines import NULL_KINDS
from kc_lib.circuits.completeness import PREFIX, completeness
from kc_lib.circuits.evaluate import Evaluation
from kc_lib.circuits.minimality import Minimality
from kc_lib.circuits.stability import Stability
from kc_lib.stats import empirical_p

HELD_OUT = "held_out"
COLUMNS = ["criterion", "split", "measure", "figure", "low", "high", "null", "bar", "verdict", "note"]


def verdict(
    evaluation: Evaluation,
    minimality: Minimality | None = None,
    stability: Stability | None = None,
    *,
    circuit: str = "circuit",
    faithful_within: float = 0.2,
    complete_below: float = 0.2,
    minimal_share: float = 0.5,
    stable_from: float = 0.8,
    stable_facts: int = 100,
    significance: float = 0.05,
) -> pd.DataFrame:
    """Faithful, held-out, complete, minimal, stable, better than random: each with figure, interval, null, bar, verdict.

    All but the first row judge the held-out facts where there are any, else those of discovery.

    Args:
        evaluation: with the circuit, its nulls of both kinds (``random_nulls``) and ``complements`` of both, on the splits
            "discovery" (or another) and "held_out".
        faithful_within: faithfulness lies within so much of 1: four fifths of the effect, as the 80% of Tigges et al. 2024
            (arXiv:2407.10827), and on the other side no more than that beyond the model (as MIB's CMD counts it).
        complete_below: faithfulness of the complement is at most this. No published bar: what the bar for faithful leaves.
        minimal_share: of the sampled edges at least this share have a drop that differs from 0, and more than of null
            edges. No published bar: a majority.
        stable_from, stable_facts: mean Jaccard overlap over resamples, and the facts it takes to say so: the published
            bar of 0.8 with n >= 100 (``stability``). Its range over pairs is shown, and only its mean is judged.
        significance: for better than random, the empirical p of the circuit's faithfulness among the nulls'. It takes
            19 draws to get below 0.05.

    Returns:
        Columns criterion, split, measure, figure, low, high, null, bar, verdict ("yes", "no", "undefined"), note. ``null``
        is the mean of the random circuits (of null edges for minimal), NaN where none was run.
    """
    splits = evaluation.splits
    judged = HELD_OUT if HELD_OUT in splits else splits[0]
    rows = [
        _faithful(evaluation, circuit, "faithful", next((s for s in splits if s != HELD_OUT), ""), faithful_within),
        _faithful(evaluation, circuit, "held-out", HELD_OUT if HELD_OUT in splits else "", faithful_within),
        _complete(evaluation, circuit, judged, complete_below),
        _minimal(minimality, judged, minimal_share),
        _stable(stability, stable_from, stable_facts),
        *(_better(evaluation, circuit, judged, kind, significance) for kind in NULL_KINDS),
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(criterion: str, split: str, measure: str, bar: str, **found: float | str) -> dict[str, float | str]:
    """A row without a verdict yet; what is not found is not measured."""
    nothing: dict[str, float | str] = dict.fromkeys(("figure", "low", "high", "null"), float("nan"))
    about = {"criterion": criterion, "split": split, "measure": measure, "bar": bar, "verdict": "undefined"}
    return nothing | about | {"note": ""} | found


def _decided(row: dict[str, float | str], met: bool) -> dict[str, float | str]:
    """The row with its verdict, where its figure and interval are numbers."""
    if np.isnan([float(row["figure"]), float(row["low"]), float(row["high"])]).any():
        return row | {"note": "no interval, or the full model's effect is next to nothing"}
    return row | {"verdict": "yes" if met else "no"}


def _faithful(evaluation: Evaluation, circuit: str, criterion: str, split: str, within: float) -> dict[str, float | str]:
    bar = f"{1 - within:g} to {1 + within:g}"
    if not split:
        return _row(criterion, split, "faithfulness", bar, note="no facts of this kind were judged")
    own, nulls = evaluation.row(circuit, split), _null_rows(evaluation, split)["faithfulness"]
    low, high = float(own.faithfulness_low), float(own.faithfulness_high)
    row = _row(criterion, split, "faithfulness", bar, figure=own.faithfulness, low=low, high=high, null=nulls.mean())
    return _decided(row, 1 - within <= low and high <= 1 + within)


def _complete(evaluation: Evaluation, circuit: str, split: str, below: float) -> dict[str, float | str]:
    measure, bar = "faithfulness of the complement", f"at most {below:g}"
    if f"{PREFIX}{circuit}" not in set(evaluation.summary["circuit"]):
        return _row("complete", split, measure, bar, note="the circuit's complement was not run")
    table = completeness(evaluation)
    table = table[table["split"] == split]
    own = table[table["circuit"] == circuit].iloc[0]
    null = table.loc[table["kind"] == NULL_KINDS["connected"], "completeness"].mean()
    low, high = float(own.completeness_low), float(own.completeness_high)
    return _decided(
        _row("complete", split, measure, bar, figure=own.completeness, low=low, high=high, null=null), high <= below
    )


def _minimal(found: Minimality | None, split: str, share: float) -> dict[str, float | str]:
    measure, bar = "share of edges with a drop that differs from 0", f"above {share:g} and the null"
    if found is None or split not in set(found.summary["split"]):
        return _row("minimal", split, measure, bar, note="not measured on these facts")
    kinds = found.summary[found.summary["split"] == split]
    own, null = kinds[kinds["kind"] == "circuit"].iloc[0], kinds.loc[kinds["kind"] == "null", "share"].mean()
    low, high = float(own.share_low), float(own.share_high)
    row = _row("minimal", split, measure, bar, figure=own.share, low=low, high=high, null=null)
    return _decided(row, low > share and not low <= null)


def _stable(found: Stability | None, bar: float, facts: int) -> dict[str, float | str]:
    split, measure, bar_text = "discovery", "Jaccard over resamples", f"at least {bar:g} with n >= {facts}"
    if found is None:
        return _row("stable", split, measure, bar_text, note="not measured")
    own = found.summary.iloc[0]
    low, high = float(own.jaccard_low), float(own.jaccard_high)
    row = _decided(_row("stable", split, measure, bar_text, figure=own.jaccard, low=low, high=high), own.jaccard >= bar)
    if row["verdict"] == "yes" and (found.n_facts is None or found.n_facts < facts):
        return row | {"verdict": "undefined", "note": f"too few facts to say so: {found.n_facts or 'number not known'}"}
    return row


def _better(evaluation: Evaluation, circuit: str, split: str, kind: str, significance: float) -> dict[str, float | str]:
    own = evaluation.row(circuit, split)
    nulls = _null_rows(evaluation, split, kind)["faithfulness"].dropna()
    criterion = {"connected": "better than random", "profile": "better than its heads shuffled"}[kind]
    row = _row(criterion, split, "empirical p of faithfulness", f"at most {significance:g}")
    if nulls.empty or np.isnan(own.faithfulness):
        return row | {"note": "none drawn" if nulls.empty else "faithfulness is undefined"}
    p = empirical_p(own.faithfulness, nulls.tolist())
    row |= {"figure": p, "null": nulls.mean(), "note": f"{len(nulls)} draws, the best {nulls.max():.3f}"}
    if p > significance and (nulls < own.faithfulness).all():
        return row | {"note": f"{row['note']}: beaten, but too few to tell"}
    return row | {"verdict": "yes" if p <= significance else "no"}


def _null_rows(evaluation: Evaluation, split: str, kind: str = "connected") -> pd.DataFrame:
    summary = evaluation.summary
    return summary[(summary["kind"] == NULL_KINDS[kind]) & (summary["split"] == split)]
