"""Attribution of MLP neurons: which neurons carry the effect, by the gradient methods of edge attribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.circuits.options import GRADIENT_RULES, Options, finite, path_points
from kc_lib.circuits.scoring.neurons import neuron_ablation, neuron_outputs, neuron_scores
from kc_lib.circuits.scoring.prepared import prepared_batches
from kc_lib.errors import MethodError
from kc_lib.metrics import Metric, get_metric
from kc_lib.models.model import Model
from kc_lib.residual.logits import reference_means
from kc_lib.results import load_table, save_table
from kc_lib.tasks.batches import TokenPair


@dataclass(frozen=True)
class NeuronScores:
    """One score per MLP neuron, in units of the metric."""

    scores: Float[Tensor, "layer d_mlp"]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """Every neuron as a row: layer, neuron, score."""
        n_layers, d_mlp = self.scores.shape
        return pd.DataFrame(
            {
                "layer": torch.arange(n_layers).repeat_interleave(d_mlp).numpy(),
                "neuron": torch.arange(d_mlp).repeat(n_layers).numpy(),
                "score": self.scores.flatten().double().numpy(),
            }
        )

    def save(self, path: str | Path) -> Path:
        """Write ``to_frame`` as parquet; shape and provenance go into the file's metadata."""
        about = {"shape": list(self.scores.shape), "provenance": dict(self.provenance)}
        return save_table(self.to_frame(), path, about)

    @classmethod
    def load(cls, path: str | Path) -> NeuronScores:
        """Read what ``save`` wrote."""
        frame, about = load_table(path)
        scores = torch.zeros(about["shape"])
        layers, neurons = (torch.tensor(frame[column].tolist()) for column in ("layer", "neuron"))
        scores[layers, neurons] = torch.tensor(frame["score"].tolist())
        return cls(scores, about["provenance"])


def attribute_neurons(
    model: Model,
    pairs: Sequence[TokenPair],
    method: str = "eap_ig",
    *,
    steps: int = 5,
    ig_rule: str = "left",
    metric: str | Metric = "logit_difference",
    intervention: str = "patching",
    full_answer: bool = False,
    batch_size: int = 8,
    progress: bool = False,
) -> NeuronScores:
    """Score every MLP neuron on clean/corrupted pairs: (ablated - clean) . d loss / d neuron, averaged over examples.

    A neuron's value is what it hands to its output direction, after activation and gate; the score sums over positions.
    Methods are the gradient methods of ``attribute_edges``: "eap" is attribution patching of neurons (Nanda 2023; Syed et
    al. 2023, arXiv:2310.10348, section 2), the others put another gradient there, "eap_ig" one that is averaged over
    inputs (Hanna et al. 2024, arXiv:2403.17806). Integrating a neuron's own value is another method (knowledge neurons,
    Dai et al. 2022). Other arguments as in ``attribute_edges``.

    Raises:
        MethodError: as ``attribute_edges``, or a method that is not one gradient.
        ModelError: MLPs that are no sum over neurons, such as experts, or of different widths.
    """
    options = Options(method, steps, ig_rule, get_metric(metric), intervention, True, full_answer, batch_size, progress)
    if method not in GRADIENT_RULES:
        raise MethodError(f"{method!r} gives neurons no scores: use one of {', '.join(GRADIENT_RULES)}")
    metric, points, rules = options.metric, path_points(method, steps, ig_rule), GRADIENT_RULES[method]
    decoder = model.residual
    means = reference_means(decoder, intervention, pairs, batch_size, full_answer)
    neuron_means = reference_means(decoder, intervention, pairs, batch_size, full_answer, neuron_outputs)
    prepared = prepared_batches(decoder, pairs, metric, intervention, means, batch_size, full_answer)
    total: Tensor | float = 0.0
    with tqdm(total=len(pairs), desc=f"{method} neuron scores", unit="pair", disable=not progress) as bar:
        for batch, ablated, reference, context in prepared:
            neurons = neuron_ablation(decoder, intervention, batch, neuron_means, context)
            total = total + neuron_scores(decoder, batch, metric, ablated, neurons, points, reference, context, rules)
            bar.update(len(batch))
    return NeuronScores(finite(torch.as_tensor(total).cpu() / len(pairs), model), options.provenance(model, len(pairs)))
