"""What single MLP neurons write: their direct contributions to the answer, and their value vectors in the vocabulary.

An MLP's output is the sum of its neurons' values times their rows of W_out ("value vectors", Geva et al. 2021,
arXiv:2012.14913, and 2022, arXiv:2203.14680), so a neuron's direct contribution to a logit is that product at the final
norm's scale in the run. Where the model normalises the MLP's output (Gemma), the vector is scaled as the norm does it there.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from kc_lib.errors import MethodError
from kc_lib.kernels.direct import direct_logits
from kc_lib.kernels.neurons import neuron_contributions
from kc_lib.tasks.batches import TokenPair, batches
from kc_lib.wiring.boot import wiring_of


def top_neurons(
    model: TransformerBridge,
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
    wiring = wiring_of(model)
    sums = []
    for batch in batches(pairs, batch_size, device=wiring.device):
        against = batch.distractors if against_distractor else None
        of_batch = neuron_contributions(wiring, batch, batch.answers[:, 0], against)
        sums.append(torch.stack([of_batch.contributions.sum(1), of_batch.values.sum(1)]))
    mean, values = torch.stack(sums).sum(0) / len(pairs)
    if not (1 <= n <= mean.numel() and 1 <= k <= wiring.W_U.shape[1]):
        raise MethodError(f"n is {n} and k is {k}; the model has {mean.numel()} neurons and {wiring.W_U.shape[1]} tokens")
    best = mean.flatten().topk(n)
    rows = []
    for size, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        layer, neuron = divmod(place, mean.shape[1])
        held = float(values[layer, neuron])
        vector = wiring.blocks[layer].mlp_parts.W_out[neuron]
        scale = torch.ones(1, 1, device=wiring.device)
        logits = direct_logits(wiring, vector[None] * (1.0 if held >= 0 else -1.0), scale)[0]
        tokens = [str(model.tokenizer.decode([token])) for token in logits.topk(k).indices.tolist()]
        rows.append((layer, neuron, size, held, " ".join(map(repr, tokens))))
    return pd.DataFrame(rows, columns=["layer", "neuron", "contribution", "value", "tokens"])
