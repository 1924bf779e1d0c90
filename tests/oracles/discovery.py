"""Slow and obvious forms of three discovery methods, one reader, one step or one writer at a time.

`oracle_activation_scores` (EAP-IG activations) runs the hand-written forward pass of `eap.py` with a residual copy for
every reader, and moves the copies above one layer of writers. `oracle_qk_fix` and `oracle_flow_scores` run the Hugging
Face model itself, with the hooks of `patching.py`: attention patterns are the ones the model returns, and gradients at
them are autograd's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .eap import at_last, edge_exists, metric_values, read_decoder, reader_heads, reader_names, run, writer_names
from .patching import Hooks, find_blocks, hooked_writer_output, layer_and_head, shift_projection, store


def all_writer_outputs(hf_model: Any, tokens: Tensor) -> Tensor:
    """What every writer adds to the residual stream, as hooks on the model see it: [U, B, P, D]."""
    return torch.stack([hooked_writer_output(hf_model, tokens, writer) for writer in writer_names(hf_model)])


# --- EAP-IG over activations -------------------------------------------------------------------------------------


def layers_of_writers(hf_model: Any) -> list[list[int]]:
    """The rows that are interpolated together: the input, the heads of a layer, an MLP."""
    layers: dict[str, list[int]] = {}
    for row, writer in enumerate(writer_names(hf_model)):
        layers.setdefault(writer.split(".")[0], []).append(row)
    return list(layers.values())


def oracle_activation_scores(
    hf_model: Any,
    clean_tokens: Tensor,
    ablated: Tensor,
    last: Tensor,
    answers: Tensor,
    distractors: Tensor,
    alphas: Sequence[float],
    ungrouped: bool = False,
    metric: str = "logit_difference",
) -> Tensor:
    """Scores [U, V]: integrated gradients over the outputs of one layer of writers at a time (Marks et al. 2024).

    `ablated` [U, B, P, D] are the values at alpha 0. The layer's outputs move by (1 - alpha) (ablated - clean); that
    is, every residual copy of a reader above it does. Each copy's gradient is contracted with these writers only.
    """
    decoder = read_decoder(hf_model)
    with torch.no_grad():
        clean = run(decoder, decoder.embed(clean_tokens), ungrouped)[1].permute(2, 0, 1, 3)
    difference = ablated - clean
    scores = torch.zeros(len(writer_names(hf_model)), len(reader_names(hf_model, ungrouped)))
    for layer in layers_of_writers(hf_model):
        for alpha in alphas:
            shift = (1 - alpha) * difference[layer].sum(dim=0)

            def above(copies: Tensor, column: int, rows: int, layer: list[int] = layer, shift: Tensor = shift) -> None:
                if rows <= layer[-1]:
                    return
                with torch.no_grad():
                    copies += shift[:, :, None]

                def contract(gradient: Tensor) -> None:
                    products = torch.einsum("ubpd,bpnd->un", difference[layer], gradient)
                    scores[layer, column : column + gradient.shape[2]] += products

                copies.register_hook(contract)

            stream = decoder.embed(clean_tokens).requires_grad_(True)
            logits = at_last(run(decoder, stream, ungrouped, on_reader=above)[0], last)
            (-metric_values(logits, answers, distractors, metric).mean()).backward()
    return scores / len(alphas)


# --- the QK fix --------------------------------------------------------------------------------------------------


def oracle_qk_fix(
    hf_model: Any,
    clean_tokens: Tensor,
    ablated: Tensor,
    last: Tensor,
    answers: Tensor,
    distractors: Tensor,
    ungrouped: bool = False,
) -> Tensor:
    """Scores [U, V] of the q and k readers (0 elsewhere) for the logit difference, one run for each edge.

    The score is sum (pattern_ablated - pattern_clean) * d(-metric) / d(pattern), averaged over the examples, where the
    ablated pattern is the one the model returns when this reader sees the stream plus (ablated - clean) of the writer.
    """
    blocks, _ = find_blocks(hf_model)
    difference = ablated - all_writer_outputs(hf_model, clean_tokens)
    out = hf_model(clean_tokens, use_cache=False, output_attentions=True)
    loss = -metric_values(at_last(out.logits, last), answers, distractors, "logit_difference").mean()
    gradients = torch.autograd.grad(loss, out.attentions)
    patterns = [pattern.detach() for pattern in out.attentions]

    group = hf_model.config.num_attention_heads // reader_heads(hf_model, ungrouped=False)
    exists = edge_exists(hf_model, ungrouped)
    scores = torch.zeros(exists.shape)
    for column, reader in enumerate(reader_names(hf_model, ungrouped)):
        if reader[-2:] not in ("q>", "k>"):
            continue
        layer, index = layer_and_head(reader)
        kind, projected, heads = reader[-2], index, [index]
        if kind == "k" and ungrouped:
            projected = index // group
        elif kind == "k":
            heads = list(range(index * group, (index + 1) * group))
        for row in exists[:, column].nonzero()[:, 0].tolist():
            with Hooks() as hooks, torch.no_grad():
                shift_projection(hooks, blocks[layer], kind, projected, difference[row])
                pattern = hf_model(clean_tokens, use_cache=False, output_attentions=True).attentions[layer]
            scores[row, column] = ((pattern - patterns[layer]) * gradients[layer])[:, heads].sum()
    return scores


# --- information flow routes -------------------------------------------------------------------------------------


@torch.no_grad()
def oracle_flow_scores(hf_model: Any, prompts: Sequence[Sequence[int]], ungrouped: bool = False) -> Tensor:
    """Shares [U, V] (Ferrando & Voita 2024), one prompt, reader, position and writer at a time, without padding.

    Mean over the prompts and their positions; for the logits, the last position only.
    """
    writers, readers = writer_names(hf_model), reader_names(hf_model, ungrouped)
    exists = edge_exists(hf_model, ungrouped)
    scores = torch.zeros(exists.shape)
    for prompt in prompts:
        tokens = torch.tensor([list(prompt)])
        outputs = all_writer_outputs(hf_model, tokens)[:, 0]
        inputs = hooked_reader_inputs(hf_model, tokens)
        for column, reader in enumerate(readers):
            seen = inputs[reader.split(".")[0]]
            positions = [len(prompt) - 1] if reader == "logits" else range(len(prompt))
            for position in positions:
                whole = seen[position]
                proximity = torch.zeros(len(writers))
                for row in exists[:, column].nonzero()[:, 0].tolist():
                    rest = whole - outputs[row, position]
                    proximity[row] = max(whole.abs().sum() - rest.abs().sum(), torch.tensor(0.0))
                scores[:, column] += proximity / proximity.sum() / len(positions) / len(prompts)
    return scores


def hooked_reader_inputs(hf_model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """The residual streams of one prompt that the readers see, by "a0", "m0", ... and "logits": each [P, D]."""
    blocks, final_norm = find_blocks(hf_model)
    seen: dict[str, Tensor] = {}
    with Hooks() as hooks:
        for layer, block in enumerate(blocks):
            hooks.on_input(block.module, store(seen, f"a{layer}"))
            if block.mlp_shared_norm is None:
                hooks.on_input(block.mlp_entry, store(seen, f"m{layer}"))
            else:
                hooks.on_input(block.module, store(seen, f"m{layer}"))
        hooks.on_input(final_norm, store(seen, "logits"))
        hf_model(tokens, use_cache=False)
    return {name: stream[0] for name, stream in seen.items()}
