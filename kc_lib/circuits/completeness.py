"""Is everything that does the task in the circuit? The model run without the circuit's edges.

Completeness is the faithfulness of the circuit's complement, all edges of the graph that are not in it (Marks et al. 2024,
arXiv:2403.19647, section 3.2): *low* means complete, 0 that nothing of the effect is left. Necessity is 1 minus it, the
drop when the circuit's edges are removed from the whole model. Almost any set of edges breaks something: read both beside
random circuits of the same size.
"""

from __future__ import annotations

import pandas as pd

from kc_lib.circuits.baselines import kind_of
from kc_lib.circuits.evaluate import Evaluation
from kc_lib.circuits.faithfulness import faithfulness_of
from kc_lib.errors import MethodError
from kc_lib.stats import with_interval

PREFIX = "without "


def completeness(evaluation: Evaluation, seed: int = 0) -> pd.DataFrame:
    """Completeness and necessity, with 95% intervals over facts, of every circuit whose complement was run too.

    Run them with ``evaluate_circuits(model, circuits | complements(circuits), splits)``, where ``circuits`` holds the
    circuit and its nulls. Columns circuit, kind, split, n (facts), completeness, completeness_low, completeness_high,
    necessity, necessity_low, necessity_high.

    Raises:
        MethodError: no complement was run.
    """
    names = [name for name in evaluation.summary["circuit"].unique() if name.startswith(PREFIX)]
    if not names:
        raise MethodError("no complement was judged: give evaluate_circuits circuits | complements(circuits)")
    rows = []
    for split in evaluation.splits:
        values = evaluation.values(split)
        found = faithfulness_of(values, seed)
        for name in names:
            (estimate,), draws = found.of(name)
            circuit = name.removeprefix(PREFIX)
            row = {"circuit": circuit, "kind": kind_of(circuit), "split": split, "n": len(values)}
            row |= with_interval("completeness", estimate, draws[:, 0])
            rows.append(row | with_interval("necessity", 1 - estimate, 1 - draws[:, 0]))
    return pd.DataFrame(rows)
