"""Knowledge neurons by plain hooks on the Hugging Face model: one layer and one point of the integral per forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

OUTPUT_LAYERS = {  # the linear layer that neurons are the input of
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "phi": "model.layers.{}.mlp.fc2",
    "bert": "bert.encoder.layer.{}.output.dense",
}
Change = Callable[[Tensor], Tensor]


def output_layer(model: nn.Module, kind: str, layer: int) -> nn.Module:
    return model.get_submodule(OUTPUT_LAYERS.get(kind, "model.layers.{}.mlp.down_proj").format(layer))


def logits_with(model: nn.Module, kind: str, tokens: Sequence[int], position: int, changes: Mapping[int, Change]) -> Tensor:
    """Logits at a position of one prompt whose neurons there are changed, by layer."""

    def hook_of(change: Change) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0].clone()
            x[0, position] = change(x[0, position])
            return (x, *inputs[1:])

        return hook

    with ExitStack() as stack:
        for layer, change in changes.items():
            handle = output_layer(model, kind, layer).register_forward_pre_hook(hook_of(change))
            stack.callback(handle.remove)
        return model(torch.tensor([tokens])).logits[0, position]


def neurons_of(model: nn.Module, kind: str, tokens: Sequence[int], position: int, layer: int) -> Tensor:
    seen: list[Tensor] = []

    def look(neurons: Tensor) -> Tensor:
        seen.append(neurons.detach().clone())
        return neurons

    with torch.no_grad():
        logits_with(model, kind, tokens, position, {layer: look})
    return seen[0]


def attribution(
    model: nn.Module,
    kind: str,
    tokens: Sequence[int],
    position: int,
    target: int,
    layer: int,
    points: Sequence[float],
    weights: Sequence[float],
    log_probability: bool = False,
) -> Tensor:
    """w * sum_k weight_k d p(target | a_k w) / d w, the gradient taken at the neurons themselves."""
    observed = neurons_of(model, kind, tokens, position, layer)
    total = torch.zeros_like(observed)
    for point, weight in zip(points, weights, strict=True):
        scaled = (point * observed).requires_grad_(True)
        log_p = logits_with(model, kind, tokens, position, {layer: lambda _, x=scaled: x}).log_softmax(-1)[target]
        (gradient,) = torch.autograd.grad(log_p if log_probability else log_p.exp(), scaled)
        total += weight * gradient
    return observed * total


def published_attribution(
    model: nn.Module,
    kind: str,
    tokens: Sequence[int],
    position: int,
    target: int,
    layer: int,
    points: Sequence[float],
    weights: Sequence[float],
    pad: int,
    length: int = 128,
) -> Tensor:
    """As published: the prompt padded, a clean pass for this layer, all points of the integral as one batch of passes."""
    padded = torch.tensor([[*tokens, *[pad] * (length - len(tokens))]])
    mask = (torch.arange(padded.shape[1]) < len(tokens)).long()[None]
    module, seen = output_layer(model, kind, layer), []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, position].detach().clone()))
    try:
        with torch.no_grad():
            model(padded, attention_mask=mask)
    finally:
        handle.remove()
    observed = seen[0]
    scaled = (torch.tensor(points)[:, None] * observed).requires_grad_(True)

    def put(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0].clone()
        x[:, position] = scaled
        return (x, *inputs[1:])

    handle = module.register_forward_pre_hook(put)
    try:
        n = len(points)
        logits = model(padded.expand(n, -1), attention_mask=mask.expand(n, -1)).logits[:, position]
        (gradient,) = torch.autograd.grad(logits.softmax(-1)[:, target].sum(), scaled)
    finally:
        handle.remove()
    return observed * torch.einsum("k,kd->d", torch.tensor(weights), gradient)
