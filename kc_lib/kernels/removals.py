"""Removing edges from a circuit one reader at a time, when only what lies above the reader and is reached from it runs.

A ``RunningCircuit`` holds the activations of a circuit: what every writer adds to the stream, as its difference from the
ablated value. Trials at one reader leave all nodes below it as they are. Above it, a node runs again only if an edge of
the circuit leads to it from a node that changed, and only at the positions from which the circuit leads on to an answer.
All trials of a call are one batch, and positions that prompts share run once (``rows.py``). So a trial's cost follows the
circuit above the reader, not the model.

Shapes: ``[row, trial, d_model]``, rows first, so that the rows a node needs are the first n of a contiguous block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kc_lib.graph import Graph
from kc_lib.kernels.context import EMPTY, Context
from kc_lib.kernels.rows import rows_of
from kc_lib.kernels.writers import Ablation
from kc_lib.tasks.batches import Batch
from kc_lib.wiring import Wiring, frozen

LogitsLoss = Callable[[Float[Tensor, "batch answer vocab"]], Float[Tensor, ""]]
ANSWERS_AT_ONCE = 48  # unembedded together: enough for a fast product, few enough to stop early


class _Changes:
    """What a trial run has changed so far: per writer its new output minus the circuit's, ``[row, trial, d_model]``."""

    def __init__(self, buffer: Tensor | None) -> None:
        self.buffer = buffer  # [writer, row, trial, d_model]; None keeps a list, through which gradients can flow
        self.kept: list[Tensor] = []
        self.writers: list[int] = []

    def add(self, writer: int, change: Float[Tensor, "needed trial d_model"], n_rows: int) -> None:
        missing = n_rows - change.shape[0]
        if self.buffer is None:
            self.kept.append(torch.cat([change, change.new_zeros(missing, *change.shape[1:])]))
        else:
            slot = self.buffer[len(self.writers)]
            slot[: change.shape[0]] = change
            slot[change.shape[0] :] = 0.0
        self.writers.append(writer)

    def stacked(self) -> Float[Tensor, "changed row trial d_model"]:
        return torch.stack(self.kept) if self.buffer is None else self.buffer[: len(self.writers)]


