"""A model run with single components of another checkpoint, one at a time (``swapped.py``).

Below a component's layer the swapped run is the host's, so it starts from the host's stream there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kc_lib.residual.decoder import Decoder
from kc_lib.residual.logits import logits_at_answers
from kc_lib.tasks.batches import Batch
from kc_lib.training.swapped import component_place, swapped

Swap = tuple[str, str]  # a component, and the donor's component that takes its place


@torch.no_grad()
def swapped_logits(
    host: Decoder, donor: Decoder, swaps: Sequence[Swap], batch: Batch
) -> Iterator[Float[Tensor, "batch answer vocab"]]:
    """The host's own logits at the answer positions of the clean prompts, then those of each swap, in float32."""
    layers = [component_place(host.graph(), component)[0] for component, _ in swaps]
    resid, streams = host.embed(batch.clean), {}
    for layer in range(host.n_layers):
        if layer in layers:
            streams[layer] = resid
        resid = host.run_block(layer, resid)
    yield logits_at_answers(host, resid, batch)
    for layer, (component, source) in zip(layers, swaps, strict=True):
        other = swapped(host, donor, component, source)
        yield logits_at_answers(other, other.run(streams[layer], layer), batch)
