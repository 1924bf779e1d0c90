"""Edge scores without splitting the residual stream.

Published code gives every head's queries, keys and values, and every MLP, a residual copy of its own, back-propagates
through the copies and contracts at every interpolation step. The same numbers come from the plain forward pass:

1. autograd stops at the queries, keys and values (head space) and at the MLP's normed input; what lies between there
   and the residual stream is one matrix and one norm, whose vector-Jacobian product is known in closed form;
2. with ``y = W (w . xhat) + const`` and ``xhat = s (x - mean)``, the gradient at the input of a reader is
   ``s [centre(w . W^T g) - xhat (g . (y - const)) / d_model]``. Its first term is linear in ``s g``, so the
   interpolation steps are summed in head space *before* the matrix; the second is one number per step and position;
3. the steps are one batch, and one contraction with the activation differences serves all of them;
4. positions that clean and corrupted prompts share from the left are not run at all (``prefix_cache.py``), only the answer
   positions go through the unembedding, and no parameter needs a gradient;
5. scores apart for each example, or for groups of positions, cost no more than their sum: an edge's score is a sum over
   positions, so the contraction of point 3 is cut into blocks of positions (``prepared.py``).

EAP: Nanda 2023, Syed et al. 2023 (arXiv:2310.10348). EAP-IG: Hanna et al. 2024 (arXiv:2403.17806), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kc_lib.circuits.scoring.prepared import Groups, Prepared, one_group
from kc_lib.errors import checked
from kc_lib.graph import Graph
from kc_lib.residual.activations import writer_outputs
from kc_lib.residual.backward_rules import NATIVE, BackwardRules
from kc_lib.residual.decoder import Decoder, frozen
from kc_lib.residual.logits import at_answers
from kc_lib.residual.parts import Attention, Norm


@dataclass(frozen=True)
class RecordedBlock:
    """What one block leaves behind: the stream before its norms, and the tensors at which autograd stops."""

    layer: int
    attention_input: Tensor
    projections: dict[str, Tensor]  # "q", "k", "v" -> step*batch pos head d_head; empty where the run starts at the MLP
    z: Tensor  # of all heads; empty where the run starts at the MLP
    mlp_input: Tensor
    mlp_normed: Tensor
    mlp_write: Tensor  # before the norm on it, where there is one


@dataclass(frozen=True)
class RecordedRun:
    """A plain run of all interpolated streams as one batch.

    ``final`` is the stream at the answers, ``loss`` the sum over the examples and the mean over the steps.
    """

    blocks: list[RecordedBlock]
    final: Float[Tensor, "step batch answer d_model"]
    loss: Float[Tensor, ""]
    n_steps: int
    rules: BackwardRules

    def over_steps(self, x: Float[Tensor, "step_batch *rest"]) -> Float[Tensor, "batch *rest"]:
        """The sum over the interpolation steps."""
        return x.unflatten(0, (self.n_steps, -1)).sum(0)


@dataclass(frozen=True)
class Differences:
    """What ablation changes in every writer, ``ablated - clean``, in the order of groups of positions."""

    outputs: Float[Tensor, "writer batch_pos d_model"]
    groups: Groups
    at_answers: Float[Tensor, "writer batch_answer d_model"]
    answer_groups: Groups

    @classmethod
    def of(cls, prepared: Prepared, clean: Float[Tensor, "writer batch pos d_model"], groups: Groups) -> Differences:
        """The differences of a batch; ``groups`` are those of all its positions."""
        difference = prepared.ablation.outputs - clean
        in_run, answers = groups.after(prepared.prefix.start), groups.at(prepared.batch.answer_positions)
        read = at_answers(difference, prepared.batch, prepared.prefix)
        return cls(in_run.ordered(difference), in_run, answers.ordered(read), answers)

    def contract(
        self, writers: slice, gradient: Float[Tensor, "reader batch pos d_model"], is_logits: bool
    ) -> Float[Tensor, "group writer reader"]:
        """Scores of the edges from some writers to the readers that have this gradient, for each group."""
        if is_logits:
            return self.answer_groups.contract(self.at_answers[writers], gradient)
        return self.groups.contract(self.outputs[writers], gradient)


@torch.no_grad()
@checked
def edge_scores(
    decoder: Decoder,
    graph: Graph,
    prepared: Prepared,
    alphas: Sequence[float],
    groups: Groups | None = None,
    rules: BackwardRules = NATIVE,
) -> Float[Tensor, "group writer reader"]:
    """Each edge's attribution score summed over the positions of each group, in units of the metric.

    score(u -> v) = sum over positions and d_model of (ablated_u - clean_u) . d loss / d input_v, with loss the metric
    signed so that lower is better, and the gradient averaged over inputs ``ablated + alpha (clean - ablated)``. A
    positive score means that ablating the edge is predicted to hurt. ``groups`` are by default one: the whole batch.
    ``rules`` may put local rules in the place of derivatives, on the way from the loss to the readers' inputs.
    """
    groups = groups or one_group(prepared.batch)
    clean = writer_outputs(decoder, prepared.batch.clean, prepared.prefix)
    run = recorded_run(decoder, graph, interpolated(prepared.ablation.outputs[0], clean[0], alphas), prepared, rules=rules)
    differences = Differences.of(prepared, clean, groups)
    scores = torch.zeros(groups.n_groups, len(graph.writers), len(graph.readers), device=decoder.device)
    for columns, gradient in reader_gradients(decoder, graph, run):
        reader = graph.readers[columns.start]
        before = slice(reader.n_writers)
        scores[:, before, columns] = differences.contract(before, gradient, reader.kind == "logits")
    return scores


def interpolated(
    start: Float[Tensor, "#batch #pos d_model"], end: Float[Tensor, "batch pos d_model"], alphas: Sequence[float]
) -> Float[Tensor, "step batch pos d_model"]:
    """Points on the straight way from ``start`` (0) to ``end`` (1)."""
    start = start.expand_as(end)
    return torch.stack([start + alpha * (end - start) for alpha in alphas])


def recorded_run(
    decoder: Decoder,
    graph: Graph,
    path: Float[Tensor, "step batch pos d_model"],
    prepared: Prepared,
    start: tuple[int, bool] = (0, False),
    rules: BackwardRules = NATIVE,
) -> RecordedRun:
    """A plain run of the streams on ``path``, from block ``start[0]`` on; ``start[1]`` leaves out that block's attention."""
    n_steps, (first, skip_attention) = path.shape[0], start
    repeat = graph.n_kv_readers // decoder.n_kv_heads  # 1, or the group size in the ungrouped view
    records = []
    with frozen(decoder.bridge), torch.enable_grad():
        resid = path.flatten(0, 1).requires_grad_()
        for layer, block in enumerate(decoder.blocks[first:], first):
            stream, projections, z, after_attention = resid, {}, resid.new_empty(0), resid
            if layer > first or not skip_attention:
                attention = block.attention
                projections = dict(zip("qkv", attention.projections(resid, rules), strict=True))
                past = prepared.prefix.of_layer(layer)
                if repeat > 1:
                    projections |= {kind: projections[kind].repeat_interleave(repeat, dim=2) for kind in "kv"}
                    past = prepared.prefix.of_heads(layer, torch.arange(graph.n_kv_readers) // repeat)
                z = attention.attend(projections["q"], projections["k"], projections["v"], past, rules)
                after_attention = resid + attention.output(z, rules)
            mlp_input = resid if block.parallel else after_attention
            normed = block.mlp_norm(mlp_input, rules)
            write = block.mlp_write(normed, rules)
            records.append(RecordedBlock(layer, stream.detach(), projections, z, mlp_input.detach(), normed, write))
            resid = after_attention + block.mlp_contribution(write, rules)
        final = at_answers(resid.unflatten(0, (n_steps, -1)), prepared.batch, prepared.prefix)
        logits = decoder.unembed(final, rules).float()
        loss = torch.stack([prepared.loss(step) for step in logits]).sum() / n_steps
    return RecordedRun(records, final, loss, n_steps, rules)


@torch.no_grad()
def reader_gradients(
    decoder: Decoder, graph: Graph, run: RecordedRun
) -> Iterator[tuple[slice, Float[Tensor, "reader batch pos d_model"]]]:
    """Gradients of the loss at the residual inputs of a run's readers, with the readers' columns; the logits come last."""
    stops = [x for record in run.blocks for x in (*record.projections.values(), record.mlp_normed)]
    # a pattern that is a constant leaves queries and keys without a gradient
    grads = iter(torch.autograd.grad(run.loss, [*stops, run.final], materialize_grads=run.rules.freeze_pattern))
    for record in run.blocks:
        block = decoder.blocks[record.layer]
        for kind in record.projections:
            gradient = _head_reader_gradient(block.attention, kind, record, next(grads), run)
            yield graph.reader_columns(record.layer, kind), gradient
        at_mlp = block.mlp_norm.vjp(record.mlp_input, next(grads), run.rules)
        yield graph.reader_columns(record.layer, "mlp"), run.over_steps(at_mlp)[None]
    last = len(graph.readers) - 1
    yield slice(last, last + 1), next(grads).sum(0, keepdim=True)


def _head_reader_gradient(
    attention: Attention,
    kind: str,
    record: RecordedBlock,
    gradient: Float[Tensor, "step_batch pos reader d_head"],
    run: RecordedRun,
) -> Float[Tensor, "reader batch pos d_model"]:
    """Gradients at the residual inputs of a layer's q, k or v readers, summed over the steps (point 2 above)."""
    stream, outputs = record.attention_input, record.projections[kind]
    weight, bias = attention.weights(kind)
    copies = outputs.shape[2] // weight.shape[0]
    weight, bias = weight.repeat_interleave(copies, 0).float(), bias.repeat_interleave(copies, 0).float()
    norm = attention.norm
    gradient = gradient.float()
    scale = norm.scale(stream).float()
    in_head_space = run.over_steps(gradient * scale[..., None])
    result = norm.centre(norm.weighted(torch.einsum("bprh,rdh->rbpd", in_head_space, weight)))
    if norm.kind == "none" or run.rules.freeze_norms:
        return result
    along = (gradient * (outputs.float() - _constant(norm, weight, bias))).sum(-1) * scale / stream.shape[-1]
    normalised, along = (x.unflatten(0, (run.n_steps, -1)) for x in (norm.normalised(stream).float(), along))
    return result - torch.einsum("sbpd,sbpr->rbpd", normalised, along)


def _constant(norm: Norm, weight: Tensor, bias: Tensor) -> Float[Tensor, "reader d_head"]:
    """The part of a projection that does not depend on the stream."""
    if norm.bias is None:
        return bias
    return bias + torch.einsum("d,rdh->rh", norm.bias.float(), weight)
