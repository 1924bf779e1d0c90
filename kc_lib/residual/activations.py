"""What every writer adds to the residual stream, and the values it is given where a circuit leaves it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kc_lib.errors import MethodError, checked
from kc_lib.graph import Graph
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.prefix_cache import EMPTY, Context
from kc_lib.tasks.batches import Batch

INTERVENTIONS = ("patching", "zero", "mean", "positional_mean")


@torch.no_grad()
@checked
def writer_outputs(
    decoder: Decoder, tokens: Int[Tensor, "batch pos"], context: Context = EMPTY
) -> Float[Tensor, "writer batch new_pos d_model"]:
    """Every writer's contribution to the stream in a plain run, at the positions after the context's.

    The contributions below a reader, plus the attention biases below it, sum to the reader's input exactly; where the
    model normalises outputs (Gemma), a head's contribution is scaled as the norm scales it in this run.
    """
    resid = decoder.embed(tokens)[:, context.start :]
    outputs = resid.new_empty(decoder.n_writers, *resid.shape)
    outputs[0] = resid
    row = 1
    for layer, block in enumerate(decoder.blocks):
        attention = block.attention
        z = attention.attend(*attention.projections(resid), context.of_layer(layer))
        heads = attention.contributions(attention.head_outputs(z))
        after_attention = resid + heads.sum(0) + attention.b_O
        mlp = block.mlp_output(decoder.mlp_input(layer, resid, after_attention))
        outputs[row : row + decoder.n_heads] = heads
        outputs[row + decoder.n_heads] = mlp
        resid = after_attention + mlp
        row += decoder.n_heads + 1
    return outputs


@dataclass(frozen=True)
class Ablation:
    """What the writers outside a circuit are worth: ``outputs`` broadcasts over batch and position.

    ``reproducible`` says that the values are those of a run of the model (patching): a node that reads nothing but
    ablated values then writes its ablated value again.
    """

    kind: str
    outputs: Float[Tensor, "writer #batch #pos d_model"]

    @property
    def reproducible(self) -> bool:
        return self.kind == "patching"


@dataclass(frozen=True)
class Means:
    """Mean writer outputs over reference prompts: over all positions, ``[writer, 1, 1, d_model]``, or per position."""

    outputs: Float[Tensor, "writer 1 pos d_model"]


def mean_outputs(
    decoder: Decoder,
    reference: Iterable[Batch],
    positional: bool = False,
    outputs_of: Callable[..., Tensor] = writer_outputs,
) -> Means:
    """Mean contribution of each writer over the clean prompts of a reference set, pads left out.

    ``positional`` averages each position (counted from the left) on its own. EAP-IG's non-positional mean averages
    across nodes and reads the last token only (known fault); this is the mean over examples and positions, per node.
    ``outputs_of`` gives what else is to be averaged, neurons say, from decoder and tokens.
    """
    total, count = decoder.W_U.new_zeros(1, 1, 0, 1), decoder.W_U.new_zeros(0)
    for batch in reference:
        outputs = outputs_of(decoder, batch.clean)
        n_pos = outputs.shape[2]
        real = torch.arange(n_pos, device=outputs.device) < batch.lengths[:, None]
        summed, seen = (outputs * real[:, :, None]).sum(1, keepdim=True), real.sum(0)
        longer = max(n_pos - len(count), 0)
        total, count = F.pad(total, (0, 0, 0, longer)), F.pad(count, (0, longer))
        total = total + F.pad(summed, (0, 0, 0, len(count) - n_pos))
        count = count + F.pad(seen, (0, len(count) - n_pos))
    if not len(count):
        raise MethodError("a mean intervention needs at least one reference prompt")
    if positional:
        return Means(total / count[:, None])
    return Means(total.sum(2, keepdim=True) / count.sum())


def ablation(
    decoder: Decoder,
    kind: str,
    batch: Batch,
    means: Means | None = None,
    context: Context = EMPTY,
    outputs_of: Callable[..., Tensor] = writer_outputs,
) -> Ablation:
    """The ablated values for one batch: the corrupted prompts' outputs, zeros, or means of a reference set.

    Under "zero" the components' outputs are zeroed and the attention biases, which belong to no writer, are kept.

    Raises:
        MethodError: an unknown kind, or a mean without its reference or too short for this batch.
    """
    if kind == "patching":
        return Ablation(kind, outputs_of(decoder, batch.corrupted, context))
    if kind == "zero":
        return Ablation(kind, decoder.W_U.new_zeros(decoder.n_writers, 1, 1, decoder.W_U.shape[0]))
    if kind not in INTERVENTIONS:
        raise MethodError(f"unknown intervention {kind!r}: use one of {', '.join(INTERVENTIONS)}")
    if means is None:
        raise MethodError(f"intervention {kind!r} needs the means of a reference set")
    n_pos = batch.clean.shape[1]
    if kind == "mean":
        return Ablation(kind, means.outputs)
    if means.outputs.shape[2] < n_pos:
        raise MethodError(
            f"positional means cover {means.outputs.shape[2]} positions, but a prompt has {n_pos}: use a reference set "
            "with prompts as long, or intervention 'mean'"
        )
    return Ablation(kind, means.outputs[:, :, :n_pos])


def ablated_inputs(
    decoder: Decoder, graph: Graph, ablated: Float[Tensor, "writer row d_model"]
) -> Float[Tensor, "reader row d_model"]:
    """What each reader sees without any edge: the ablated stream and the attention biases below it."""
    streams, biases = [], decoder.bias_before
    total = ablated[0]
    for layer in range(graph.n_layers):
        heads = graph.head_writers(layer)
        with_heads = total + ablated[heads].sum(0)
        below_mlp = total + biases[layer] if graph.parallel else with_heads + biases[layer + 1]
        n_columns = graph.reader_columns(layer, "mlp").stop - graph.reader_columns(layer, "q").start
        streams += [(total + biases[layer]).expand(n_columns - 1, -1, -1), below_mlp[None]]
        total = with_heads + ablated[heads.stop]
    return torch.cat([*streams, (total + biases[-1])[None]])
