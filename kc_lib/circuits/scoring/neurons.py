"""What MLP neurons hold, and first-order scores of them (attribution patching at neurons).

A neuron is one row of ``W_out``; its value is what comes after the activation and, where there is one, the gate. The
gradient there is the gradient at the MLP's output times ``W_out``, which is linear: autograd stops at the output, the
interpolation steps are summed there, and one matrix product per layer serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kc_lib.circuits.scoring.edges import interpolated, recorded_run
from kc_lib.circuits.scoring.prepared import Prepared
from kc_lib.errors import ModelError, checked
from kc_lib.residual.activations import NO_PREFIX, Means, PrefixCache, ablation
from kc_lib.residual.backward_rules import NATIVE, BackwardRules
from kc_lib.residual.decoder import Decoder
from kc_lib.tasks.batches import Batch


@torch.no_grad()
@checked
def neuron_outputs(
    decoder: Decoder, tokens: Int[Tensor, "batch pos"], prefix: PrefixCache = NO_PREFIX
) -> Float[Tensor, "layer batch new_pos d_mlp"]:
    """Every MLP neuron's value in a plain run, at the positions after the prefix's.

    Raises:
        ModelError: MLPs that are no sum over neurons, or of different widths.
    """
    widths = sorted({block.mlp_parts.W_out.shape[0] for block in decoder.blocks})
    if len(widths) > 1:
        raise ModelError(f"the model's MLPs have different widths ({widths}): its neurons do not fit one table")
    resid = decoder.embed(tokens)[:, prefix.start :]
    outputs = resid.new_empty(decoder.n_layers, *resid.shape[:2], widths[0])
    for layer, block in enumerate(decoder.blocks):
        after_attention = decoder.run_attention(layer, resid, prefix.of_layer(layer))
        normed = block.mlp_norm(resid if block.parallel else after_attention)
        outputs[layer] = block.mlp_parts.neurons(normed)
        resid = after_attention + block.mlp_contribution(block.mlp_parts.write(outputs[layer]))
    return outputs


def neuron_ablation(
    decoder: Decoder, kind: str, batch: Batch, means: Means | None = None, prefix: PrefixCache = NO_PREFIX
) -> Float[Tensor, "layer #batch #pos #d_mlp"]:
    """The ablated values of all neurons: those of the corrupted prompts, zeros, or the means of a reference set.

    Raises:
        MethodError: as ``ablation``.
    """
    if kind == "zero":
        return decoder.W_U.new_zeros(decoder.n_layers, 1, 1, 1)
    return ablation(decoder, kind, batch, means, prefix, neuron_outputs).outputs


@torch.no_grad()
@checked
def neuron_scores(
    decoder: Decoder,
    prepared: Prepared,
    ablated_neurons: Float[Tensor, "layer #batch #pos #d_mlp"],
    alphas: Sequence[float],
    rules: BackwardRules = NATIVE,
) -> Float[Tensor, "layer d_mlp"]:
    """Sum over the batch's examples of each neuron's attribution score, in units of the metric.

    score = sum over positions of (ablated - clean) . d loss / d neuron, with the loss, the average over the inputs
    ``ablated + alpha (clean - ablated)`` and ``rules`` as in ``edge_scores``.
    """
    clean, prefix = prepared.batch.clean, prepared.prefix
    difference = ablated_neurons - neuron_outputs(decoder, clean, prefix)
    path = interpolated(prepared.ablation.outputs[0], decoder.embed(clean)[:, prefix.start :], alphas)
    run = recorded_run(decoder, decoder.graph(), path, prepared, rules=rules)
    gradients = torch.autograd.grad(run.loss, [record.mlp_write for record in run.blocks])
    scores = torch.zeros(decoder.n_layers, difference.shape[-1], device=decoder.device)
    for layer, (block, gradient) in enumerate(zip(decoder.blocks, gradients, strict=True)):
        at_neurons = run.over_steps(gradient.float()) @ block.mlp_parts.W_out.float().T
        scores[layer] = (difference[layer].float() * at_neurons).sum((0, 1))
    return scores
