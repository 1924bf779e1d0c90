"""Statistics over facts that results about neurons share: means, ratios and rates with intervals, by relation and pooled.

Prompts, and draws of random neurons, are averaged within a fact before facts are averaged, so that a fact counts once.
Ratios and means have bootstraps over facts. Rates have Wilson's interval with the number of facts as n, and as count the sum
of each fact's share of prompts: prompts of one fact are not independent, and this interval takes them for one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from kc_lib.results import Result
from kc_lib.stats import resampled_means, share_interval, with_interval

METHODS = ("knowledge", "base")
KINDS = (*METHODS, "random")
ALL = "all"  # relations pooled
PERPLEXITIES = ("perplexity_before", "perplexity", "ratio", "ratio_low", "ratio_high")


class OfFacts(Result):
    """A result whose ``frame`` has rows about facts by their number, and whose ``facts`` says what these are."""

    frame: pd.DataFrame
    facts: pd.DataFrame

    def with_facts(self) -> pd.DataFrame:
        """``frame`` with what is known of every fact: relation, subject, answer."""
        names = [name for name in ("relation", "subject", "answer", "new_answer") if name in self.facts]
        return self.frame.merge(self.facts[["fact", *names]], on="fact")


def headline(*results: Any, seed: int = 0) -> dict[str, str]:
    """The figures that a run is remembered by, of several results that each have a ``headline(seed)``."""
    return {name: figure for result in results for name, figure in result.headline(seed).items()}


def relations_of(facts: pd.DataFrame) -> list[tuple[str, list[int]]]:
    """All facts pooled, then those of every relation: name and numbers of the facts."""
    by_relation = [(str(name), rows["fact"].tolist()) for name, rows in facts.groupby("relation", sort=False)]
    return [(ALL, facts["fact"].tolist()), *by_relation]


def by_relation(
    by_fact: pd.DataFrame,
    facts: pd.DataFrame,
    levels: Mapping[str, Sequence[Any]],
    measure: Callable[[pd.DataFrame], dict[str, float]],
    figures: Sequence[str],
) -> pd.DataFrame:
    """Rows of what ``measure`` says of facts, of all relations pooled and of each one, and of each value of the levels.

    Args:
        by_fact: one row per fact and value of the levels; its index has them and "fact" by name.
        levels: the values of each level, in the order of the rows.
        measure: from the rows of a group of facts; groups without facts have no row.
        figures: what it says, which are the columns beside relation, the levels and n (facts).
    """
    rows = []
    for relation, numbers in relations_of(facts) if len(by_fact) else []:
        groups = dict(iter(by_fact[by_fact.index.isin(numbers, level="fact")].groupby(list(levels))))
        for values in product(*levels.values()):
            if values in groups:
                named = dict(zip(levels, values, strict=True))
                rows.append({"relation": relation, **named, "n": len(groups[values])} | measure(groups[values]))
    return pd.DataFrame(rows, columns=["relation", *levels, "n", *figures])


def means_with_draws(values: Float[np.ndarray, "fact column"], seed: int) -> Float[np.ndarray, "draw column"]:
    """Means over facts in the first row, then those of every resample."""
    if not len(values):
        return np.full((2, values.shape[1]), np.nan)
    return np.concatenate([values.mean(0, keepdims=True), resampled_means(values, seed)])


def relative_change(before: Float[np.ndarray, " draw"], after: Float[np.ndarray, " draw"]) -> Float[np.ndarray, " draw"]:
    """(after - before) / before."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (after - before) / before


def rate(name: str, shares: pd.Series) -> dict[str, float]:
    """A rate from every fact's share of prompts, with Wilson's interval over facts."""
    low, high = share_interval(float(shares.sum()), len(shares))
    return {name: float(shares.mean()), f"{name}_low": low, f"{name}_high": high}


def perplexities(by_fact: pd.DataFrame, seed: int) -> dict[str, float]:
    """From nll_before and nll of every fact: the columns ``PERPLEXITIES``; ratio is the quotient less 1."""
    means = means_with_draws(by_fact[["nll_before", "nll"]].to_numpy(), seed)
    ratio = np.expm1(means[:, 1] - means[:, 0])
    before, after = np.exp(means[0])
    return {"perplexity_before": before, "perplexity": after} | with_interval("ratio", ratio[0], ratio[1:])


def ends(*names: str) -> list[str]:
    """The columns of figures with their intervals."""
    return [f"{name}{end}" for name in names for end in ("", "_low", "_high")]


def figure(row: Mapping[Any, Any], name: str, form: str) -> str:
    """A figure of a table with its interval, each as ``form`` writes it: ``.2f``, ``+.1%``."""
    if pd.isna(row[name]):
        return "undefined"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:{form}}" + ("" if pd.isna(low) else f" [{low:{form}}, {high:{form}}]")
