"""The loss of many runs of one batch, from the final residual stream.

The unembedding is often the larger part of a run that starts high in the model. Where a metric reads the answers' logits
only, only these are computed. Where it is a cross-entropy (``Metric.target``: log-probability, match-NLL, KL), the loss is
the logits' logsumexp less a product of the normed stream with one vector per answer, the target's mean unembedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from kc_lib.circuits.acdc.products import can_pack, packed_linear
from kc_lib.metrics import Metric
from kc_lib.residual.decoder import Decoder
from kc_lib.tasks.batches import Batch

StreamLosses = Callable[[Float[Tensor, "run batch answer d_model"]], Iterator[Float[Tensor, ""]]]
ROWS_AT_ONCE = 80  # vectors unembedded together, so that no large table of logits is held
SMALLEST_SUM = 1e-30  # of exponentials, below which they lose digits


def stream_losses(
    decoder: Decoder, metric: Metric, batch: Batch, reference: Tensor, weights: Float[Tensor, " batch"]
) -> StreamLosses:
    """A function that gives the loss of one run after the other: the mean over examples of weight times the metric's loss.

    Args:
        reference: the full model's logits, ``[batch, answer, vocab]``.
    """
    if metric.target is not None and decoder.logit_soft_cap is None and can_pack(decoder.W_U):
        losses_of_some = _cross_entropies(decoder, metric, metric.target(batch, reference), batch, reference, weights)
    else:
        losses_of_some = _of_logits(decoder, metric, batch, reference, weights)

    def losses(streams: Tensor) -> Iterator[Tensor]:
        for some in streams.split(max(1, ROWS_AT_ONCE // batch.answers.numel())):
            yield from losses_of_some(some)

    return losses


def _of_logits(
    decoder: Decoder, metric: Metric, batch: Batch, reference: Tensor, weights: Float[Tensor, " batch"]
) -> StreamLosses:
    judged, tokens = batch.among_answers() if metric.answers_only else (batch, None)

    def losses(streams: Tensor) -> Iterator[Tensor]:
        for logits in decoder.unembed(streams, tokens=tokens).float():
            yield (metric.loss(logits, judged, reference) * weights).mean()

    return losses


def _cross_entropies(
    decoder: Decoder,
    metric: Metric,
    target: Float[Tensor, "batch answer vocab"],
    batch: Batch,
    reference: Float[Tensor, "batch answer vocab"],
    weights: Float[Tensor, " batch"],
) -> StreamLosses:
    direction = torch.einsum("dv,bav->bad", decoder.W_U, target)
    offset = torch.einsum("v,bav->ba", decoder.b_U, target)
    real = batch.answer_mask.to(weights)
    share = weights[:, None] * real / real.sum(-1, keepdim=True) / len(batch)
    of_full = (reference.logsumexp(-1) - torch.einsum("bav,bav->ba", reference, target)) * share
    constant = (metric.loss(reference, batch, reference) * weights).mean() - of_full.sum()
    logits_of = packed_linear(decoder.W_U.T, decoder.b_U)

    def losses(streams: Tensor) -> Iterator[Tensor]:
        normed = decoder.final_norm(streams)
        # float32 holds the exponentials of the logits that models give; else the largest is taken out first
        total = logits_of(normed).exp_().sum(-1)
        usual = bool(((total > SMALLEST_SUM) & total.isfinite()).all())
        each = total.log() if usual else logits_of(normed).logsumexp(-1)
        each = each - (normed * direction).sum(-1) - offset
        yield from (each * share).sum((-2, -1)) + constant

    return losses
