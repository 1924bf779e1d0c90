"""Direct contributions to logits: what each part of the final stream adds to them, at the final norm's scale in the run.

Given that scale the final norm is linear, so the contributions of all writers, of the attention biases and of the norm's own
bias sum to the logit (before a soft cap, where the model has one). TransformerLens's ``direct_logit_attribution`` computes
the same on weights with the norm folded in; the suite keeps the model's own weights, so its kernel is here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kc_lib.errors import checked
from kc_lib.residual.activations import writer_outputs
from kc_lib.residual.decoder import Decoder
from kc_lib.tasks.batches import Batch


@dataclass(frozen=True)
class AnswerRun:
    """A plain run read at the position that predicts the (first) answer token.

    ``outputs`` are the writers' contributions there, ``final`` the stream, ``scale`` that of the final norm.
    """

    outputs: Float[Tensor, "writer batch d_model"]
    final: Float[Tensor, "batch d_model"]
    scale: Float[Tensor, "batch 1"]


@torch.no_grad()
@checked
def answer_run(decoder: Decoder, batch: Batch) -> AnswerRun:
    """The writers' contributions to the clean prompts' final stream, at the answer position."""
    outputs = writer_outputs(decoder, batch.clean)
    rows = torch.arange(len(batch), device=outputs.device)
    at_answer = outputs[:, rows, batch.answer_positions[:, 0]]
    final = at_answer.sum(0) + decoder.bias_before[-1]
    return AnswerRun(at_answer, final, decoder.final_norm.scale(final))


@torch.no_grad()
@checked
def direct_logits(
    decoder: Decoder, vectors: Float[Tensor, "*batch d_model"], scale: Float[Tensor, "*#batch 1"]
) -> Float[Tensor, "*batch vocab"]:
    """What vectors, as parts of a final stream whose norm has this scale, add to every logit."""
    norm = decoder.final_norm
    return norm.weighted(norm.centre(vectors) * scale) @ decoder.W_U


@torch.no_grad()
@checked
def direct_contributions(
    decoder: Decoder,
    vectors: Float[Tensor, "*part batch d_model"],
    scale: Float[Tensor, "batch 1"],
    tokens: Int[Tensor, " batch"],
    against: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "*part batch"]:
    """What vectors add to one logit per example, or to its difference ``against`` another."""
    norm = decoder.final_norm
    direction = decoder.W_U[:, tokens].T if against is None else (decoder.W_U[:, tokens] - decoder.W_U[:, against]).T
    return torch.einsum("...bd,bd->...b", norm.weighted(norm.centre(vectors) * scale), direction)


@torch.no_grad()
@checked
def constant_contribution(
    decoder: Decoder, tokens: Int[Tensor, " batch"], against: Int[Tensor, " batch"] | None = None
) -> Float[Tensor, " batch"]:
    """What the final norm's bias and the unembedding's add to one logit per example, or to a difference."""

    def constant(chosen: Tensor) -> Tensor:
        bias = decoder.final_norm.bias
        return decoder.b_U[chosen] + (0.0 if bias is None else bias @ decoder.W_U[:, chosen])

    return constant(tokens) if against is None else constant(tokens) - constant(against)


@torch.no_grad()
@checked
def residual_streams(
    decoder: Decoder, tokens: Int[Tensor, "batch pos"]
) -> tuple[list[str], Float[Tensor, "point batch pos d_model"]]:
    """The stream along the model, with TransformerLens's names of the points.

    ``blocks.0.hook_resid_pre``, then ``hook_resid_mid`` (after attention; blocks with parallel MLPs have none) and
    ``hook_resid_post`` of every block.
    """
    resid = decoder.embed(tokens)
    names, streams = ["blocks.0.hook_resid_pre"], [resid]
    for layer, block in enumerate(decoder.blocks):
        after_attention = decoder.run_attention(layer, resid)
        if not block.parallel:
            names.append(f"blocks.{layer}.hook_resid_mid")
            streams.append(after_attention)
        resid = after_attention + block.mlp_output(block.mlp_norm(resid if block.parallel else after_attention))
        names.append(f"blocks.{layer}.hook_resid_post")
        streams.append(resid)
    return names, torch.stack(streams)
