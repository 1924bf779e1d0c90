"""What was shown of a circuit, against which bar, and what was not: one table, and the figures that matter.

A criterion is met ("yes") where the whole 95% interval of its figure clears the bar, so "no" means *not shown*, not the
opposite shown. "undefined" means that the figure was not measured, is not defined, or that too little was drawn to
tell; the note says which.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from kc_lib.circuits.baselines import LAYER_MATCHED, RANDOM
from kc_lib.circuits.criteria import Minimality, Stability, completeness
from kc_lib.circuits.evaluate import Evaluation
from kc_lib.circuits.options import VerdictOptions
from kc_lib.graph import Circuit
from kc_lib.stats import empirical_p

HELD_OUT = "held_out"
COLUMNS = ["criterion", "split", "measure", "figure", "low", "high", "baseline", "bar", "verdict", "note"]
BETTER = {RANDOM: "better than random", LAYER_MATCHED: "better than its heads shuffled"}
IN_FIGURES = {RANDOM: "random circuits", LAYER_MATCHED: "heads shuffled within layers"}
Row = dict[str, float | str]


def verdict(
    evaluation: Evaluation,
    minimality: Minimality | None = None,
    stability: Stability | None = None,
    circuit: str = "circuit",
    **bars: Any,
) -> pd.DataFrame:
    """Faithful, held-out, complete, minimal, stable, better than random: each with figure, interval, baseline, bar, verdict.

    All but the first row are about the held-out facts where there are any, else about those of discovery.

    Args:
        evaluation: with the circuit, its ``random_baselines`` of both kinds and ``complements`` of both, on the splits
            "discovery" (or another) and "held_out".
        bars: fields of ``VerdictOptions``, which says where they come from.

    Returns:
        Columns criterion, split, measure, figure, low, high, baseline, bar, verdict ("yes", "no", "undefined"), note.
        ``baseline`` is the mean of the random circuits (of random edges for minimal), NaN where none was run.

    Raises:
        MethodError: a bar out of range.
    """
    asked, splits = VerdictOptions.of(bars), evaluation.splits
    found_on = next((split for split in splits if split != HELD_OUT), "")
    held_out = HELD_OUT if HELD_OUT in splits else ""
    rows = [
        _faithful(evaluation, circuit, "faithful", found_on, asked.faithful_within),
        _faithful(evaluation, circuit, "held-out", held_out, asked.faithful_within),
        _complete(evaluation, circuit, held_out or found_on, asked.complete_below),
        _minimal(minimality, held_out or found_on, asked.minimal_share),
        _stable(stability, asked.stable_from, asked.stable_facts),
        *(_better(evaluation, circuit, held_out or found_on, kind, asked.significance) for kind in BETTER),
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(criterion: str, split: str, measure: str, bar: str, **found: Any) -> Row:
    """A row without a verdict yet; what is not found is not measured."""
    nothing: Row = dict.fromkeys(("figure", "low", "high", "baseline"), float("nan"))
    about = {"criterion": criterion, "split": split, "measure": measure, "bar": bar, "verdict": "undefined"}
    return nothing | about | {"note": ""} | found


def _measured(row: pd.Series, name: str, baseline: float) -> dict[str, Any]:
    """A figure of a table with its interval, beside its baseline."""
    return {"figure": row[name], "low": float(row[f"{name}_low"]), "high": float(row[f"{name}_high"]), "baseline": baseline}


def _decided(row: Row, met: bool) -> Row:
    """The row with its verdict, where its figure and interval are numbers."""
    if np.isnan([float(row["figure"]), float(row["low"]), float(row["high"])]).any():
        return row | {"note": "no interval, or the full model's effect is next to nothing"}
    return row | {"verdict": "yes" if met else "no"}


def _faithful(evaluation: Evaluation, circuit: str, criterion: str, split: str, within: float) -> Row:
    about = criterion, split, "faithfulness", f"{1 - within:g} to {1 + within:g}"
    if not split:
        return _row(*about, note="no facts of this kind were evaluated")
    row = evaluation.row(circuit, split)
    measured = _measured(row, "faithfulness", evaluation.baselines(circuit, split)["faithfulness"].mean())
    return _decided(_row(*about, **measured), 1 - within <= measured["low"] and measured["high"] <= 1 + within)


def _complete(evaluation: Evaluation, circuit: str, split: str, below: float) -> Row:
    about = "complete", split, "faithfulness of the complement", f"at most {below:g}"
    table = evaluation.table
    if circuit not in set(table.loc[table["kind"] == "complement", "of"]):
        return _row(*about, note="the circuit's complement was not run")
    without = completeness(evaluation)
    without = without[without["split"] == split]
    baselines = without[(without["kind"] == RANDOM) & (without["of"] == circuit)]
    row = without[without["circuit"] == circuit].iloc[0]
    measured = _measured(row, "completeness", baselines["completeness"].mean())
    return _decided(_row(*about, **measured), measured["high"] <= below)


def _minimal(minimality: Minimality | None, split: str, share: float) -> Row:
    about = "minimal", split, "share of edges with a drop that differs from 0", f"above {share:g} and random edges"
    if minimality is None or split not in set(minimality.totals["split"]):
        return _row(*about, note="not measured on these facts")
    kinds = minimality.totals[minimality.totals["split"] == split]
    random = kinds.loc[kinds["kind"] == "random", "share"].mean()
    measured = _measured(kinds[kinds["kind"] == "circuit"].iloc[0], "share", random)
    return _decided(_row(*about, **measured), measured["low"] > share and not measured["low"] <= random)


def _stable(stability: Stability | None, bar: float, facts: int) -> Row:
    about = "stable", "discovery", "Jaccard over resamples", f"at least {bar:g} with n >= {facts}"
    if stability is None:
        return _row(*about, note="not measured")
    measured = _measured(stability.summary().iloc[0], "jaccard", float("nan"))
    row = _decided(_row(*about, **measured), measured["figure"] >= bar)
    if row["verdict"] == "yes" and (stability.n_facts is None or stability.n_facts < facts):
        return row | {"verdict": "undefined", "note": f"too few facts to say so: {stability.n_facts or 'number not known'}"}
    return row


def _better(evaluation: Evaluation, circuit: str, split: str, kind: str, significance: float) -> Row:
    faithfulness = evaluation.row(circuit, split)["faithfulness"]
    baselines = evaluation.baselines(circuit, split, kind)["faithfulness"].dropna()
    row = _row(BETTER[kind], split, "empirical p of faithfulness", f"at most {significance:g}")
    if baselines.empty or np.isnan(faithfulness):
        return row | {"note": "none drawn" if baselines.empty else "faithfulness is undefined"}
    p = empirical_p(faithfulness, baselines.tolist())
    note = f"{len(baselines)} draws, the best {baselines.max():.3f}"
    row |= {"figure": p, "baseline": baselines.mean(), "note": note}
    if p > significance and (baselines < faithfulness).all():
        return row | {"note": f"{note}: beaten, but too few to tell"}
    return row | {"verdict": "yes" if p <= significance else "no"}


def headline(evaluation: Evaluation, circuit: Circuit, split: str) -> dict[str, str]:
    """The figures that matter: size, faithfulness with its interval, and that of the baselines that were run."""
    row = evaluation.row("circuit", split)
    edges, nodes = circuit.graph.n_edges, len(circuit.nodes)
    figures = {
        "size": f"{circuit.n_edges} of {edges} edges ({circuit.share:.2%}), {nodes} nodes",
        f"faithfulness, {split}": (
            f"{row.faithfulness:.3f} [{row.faithfulness_low:.3f}, {row.faithfulness_high:.3f}] (95%, n = {row.n} facts)"
        ),
        "faithfulness, random circuits": "none drawn",
    }
    for kind, named in IN_FIGURES.items():
        drawn = evaluation.baselines("circuit", split, kind)["faithfulness"]
        if len(drawn):
            mean, low, high = (round(value, 3) + 0.0 for value in (drawn.mean(), drawn.min(), drawn.max()))  # no -0.000
            figures[f"faithfulness, {named}"] = f"{mean:.3f} ({low:.3f} to {high:.3f}, n = {len(drawn)})"
    return figures
