"""What every writer adds to the residual stream, and the values it is given where a circuit leaves it out.

The prefix cache is the part of a batch's prompts that no run can change, computed once.

Under causal attention a position depends on nothing to its right. Where the ablated values are those of the corrupted
prompts, every position left of the first token in which clean and corrupted prompt differ is the same in the clean, the
corrupted and every interpolated or patched run: its differences are zero and add nothing to any score. What later
positions need of it are its keys and values. In a prompt like "The capital city of France is" that is most of the work.
"""

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
from kc_lib.tasks.batches import Batch

INTERVENTIONS = ("patching", "zero", "mean", "positional_mean")


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values, per layer, of the first ``start`` positions of each prompt; kernels run the positions after them."""

    start: int = 0
    past: tuple[tuple[Float[Tensor, "batch past kv d_head"], Float[Tensor, "batch past kv d_head"]], ...] = ()

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor] | None:
        return self.past[layer] if self.past else None

    def of_heads(self, layer: int, kv_heads: Int[Tensor, " head"]) -> tuple[Tensor, Tensor] | None:
        """Keys and values of these key-value heads, one for each query head."""
        return (self.past[layer][0][:, :, kv_heads], self.past[layer][1][:, :, kv_heads]) if self.past else None


NO_PREFIX = PrefixCache()


@torch.no_grad()
def shared_prefix(decoder: Decoder, batch: Batch, intervention: str) -> PrefixCache:
    """The prefix of a batch: what its clean and corrupted prompts share from the left, in every row.

    Empty for interventions other than patching, which change every position.
    """
    if intervention != "patching":
        return NO_PREFIX
    differs = (batch.clean != batch.corrupted).any(0)
    shared = int(differs.nonzero()[0]) if differs.any() else batch.clean.shape[1]
    start = min(shared, int(batch.answer_positions.min()))  # the answer is always read from positions that are run
    if start == 0:
        return NO_PREFIX
    prefixes, row_of = batch.clean[:, :start].unique(dim=0, return_inverse=True)
    prefix = prefix_of(decoder, prefixes)
    return PrefixCache(start, tuple((k[row_of], v[row_of]) for k, v in prefix.past))


@torch.no_grad()
def prefix_of(decoder: Decoder, tokens: Int[Tensor, "batch past"]) -> PrefixCache:
    """The prefix that these tokens are to whatever follows them."""
    if not tokens.shape[1]:
        return NO_PREFIX
    resid = decoder.embed(tokens)
    past = []
    for layer in range(decoder.n_layers):
        past.append(decoder.keys_values(layer, resid))
        resid = decoder.run_block(layer, resid)
    return PrefixCache(tokens.shape[1], tuple(past))


@torch.no_grad()
@checked
def writer_outputs(
    decoder: Decoder, tokens: Int[Tensor, "batch pos"], prefix: PrefixCache = NO_PREFIX
) -> Float[Tensor, "writer batch new_pos d_model"]:
    """Every writer's contribution to the stream in a plain run, at the positions after the prefix's.

    The contributions below a reader, plus the attention biases below it, sum to the reader's input exactly; where the
    model normalises outputs (Gemma), a head's contribution is scaled as the norm scales it in this run.
    """
    resid = decoder.embed(tokens)[:, prefix.start :]
    outputs = resid.new_empty(decoder.n_writers, *resid.shape)
    outputs[0] = resid
    row = 1
    for layer, block in enumerate(decoder.blocks):
        attention = block.attention
        z = attention.attend(*attention.projections(resid), prefix.of_layer(layer))
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
    prefix: PrefixCache = NO_PREFIX,
    outputs_of: Callable[..., Tensor] = writer_outputs,
) -> Ablation:
    """The ablated values for one batch: the corrupted prompts' outputs, zeros, or means of a reference set.

    Under "zero" the components' outputs are zeroed and the attention biases, which belong to no writer, are kept.

    Raises:
        MethodError: an unknown kind, or a mean without its reference or too short for this batch.
    """
    if kind == "patching":
        return Ablation(kind, outputs_of(decoder, batch.corrupted, prefix))
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
