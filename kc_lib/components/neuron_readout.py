"""What single MLP neurons write: their direct contributions to the answer, and their value vectors in the vocabulary.

An MLP's output is the sum of its neurons' values times their rows of W_out ("value vectors", Geva et al. 2021,
arXiv:2012.14913, and 2022, arXiv:2203.14680), so a neuron's direct contribution to a logit is that product at the final
norm's scale in the run. Where the model normalises the MLP's output (Gemma), the vector is scaled as the norm does it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kc_lib.circuits.scoring.neurons import neuron_outputs
from kc_lib.components.direct import direct_contributions, direct_logits
from kc_lib.errors import MethodError, checked
from kc_lib.models.model import Model
from kc_lib.residual.decoder import Decoder
from kc_lib.tasks.batches import Batch, TokenPair, batches


@dataclass(frozen=True)
class NeuronContributions:
    """Neurons at the answer position: their values, and what each adds to a logit directly."""

    values: Float[Tensor, "layer batch d_mlp"]
    contributions: Float[Tensor, "layer batch d_mlp"]


@torch.no_grad()
@checked
def neuron_contributions(
    decoder: Decoder, batch: Batch, tokens: Int[Tensor, " batch"], against: Int[Tensor, " batch"] | None = None
) -> NeuronContributions:
    """What every neuron adds to one logit per example, or to its difference ``against`` another.

    ``direct_contributions`` says what that is. Those of a layer's neurons and of its output bias sum to the MLP's.

    Raises:
        ModelError: MLPs that are no sum over neurons, or of different widths.
    """
    rows = torch.arange(len(batch), device=decoder.device)
    values = neuron_outputs(decoder, batch.clean)[:, rows, batch.answer_positions[:, 0]]
    final = decoder.run(decoder.embed(batch.clean))[rows, batch.answer_positions[:, 0]]
    scale = decoder.final_norm.scale(final)
    contributions = torch.empty_like(values)
    for layer, block in enumerate(decoder.blocks):
        vectors = block.mlp_parts.W_out[:, None].expand(-1, len(batch), -1)
        norm = block.mlp_post_norm
        if norm is not None:
            vectors = norm.weighted(norm.centre(vectors) * norm.scale(block.mlp_parts.write(values[layer])))
        unit_contributions = direct_contributions(decoder, vectors, scale, tokens, against)  # of neurons of value 1
        contributions[layer] = values[layer] * unit_contributions.T
    return NeuronContributions(values, contributions)


def top_neurons(
    model: Model,
    pairs: Sequence[TokenPair],
    *,
    n: int = 20,
    k: int = 8,
    against_distractor: bool = False,
    batch_size: int = 8,
) -> pd.DataFrame:
    """The n neurons that contribute most to the answer's logit (or its difference from the distractor's), over all layers.

    Columns: layer, neuron, contribution (logits, mean over facts, at the answer position), value (the neuron's mean value
    there), and ``tokens``, the k tokens that the neuron raises most where its value is positive, lowers most where negative.

    Raises:
        MethodError: n or k out of range.
        ModelError: MLPs that are no sum over neurons.
    """
    decoder = model.residual
    sums = []
    for batch in batches(pairs, batch_size, device=decoder.device):
        against = batch.distractors if against_distractor else None
        neurons = neuron_contributions(decoder, batch, batch.answers[:, 0], against)
        sums.append(torch.stack([neurons.contributions.sum(1), neurons.values.sum(1)]))
    mean, values = torch.stack(sums).sum(0) / len(pairs)
    if not (1 <= n <= mean.numel() and 1 <= k <= decoder.W_U.shape[1]):
        raise MethodError(f"n is {n} and k is {k}; the model has {mean.numel()} neurons and {decoder.W_U.shape[1]} tokens")
    best, one = mean.flatten().topk(n), torch.ones(1, 1, device=decoder.device)
    rows = []
    for contribution, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        layer, neuron = divmod(place, mean.shape[1])
        value = float(values[layer, neuron])
        vector = decoder.blocks[layer].mlp_parts.W_out[neuron] * (1.0 if value >= 0 else -1.0)
        raised = direct_logits(decoder, vector[None], one)[0].topk(k).indices.tolist()
        tokens = " ".join(repr(str(model.tokenizer.decode([token]))) for token in raised)
        rows.append((layer, neuron, contribution, value, tokens))
    return pd.DataFrame(rows, columns=["layer", "neuron", "contribution", "value", "tokens"])
