"""Causal tracing: states of a clean run put into corrupted runs, and only what they can change computed again.

All runs of a fact share the prompt left of the subject, which noise on the subject cannot reach: its keys and values are
a prefix cache. The corrupted runs, one per noise sample, are run once and kept. A *cell* restores something at one token
and layer; what it can change are the positions from that token on, in the blocks above. Those (cell, position) places are
the rows of one tensor that goes up through the blocks once: a cell's rows join at the block where they first differ from
the corrupted run. Linear parts see rows only; attention goes back to cells x samples, where positions left of the token
carry the corrupted run's keys and values. Of the last block and the logits only the last position is computed.

What is held at a token in some layers (the attention or MLP output of the corrupted run when it is *severed*, of the clean
run when it is *restored* in a window) replaces the row's own output, which is not computed where nothing else needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kc_lib.errors import checked
from kc_lib.residual.activations import PrefixCache, prefix_of
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.parts import Attention
from kc_lib.tracing.options import WINDOWED

LOGITS_AT_ONCE = 2**24  # 64 MB


@dataclass(frozen=True)
class Kept:
    """One run per sample after the prefix: the stream before each block (last: the final one), and what blocks write."""

    streams: Float[Tensor, "boundary pos sample d_model"]
    attention: Float[Tensor, "layer pos sample d_model"]
    mlp: Float[Tensor, "layer pos sample d_model"]
    keys: Float[Tensor, "layer pos sample kv d_head"]
    values: Float[Tensor, "layer pos sample kv d_head"]


@dataclass(frozen=True)
class FactRuns:
    """The runs of one fact that its cells are made of; ``clean`` has a single sample."""

    prefix: PrefixCache
    clean: Kept
    corrupted: Kept
    answer: int


@dataclass(frozen=True)
class Cells:
    """What each run restores: the block output, or a window of attention or MLP outputs, of a layer at some positions.

    Positions count from the end of the prefix on. A run of the suite restores one position, its self-checks all or none.
    """

    mediator: str  # one of ``options.MEDIATORS``
    layers: Int[Tensor, " cell"]
    restored: Bool[Tensor, "cell pos"]
    window: int = 10

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, rows: slice | Tensor) -> Cells:
        return Cells(self.mediator, self.layers[rows], self.restored[rows], self.window)

    def spans(self, n_layers: int) -> tuple[Int[Tensor, " cell"], Int[Tensor, " cell"]]:
        """The blocks in which something is held: first and one past the last; rows join at the first.

        A window has ``window`` layers centred on the layer, of an even number one more below it, and ends with the model
        (as in the authors' code).
        """
        if self.mediator not in WINDOWED:
            return self.layers + 1, torch.full_like(self.layers, n_layers)
        below = self.window // 2
        return (self.layers - below).clamp(min=0), (self.layers - below + self.window).clamp(max=n_layers)


@torch.no_grad()
def fact_runs(
    decoder: Decoder,
    tokens: Int[Tensor, " all_pos"],
    start: int,
    corrupted: Float[Tensor, "sample pos d_model"],
    answer: int,
) -> FactRuns:
    """Clean and corrupted runs of a prompt, from position ``start`` on; ``corrupted`` is the stream before block 0."""
    prefix = prefix_of(decoder, tokens[None, :start])
    clean = decoder.embed(tokens[None])[:, start:]
    return FactRuns(prefix, _kept(decoder, clean, prefix), _kept(decoder, corrupted, prefix), answer)


def _kept(decoder: Decoder, resid: Float[Tensor, "sample pos d_model"], prefix: PrefixCache) -> Kept:
    streams, layers = [resid], []
    for layer, block in enumerate(decoder.blocks):
        attention = block.attention
        q, k, v = attention.projections(resid)
        write = attention.output(attention.attend(q, k, v, prefix.of_layer(layer)))
        mlp = block.mlp_output(block.mlp_norm(resid if block.parallel else resid + write))
        resid = resid + write + mlp
        streams.append(resid)
        layers.append((write, mlp, k, v))
    kinds = (streams, *zip(*layers, strict=True))
    return Kept(*(rearrange(list(kind), "layer sample pos ... -> layer pos sample ...").contiguous() for kind in kinds))


@torch.no_grad()
@checked
def answer_probabilities(decoder: Decoder, runs: FactRuns, kept: Kept) -> Float[Tensor, " sample"]:
    """The probability of the answer's first token in runs that were kept."""
    return _read(decoder, kept.streams[-1][-1], runs.answer)


@torch.no_grad()
@checked
def restored_probabilities(
    decoder: Decoder, runs: FactRuns, cells: Cells, cells_at_once: int = 24
) -> Float[Tensor, "cell sample"]:
    """The probability of the answer's first token in the corrupted runs with each cell's states restored."""
    order = cells.spans(decoder.n_layers)[0].argsort(stable=True)
    parts = [_restored(decoder, runs, cells[part]) for part in order.split(cells_at_once)]
    probabilities = torch.cat(parts)
    return torch.empty_like(probabilities).index_copy_(0, order.to(probabilities.device), probabilities)


@dataclass(frozen=True)
class _Rows:
    """The (cell, position) places that cells of one mediator can change, by the block where they join."""

    mediator: str
    cell: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    joins: Int[Tensor, " row"]
    ends: Int[Tensor, " row"]  # one past the last block in which something is held
    restored: Bool[Tensor, " row"]

    def __getitem__(self, rows: slice | Tensor) -> _Rows:
        tensors = (self.cell, self.position, self.joins, self.ends, self.restored)
        return _Rows(self.mediator, *(tensor[rows] for tensor in tensors))

    def __len__(self) -> int:
        return len(self.cell)

    def held(self, layer: int, kind: str) -> Bool[Tensor, " row"]:
        """Where a block's "attention" or "mlp" output is held at what a kept run has."""
        return self.restored & (layer < self.ends) & (kind in self.mediator)


def _restored(decoder: Decoder, runs: FactRuns, cells: Cells) -> Float[Tensor, "cell sample"]:
    """One pass up the blocks for cells in the order in which they join."""
    first, end = cells.spans(decoder.n_layers)
    reached = cells.restored.cumsum(1) > 0
    reached[~cells.restored.any(1)] = True  # a cell that restores nothing is run whole, for the self-check
    cell, position = reached.nonzero(as_tuple=True)
    rows = _Rows(cells.mediator, cell, position, first[cell], end[cell], cells.restored[cell, position])
    source = runs.corrupted if cells.mediator in WINDOWED else runs.clean  # windows restore what the blocks write instead
    stream, corrupted = source.streams[rows.joins, position], runs.corrupted.streams[rows.joins, position]
    resid = torch.where(rows.restored[:, None, None], stream, corrupted)
    at_last = position == cells.restored.shape[1] - 1
    for layer in range(int(first.min()), decoder.n_layers):
        n_active = int((rows.joins <= layer).sum())
        needed = slice(n_active) if layer < decoder.n_layers - 1 else at_last[:n_active].nonzero()[:, 0]
        resid[needed] = _block(decoder, layer, runs, resid[:n_active], rows[:n_active], needed)
    return _read(decoder, resid[at_last], runs.answer)


def _block(
    decoder: Decoder,
    layer: int,
    runs: FactRuns,
    resid: Float[Tensor, "row sample d_model"],
    rows: _Rows,
    needed: slice | Int[Tensor, " needed"],
) -> Float[Tensor, "needed sample d_model"]:
    """The stream after a block at the rows that are needed, from the stream before it."""
    block = decoder.blocks[layer]
    source = runs.clean if rows.mediator in WINDOWED else runs.corrupted
    normed = block.attention.norm(resid)
    keys, values = (
        _of_all_positions(kept[layer], block.attention.project(kind, normed), rows)
        for kind, kept in (("k", runs.corrupted.keys), ("v", runs.corrupted.values))
    )
    resid, normed, rows = resid[needed], normed[needed], rows[needed]
    past = runs.prefix.of_layer(layer)

    def attention(of: slice | Tensor) -> Tensor:
        return _attention(block.attention, normed[of], rows[of], keys, values, past)

    write = _unless_held(attention, rows.held(layer, "attention"), source.attention[layer], rows)
    after_attention = resid + write
    mlp_input = resid if block.parallel else after_attention

    def mlp(of: slice | Tensor) -> Tensor:
        return block.mlp_output(block.mlp_norm(mlp_input[of]))

    return after_attention + _unless_held(mlp, rows.held(layer, "mlp"), source.mlp[layer], rows)


def _unless_held(
    compute: Callable[[slice | Tensor], Tensor],
    held: Bool[Tensor, " row"],
    kept: Float[Tensor, "pos #sample d_model"],
    rows: _Rows,
) -> Float[Tensor, "row #sample d_model"]:
    """What ``compute`` gives for the rows that are not held, and what was kept at the positions of those that are."""
    if not held.any():
        return compute(slice(None))
    if held.all():
        return kept[rows.position]
    live = (~held).nonzero()[:, 0]
    computed = compute(live)
    write = kept[rows.position].expand(-1, computed.shape[1], -1).clone()
    write[live] = computed
    return write


def _of_all_positions(
    kept: Float[Tensor, "pos sample kv d_head"], projected: Float[Tensor, "row sample kv d_head"], rows: _Rows
) -> Float[Tensor, "run pos kv d_head"]:
    """Keys or values of every cell and sample at every position: the rows' own, left of them the corrupted run's."""
    full = kept.repeat(int(rows.cell[-1]) + 1, 1, 1, 1, 1)
    full[rows.cell, rows.position] = projected
    return rearrange(full, "cell pos sample kv d -> (cell sample) pos kv d")


def _attention(
    attention: Attention,
    normed: Float[Tensor, "row sample d_model"],
    rows: _Rows,
    keys: Float[Tensor, "run pos kv d_head"],
    values: Float[Tensor, "run pos kv d_head"],
    past: tuple[Tensor, Tensor] | None,
) -> Float[Tensor, "row sample d_model"]:
    """What attention writes at some rows; places that are no rows ask with zeros, and what they get is left out."""
    n_samples = normed.shape[1]
    row_queries = attention.project("q", normed)
    start = int(rows.position.min())
    queries = row_queries.new_zeros(len(keys) // n_samples, keys.shape[1] - start, *row_queries.shape[1:])
    queries[rows.cell, rows.position - start] = row_queries
    z = attention.attend(rearrange(queries, "cell pos sample h d -> (cell sample) pos h d"), keys, values, past)
    z = rearrange(z, "(cell sample) pos h d -> cell pos sample h d", sample=n_samples)
    return attention.output(z[rows.cell, rows.position - start])


def _read(decoder: Decoder, final: Float[Tensor, "*run d_model"], answer: int) -> Float[Tensor, "*run"]:
    at_once = max(1, LOGITS_AT_ONCE // decoder.W_U.shape[1])
    probabilities = []
    for part in final.flatten(0, -2).split(at_once):
        logits = decoder.unembed(part).float()
        probabilities.append(logits.log_softmax(-1)[:, answer].exp())  # logsumexp takes four times as long
    return torch.cat(probabilities).view(final.shape[:-1])
