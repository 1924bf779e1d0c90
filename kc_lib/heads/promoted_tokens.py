"""What heads write at the answer position, in the vocabulary: contributions to chosen tokens, and each head's top tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kc_lib.components.contributions import answer_run, direct_logits
from kc_lib.errors import checked
from kc_lib.residual.decoder import Decoder
from kc_lib.tasks.batches import Batch


@dataclass(frozen=True)
class Promotion:
    """Per head, example and chosen token: what the head adds to the token's logit, and whether it is in the head's top k."""

    contribution: Float[Tensor, "layer head batch token"]
    among_top: Bool[Tensor, "layer head batch token"]


@torch.no_grad()
@checked
def head_promotion(decoder: Decoder, batch: Batch, tokens: Int[Tensor, " token"], k: int) -> Promotion:
    """What every head writes at the answer position, read at some tokens; one layer's logits exist at a time."""
    run, graph = answer_run(decoder, batch), decoder.graph()
    contributions, among = [], []
    for layer in range(decoder.n_layers):
        logits = direct_logits(decoder, run.outputs[graph.head_writers(layer)], run.scale)
        least = logits.topk(k, -1).values[..., -1:]
        chosen = logits[..., tokens]
        contributions.append(chosen.float().cpu())
        among.append((chosen >= least).cpu())
    return Promotion(torch.stack(contributions), torch.stack(among))
