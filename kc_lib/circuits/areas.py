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

from kc_lib.circuits.baselines import kind_of, ranking_of
from kc_lib.circuits.evaluate import Evaluation
from kc_lib.circuits.faithfulness import faithfulness_of
from kc_lib.errors import MethodError
from kc_lib.stats import with_interval


def areas(evaluation: Evaluation, seed: int = 0) -> pd.DataFrame:
    """CPR, CMD and log area of every ranking that was run at several sizes (``circuits_by_size``), by split.

    All edges are the model itself, so every curve ends at share 1 with faithfulness 1, run there or not: random circuits
    that do nothing have a CPR of 0.25. Figures compare with published ones where the smallest share is 0.001. An
    interval of cmd leans upwards, because noise adds to a distance.

    Returns:
        Columns ranking (``top``, ``random #1``, or your label), kind, split, n (facts), n_sizes, smallest (share), and
        each area with its 95% interval (``cpr``, ``cpr_low``, ``cpr_high`` ...): a resample of the facts serves all sizes.

    Raises:
        MethodError: no ranking was run below share 1.
    """
    curves: dict[str, dict[float, str]] = {}
    for name in evaluation.summary["circuit"].unique():
        if place := ranking_of(name):
            curves.setdefault(place[0], {1.0: "full"})[place[1]] = name
    curves = {ranking: points for ranking, points in curves.items() if len(points) > 1}
    if not curves:
        raise MethodError("no ranking was judged at several sizes: give evaluate_circuits what circuits_by_size returns")
    rows = []
    for split in evaluation.splits:
        values = evaluation.values(split)
        found = faithfulness_of(values, seed)
        for ranking, points in curves.items():
            shares = np.array(sorted(points))
            estimate, draws = found.of(*(points[share] for share in shares))
            curve = np.concatenate([estimate[None], draws])
            logs = np.log10(shares)
            measured = {
                "cpr": trapezoid(curve, shares),
                "cmd": trapezoid(np.abs(1 - curve), shares),
                "log_area": trapezoid(curve, logs) / (logs[-1] - logs[0]),
            }
            row = {"ranking": ranking, "kind": kind_of(ranking), "split": split, "n": len(values), "n_sizes": len(shares)}
            row["smallest"] = shares[0]
            for name, area in measured.items():
                row |= with_interval(name, area[0], area[1:])
            rows.append(row)
    return pd.DataFrame(rows)
