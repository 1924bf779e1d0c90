"""Is a circuit faithful? Circuits run alone, on the facts they were found on and on held-out ones, beside their nulls."""

from kc_lib.evaluation.runs import (
    MINIMAL_EFFECT,
    SHARES,
    Evaluation,
    circuits_by_size,
    conclusion,
    evaluate_circuits,
    headline,
    random_nulls,
)

__all__ = [
    "MINIMAL_EFFECT",
    "SHARES",
    "Evaluation",
    "circuits_by_size",
    "conclusion",
    "evaluate_circuits",
    "headline",
    "random_nulls",
]
