"""The judge: what a circuit is worth, on the facts it was found on and on held-out ones, beside its nulls.

Circuits go in by name; each is run alone once per fact, and everything else is read from those runs::

    named = {"circuit": circuit} | random_nulls(circuit, 20) | random_nulls(circuit, 20, kind="profile")
    sizes = circuits_by_size(scores, "absolute") | circuits_by_size(scores, "signed", label="signed")
    result = evaluate_circuits(model, named | complements(named) | sizes, {"discovery": ..., "held_out": ...})

============ ============================================================ =====================================
question     answer                                                       from
============ ============================================================ =====================================
faithful?    ``result.summary``, ``headline``, ``conclusion``             ``evaluate_circuits`` -> Evaluation
at any size? ``areas(result)``: CPR, CMD, log area by ranking             ``circuits_by_size`` in the evaluation
complete?    ``completeness(result)``: of every circuit and null          ``complements`` in the evaluation
minimal?     ``minimality(model, circuit, splits)`` -> Minimality         runs without single edges
stable?      ``stability(circuits, reference)`` -> Stability              ``resampled_circuits(fact_scores)``, or
                                                                          circuits by method or template
true?        ``edge_auroc(scores, truth)``, ``recovery(circuit, truth)``  a model whose circuit is known
how small?   ``smallest_faithful(model, scores, pairs)``                  runs at sizes that the search picks
altogether?  ``verdict(result, minimality, stability)``                   all of the above
============ ============================================================ =====================================

Tables have one row per circuit (or ranking, edge, comparison) and split, and give a figure as ``name``, ``name_low``,
``name_high`` with its 95% bootstrap interval over facts. Evaluation, Minimality and Stability are kept with ``save`` and
read with ``load``. What circuits are called and how names are read is at the head of ``circuits.py``; each question's
definition, source and null is at the head of its file.
"""

from kc_lib.evaluation.areas import areas
from kc_lib.evaluation.behaviour import BEHAVIOURS, Behaviour, behaviour
from kc_lib.evaluation.circuits import (
    NULL_KINDS,
    SHARES,
    circuits_by_size,
    complement,
    complements,
    kind_of,
    random_nulls,
    ranking_of,
)
from kc_lib.evaluation.completeness import completeness
from kc_lib.evaluation.conclusion import conclusion, headline
from kc_lib.evaluation.faithfulness import MINIMAL_EFFECT, Faithfulness, faithfulness_of
from kc_lib.evaluation.head_conclusion import head_conclusion, head_headline
from kc_lib.evaluation.heads import HeadAblation, ablate_heads, random_heads, recurrence
from kc_lib.evaluation.minimality import Minimality, edges_between_nodes, minimality
from kc_lib.evaluation.neuron_conclusion import neurons_conclusion, neurons_headline
from kc_lib.evaluation.neuron_effects import activation_means, change_ratios, erasure_effects, side_effects, update_rates
from kc_lib.evaluation.neuron_sets import layer_shares, neurons_per_fact, overlaps
from kc_lib.evaluation.nodes import ablated_values
from kc_lib.evaluation.runs import Evaluation, evaluate_circuits, metric_values
from kc_lib.evaluation.sizes import model_sizes, results_of_others, size_correlations, size_over_time
from kc_lib.evaluation.smallest import smallest_faithful
from kc_lib.evaluation.stability import Stability, jaccard, jaccard_matrix, resampled_circuits, stability
from kc_lib.evaluation.swaps import strongest_heads, strongest_swaps, swap_changes, swap_measure, swap_rows
from kc_lib.evaluation.table import CircuitTable, circuit_table
from kc_lib.evaluation.tracing import (
    SUBJECT,
    average_effects,
    peaks,
    severing,
    total_effect,
    tracing_conclusion,
    tracing_headline,
)
from kc_lib.evaluation.training import TRAINING_MEASURES, training_measures
from kc_lib.evaluation.training_summary import (
    SIMILARITIES,
    emergence,
    over_draws,
    similarities,
    training_conclusion,
    training_headline,
)
from kc_lib.evaluation.truth import Recovery, edge_auroc, recovery
from kc_lib.evaluation.verdict import verdict

__all__ = [
    "BEHAVIOURS",
    "MINIMAL_EFFECT",
    "NULL_KINDS",
    "SHARES",
    "SIMILARITIES",
    "SUBJECT",
    "TRAINING_MEASURES",
    "Behaviour",
    "CircuitTable",
    "Evaluation",
    "Faithfulness",
    "HeadAblation",
    "Minimality",
    "Recovery",
    "Stability",
    "ablate_heads",
    "ablated_values",
    "activation_means",
    "areas",
    "average_effects",
    "behaviour",
    "change_ratios",
    "circuit_table",
    "circuits_by_size",
    "complement",
    "complements",
    "completeness",
    "conclusion",
    "edge_auroc",
    "edges_between_nodes",
    "emergence",
    "erasure_effects",
    "evaluate_circuits",
    "faithfulness_of",
    "head_conclusion",
    "head_headline",
    "headline",
    "jaccard",
    "jaccard_matrix",
    "kind_of",
    "layer_shares",
    "metric_values",
    "minimality",
    "model_sizes",
    "neurons_conclusion",
    "neurons_headline",
    "neurons_per_fact",
    "over_draws",
    "overlaps",
    "peaks",
    "random_heads",
    "random_nulls",
    "ranking_of",
    "recovery",
    "recurrence",
    "resampled_circuits",
    "results_of_others",
    "severing",
    "side_effects",
    "similarities",
    "size_correlations",
    "size_over_time",
    "smallest_faithful",
    "stability",
    "strongest_heads",
    "strongest_swaps",
    "swap_changes",
    "swap_measure",
    "swap_rows",
    "total_effect",
    "tracing_conclusion",
    "tracing_headline",
    "training_conclusion",
    "training_headline",
    "training_measures",
    "update_rates",
    "verdict",
]