class RunningCircuit:
    """A circuit's activations on one batch, and trial removals at one of its readers; see the head of this file.

    Writers below the reader under trial must not depend on it, so readers are tried from the logits down. ``loss`` takes the
    logits at the answers, of all tokens or, where it reads no others, of ``tokens``.
    """

    def __init__(
        self,
        wiring: Wiring,
        graph: Graph,
        mask: Bool[Tensor, "writer reader"],
        batch: Batch,
        ablation: Ablation,
        loss: LogitsLoss,
        context: Context = EMPTY,
        tokens: Int[Tensor, " token"] | None = None,
    ) -> None:
        self.wiring, self.graph, self.context, self.loss, self.tokens = wiring, graph, context, loss, tokens
        self.mask = mask.clone()
        self.rows = rows_of(batch, ablation.kind, context)
        self.ablated = self.rows.take(ablation.outputs)
        self.embedded = self.rows.take(wiring.embed(batch.clean)[None, :, context.start :])[0]
        self.post_norm = wiring.blocks[0].attention.post_norm is not None
        self._ablated_streams = self._sum_ablated()
        self._buffer = self.ablated.new_empty(0)
        self.build()

    # --- the circuit as it stands ------------------------------------------------------------------------------------

    @torch.no_grad()
    def build(self) -> None:
        """Run the circuit of the present mask afresh: what follows depends on the mask alone, not on how it came about."""
        graph, wiring = self.graph, self.wiring
        self._inputs: dict[int, Tensor] = {}
        self._projections: dict[int, Tensor] = {}
        self._raw: dict[int, Tensor] = {}
        self._needed = torch.zeros(len(graph.writers), len(self.rows), dtype=torch.bool)
        self._needed_by = torch.zeros(len(graph.readers), len(self.rows), dtype=torch.bool)
        self._needed_by[-1, self.rows.answers.flatten().cpu()] = True
        for layer in reversed(range(graph.n_layers)):
            self._find_needed(layer)
        self.differences = torch.zeros_like(self.ablated)
        self.differences[0] = self.embedded - self.ablated[0]
        for layer in range(graph.n_layers):
            heads = graph.head_writers(layer)
            live = self._live_heads(layer)
            if live:
                self._fill_inputs(layer, "qkv")
                raw = self._attend(layer, live, {}, 1)
                if self.post_norm:
                    self._raw[layer] = raw[:, :, 0]
                written = wiring.blocks[layer].attention.contributions(raw)[:, :, 0]
                rows = [heads.start + head for head in live]
                self.differences[rows, : raw.shape[1]] = written - self.ablated[rows, : raw.shape[1]]
            n_rows = _count(self._needed[heads.stop])
            if n_rows:
                self._fill_inputs(layer, ("mlp",))
                x = self._inputs[graph.reader_columns(layer, "mlp").start][:n_rows]
                block = wiring.blocks[layer]
                written = block.mlp_output(block.mlp_norm(x[:, None]))[:, 0]
                self.differences[heads.stop, :n_rows] = written - self.ablated[heads.stop, :n_rows]
        self._slope = self._loss_slope()

    def full_loss(self) -> float:
        """The circuit's loss."""
        return float(next(self._losses(self._input(len(self.graph.readers) - 1)[:, None])))

    # --- trials ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def trial_losses(self, column: int, removed: Bool[Tensor, "trial writer"]) -> Iterator[float]:
        """Loss of the circuit without the ``removed`` edges into one reader, trial by trial; ``accept`` makes one real.

        All trials run to the logits' input together; the unembedding, often the larger part, as losses are asked for.
        """
        self._find_needed(self.graph.readers[column].layer)
        # what stays is summed, not the rest subtracted: a reader that loses every edge must see exactly nothing, because
        # norms blow up what rounding leaves of it
        edges = self.mask[:, column].nonzero()[:, 0]
        stay = (~removed[:, edges]).to(self.differences) @ self.differences[edges].flatten(1)
        x = rearrange(stay, "trial (row d) -> row trial d", row=len(self.rows)) + self._base(column)[:, None]
        changes = _Changes(self._buffer_for(len(removed)))
        self._raw_trials: dict[int, Tensor] = {}
        final = self._propagate(column, x, changes)
        self._trial = (column, removed, changes)
        yield from map(float, self._losses(final))

    @torch.no_grad()
    def accept(self, trial: int) -> None:
        """Make a trial of the last call the circuit."""
        column, removed, changes = self._trial
        self.mask[removed[trial], column] = False
        stale = self.mask[changes.writers].any(0) if changes.writers else torch.zeros_like(self.mask[0])
        stale[column] = True
        for place, writer in enumerate(changes.writers):
            self.differences[writer] += changes.stacked()[place, :, trial]
        for reader in stale.nonzero()[:, 0].tolist():
            self._inputs.pop(reader, None)
            self._projections.pop(reader, None)
        for layer, raw in self._raw_trials.items():
            self._raw[layer] = torch.cat([raw[:, :, trial], self._raw[layer][:, raw.shape[1] :]], 1)

    def drop(self, column: int) -> None:
        """Remove all edges into a reader whose nodes nothing reads."""
        self.mask[:, column] = False
        self._inputs.pop(column, None)
        self._projections.pop(column, None)

    def predicted_rises(self, column: int) -> Float[Tensor, " writer"]:
        """First-order estimate of how much the loss rises when one edge into the reader is removed, for every writer.

        The loss is taken as linear in the logits' input, with its slope of the last ``build``: the unembedding, which can
        cost more than all the rest, is not run.
        """
        self._find_needed(self.graph.readers[column].layer)
        with torch.no_grad():
            x = self._input(column)[:, None].clone()
        with frozen(self.wiring.model), torch.enable_grad():
            x.requires_grad_()
            self._raw_trials = {}
            final = self._propagate(column, x, _Changes(None))
            n_rows = min(final.shape[0], self._slope.shape[0])
            (gradient,) = torch.autograd.grad((final[:n_rows, 0] * self._slope[:n_rows]).sum(), x)
        n_writers = self.graph.readers[column].n_writers
        return -(self.differences[:n_writers].flatten(1) @ gradient.flatten())

    def _loss_slope(self) -> Float[Tensor, "row d_model"]:
        """Gradient of the circuit's loss at the logits' input; zero at rows that predict no answer."""
        with torch.no_grad():
            x = self._input(len(self.graph.readers) - 1)[:, None].clone()
        with frozen(self.wiring.model), torch.enable_grad():
            x.requires_grad_()
            (slope,) = torch.autograd.grad(next(self._losses(x)), x)
        return slope[:, 0]

    # --- parts -------------------------------------------------------------------------------------------------------

    def _propagate(self, column: int, x: Float[Tensor, "row trial d_model"], changes: _Changes) -> Tensor:
        """The logits' input when one reader sees ``x``: every node above that this reaches runs again."""
        reader = self.graph.readers[column]
        for layer in range(reader.layer, self.graph.n_layers):
            given = {column: x} if layer == reader.layer else {}
            if not (given and reader.kind == "mlp"):
                self._run_heads(layer, changes, given, x.shape[1])
            if not (given and reader.kind != "mlp" and self.graph.parallel):
                self._run_mlp(layer, changes, given)
        if reader.kind == "logits":
            return x
        last = len(self.graph.readers) - 1
        reached = self._changed_inputs([last], changes, {}, int(self.rows.answers.max()) + 1)
        return self._input(last)[:, None].expand_as(x) if reached is None else reached[1][0]

    def _run_heads(self, layer: int, changes: _Changes, given: Mapping[int, Tensor], n_trials: int) -> None:
        live = self._live_heads(layer)
        if not live:
            return
        attention = self.wiring.blocks[layer].attention
        new: dict[int, Tensor] = {}
        for kind in "qkv":
            columns = self._columns_of(layer, kind, live)
            changed = self._changed_inputs(sorted(set(columns)), changes, given, self._rows_read(layer))
            if changed is not None:
                projected = self._project(layer, kind, *changed)
                new |= dict(zip(changed[0], projected, strict=True))
        touched = [head for head in live if any(self._columns_of(layer, kind, [head])[0] in new for kind in "qkv")]
        if not touched:
            return
        raw = self._attend(layer, touched, new, n_trials)
        start = self.graph.head_writers(layer).start
        if self.post_norm:  # the norm on the layer's output ties its heads together: all of them change
            rest = self._raw[layer][:, : raw.shape[1], None].expand(-1, -1, n_trials, -1)
            rows = [raw[touched.index(head)] if head in touched else rest[i] for i, head in enumerate(live)]
            raw, touched = torch.stack(rows), live
            self._raw_trials[layer] = raw
        written = attention.contributions(raw)
        for i, head in enumerate(touched):
            row = start + head
            now = (self.differences[row] + self.ablated[row])[: written.shape[1], None]
            changes.add(row, written[i] - now, len(self.rows))

    def _run_mlp(self, layer: int, changes: _Changes, given: Mapping[int, Tensor]) -> None:
        row = self.graph.head_writers(layer).stop
        n_rows = _count(self._needed[row])
        column = self.graph.reader_columns(layer, "mlp").start
        changed = self._changed_inputs([column], changes, given, n_rows) if n_rows else None
        if changed is None:
            return
        block = self.wiring.blocks[layer]
        written = block.mlp_output(block.mlp_norm(changed[1][0]))
        changes.add(row, written - (self.differences[row] + self.ablated[row])[:n_rows, None], len(self.rows))

    def _changed_inputs(
        self, columns: Sequence[int], changes: _Changes, given: Mapping[int, Tensor], n_rows: int
    ) -> tuple[list[int], Float[Tensor, "changed n_rows trial d_model"]] | None:
        """Which of these readers see something new, and what they see."""
        fixed = [column for column in columns if column in given]
        if fixed:  # the reader under trial; its neighbours read only what lies below it
            return fixed, torch.stack([given[column][:n_rows] for column in fixed])
        if not changes.writers:
            return None
        edges = self.mask[changes.writers][:, columns]
        seen = [column for column, any_edge in zip(columns, edges.any(0).tolist(), strict=True) if any_edge]
        if not seen:
            return None
        edges = self.mask[changes.writers][:, seen]
        used = edges.any(1).nonzero()[:, 0]
        stacked = changes.stacked()[:, :n_rows]
        if len(used) < len(changes.writers) / 2:
            edges, stacked = edges[used], stacked[used]
        x = edges.T.to(stacked) @ stacked.flatten(1)
        now = torch.stack([self._input(column)[:n_rows] for column in seen])
        return seen, x.view(len(seen), *stacked.shape[1:]) + now[:, :, None]

    def _attend(
        self, layer: int, heads: Sequence[int], new: Mapping[int, Tensor], n_trials: int
    ) -> Float[Tensor, "head n_rows trial d_model"]:
        """Raw outputs of some heads, with new projections (``[row, trial, d_head]``) of some readers."""
        attention = self.wiring.blocks[layer].attention
        projected: dict[str, Tensor] = {}
        n_read = self._rows_read(layer)
        row_of = self.rows.row_of.clamp(max=n_read - 1)  # rows beyond are not needed, whatever stands there
        for kind in "qkv":
            columns = self._columns_of(layer, kind, heads)
            per_head = [
                new[column] if column in new else self._projection(column)[:, None].expand(-1, n_trials, -1)
                for column in columns
            ]
            stacked = torch.stack([y[:n_read] for y in per_head], 2)  # row trial head d_head
            projected[kind] = rearrange(stacked[row_of], "b p k h d -> (k b) p h d")
        past = self.context.of_layer(layer)
        if past is not None:
            group = [head // attention.group_size for head in heads]
            past = (past[0][:, :, group], past[1][:, :, group])
        z = rearrange(
            attention.attend(projected["q"], projected["k"], projected["v"], past), "(k b) p h d -> (b p) k h d", k=n_trials
        )
        start = self.graph.head_writers(layer).start
        n_rows = max(_count(self._needed[start + head]) for head in heads)
        return torch.einsum("rkhd,hde->hrke", z[self.rows.first[:n_rows]], attention.W_O[list(heads)])

    def _project(
        self, layer: int, kind: str, columns: Sequence[int], x: Float[Tensor, "reader row trial d_model"]
    ) -> Float[Tensor, "reader row trial d_head"]:
        attention = self.wiring.blocks[layer].attention
        weight, bias = attention.weights(kind)
        n_readers = self.graph.n_heads if kind == "q" else self.graph.n_kv_readers
        first = self.graph.reader_columns(layer, kind).start
        own = [(column - first) * weight.shape[0] // n_readers for column in columns]
        return torch.einsum("vrkd,vdh->vrkh", attention.norm(x), weight[own]) + bias[own][:, None, None]

    def _losses(self, x: Float[Tensor, "row trial d_model"]) -> Iterator[Float[Tensor, ""]]:
        """Loss of one trial after the other from the logits' input, unembedded a few at a time."""
        final = rearrange(x[self.rows.answers], "b a k d -> k b a d").contiguous()  # one product, not one per example
        for some in final.split(max(1, ANSWERS_AT_ONCE // self.rows.answers.numel())):
            for logits in self.wiring.unembed(some, tokens=self.tokens).float():
                yield self.loss(logits)

    # --- what the circuit needs and sees -----------------------------------------------------------------------------

    def _find_needed(self, layer: int) -> None:
        """At which rows a layer's nodes matter to an answer, given what the readers above them need."""
        if layer == self.graph.n_layers:
            return
        heads, mask = self.graph.head_writers(layer), self.mask
        mlp = self.graph.reader_columns(layer, "mlp").start
        self._needed[heads.stop] = self._needed_by[mask[heads.stop]].any(0)
        self._needed_by[mlp] = self._needed[heads.stop]
        needed = (mask[heads].float() @ self._needed_by.float()) > 0
        if self.post_norm:
            needed = needed.any(0, keepdim=True).expand_as(needed)
        self._needed[heads] = needed
        self._needed_by[self.graph.reader_columns(layer, "q")] = needed
        keys = (
            rearrange(needed, "(kv g) r -> kv g r", kv=self.graph.n_kv_readers).any(1).float() @ self.rows.sees.float()
        ) > 0
        for kind in "kv":
            self._needed_by[self.graph.reader_columns(layer, kind)] = keys

    def _live_heads(self, layer: int) -> list[int]:
        return self._needed[self.graph.head_writers(layer)].any(1).nonzero()[:, 0].tolist()

    def _rows_read(self, layer: int) -> int:
        return _count(self._needed_by[self.graph.reader_columns(layer, "k")].any(0))

    def _columns_of(self, layer: int, kind: str, heads: Sequence[int]) -> list[int]:
        """The reader of a kind ("q", "k", "v") that serves each of some heads."""
        first = self.graph.reader_columns(layer, kind).start
        group = 1 if kind == "q" else self.graph.n_heads // self.graph.n_kv_readers
        return [first + head // group for head in heads]

    def _fill_inputs(self, layer: int, kinds: Sequence[str]) -> None:
        """Inputs and projections of a layer's readers, all at once."""
        columns = [
            c for kind in kinds for c in range(*self.graph.reader_columns(layer, kind).indices(len(self.graph.readers)))
        ]
        before = self.graph.readers[columns[0]].n_writers
        summed = self.mask[:before, columns].T.to(self.differences) @ self.differences[:before].flatten(1)
        base = self._ablated_streams[layer, int("mlp" in kinds)]
        for column, x in zip(columns, summed.view(len(columns), *base.shape) + base, strict=True):
            self._inputs[column] = x
        for kind in kinds:
            if kind != "mlp":
                own = [c for c in columns if self.graph.readers[c].kind == kind]
                x = torch.stack([self._inputs[c] for c in own])[:, :, None]
                self._projections |= dict(zip(own, self._project(layer, kind, own, x)[:, :, 0], strict=True))

    def _input(self, column: int) -> Float[Tensor, "row d_model"]:
        if column not in self._inputs:
            self._inputs[column] = self._base(column) + self.differences[self.mask[:, column]].sum(0)
        return self._inputs[column]

    def _base(self, column: int) -> Float[Tensor, "row d_model"]:
        """What a reader sees without any edge."""
        reader = self.graph.readers[column]
        return self._ablated_streams[reader.layer, int(reader.kind == "mlp")]

    def _projection(self, column: int) -> Float[Tensor, "row d_head"]:
        if column not in self._projections:
            reader = self.graph.readers[column]
            x = self._input(column)[None, :, None]
            self._projections[column] = self._project(reader.layer, reader.kind, [column], x)[0, :, 0]
        return self._projections[column]

    def _sum_ablated(self) -> Float[Tensor, "layer half row d_model"]:
        """The ablated stream and the attention biases below each layer's attention, and below its MLP (or the logits)."""
        streams, biases = [], self.wiring.bias_before
        total = self.ablated[0]
        for layer in range(self.graph.n_layers):
            heads = self.graph.head_writers(layer)
            with_heads = total + self.ablated[heads].sum(0)
            below_mlp = total + biases[layer] if self.graph.parallel else with_heads + biases[layer + 1]
            streams.append(torch.stack([total + biases[layer], below_mlp]))
            total = with_heads + self.ablated[heads.stop]
        streams.append((total + biases[-1]).expand(2, -1, -1))
        return torch.stack(streams)

    def _buffer_for(self, n_trials: int) -> Tensor:
        """Room for what a call can change; one allocation serves all calls of up to so many trials."""
        n = self.ablated.numel() * n_trials
        if self._buffer.numel() < n:
            self._buffer = self.ablated.new_empty(n)
        return self._buffer[:n].view(*self.ablated.shape[:2], n_trials, -1)


def _count(needed: Bool[Tensor, " row"]) -> int:
    """How many of the first rows hold all that are needed."""
    where = needed.nonzero()
    return int(where[-1]) + 1 if len(where) else 0
