"""Scores of nodes and of neurons, the obvious way: perturb what a node writes, or what a neuron holds, and differentiate.

Nodes go through the hand-written forward pass of `oracles.eap`, with a zero added to every writer's output; neurons
through plain hooks on the Hugging Face model, in whose first block the interpolated stream is put.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oracles import eap, rules


def oracle_node_scores(
    hf_model: Any,
    clean_tokens: Tensor,
    corrupted_tokens: Tensor,
    last: Tensor,
    answers: Tensor,
    distractors: Tensor,
    alphas: Sequence[float],
    decoder: eap.Decoder | None = None,
) -> Tensor:
    """(corrupted - clean) . d loss / d (writer's addition to the stream), mean over alphas and examples: [U]."""
    decoder = decoder or eap.read_decoder(hf_model)
    with torch.no_grad():
        _, corrupted = eap.run(decoder, decoder.embed(corrupted_tokens))
        _, clean = eap.run(decoder, decoder.embed(clean_tokens))
    total = torch.zeros(clean.shape[2], dtype=clean.dtype)
    for alpha in alphas:
        added = torch.zeros_like(clean, requires_grad=True)
        stream = corrupted[:, :, 0] + alpha * (clean[:, :, 0] - corrupted[:, :, 0]) + added[:, :, 0]
        row = 1
        for layer in decoder.layers:
            queries = stream[:, :, None].expand(-1, -1, decoder.heads, -1)
            keys = stream[:, :, None].expand(-1, -1, decoder.kv_heads, -1)
            heads = eap.head_contributions(layer, queries, keys, keys) + added[:, :, row : row + decoder.heads]
            after_attention = stream + heads.sum(2) + layer.b_o
            row += decoder.heads
            mlp = eap.mlp_contribution(layer, stream if decoder.parallel else after_attention) + added[:, :, row]
            stream = after_attention + mlp
            row += 1
        logits = eap.unembed(decoder, stream, last)
        loss = -eap.metric_values(logits, answers, distractors, "logit_difference").mean()
        (gradient,) = torch.autograd.grad(loss, added)
        total += ((corrupted - clean) * gradient).sum((0, 1, 3))
    return total / len(alphas)


def first_block(hf_model: Any) -> Any:
    """The module of block 0."""
    family = hf_model.config.model_type
    if family in ("gpt2", "gptj"):
        return hf_model.transformer.h[0]
    return hf_model.gpt_neox.layers[0] if family == "gpt_neox" else hf_model.model.layers[0]


def hooked_run(hf_model: Any, tokens: Tensor, stream: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, the stream before block 0 (put there if given), and every layer's neurons: inputs of the down projections."""
    seen: list[Tensor] = []
    entered: list[Tensor] = []

    def enter(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            entered.append(args[0] if stream is None else stream)
            return (entered[0], *args[1:]), kwargs
        entered.append(kwargs["hidden_states"] if stream is None else stream)
        return args, {**kwargs, "hidden_states": entered[0]}

    handles = [first_block(hf_model).register_forward_pre_hook(enter, with_kwargs=True)]
    for layer in range(hf_model.config.num_hidden_layers):
        down = rules.mlp_parts(hf_model, layer)[2]
        handles.append(down.register_forward_pre_hook(lambda module, args: seen.append(args[0])))
    logits = hf_model(tokens).logits
    for handle in handles:
        handle.remove()
    return logits, entered[0], seen


def ablated_values(clean: Tensor, corrupted: Tensor, lengths: Tensor, intervention: str) -> Tensor:
    """Ablated values [B, P, D] under an intervention; pads, which nothing reads, are anything finite."""
    if intervention == "patching":
        return corrupted
    if intervention == "zero":
        return torch.zeros_like(clean)
    rows = [clean[i, :length] for i, length in enumerate(lengths.tolist())]
    if intervention == "mean":
        return torch.cat(rows).mean(0).expand_as(clean)
    by_position = [torch.stack([row[p] for row in rows if len(row) > p]).mean(0) for p in range(clean.shape[1])]
    return torch.stack(by_position).expand_as(clean)


def oracle_neuron_scores(
    hf_model: Any,
    clean_tokens: Tensor,
    corrupted_tokens: Tensor,
    lengths: Tensor,
    answers: Tensor,
    distractors: Tensor,
    alphas: Sequence[float],
    intervention: str = "patching",
) -> Tensor:
    """(ablated - clean) . d loss / d neuron, summed over positions, mean over alphas and examples: [layer, d_mlp]."""
    with torch.no_grad():
        _, clean_stream, clean = hooked_run(hf_model, clean_tokens)
        _, corrupted_stream, corrupted = hooked_run(hf_model, corrupted_tokens)
        start = ablated_values(clean_stream, corrupted_stream, lengths, intervention)
        ablated = [ablated_values(c, other, lengths, intervention) for c, other in zip(clean, corrupted, strict=True)]
    total = torch.zeros(len(clean), clean[0].shape[-1])
    for alpha in alphas:
        stream = (start + alpha * (clean_stream - start)).requires_grad_(True)
        logits, _, neurons = hooked_run(hf_model, clean_tokens, stream)
        logits = eap.at_last(logits, lengths - 1)
        loss = -eap.metric_values(logits, answers, distractors, "logit_difference").mean()
        gradients = torch.autograd.grad(loss, neurons)
        for layer, gradient in enumerate(gradients):
            total[layer] += ((ablated[layer] - clean[layer]) * gradient).sum((0, 1))
    return total / len(alphas)
