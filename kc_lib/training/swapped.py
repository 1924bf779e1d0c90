"""A decoder run with single components of another checkpoint of its training; neither model is touched.

What is moved is what a component has for itself:

- a head: its W_Q, W_K, W_V and W_O, and its biases of queries, keys and values. Keys and values that several query heads
  share are moved for this head alone: it is given its own, and its neighbours keep the host's;
- an MLP: all its weights and biases.

What belongs to no component stays the host's: embeddings, every norm (before attention and MLPs, on queries and keys, on
outputs), the bias of the attention's output, and the unembedding. Below a component's layer the swapped run is the host's,
so it starts from the host's stream there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from kc_lib.errors import MethodError, ModelError
from kc_lib.graph import Graph
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.logits import logits_at_answers
from kc_lib.residual.parts import Attention
from kc_lib.tasks.batches import Batch

Swap = tuple[str, str]  # a component, and the donor's component that takes its place

OF_QUERIES, OF_KEYS_AND_VALUES = ("W_Q", "b_Q", "W_O"), ("W_K", "b_K", "W_V", "b_V")
SETTINGS = ("adjacent_pairs", "scale", "soft_cap", "window")  # of attention, beside its weights


def component_place(graph: Graph, component: str) -> tuple[int, int | None]:
    """Layer and head of a component by name ("a3.h1"); the head of an MLP ("m2") is None.

    Raises:
        MethodError: the graph has no such head or MLP.
    """
    row = graph.writer_index.get(component, 0)
    if not row:  # the input's is 0, and it is no component with weights of its own
        raise MethodError(
            f"{component!r} is no head or MLP of the model: name heads a0.h0 to a{graph.n_layers - 1}.h{graph.n_heads - 1} "
            f"and MLPs m0 to m{graph.n_layers - 1}"
        )
    layer = graph.layer_of_writer(row)
    heads = graph.head_writers(layer)
    return layer, row - heads.start if row < heads.stop else None


def check_exchangeable(host: Decoder, donor: Decoder) -> None:
    """Raise ModelError if two models are not of one shape, type and device, so that components of one fit into the other."""
    ours, theirs = _described(host), _described(donor)
    for name in ours | theirs:
        own, other = ours.get(name, "missing"), theirs.get(name, "missing")
        if own != other:
            raise ModelError(
                f"components cannot be exchanged: {name} {own} in one checkpoint and {other} in the other; give two "
                "checkpoints of one training, loaded alike"
            )


def swapped(host: Decoder, donor: Decoder, component: str, source: str | None = None) -> Decoder:
    """The host with the donor's weights in a component's place; see the head of this file.

    Args:
        source: which of the donor's components is put there; None takes the component itself.

    Raises:
        MethodError: no such component, or a source of another kind.
    """
    graph = host.graph()
    layer, head = component_place(graph, component)
    from_layer, from_head = component_place(graph, source or component)
    block, other = host.blocks[layer], donor.blocks[from_layer]
    if head is not None and from_head is not None:
        block = replace(block, attention=_with_head(block.attention, head, other.attention, from_head))
    elif head is None and from_head is None:
        block = replace(block, mlp=other.mlp, mlp_in_parts=other.mlp_in_parts)
    else:
        raise MethodError(f"{source} cannot take the place of {component}: give a head for a head and an MLP for an MLP")
    return replace(host, blocks=[*host.blocks[:layer], block, *host.blocks[layer + 1 :]])


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


def _with_head(attention: Attention, head: int, donor: Attention, from_head: int) -> Attention:
    weights = {}
    for name in OF_QUERIES:
        weights[name] = getattr(attention, name).clone()
        weights[name][head] = getattr(donor, name)[from_head]
    for name in OF_KEYS_AND_VALUES:
        weights[name] = getattr(attention, name).repeat_interleave(attention.group_size, 0)  # a copy, by query head
        weights[name][head] = getattr(donor, name)[from_head // donor.group_size]
    return replace(attention, **weights)


def _described(decoder: Decoder) -> dict[str, str]:
    """Shape, type and device of every parameter by its name, and the settings of every layer's attention."""
    described = {
        f"{name} is": f"{list(weights.shape)} of {str(weights.dtype).removeprefix('torch.')} on {weights.device}"
        for name, weights in decoder.bridge.named_parameters()
    }
    for layer, block in enumerate(decoder.blocks):
        of_attention = {f"attention of layer {layer} has {name}": str(getattr(block.attention, name)) for name in SETTINGS}
        described |= of_attention
    return described
