"""Edge scores without splitting the residual stream.

Published code gives every head's queries, keys and values, and every MLP, a residual copy of its own, back-propagates
through the copies and contracts at every interpolation step. The same numbers come from the plain forward pass:

1. autograd stops at the queries, keys and values (head space) and at the MLP's normed input; what lies between there
   and the residual stream is one matrix and one norm, whose vector-Jacobian product is known in closed form;
2. with ``y = W (w . xhat) + const`` and ``xhat = s (x - mean)``, the gradient at the input of a reader is
   ``s [centre(w . W^T g) - xhat (g . (y - const)) / d_model]``. Its first term is linear in ``s g``, so the
   interpolation steps are summed in head space *before* the matrix; the second is one number per step and position;
3. the steps are one batch, and one contraction with the activation differences serves all of them;
4. positions that clean and corrupted prompts share from the left are not run at all (``context.py``), only the answer
   positions go through the unembedding, and no parameter needs a gradient;
5. scores apart for each example, or for groups of positions, cost no more than their sum: an edge's score is a sum over
   positions, so the contraction of point 3 is cut into blocks of positions (``groups.py``).

EAP: Nanda 2023, Syed et al. 2023 (arXiv:2310.10348). EAP-IG: Hanna et al. 2024 (arXiv:2403.17806), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from kc_lib.circuits.scoring.groups import Groups, one_group
from kc_lib.errors import checked
from kc_lib.graph import Graph
from kc_lib.metrics import Metric
from kc_lib.residual.activations import Ablation, writer_outputs
from kc_lib.residual.backward_rules import NATIVE, BackwardRules
from kc_lib.residual.decoder import Decoder, frozen
from kc_lib.residual.parts import Attention, Block, Norm
from kc_lib.residual.prefix_cache import EMPTY, Context
from kc_lib.tasks.batches import Batch


@dataclass(frozen=True)
class Recorded:
    """What one block leaves behind: stream before its norms, and the tensors at which autograd stops."""

    attention_input: Tensor
    projections: dict[str, Tensor]  # "q", "k", "v" -> step*batch pos head d_head
    mlp_input: Tensor
    mlp_normed: Tensor
    mlp_write: Tensor  # before the norm on it, where there is one


@checked
def edge_scores(
    decoder: Decoder,
    graph: Graph,
    batch: Batch,
    metric: Metric,
    ablation: Ablation,
    alphas: Sequence[float],
    reference: Float[Tensor, "batch answer vocab"] | None = None,
    context: Context = EMPTY,
    rules: BackwardRules = NATIVE,
) -> Float[Tensor, "writer reader"]:
    """Sum over the batch's examples of each edge's attribution score, in units of the metric.

    score(u -> v) = sum over positions and d_model of (ablated_u - clean_u) . d loss / d input_v, with loss the metric
    signed so that lower is better, and the gradient averaged over inputs ``ablated + alpha (clean - ablated)``. A
    positive score means that ablating the edge is predicted to hurt. ``ablation`` covers the positions after the context's.
    ``rules`` may put local rules in the place of derivatives, on the way from the loss to the readers' inputs.
    """
    whole = one_group(batch)
    return grouped_edge_scores(decoder, graph, batch, metric, ablation, alphas, whole, reference, context, rules)[0]


@checked
def grouped_edge_scores(
    decoder: Decoder,
    graph: Graph,
    batch: Batch,
    metric: Metric,
    ablation: Ablation,
    alphas: Sequence[float],
    groups: Groups,
    reference: Float[Tensor, "batch answer vocab"] | None = None,
    context: Context = EMPTY,
    rules: BackwardRules = NATIVE,
) -> Float[Tensor, "group writer reader"]:
    """``edge_scores`` in parts: for each group, the sum over its positions only."""
    clean = writer_outputs(decoder, batch.clean, context)
    difference = ablation.outputs - clean
    path = interpolated(ablation.outputs[0], clean[0], alphas)
    n_steps = len(alphas)
    with frozen(decoder.bridge), torch.enable_grad():
        records, final, loss = recorded_run(decoder, graph, path, batch, metric, reference, context, rules=rules)
        targets = [t for record in records for t in (*record.projections.values(), record.mlp_normed)]
        gradients = iter(torch.autograd.grad(loss / n_steps, [*targets, final], materialize_grads=rules.freeze_pattern))

    scores = torch.zeros(groups.n_groups, len(graph.writers), len(graph.readers), device=decoder.device)
    with torch.no_grad():
        at_answers = at_positions(difference, batch.answer_positions - context.start)
        run_groups, answer_groups = groups.after(context.start), groups.at(batch.answer_positions)
        difference = run_groups.ordered(difference)
        for columns, gradient in reader_gradients(decoder, graph, records, gradients, n_steps, rules=rules):
            before = graph.readers[columns.start].n_writers
            scores[:, :before, columns] = run_groups.contract(difference[:before], gradient)
        final_gradient = rearrange(next(gradients), "(s b) a d -> s b a d", s=n_steps).sum(0)[None]
        scores[:, :, -1:] = answer_groups.contract(answer_groups.ordered(at_answers), final_gradient)
    return scores


def interpolated(
    start: Float[Tensor, "#batch #pos d_model"], end: Float[Tensor, "batch pos d_model"], alphas: Sequence[float]
) -> Float[Tensor, "step batch pos d_model"]:
    """Points on the straight way from ``start`` (0) to ``end`` (1)."""
    start = start.expand_as(end)
    return torch.stack([start + alpha * (end - start) for alpha in alphas])


def reader_gradients(
    decoder: Decoder,
    graph: Graph,
    records: Sequence[Recorded],
    gradients: Iterator[Tensor],
    n_steps: int,
    first_layer: int = 0,
    rules: BackwardRules = NATIVE,
) -> Iterator[tuple[slice, Float[Tensor, "reader batch pos d_model"]]]:
    """Gradients at the residual inputs of the recorded blocks' readers, summed over the steps, with the readers' columns.

    ``gradients`` gives those at the tensors where autograd stops, in the order of the records.
    """
    for layer, record in enumerate(records, first_layer):
        block = decoder.blocks[layer]
        for kind, outputs in record.projections.items():
            gradient = _head_reader_gradient(
                block.attention, kind, record.attention_input, outputs, next(gradients), n_steps, rules
            )
            yield graph.reader_columns(layer, kind), gradient
        mlp_gradient = mlp_reader_gradient(block, record.mlp_input, next(gradients), n_steps, rules)
        yield graph.reader_columns(layer, "mlp"), mlp_gradient


def mlp_reader_gradient(
    block: Block,
    stream: Float[Tensor, "step_batch pos d_model"],
    gradient: Float[Tensor, "step_batch pos d_model"],
    n_steps: int,
    rules: BackwardRules = NATIVE,
) -> Float[Tensor, "1 batch pos d_model"]:
    """The gradient at the residual input of a block's MLP, summed over the steps."""
    return rearrange(block.mlp_norm.vjp(stream, gradient, rules), "(s b) p d -> s b p d", s=n_steps).sum(0)[None]


