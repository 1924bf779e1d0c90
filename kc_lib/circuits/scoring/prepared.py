"""Batches with everything a score is computed from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from kc_lib.metrics import Metric
from kc_lib.residual.activations import Ablation, Means, ablation
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.logits import full_logits
from kc_lib.residual.prefix_cache import Context, shared_context
from kc_lib.tasks.batches import Batch, TokenPair, batches


def prepared_batches(
    decoder: Decoder,
    pairs: Sequence[TokenPair],
    metric: Metric,
    intervention: str,
    means: Means | None,
    batch_size: int,
    full_answer: bool,
) -> Iterator[tuple[Batch, Ablation, Tensor | None, Context]]:
    """Batches with their ablated values, the full model's logits where the metric compares with them, and context."""
    for batch in batches(pairs, batch_size, full_answer, decoder.device):
        context = shared_context(decoder, batch, intervention)
        reference = full_logits(decoder, batch, context) if metric.needs_reference else None
        yield batch, ablation(decoder, intervention, batch, means, context), reference, context
