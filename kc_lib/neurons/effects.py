"""What changing, reading and editing knowledge neurons does, over facts: ratios, means and rates with intervals.

Prompts, and draws of random neurons, are averaged within a fact before facts are averaged, so that a fact counts once.
Ratios and means have bootstraps over facts. Rates have Wilson's interval with the number of facts as n, and as count the sum
of each fact's share of prompts: prompts of one fact are not independent, and this interval takes them for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from kc_lib.neurons.activate import SENTENCES, NeuronActivations
from kc_lib.neurons.controls import KINDS
from kc_lib.neurons.erase import RelationErasure
from kc_lib.neurons.sets import relations_of
from kc_lib.neurons.suppress import NeuronChanges
from kc_lib.neurons.update import FactUpdates
from kc_lib.stats import resampled_means, with_interval

CONTRASTS = (("T1", "T2"), ("T1", "T3"))
RATES = ("changed", "success_1", "success_5")


def change_ratios(changes: NeuronChanges, seed: int = 0) -> pd.DataFrame:
    """(mean p_changed - mean p) / mean p of the gold answer, per relation and pooled, factor, prompts and kind.

    Columns: relation ("all" pooled), factor, on, kind, n (facts), p, p_changed, ratio, and ``more``, the ratio less that of
    random neurons on the same facts; ratio and more with their intervals. Facts without neurons are in none.
    """
    prompts = changes.frame.groupby(["factor", "on", "kind", "fact", "of_fact", "prompt"])[["p", "p_changed"]].mean()
    by_fact = prompts.groupby(["factor", "on", "kind", "fact"]).mean()
    rows: list[dict[str, Any]] = []
    for relation, facts in relations_of(changes.facts):
        for (factor, on), own in by_fact[by_fact.index.isin(facts, level="fact")].groupby(["factor", "on"], sort=True):
            table = own.droplevel(["factor", "on"]).unstack("kind")
            for kind in KINDS:
                if kind not in table["p"]:
                    continue
                values = table[[("p", kind), ("p_changed", kind)]].dropna().to_numpy()
                means = _with_draws(values, seed)
                ratio = _ratio(means[:, 0], means[:, 1])
                more = np.full(2, np.nan)
                if kind != "random" and "random" in table["p"]:
                    columns = [(name, which) for which in (kind, "random") for name in ("p", "p_changed")]
                    both = _with_draws(table[columns].dropna().to_numpy(), seed)
                    more = _ratio(both[:, 0], both[:, 1]) - _ratio(both[:, 2], both[:, 3])
                about = {"relation": relation, "factor": factor, "on": on, "kind": kind, "n": len(values)}
                about |= {"p": means[0, 0], "p_changed": means[0, 1]}
                rows.append(about | with_interval("ratio", ratio[0], ratio[1:]) | with_interval("more", more[0], more[1:]))
    names = ["relation", "factor", "on", "kind", "n", "p", "p_changed", *_ends("ratio"), *_ends("more")]
    return pd.DataFrame(rows, columns=names)


def activation_means(activations: NeuronActivations, seed: int = 0) -> pd.DataFrame:
    """Mean activation of facts' neurons on T1, T2 and T3 sentences, per relation and pooled, and the differences of these.

    Columns: relation, kind, sentences ("T1", "T2", "T3", "T1 - T2", "T1 - T3"), n (facts), activation with its interval.
    """
    by_fact = activations.frame.groupby(["kind", "fact", "sentences"])["activation"].mean()
    rows: list[dict[str, Any]] = []
    for relation, facts in relations_of(activations.facts):
        for kind in KINDS:
            own = by_fact[by_fact.index.isin(facts, level="fact") & by_fact.index.isin([kind], level="kind")]
            table = own.droplevel("kind").unstack("sentences")
            columns = {name: table[name].dropna() for name in SENTENCES if name in table}
            columns |= {
                f"{one} - {two}": (table[one] - table[two]).dropna() for one, two in CONTRASTS if {one, two} <= set(table)
            }
            for name, values in columns.items():
                if len(values):
                    means = _with_draws(values.to_numpy()[:, None], seed)[:, 0]
                    about = {"relation": relation, "kind": kind, "sentences": name, "n": len(values)}
                    rows.append(about | with_interval("activation", means[0], means[1:]))
    return pd.DataFrame(rows, columns=["relation", "kind", "sentences", "n", *_ends("activation")])


def update_rates(updates: FactUpdates) -> pd.DataFrame:
    """How often an update takes: per relation and pooled, kind, and own or held-out prompts.

    Columns: relation, on, kind, n (facts), changed (another token has rank 1), success_1 and success_5 (the new answer has
    rank 1, or at most 5) with Wilson intervals; p_before, p, rank_before and rank of the new answer (ranks are medians).
    """
    frame = updates.frame.assign(success_1=updates.frame["rank"] == 1, success_5=updates.frame["rank"] <= 5)
    numbers = [*RATES, "p_before", "p", "rank_before", "rank"]
    by_fact = frame.astype(dict.fromkeys(numbers, float)).groupby(["on", "kind", "fact"])[numbers].mean()
    rows: list[dict[str, Any]] = []
    for relation, facts in relations_of(updates.facts):
        chosen = by_fact[by_fact.index.isin(facts, level="fact")]
        for on in ("own", "held_out"):
            for kind in KINDS:
                own = chosen[chosen.index.isin([on], level="on") & chosen.index.isin([kind], level="kind")]
                if own.empty:
                    continue
                row: dict[str, Any] = {"relation": relation, "on": on, "kind": kind, "n": len(own)}
                for name in RATES:
                    row |= _rate(name, own[name])
                row |= {"p_before": own["p_before"].mean(), "p": own["p"].mean()}
                rows.append(row | {"rank_before": own["rank_before"].median(), "rank": own["rank"].median()})
    names = [*("relation", "on", "kind", "n"), *(end for name in RATES for end in _ends(name))]
    return pd.DataFrame(rows, columns=[*names, "p_before", "p", "rank_before", "rank"])


def side_effects(updates: FactUpdates, seed: int = 0) -> pd.DataFrame:
    """Perplexity of other facts' gold answers before and after updates, per relation of the updated fact and pooled.

    Columns: relation, on ("intra", "inter"), kind, n (updated facts), perplexity_before, perplexity, and ratio, their
    quotient less 1, with its interval.
    """
    by_fact = updates.others.groupby(["on", "kind", "fact"])[["nll_before", "nll"]].mean()
    rows: list[dict[str, Any]] = []
    for relation, facts in relations_of(updates.facts):
        chosen = by_fact[by_fact.index.isin(facts, level="fact")]
        for on in ("intra", "inter"):
            for kind in KINDS:
                own = chosen[chosen.index.isin([on], level="on") & chosen.index.isin([kind], level="kind")]
                if len(own):
                    about = {"relation": relation, "on": on, "kind": kind, "n": len(own)}
                    rows.append(about | _perplexities(own, seed))
    return pd.DataFrame(rows, columns=["relation", "on", "kind", "n", *PERPLEXITIES])


def erasure_effects(erasures: Sequence[RelationErasure], seed: int = 0) -> pd.DataFrame:
    """What erasing each relation does to it, to all others together ("others"), and to every other one.

    Columns: erased, on ("erased", "others", "other"), relation, kind, n_neurons, n (facts), right_before and right (with
    Wilson intervals), perplexity_before, perplexity, and ratio, their quotient less 1, with its interval.
    """
    names = ["right_before", "right"]
    rows: list[dict[str, Any]] = []
    for erasure in erasures:
        erased = str(erasure.provenance["relation"])
        frame = erasure.frame.astype(dict.fromkeys(names, float))
        sizes = erasure.neurons.groupby(["kind", "draw"]).size().groupby("kind").first()
        by_fact = frame.groupby(["kind", "relation", "fact"], sort=False)[[*names, "nll_before", "nll"]].mean()
        for kind in KINDS:
            own = by_fact[by_fact.index.isin([kind], level="kind")]
            of_relation = own.index.get_level_values("relation")
            groups = {("erased", erased): own[of_relation == erased], ("others", "others"): own[of_relation != erased]}
            groups |= {("other", str(name)): own[of_relation == name] for name in of_relation.unique() if name != erased}
            for (on, relation), some in groups.items():
                if some.empty:
                    continue
                about: dict[str, Any] = {"erased": erased, "on": on, "relation": relation, "kind": kind}
                about |= {"n_neurons": int(sizes[kind]), "n": len(some)}
                rows.append(
                    about
                    | _rate("right_before", some["right_before"])
                    | _rate("right", some["right"])
                    | _perplexities(some, seed)
                )
    columns = [
        *("erased", "on", "relation", "kind", "n_neurons", "n"),
        *_ends("right_before"),
        *_ends("right"),
        *PERPLEXITIES,
    ]
    return pd.DataFrame(rows, columns=columns)


def _ends(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


PERPLEXITIES = ("perplexity_before", "perplexity", *_ends("ratio"))


def _perplexities(own: pd.DataFrame, seed: int) -> dict[str, float]:
    """From nll_before and nll of every fact."""
    means = _with_draws(own[["nll_before", "nll"]].to_numpy(), seed)
    ratio = np.expm1(means[:, 1] - means[:, 0])
    before, after = np.exp(means[0])
    return {"perplexity_before": before, "perplexity": after} | with_interval("ratio", ratio[0], ratio[1:])


def _rate(name: str, shares: pd.Series) -> dict[str, float]:
    """A rate from every fact's share of prompts, with Wilson's interval over facts."""
    low, high = proportion_confint(shares.sum(), len(shares), method="wilson")
    return {name: float(shares.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}


def _with_draws(values: np.ndarray, seed: int) -> np.ndarray:
    """Means over facts in the first row, then those of every resample."""
    if not len(values):
        return np.full((2, values.shape[1]), np.nan)
    return np.concatenate([values.mean(0, keepdims=True), resampled_means(values, seed)])


def _ratio(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return (after - before) / before