def recorded_run(
    decoder: Decoder,
    graph: Graph,
    path: Float[Tensor, "step batch pos d_model"],
    batch: Batch,
    metric: Metric,
    reference: Tensor | None,
    context: Context,
    first_layer: int = 0,
    rules: BackwardRules = NATIVE,
) -> tuple[list[Recorded], Tensor, Tensor]:
    """A plain run of all interpolated streams as one batch: per-block records, final stream at the answers, loss.

    The run starts before block ``first_layer``.
    """
    n_steps = path.shape[0]
    resid = path.flatten(0, 1).requires_grad_()
    repeat = graph.n_kv_readers // decoder.n_kv_heads  # 1, or the group size in the ungrouped view
    records = []
    for layer, block in enumerate(decoder.blocks[first_layer:], first_layer):
        attention = block.attention
        x = attention.norm(resid, rules)
        past = context.of_layer(layer)
        projections = {kind: attention.project(kind, x) for kind in "qkv"}
        if repeat > 1:
            projections |= {kind: projections[kind].repeat_interleave(repeat, dim=2) for kind in "kv"}
            past = None if past is None else (past[0].repeat_interleave(repeat, 2), past[1].repeat_interleave(repeat, 2))
        z = attention.attend(projections["q"], projections["k"], projections["v"], past, rules)
        after_attention = resid + attention.output(z, rules)
        mlp_input = resid if block.parallel else after_attention
        mlp_normed = block.mlp_norm(mlp_input, rules)
        mlp_write = block.mlp_write(mlp_normed, rules)
        records.append(Recorded(resid.detach(), projections, mlp_input.detach(), mlp_normed, mlp_write))
        resid = after_attention + block.mlp_contribution(mlp_write, rules)
    final = at_positions(resid[None], (batch.answer_positions - context.start).repeat(n_steps, 1))[0]
    logits = rearrange(decoder.unembed(final, rules).float(), "(s b) a v -> s b a v", s=n_steps)
    loss = sum(metric.loss(step, batch, reference).sum() for step in logits)
    return records, final, torch.as_tensor(loss)


def _head_reader_gradient(
    attention: Attention,
    kind: str,
    stream: Float[Tensor, "step_batch pos d_model"],
    outputs: Float[Tensor, "step_batch pos reader d_head"],
    gradient: Float[Tensor, "step_batch pos reader d_head"],
    n_steps: int,
    rules: BackwardRules = NATIVE,
) -> Float[Tensor, "reader batch pos d_model"]:
    """Gradients at the residual inputs of a layer's q, k or v readers, summed over the steps (point 2 above)."""
    weight, bias = attention.weights(kind)
    copies = outputs.shape[2] // weight.shape[0]
    weight, bias = weight.repeat_interleave(copies, 0).float(), bias.repeat_interleave(copies, 0).float()
    norm = attention.norm
    gradient = gradient.float()
    scale = norm.scale(stream).float()
    in_head_space = rearrange(gradient * scale[..., None], "(s b) p r h -> s b p r h", s=n_steps).sum(0)
    result = norm.centre(norm.weighted(torch.einsum("bprh,rdh->rbpd", in_head_space, weight)))
    if norm.kind == "none" or rules.freeze_norms:
        return result
    along = (gradient * (outputs.float() - _constant(norm, weight, bias))).sum(-1) * scale / stream.shape[-1]
    normalised = rearrange(norm.normalised(stream).float(), "(s b) p d -> s b p d", s=n_steps)
    along = rearrange(along, "(s b) p r -> s b p r", s=n_steps)
    return result - torch.einsum("sbpd,sbpr->rbpd", normalised, along)


def _constant(norm: Norm, weight: Tensor, bias: Tensor) -> Float[Tensor, "reader d_head"]:
    """The part of a projection that does not depend on the stream."""
    if norm.bias is None:
        return bias
    return bias + torch.einsum("d,rdh->rh", norm.bias.float(), weight)


def at_positions(x: Float[Tensor, "n batch pos d"], positions: Tensor) -> Float[Tensor, "n batch answer d"]:
    rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
    return x[:, rows, positions]
