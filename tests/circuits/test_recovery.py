"""Does a discovery method find a circuit that is known? Every method on every hand-wired model.

``docs/ground_truth.md`` holds the same tables, with what they mean; a test keeps the two alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ground_truth.circuits import HAND_WIRED, HandWired, hand_wired
from ground_truth.known_circuit import edge_auroc
from jaxtyping import Bool
from torch import Tensor

from kc_lib.circuits.acdc.search import acdc
from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.options import METHODS
from kc_lib.circuits.selection import top_edges

PAGE = Path(__file__).parents[2] / "docs" / "ground_truth.md"
N_TRUE = {"induction": 5, "saturated": 5, "fact": 3, "cancelling": 3, "redundant": 6}
MODELS = tuple(N_TRUE)

# AUROC of |score| against the true edges, rounded down; true edges among the n best (n = number of true edges)
# fmt: off
RANKINGS: Mapping[str, tuple[tuple[float, int], ...]] = {
    #                      induction  saturated  fact       cancelling redundant
    "eap":                ((1.00, 5), (0.61, 3), (1.00, 3), (0.99, 0), (0.85, 2)),
    "eap_ig":             ((1.00, 5), (1.00, 5), (1.00, 3), (0.99, 0), (1.00, 6)),
    "clean_corrupted":    ((1.00, 5), (0.61, 3), (1.00, 3), (0.99, 0), (0.98, 3)),
    "eap_ig_activations": ((1.00, 5), (1.00, 5), (1.00, 3), (0.99, 0), (0.99, 4)),
    "relp":               ((1.00, 5), (0.61, 3), (1.00, 3), (0.99, 0), (0.74, 2)),
    "gim":                ((1.00, 5), (0.97, 2), (1.00, 3), (0.99, 0), (0.82, 2)),
    "qk_fix":             ((1.00, 5), (1.00, 5), (1.00, 3), (0.99, 0), (0.85, 2)),
    "flow_routes":        ((0.91, 0), (0.92, 0), (0.89, 0), (0.89, 0), (0.84, 0)),
    "exact":              ((1.00, 5), (1.00, 5), (1.00, 3), (0.99, 0), (0.93, 2)),
}
# edges kept, and true ones among them, of ACDC under patching
ACDC: Mapping[str, tuple[dict[str, Any], tuple[tuple[int, int], ...]]] = {
    #                                                                              ind.    sat.    fact    canc.   red.
    "logit difference":           ({"metric": "logit_difference", "tau": 0.5},   ((5, 5), (5, 5), (3, 3), (5, 3), (4, 4))),
    "logit difference, absolute": ({"metric": "logit_difference", "tau": 0.5,
                                    "absolute": True},                           ((5, 5), (5, 5), (3, 3), (7, 3), (4, 4))),
    "KL":                         ({"metric": "kl", "tau": 0.1},                 ((5, 5), (5, 5), (3, 3), (3, 3), (4, 4))),
    "KL, from the input":         ({"metric": "kl", "tau": 0.1,
                                    "order": "normal"},                          ((5, 5), (5, 5), (3, 3), (3, 1), (4, 4))),
}
# fmt: on


@cache
def built(name: str) -> HandWired:
    return hand_wired(name)


def is_found(wired: HandWired, mask: Bool[Tensor, "writer reader"]) -> bool:
    """The true edges and no other: all of them, or a whole minimal circuit."""
    return any(torch.equal(mask, circuit.mask) for circuit in (wired.circuit, *wired.minimal))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_ranking(method: str, name: str) -> None:
    if method not in RANKINGS:
        pytest.fail(f"no row for {method!r}: measure it, then add it to RANKINGS and to {PAGE.name}")
    minimum, expected = RANKINGS[method][MODELS.index(name)]
    wired = built(name)
    scores = score_edges(wired.model, wired.pairs, method)
    best = top_edges(scores.graph, scores.scores.abs(), wired.circuit.n_edges)
    found = int((best & wired.circuit.mask).sum())
    assert edge_auroc(scores, wired.circuit) >= minimum
    assert found >= expected
    assert is_found(wired, best) == (expected == N_TRUE[name]), "the page says otherwise"
    if name == "cancelling" and method != "flow_routes":  # their own effects rank all seven edges first, as they must
        effective = wired.circuit.mask | wired.others["cancelling"].mask
        assert torch.equal(top_edges(scores.graph, scores.scores.abs(), 7), effective)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", ACDC)
def test_acdc(variant: str, name: str) -> None:
    options, row = ACDC[variant]
    n_kept, n_true = row[MODELS.index(name)]
    wired = built(name)
    kept = acdc(wired.model, wired.pairs, intervention="patching", **options).pruned()
    assert (kept.n_edges, int((kept.mask & wired.circuit.mask).sum())) == (n_kept, n_true)
    assert is_found(wired, kept.mask) == (n_kept == n_true)


def test_every_method_and_model_has_its_place() -> None:
    assert tuple(HAND_WIRED) == MODELS
    assert {name: built(name).circuit.n_edges for name in MODELS} == N_TRUE
    assert set(RANKINGS) == set(METHODS)


def test_the_page_holds_the_tables() -> None:
    head = ["| | " + " | ".join(MODELS) + " |", "|---" * (len(MODELS) + 1) + "|"]
    rankings = [
        _line(f"`{method}`", [_ranked(*cell) for cell in zip(MODELS, row, strict=True)]) for method, row in RANKINGS.items()
    ]
    searches = [_line(variant, [_kept(*cell) for cell in row]) for variant, (_, row) in ACDC.items()]
    text = PAGE.read_text()
    for table in (rankings, searches):
        wanted = "\n".join([*head, *table])
        assert wanted in text, f"{PAGE.name} should say\n{wanted}"


def _line(first: str, cells: list[str]) -> str:
    return f"| {first} | " + " | ".join(cells) + " |"


def _ranked(name: str, cell: tuple[float, int]) -> str:
    auroc, found = cell
    text = f"{auroc:.2f}, {found} of {N_TRUE[name]}"
    return f"**{text}**" if found == N_TRUE[name] else text


def _kept(n_kept: int, n_true: int) -> str:
    text = f"{n_true} true of {n_kept}"
    return f"**{text}**" if n_kept == n_true else text
