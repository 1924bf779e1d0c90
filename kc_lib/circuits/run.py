"""Running a circuit: every edge outside it carries its ablated value, in one forward pass per batch, for any mask.

The stream a reader v sees is ``ablated stream + sum over u in the circuit of (output_u - ablated_u)``. Only differences
from the ablated values are kept, so one matrix product per layer gives the inputs of all its readers, and nodes that
cannot reach the logits through the mask are never computed. A reader with more than half of the possible edges is
summed from the other end (this run's stream minus the edges left out), so a nearly full circuit costs little more than
a plain forward and a small one costs less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kc_lib.errors import checked
from kc_lib.graph import Graph
from kc_lib.residual.activations import NO_PREFIX, Ablation, PrefixCache
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.logits import at_answers
from kc_lib.tasks.batches import Batch


@dataclass(frozen=True)
class _Circuit:
    """What is run: a mask over a decoder's graph, with the values of what it leaves out."""

    decoder: Decoder
    graph: Graph
    mask: Bool[Tensor, "writer reader"]
    ablation: Ablation
    prefix: PrefixCache


class _Stream:
    """The stream of a run, as differences from the ablated values: row 0 their sum, then one row per active writer."""

    def __init__(self, n_active: int, ablated_input: Float[Tensor, "batch pos d_model"]) -> None:
        self.differences = ablated_input.new_zeros(n_active + 1, *ablated_input.shape)
        self.rows: list[int] = []  # the graph's row of each writer so far
        self.ablated = ablated_input

    def add(self, row: int, difference: Tensor) -> None:
        self.rows.append(row)
        self.differences[len(self.rows)] = difference
        self.differences[0] += difference

    def reader_inputs(
        self,
        mask: Bool[Tensor, "writer reader"],
        bias: Float[Tensor, " d_model"],
        at: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "reader batch pos d_model"]:
        """The residual inputs of some readers: ablated stream and biases, plus the differences their edges carry."""
        differences, ablated = self.differences[: len(self.rows) + 1], self.ablated + bias
        if at is not None:
            differences, ablated = at(differences), at(ablated)
        edges = mask[self.rows].T.to(differences)  # reader x active
        from_above = edges.sum(1, keepdim=True) > len(self.rows) / 2
        coefficients = torch.cat([from_above.to(edges), torch.where(from_above, edges - 1, edges)], 1)
        used = coefficients.any(0).nonzero()[:, 0]
        if len(used) < len(differences) / 2:
            coefficients, differences = coefficients[:, used], differences[used]
        inputs = torch.addmm(ablated.reshape(1, -1), coefficients, differences.flatten(1))
        return inputs.view(-1, *ablated.shape)


@torch.no_grad()
@checked
def run_circuit(
    decoder: Decoder,
    graph: Graph,
    mask: Bool[Tensor, "writer reader"],
    batch: Batch,
    ablation: Ablation,
    prefix: PrefixCache = NO_PREFIX,
) -> Float[Tensor, "batch answer vocab"]:
    """Logits at the answer positions of the clean prompts, run through the circuit alone.

    The full mask gives the model's own logits; the empty mask gives those of the ablated stream (with patching: the
    corrupted prompts'). The mask need not be pruned. ``ablation`` covers the positions after the prefix's.
    """
    circuit = _Circuit(decoder, graph, mask, ablation, prefix)
    active = _active_writers(circuit)
    resid = decoder.embed(batch.clean)[:, prefix.start :]
    stream = _Stream(int(active.sum()), ablation.outputs[0].expand_as(resid).clone())
    if active[0]:
        stream.add(0, resid - ablation.outputs[0])
    for layer in range(graph.n_layers):
        _run_layer(circuit, layer, active, stream)
    at = partial(at_answers, batch=batch, prefix=prefix)
    return decoder.unembed(stream.reader_inputs(mask[:, -1:], decoder.bias_before[-1], at)[0]).float()


def _active_writers(circuit: _Circuit) -> Bool[Tensor, " writer"]:
    """Writers whose value can differ from its ablated one and can reach the logits through the mask."""
    graph, mask = circuit.graph, circuit.mask
    serves = graph.serves
    active = torch.zeros(len(graph.writers), dtype=torch.bool)
    live_readers = torch.zeros(len(graph.readers), dtype=torch.bool)
    live_readers[-1] = True
    post_norm = circuit.decoder.blocks[0].attention.post_norm is not None
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
    if circuit.ablation.reproducible:  # what reads only ablated values writes its ablated value
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


def _run_layer(circuit: _Circuit, layer: int, active: Bool[Tensor, " writer"], stream: _Stream) -> None:
    """Run a layer's active nodes on what the mask lets them read, and add what they write to the stream."""
    decoder, graph, outside = circuit.decoder, circuit.graph, circuit.ablation.outputs
    block, heads = decoder.blocks[layer], graph.head_writers(layer)
    bias = decoder.bias_before[layer]
    kept = active[heads].nonzero()[:, 0]
    mlp_row = heads.stop
    mlp_mask = circuit.mask[:, graph.reader_columns(layer, "mlp")]
    mlp_input = None
    if block.parallel and active[mlp_row]:  # before this block's heads join the stream
        mlp_input = stream.reader_inputs(mlp_mask, bias)[0]
    if len(kept):
        outputs = _head_outputs(circuit, layer, kept, stream)
        for head, output in zip(kept.tolist(), outputs, strict=True):
            stream.add(heads.start + head, output - outside[heads.start + head])
    stream.ablated = stream.ablated + outside[heads].sum(0)
    if active[mlp_row]:
        if mlp_input is None:
            mlp_input = stream.reader_inputs(mlp_mask, decoder.bias_before[layer + 1])[0]
        stream.add(mlp_row, block.mlp_output(block.mlp_norm(mlp_input)) - outside[mlp_row])
    stream.ablated = stream.ablated + outside[mlp_row]


def _head_outputs(
    circuit: _Circuit, layer: int, kept: Int[Tensor, " kept"], stream: _Stream
) -> Float[Tensor, "kept batch pos d_model"]:
    """What the kept heads of a layer add to the stream, each of their readers seeing its own input."""
    decoder, graph = circuit.decoder, circuit.graph
    attention = decoder.blocks[layer].attention
    reader_of = kept // (graph.n_heads // graph.n_kv_readers)  # the key and value reader of each kept head
    projected = {}
    for kind in "qkv":
        readers = kept if kind == "q" else reader_of.unique()
        columns = graph.reader_columns(layer, kind).start + readers
        x = attention.norm(stream.reader_inputs(circuit.mask[:, columns], decoder.bias_before[layer]))
        weight, bias = attention.weights(kind)
        own = readers // ((graph.n_heads if kind == "q" else graph.n_kv_readers) // weight.shape[0])
        y = torch.einsum("rbpd,rdh->bprh", x, weight[own]) + bias[own]
        projected[kind] = y if kind == "q" else y[:, :, torch.searchsorted(readers, reader_of)]
    past = circuit.prefix.of_heads(layer, kept // attention.group_size)
    z = attention.attend(projected["q"], projected["k"], projected["v"], past=past)
    return attention.contributions(torch.einsum("bphd,hde->hbpe", z, attention.W_O[kept]))
