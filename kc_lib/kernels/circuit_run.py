"""Running a circuit: every edge outside it carries its ablated value, in one forward pass per batch, for any mask.

The stream a reader v sees is ``ablated stream + sum over u in the circuit of (output_u - ablated_u)``. Only differences
from the ablated values are kept, so one matrix product per layer gives the inputs of all its readers, and nodes that
cannot reach the logits through the mask are never computed. A reader with more than half of the possible edges is
summed from the other end (this run's stream minus the edges left out), so a nearly full circuit costs little more than
a plain forward and a small one costs less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kc_lib.graph import Graph
from kc_lib.kernels.writers import Ablation
from kc_lib.tasks.batches import Batch
from kc_lib.wiring import Block, Wiring


@dataclass
class _Stream:
    """Differences from the ablated values, of the writers computed so far, and the stream both ways."""

    differences: Float[Tensor, "active batch pos d_model"]
    rows: list[int]  # the graph's row of each difference
    ablated: Float[Tensor, "batch pos d_model"]
    total_difference: Float[Tensor, "batch pos d_model"]

    def add(self, row: int, difference: Tensor) -> None:
        self.differences[len(self.rows)] = difference
        self.rows.append(row)
        self.total_difference = self.total_difference + difference


@torch.no_grad()
def run_circuit(
    wiring: Wiring,
    graph: Graph,
    mask: Bool[Tensor, "writer reader"],
    batch: Batch,
    ablation: Ablation,
) -> Float[Tensor, "batch answer vocab"]:
    """Logits at the answer positions of the clean prompts, run through the circuit alone.

    The full mask gives the model's own logits; the empty mask gives those of the ablated stream (with patching: the
    corrupted prompts'). The mask need not be pruned.
    """
    active = _active_writers(graph, mask, wiring, ablation)
    resid = wiring.embed(batch.clean)
    stream = _Stream(
        differences=resid.new_empty(int(active.sum()), *resid.shape),
        rows=[],
        ablated=ablation.outputs[0].expand_as(resid),
        total_difference=torch.zeros_like(resid),
    )
    if active[0]:
        stream.add(0, resid - ablation.outputs[0])
    for layer, block in enumerate(wiring.blocks):
        _run_layer(wiring, graph, mask, active, stream, layer, block, ablation)
    bias = wiring.bias_before[-1]
    rows = torch.arange(len(batch), device=resid.device)[:, None]
    logits_input = _reader_inputs(stream, mask[:, -1:], bias, at=(rows, batch.answer_positions))[0]
    return wiring.unembed(logits_input).float()


def _active_writers(graph: Graph, mask: Tensor, wiring: Wiring, ablation: Ablation) -> Bool[Tensor, " writer"]:
    """Writers whose value can differ from its ablated one and can reach the logits through the mask."""
    serves = graph.serves
    active = torch.zeros(len(graph.writers), dtype=torch.bool)
    live_readers = torch.zeros(len(graph.readers), dtype=torch.bool)
    live_readers[-1] = True
    post_norm = wiring.blocks[0].attention.post_norm is not None
    for layer in reversed(range(graph.n_layers)):
        heads = graph.head_writers(layer)
        mlp = heads.stop
        active[mlp] = (mask[mlp] & live_readers).any()
        if active[mlp]:
            live_readers |= serves[mlp]
        active[heads] = (mask[heads] & live_readers).any(1)
        if post_norm and active[heads].any():
            active[heads] = True  # a norm over the heads' sum ties them together
        live_readers |= (serves[heads] & active[heads, None]).any(0)
    active[0] = (mask[0] & live_readers).any()
    if ablation.reproducible:  # what reads only ablated values writes its ablated value
        changed = torch.zeros_like(active)
        changed[0] = active[0]
        for layer in range(graph.n_layers):
            heads = graph.head_writers(layer)
            for rows in (heads, slice(heads.stop, heads.stop + 1)):
                fed = (mask & changed[:, None]).any(0)
                changed[rows] = (serves[rows] & fed).any(1) & active[rows]
                if post_norm and rows is heads and changed[rows].any():
                    changed[rows] = active[rows]
        active = changed
    return active


def _run_layer(
    wiring: Wiring,
    graph: Graph,
    mask: Tensor,
    active: Tensor,
    stream: _Stream,
    layer: int,
    block: Block,
    ablation: Ablation,
) -> None:
    attention, heads = block.attention, graph.head_writers(layer)
    bias = wiring.bias_before[layer]
    kept = active[heads].nonzero()[:, 0]
    mlp_row = heads.stop
    mlp_column = graph.reader_columns(layer, "mlp")
    mlp_input = None
    if block.parallel and active[mlp_row]:  # before this block's heads join the stream
        mlp_input = _reader_inputs(stream, mask[:, mlp_column], bias)[0]
    if len(kept):
        reads = {"q": kept}
        reads["k"] = reads["v"] = (kept // (graph.n_heads // graph.n_kv_readers)).unique()
        projected = {}
        for kind, indices in reads.items():
            columns = graph.reader_columns(layer, kind).start + indices
            x = attention.norm(_reader_inputs(stream, mask[:, columns], bias))
            weight, bias_of = attention.weights(kind)
            copies = (graph.n_heads if kind == "q" else graph.n_kv_readers) // weight.shape[0]
            own = indices // copies
            y = torch.einsum("rbpd,rdh->bprh", x, weight[own]) + bias_of[own]
            if kind != "q":  # one key and value per kept query head
                group = kept // (graph.n_heads // graph.n_kv_readers)
                y = y[:, :, torch.searchsorted(indices, group)]
            projected[kind] = y
        z = attention.attend(projected["q"], projected["k"], projected["v"])
        outputs = attention.contributions(torch.einsum("bphd,hde->hbpe", z, attention.W_O[kept]))
        for head, output in zip(kept.tolist(), outputs, strict=True):
            stream.add(heads.start + head, output - ablation.outputs[heads.start + head])
    stream.ablated = stream.ablated + ablation.outputs[heads].sum(0)
    if active[mlp_row]:
        if mlp_input is None:
            mlp_input = _reader_inputs(stream, mask[:, mlp_column], wiring.bias_before[layer + 1])[0]
        output = block.mlp_output(block.mlp_norm(mlp_input))
        stream.add(mlp_row, output - ablation.outputs[mlp_row])
    stream.ablated = stream.ablated + ablation.outputs[mlp_row]


def _reader_inputs(
    stream: _Stream,
    mask: Bool[Tensor, "writer reader"],
    bias: Float[Tensor, " d_model"],
    at: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "reader batch pos d_model"]:
    """The residual input of some readers: ablated stream plus the differences their edges carry."""
    differences = stream.differences[: len(stream.rows)]
    ablated, total = stream.ablated + bias, stream.total_difference
    if at is not None:
        differences, ablated, total = differences[:, at[0], at[1]], ablated[at], total[at]
    edges = mask[stream.rows].T.to(differences.dtype).to(differences.device)  # reader x active
    from_above = edges.sum(1, keepdim=True) > len(stream.rows) / 2
    coefficients = torch.where(from_above, edges - 1, edges)
    used = coefficients.any(0)
    inputs = ablated + torch.where(from_above[:, :, None, None], total, torch.zeros_like(total))
    if not used.any():
        return inputs
    if not used.all():
        coefficients, differences = coefficients[:, used], differences[used]
    return inputs + torch.einsum("ru,ubpd->rbpd", coefficients, differences)
