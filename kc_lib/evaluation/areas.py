"""How good a *ranking* of edges is, whatever size one picks: areas under faithfulness over the share of edges kept.

- ``cpr``: area under faithfulness (Circuit Performance Ratio: higher is better, above 1 where edges that work against the
  answer are left out), meant for signed selection;
- ``cmd``: area of |1 - faithfulness| (Circuit-Model Distance: 0 is best), meant for absolute selection. Both as in MIB
  (Mueller et al. 2025, arXiv:2504.13151, section 3): trapezoids, linear in the share, over ``SHARES``;
- ``log_area``: area under faithfulness over log10(share) divided by the range, so a mean of faithfulness. Sizes up to 5%,
  where circuits are looked for, weigh 7% in CPR and CMD and 62% here.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid

from kc_lib.errors import MethodError
from kc_lib.evaluation.circuits import kind_of, ranking_of
from kc_lib.evaluation.faithfulness import faithfulness_of, with_interval
from kc_lib.evaluation.runs import Evaluation


def areas(evaluation: Evaluation, seed: int = 0) -> pd.DataFrame:
    """CPR, CMD and log area of every ranking that was run at two or more sizes (``circuits_by_size``), by split.

    Columns ranking (``top``, ``random #1``, or your label), kind, split, n (facts), n_sizes, smallest and largest share,
    and each area with its 95% interval (``cpr``, ``cpr_low``, ``cpr_high`` ...): a resample of the facts serves all sizes.
    Figures compare with published ones where the shares run from 0.001 to 1. An interval of cmd leans upwards, because
    noise adds to a distance.

    Raises:
        MethodError: no ranking was run at two sizes.
    """
    curves: dict[str, list[tuple[float, str]]] = {}
    for name in evaluation.summary["circuit"].unique():
        if place := ranking_of(name):
            curves.setdefault(place[0], []).append((place[1], name))
    curves = {ranking: sorted(points) for ranking, points in curves.items() if len(points) > 1}
    if not curves:
        raise MethodError("no ranking was judged at two sizes: give evaluate_circuits what circuits_by_size returns")
    rows = []
    for split in evaluation.splits:
        values = evaluation.values(split)
        found = faithfulness_of(values, seed)
        for ranking, points in curves.items():
            shares = np.array([share for share, _ in points])
            estimate, draws = found.of(*(name for _, name in points))
            curve = np.concatenate([estimate[None], draws])
            logs = np.log10(shares)
            measured = {
                "cpr": trapezoid(curve, shares),
                "cmd": trapezoid(np.abs(1 - curve), shares),
                "log_area": trapezoid(curve, logs) / (logs[-1] - logs[0]),
            }
            row = {"ranking": ranking, "kind": kind_of(ranking), "split": split, "n": len(values), "n_sizes": len(shares)}
            row |= {"smallest": shares[0], "largest": shares[-1]}
            for name, area in measured.items():
                row |= with_interval(name, area[0], area[1:])
            rows.append(row)
    return pd.DataFrame(rows)
