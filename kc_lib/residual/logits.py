"""Plain runs read at the answer, and the reference means that some interventions need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kc_lib.errors import checked
from kc_lib.residual.activations import NO_PREFIX, Means, PrefixCache, mean_outputs, writer_outputs
from kc_lib.residual.decoder import Decoder
from kc_lib.tasks.batches import Batch, TokenPair, batches


@torch.no_grad()
@checked
def full_logits(decoder: Decoder, batch: Batch, prefix: PrefixCache = NO_PREFIX) -> Float[Tensor, "batch answer vocab"]:
    """The whole model's logits at the answer positions of the clean prompts, in float32."""
    final = decoder.run(decoder.embed(batch.clean)[:, prefix.start :], past=prefix.past)
    return logits_at_answers(decoder, final, batch, prefix)


def logits_at_answers(
    decoder: Decoder, final: Float[Tensor, "*run batch pos d_model"], batch: Batch, prefix: PrefixCache = NO_PREFIX
) -> Float[Tensor, "*run batch answer vocab"]:
    """The logits at the answer positions, in float32, from the final residual stream after the prefix."""
    return decoder.unembed(at_answers(final, batch, prefix)).float()


def at_answers(
    x: Float[Tensor, "*n batch pos d"], batch: Batch, prefix: PrefixCache = NO_PREFIX
) -> Float[Tensor, "*n batch answer d"]:
    """What stands at the positions that predict answers; ``x`` begins after the prefix."""
    rows = torch.arange(len(batch), device=x.device)[:, None]
    return x[..., rows, batch.answer_positions - prefix.start, :]


def reference_means(
    decoder: Decoder,
    intervention: str,
    pairs: Sequence[TokenPair],
    batch_size: int,
    full_answer: bool = False,
    outputs_of: Callable[..., Tensor] = writer_outputs,
) -> Means | None:
    """Means over the pairs' clean prompts where the intervention needs them, else None (``mean_outputs``)."""
    if intervention not in ("mean", "positional_mean"):
        return None
    reference = batches(pairs, batch_size, full_answer, decoder.device)
    return mean_outputs(decoder, reference, intervention == "positional_mean", outputs_of)
