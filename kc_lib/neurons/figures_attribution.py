"""Scores of a fact's neurons, paraphrase by paraphrase: what refining sees."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from kc_lib.errors import MethodError
from kc_lib.neurons.attribute import NeuronAttributions
from kc_lib.neurons.options import RefineOptions
from kc_lib.neurons.refine import coarse_neurons
from kc_lib.plotting import HEAD, NEUTRAL, POSITIVE, origin, titled

FEW = ("one paraphrase", NEUTRAL)
SOME = ("several", HEAD)
EVERY = ("every one", POSITIVE)


def attribution_figure(
    attributions: NeuronAttributions, fact: int = 0, method: str = "knowledge", threshold: float | None = None
) -> go.Figure:
    """The neurons that pass the threshold on a fact's paraphrases, by layer, coloured by how many paraphrases they pass on.

    Args:
        threshold: share of a prompt's largest score; by default the method's own.

    Raises:
        MethodError: no such fact, or no neuron of it has a positive score.
    """
    rows = coarse_neurons(
        attributions,
        method,
        {"knowledge": RefineOptions.threshold, "base": RefineOptions.base_threshold}[method]
        if threshold is None
        else threshold,
    )
    rows = rows[rows["fact"] == fact]
    if rows.empty:
        raise MethodError(f"fact {fact} has no neurons to show; facts are 0 to {len(attributions.facts) - 1}")
    about = attributions.facts[attributions.facts["fact"] == fact].iloc[0]
    found: pd.Series = rows.groupby(["layer", "neuron"])["prompt"].transform("size")
    n_prompts = int(about["n_prompts"])
    figure, width = go.Figure(), 0.6
    shown = {FEW: found == 1, SOME: (found > 1) & (found < n_prompts), EVERY: (found == n_prompts) & (found > 1)}
    for (name, colour), which in shown.items():
        some = rows[which]
        figure.add_scatter(
            x=some["layer"] + width * ((some["prompt"] + 0.5) / n_prompts - 0.5),  # paraphrases side by side
            y=some["value"],
            mode="markers",
            name=f"passes on {name} ({some.groupby(['layer', 'neuron']).ngroups} neurons)",
            marker={"color": colour, "size": 9, "opacity": 0.75, "line": {"width": 0.5, "color": "white"}},
            customdata=some[["layer", "neuron", "prompt"]],
            hovertemplate="layer %{customdata[0]}, neuron %{customdata[1]}<br>"
            "paraphrase %{customdata[2]}: %{y:.4f}<extra></extra>",
        )
    of_what = "value" if method == "base" else "attribution"
    titled(
        figure,
        f"Neurons of {about['subject']}: {about['answer']}",
        [*origin(attributions.provenance), f"{n_prompts} paraphrases"],
    )
    n_layers = int(attributions.provenance["n_layers"])
    figure.update_xaxes(title_text="layer", range=[-0.7, n_layers - 0.3], dtick=max(1, n_layers // 15))
    figure.update_yaxes(title_text=of_what, rangemode="tozero")
    return figure.update_layout(width=900, height=430, legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"})
