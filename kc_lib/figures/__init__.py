"""Figures of circuits, scores and evaluations: each function takes results and returns a plotly figure.

Positive scores are blue (ablating the edge hurts), negative ones vermillion (ablating it helps): colours of Okabe and
Ito's, which colour-blind readers can tell apart. A circuit is blue beside its grey nulls. Titles say units and n, and
an interval is drawn wherever the results have one. Under grouped queries an edge into a key or value reader that several
heads share is drawn into, and counted for, each of those heads that writes in the circuit.
"""

from kc_lib.figures.attention import MOST_HEADS, MOST_TOKENS, attention_bundle, attention_heatmap, attention_view
from kc_lib.figures.attributions import attribution_figure
from kc_lib.figures.circuits import circuit_graph, top_edges_table, top_nodes_table
from kc_lib.figures.comparison import method_bars, overlap_figure, verdict_table
from kc_lib.figures.components import direct_by_layer, direct_heatmap, lens_figure, neuron_bars, promoted_table
from kc_lib.figures.evaluation import PANELS, comparison_bars, faithfulness_figure
from kc_lib.figures.head_scores import head_score_grid, recurrence_figure
from kc_lib.figures.heads import ablation_figure, attention_sources_heatmap, head_class_figure
from kc_lib.figures.judge import area_curves, completeness_figure, null_figure
from kc_lib.figures.knowledge_neurons import (
    activating_figure,
    change_ratio_figure,
    erase_figure,
    neuron_layer_figure,
    neuron_overlap_figure,
    neurons_per_fact_figure,
    side_effect_figure,
    update_figure,
)
from kc_lib.figures.minimality import minimality_figure
from kc_lib.figures.scores import score_distribution
from kc_lib.figures.sizes import model_size_figure
from kc_lib.figures.style import DARK, NEGATIVE, NEUTRAL, POSITIVE, TEMPLATE
from kc_lib.figures.swaps import swap_grid
from kc_lib.figures.tracing import class_heatmap, class_lines, fact_heatmap, severing_bars
from kc_lib.figures.training import (
    behaviour_over_training,
    circuit_over_training,
    consistency_over_training,
    heads_over_training,
    similarity_over_training,
)

__all__ = [
    "DARK",
    "MOST_HEADS",
    "MOST_TOKENS",
    "NEGATIVE",
    "NEUTRAL",
    "PANELS",
    "POSITIVE",
    "TEMPLATE",
    "ablation_figure",
    "activating_figure",
    "area_curves",
    "attention_bundle",
    "attention_heatmap",
    "attention_sources_heatmap",
    "attention_view",
    "attribution_figure",
    "behaviour_over_training",
    "change_ratio_figure",
    "circuit_graph",
    "circuit_over_training",
    "class_heatmap",
    "class_lines",
    "comparison_bars",
    "completeness_figure",
    "consistency_over_training",
    "direct_by_layer",
    "direct_heatmap",
    "erase_figure",
    "fact_heatmap",
    "faithfulness_figure",
    "head_class_figure",
    "head_score_grid",
    "heads_over_training",
    "lens_figure",
    "method_bars",
    "minimality_figure",
    "model_size_figure",
    "neuron_bars",
    "neuron_layer_figure",
    "neuron_overlap_figure",
    "neurons_per_fact_figure",
    "null_figure",
    "overlap_figure",
    "promoted_table",
    "recurrence_figure",
    "score_distribution",
    "severing_bars",
    "side_effect_figure",
    "similarity_over_training",
    "swap_grid",
    "top_edges_table",
    "top_nodes_table",
    "update_figure",
    "verdict_table",
]
