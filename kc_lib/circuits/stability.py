"""Would other facts, another method or another sentence have given the same circuit? Overlap of edge sets.

Overlap is Jaccard's: edges in both over edges in either. A published analysis of EAP-IG (Méloux et al. 2025,
arXiv:2510.00845) reports it over bootstrap resamples of the examples; the bar there is 0.8 with at least 100 examples, and
GPT-2 small on IOI reaches 0.67. A bootstrap resample holds about 63% of the facts, so its circuit differs from the
full one by more than a new sample of the same size would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from kc_lib.circuits.scores import FactScores
from kc_lib.circuits.selection import select, select_bootstrap
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit
from kc_lib.stats import interval


@dataclass(frozen=True)
class Stability:
    """Overlap of circuits found in different ways.

    ``pairs`` has one row per pair: a, b, against ("each other" or "reference"), jaccard. ``n_facts`` is how many facts
    the circuits were found on, where they say so (``n_pairs`` of their provenance) and agree.
    """

    pairs: pd.DataFrame
    n_facts: int | None = None

    @property
    def summary(self) -> pd.DataFrame:
        """Mean overlap, and the range that holds 95% of the pairs (pairs share circuits: it is no interval of the mean).

        One row per kind of comparison: against, n_pairs, jaccard, jaccard_low, jaccard_high.
        """
        rows = []
        for against, group in self.pairs.groupby("against", sort=False):
            low, high = interval(group["jaccard"].to_numpy())
            row = {"against": against, "n_pairs": len(group), "jaccard": group["jaccard"].mean(skipna=False)}
            rows.append(row | {"jaccard_low": float(low), "jaccard_high": float(high)})
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> Path:
        """Write ``pairs`` as parquet; the number of facts goes into the file's metadata."""
        frame = self.pairs.copy()
        frame.attrs = {"n_facts": self.n_facts}
        frame.to_parquet(path, index=False)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Stability:
        """Read what ``save`` wrote."""
        frame = pd.read_parquet(path)
        return cls(frame, frame.attrs.pop("n_facts"))


def jaccard(a: Circuit, b: Circuit) -> float:
    """Edges in both circuits over edges in either; NaN where neither has one.

    Raises:
        MethodError: circuits of different graphs.
    """
    if a.graph != b.graph:
        raise MethodError(f"circuits of different graphs have no common edges to count: {a.graph} and {b.graph}")
    either = int((a.mask | b.mask).sum())
    return int((a.mask & b.mask).sum()) / either if either else float("nan")


def jaccard_matrix(circuits: Mapping[str, Circuit]) -> pd.DataFrame:
    """Jaccard overlap of every circuit with every other, by name: over methods, templates, seeds."""
    matrix = [[jaccard(a, b) for b in circuits.values()] for a in circuits.values()]
    return pd.DataFrame(matrix, index=list(circuits), columns=list(circuits))


def resampled_circuits(
    fact_scores: FactScores,
    n: int = 10,
    seed: int = 0,
    selection: str = "absolute",
    size: int | float | None = 0.005,
    threshold: float | None = None,
    fill: bool = True,
) -> dict[str, Circuit]:
    """The circuits that ``n`` bootstrap resamples of the facts give (``select`` on their mean scores; ``resample #1`` ...).

    ``bootstrap`` selects within every resample by resamples of its own, and it alone knows a size of None.

    Raises:
        MethodError: what ``select`` raises.
    """
    generator = np.random.default_rng(seed)
    n_facts = len(fact_scores.scores)
    circuits = {}
    for draw in range(1, n + 1):
        facts = generator.integers(0, n_facts, n_facts).tolist()
        if selection == "bootstrap":
            again = FactScores(fact_scores.graph, fact_scores.scores[facts], fact_scores.provenance)
            circuits[f"resample #{draw}"] = select_bootstrap(again, seed=seed + draw, size=size)
        elif size is None:
            raise MethodError(f"selection {selection!r} needs a size: a number of edges or a share of them")
        else:
            circuits[f"resample #{draw}"] = select(fact_scores.mean(facts), selection, size, threshold, fill)
    return circuits


def stability(circuits: Mapping[str, Circuit], reference: Circuit | None = None) -> Stability:
    """Overlap of circuits with each other and, where there is one, with a reference (the circuit of all facts).

    Raises:
        MethodError: nothing to compare, or circuits of different graphs.
    """
    pairs = [
        {"a": a, "b": b, "against": "each other", "jaccard": jaccard(circuits[a], circuits[b])}
        for a, b in combinations(circuits, 2)
    ]
    if reference is not None:
        pairs += [
            {"a": name, "b": "reference", "against": "reference", "jaccard": jaccard(circuit, reference)}
            for name, circuit in circuits.items()
        ]
    if not pairs:
        raise MethodError("stability compares circuits: give at least two, or one and a reference")
    n_facts = {circuit.provenance.get("n_pairs") for circuit in circuits.values()}
    return Stability(pd.DataFrame(pairs), n_facts.pop() if len(n_facts) == 1 else None)
