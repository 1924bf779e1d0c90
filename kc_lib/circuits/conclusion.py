"""What an evaluation says in words: the figures that matter, and one paragraph."""

from __future__ import annotations

import numpy as np
import pandas as pd

from kc_lib.circuits.baselines import NULL_KINDS
from kc_lib.circuits.evaluate import Evaluation
from kc_lib.graph import Circuit
from kc_lib.stats import empirical_p

IN_FIGURES = {"connected": "random circuits", "profile": "heads shuffled within layers"}
IN_WORDS = {"connected": "Random circuits of that size", "profile": "Copies with the heads shuffled within every layer"}


def headline(evaluation: Evaluation, circuit: Circuit, split: str) -> dict[str, str]:
    """The figures that matter: size, faithfulness with its interval, and that of the nulls that were run."""
    own = evaluation.row("circuit", split)
    edges, nodes = circuit.graph.n_edges, len(circuit.nodes)
    figures = {
        "size": f"{circuit.n_edges} of {edges} edges ({circuit.share:.2%}), {nodes} nodes",
        f"faithfulness, {split}": (
            f"{own.faithfulness:.3f} [{own.faithfulness_low:.3f}, {own.faithfulness_high:.3f}] (95%, n = {own.n} facts)"
        ),
        "faithfulness, random circuits": "none drawn",
    }
    for kind, nulls in _nulls(evaluation, split).items():
        mean, low, high = (round(value, 3) + 0.0 for value in (nulls.mean(), nulls.min(), nulls.max()))  # no -0.000
        figures[f"faithfulness, {IN_FIGURES[kind]}"] = f"{mean:.3f} ({low:.3f} to {high:.3f}, n = {len(nulls)})"
    return figures


def conclusion(evaluation: Evaluation, circuit: Circuit, split: str) -> str:
    """One paragraph (Markdown) that says what was found and what it does not say."""
    own = evaluation.row("circuit", split)
    facts = f"{own.n} {'held-out' if split == 'held_out' else split} facts"
    if np.isnan(own.faithfulness):
        return (
            f"On {facts} the corrupted prompts change the metric by next to nothing, so faithfulness is undefined: choose "
            "another task, metric or intervention."
        )
    against = [
        f"{IN_WORDS[kind]} have {nulls.mean():.2f} on average and {nulls.max():.2f} at most "
        f"(p = {empirical_p(own.faithfulness, nulls.tolist()):.2f}, {len(nulls)} draws)."
        for kind, nulls in _nulls(evaluation, split).items()
    ]
    held_out = "" if split == "held_out" else " No facts were held out, so the circuit is judged on those it was found on."
    return (
        f"On {facts} the circuit of **{circuit.n_edges:,} edges ({circuit.share:.2%})** has a faithfulness of "
        f"**{own.faithfulness:.2f}** (95% interval {own.faithfulness_low:.2f} to {own.faithfulness_high:.2f}).{held_out} "
        f"{' '.join(against) or 'No random circuits were drawn.'} The right answer is among its first ten tokens for "
        f"{own.hit_at_10:.0%} of the facts.\n\n"
        "Faithful means that these edges *suffice* for this metric under this intervention. It does not mean that no other "
        "set would, or that every edge in it is needed."
    )


def _nulls(evaluation: Evaluation, split: str) -> dict[str, pd.Series]:
    """Faithfulness of the circuit's nulls by kind, of the kinds that were run."""
    summary = evaluation.summary[evaluation.summary["split"] == split]
    found = {kind: summary.loc[summary["kind"] == named, "faithfulness"] for kind, named in NULL_KINDS.items()}
    return {kind: nulls for kind, nulls in found.items() if len(nulls)}
