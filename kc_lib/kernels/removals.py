"""Removing edges from a circuit one reader at a time, when only what lies above the reader and is reached from it runs.

A ``RunningCircuit`` holds the activations of a circuit: what every writer adds to the stream, as its difference from the
ablated value, and what every reader sees. Trials at one reader leave all nodes below it as they are. Above it, a node runs
again only if an edge of the circuit leads to it from a node that changed, and only at the positions from which the circuit
leads on to an answer (``needs.py``). All trials of a call are one batch, and positions that prompts share run once
(``rows.py``). So a trial's cost follows the circuit above the reader, not the model.

Shapes: ``[row, trial, d_model]``, rows first, so that the rows a node needs are the first n of a contiguous block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from kc_lib.graph import Graph
from kc_lib.kernels.changes import Changes, EdgeSums, edge_sums
from kc_lib.kernels.context import EMPTY, Context
from kc_lib.kernels.losses import StreamLosses
from kc_lib.kernels.needs import Needs
from kc_lib.kernels.packed import packed_mlp
from kc_lib.kernels.rows import rows_of
from kc_lib.kernels.writers import Ablation, ablated_inputs
from kc_lib.tasks.batches import Batch
from kc_lib.wiring import Wiring, frozen


@dataclass(frozen=True)
class _Reached:
    """Which of some readers see what some writers change, and how it is summed.

    Kept for the next trials: the edges into readers above the one under trial are settled.
    """

    writers: list[int]
    columns: list[int]
    n_rows: int
    seen: list[int]
    sums: EdgeSums | None  # nothing where no reader sees any of it


class RunningCircuit:
    """A circuit's activations on one batch, and trial removals at one of its readers; see the head of this file.

    Writers below the reader under trial must not depend on it, so readers are tried from the logits down. ``losses`` gives
    the loss of runs from their final streams at the answers (``losses.py``).
    """

    def __init__(
        self,
        wiring: Wiring,
        graph: Graph,
        mask: Bool[Tensor, "writer reader"],
        batch: Batch,
        ablation: Ablation,
        losses: StreamLosses,
        context: Context = EMPTY,
    ) -> None:
        self.wiring, self.graph, self.context, self.losses = wiring, graph, context, losses
        self.mask = mask.clone()
        self.rows = rows_of(batch, ablation.kind, context)
        self.ablated = self.rows.take(ablation.outputs)
        self.embedded = self.rows.take(wiring.embed(batch.clean)[None, :, context.start :])[0]
        self.post_norm = wiring.blocks[0].attention.post_norm is not None
        self.last = len(graph.readers) - 1
        self.n_answer_rows = int(self.rows.answers.max()) + 1
        self._base = ablated_inputs(wiring, graph, self.ablated)
        self._buffer = self.ablated.new_empty(0)
        self._mlps: dict[int, Callable[[Tensor], Tensor]] = {}  # packed when a layer is first reached
        self._folded: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}  # projections, with the norm before them
        self._chosen: dict[tuple[int, str], tuple[list[int], tuple[Tensor, ...]]] = {}
        self._reached: dict[int, _Reached] = {}
        self.build()

    # --- the circuit as it stands ------------------------------------------------------------------------------------

    @torch.no_grad()
    def build(self) -> None:
        """Run the circuit of the present mask afresh: what follows depends on the mask alone, not on how it came about."""
        graph, wiring = self.graph, self.wiring
        self._reached = {}
        self.needs = Needs(graph, self.rows, self.post_norm)
        for layer in reversed(range(graph.n_layers)):
            self.needs.find(layer, self.mask)
        self.differences = torch.zeros_like(self.ablated)
        self.differences[0] = self.embedded - self.ablated[0]
        self._inputs = self._base.clone()
        self._projected = self._base.new_zeros(*self._base.shape[:2], wiring.blocks[0].attention.W_Q.shape[-1])
        self._stale = torch.ones(len(graph.readers), dtype=torch.bool)
        self._raw: dict[int, Tensor] = {}
        for layer in range(graph.n_layers):
            heads, needs = graph.head_writers(layer), self.needs.layers[layer]
            if needs.heads:
                self._freshen(layer, needs.columns)
                raw = torch.bmm(*self._attend(layer, needs.heads, [], self._projected[:0], 1))
                if self.post_norm:
                    self._raw[layer] = raw
                written = wiring.blocks[layer].attention.contributions(raw)
                rows = [heads.start + head for head in needs.heads]
                self.differences[rows, : raw.shape[1]] = written - self.ablated[rows, : raw.shape[1]]
            if needs.mlp_rows:
                x = self._seen(graph.reader_columns(layer, "mlp").start)[: needs.mlp_rows]
                written = self._mlp_output(layer, x)
                self.differences[heads.stop, : needs.mlp_rows] = written - self.ablated[heads.stop, : needs.mlp_rows]
        self._slope = self._loss_slope()

    def full_loss(self) -> float:
        """The circuit's loss."""
        return float(next(self._losses(self._final()[:, None])))

    # --- trials ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def trial_losses(self, column: int, removed: Bool[Tensor, "trial writer"]) -> Iterator[float]:
        """Loss of the circuit without the ``removed`` edges into one reader, trial by trial; ``accept`` makes one real.

        All trials run to the logits' input together; the unembedding, often the larger part, as losses are asked for.
        """
        self.needs.find(self.graph.readers[column].layer, self.mask)
        # what stays is summed, not the rest subtracted: a reader that loses every edge must see exactly nothing, because
        # norms blow up what rounding leaves of it
        edges = self.mask[:, column] & ~removed
        n_below = self.graph.readers[column].n_writers
        stay = edges[:, :n_below].to(self.differences) @ self.differences[:n_below].flatten(1)
        x = rearrange(stay, "trial (row d) -> row trial d", row=len(self.rows)) + self._base[column][:, None]
        run = Changes(self._buffer_for(len(removed)))
        final = self._propagate({column: x}, run)
        self._trial = (column, removed, run, final)
        yield from map(float, self._losses(final))

    @torch.no_grad()
    def estimated_rises(self) -> list[float]:
        """How much the loss of each trial of the last call lies above the circuit's, the loss taken as linear."""
        change = self._trial[3] - self._final()[:, None]
        return torch.einsum("nkd,nd->k", change, self._slope).tolist()

    @torch.no_grad()
    def accept(self, trial: int) -> None:
        """Make a trial of the last call the circuit."""
        column, removed, run, _ = self._trial
        self.mask[removed[trial], column] = False
        self._stale[column] = True
        if not run.writers:
            return
        self.differences[run.writers] += run.buffer[: len(run.writers), :, trial]
        unchanged = torch.ones(len(self.mask), dtype=torch.bool)
        unchanged[run.writers] = False
        for columns, x, projected in run.inputs:
            self._inputs[columns, : x.shape[1]] = x[:, :, trial]
            if projected is not None:
                self._projected[columns, : x.shape[1]] = projected[:, :, trial]
            # rounding must not be all that is left of an input: it is summed anew if all of it changed
            self._stale[columns] |= ~(self.mask[:, columns] & unchanged[:, None]).any(0)
        for layer, raw in run.raw.items():
            self._raw[layer][:, : raw.shape[1]] = raw[:, :, trial]

    def drop(self, column: int) -> None:
        """Remove all edges into a reader whose nodes nothing reads."""
        self.mask[:, column] = False
        self._stale[column] = True

    @torch.no_grad()
    def shares(self, column: int) -> Float[Tensor, " writer"]:
        """How much of what a reader sees each writer's edge carries: the norms' quotient, its mean over the rows."""
        seen = torch.linalg.vector_norm(self._seen(column), dim=-1)
        carried = torch.linalg.vector_norm(self.differences, dim=-1)
        least = torch.finfo(seen.dtype).eps
        return (carried / seen.clamp(min=least)).mean(-1).clamp(min=least)

    def _loss_slope(self) -> Float[Tensor, "answer_row d_model"]:
        """Gradient of the circuit's loss at the logits' input."""
        with torch.no_grad():
            x = self._final()[:, None].clone()
        with frozen(self.wiring.model), torch.enable_grad():
            x.requires_grad_()
            (slope,) = torch.autograd.grad(next(self._losses(x)), x)
        return slope[:, 0]

    # --- parts -------------------------------------------------------------------------------------------------------

    def _propagate(self, given: Mapping[int, Float[Tensor, "row trial d_model"]], run: Changes) -> Tensor:
        """The logits' input when some readers of a layer see what is given: all nodes above that this reaches run again."""
        graph = self.graph
        reader = graph.readers[next(iter(given))]
        if reader.kind == "logits":
            return given[self.last][: self.n_answer_rows]
        for layer in range(reader.layer, graph.n_layers):
            here = given if layer == reader.layer else {}
            if not (here and reader.kind == "mlp"):
                self._run_heads(layer, run, here)
            if not (here and reader.kind != "mlp" and graph.parallel):
                self._run_mlp(layer, run, here)
        changed = self._changed_inputs([self.last], run, {}, self.n_answer_rows)
        if changed is None:
            return self._final()[:, None].expand(-1, run.n_trials, -1)
        run.inputs.append((*changed, None))
        return changed[1][0]

    def _run_heads(self, layer: int, run: Changes, given: Mapping[int, Tensor]) -> None:
        needs = self.needs.layers[layer]
        changed = self._changed_inputs(needs.columns, run, given, needs.read_rows)
        if changed is None:
            return
        columns, x = changed
        projected = self._project(layer, columns, x)
        if not given:
            run.inputs.append((columns, x, projected))
        heads = [head for head in needs.heads if not set(self._columns_of(layer, head)).isdisjoint(columns)]
        z, W_O = self._attend(layer, heads, columns, projected, run.n_trials)
        attention, start = self.wiring.blocks[layer].attention, self.graph.head_writers(layer).start
        n_rows = needs.head_rows
        if self.post_norm:  # the norm on the layer's output ties its heads together: all of them change
            raw = torch.bmm(z, W_O).view(len(heads), n_rows, run.n_trials, -1)
            rest = self._raw[layer][:, :n_rows, None].repeat(1, 1, run.n_trials, 1)
            raw = rest.index_copy(0, torch.tensor([needs.heads.index(head) for head in heads], device=rest.device), raw)
            run.raw[layer] = raw
            writers = [start + head for head in needs.heads]
            room = run.add(writers, self._written(writers, n_rows))
            torch.sub(attention.contributions(raw), room, out=room)
        else:
            writers = [start + head for head in heads]
            room = run.add(writers, self._written(writers, n_rows))
            # what is written now minus what the room holds, without another tensor of that size
            room.view(len(heads), -1, room.shape[-1]).baddbmm_(z, W_O, beta=-1)

    def _run_mlp(self, layer: int, run: Changes, given: Mapping[int, Tensor]) -> None:
        writer = self.graph.head_writers(layer).stop
        n_rows = self.needs.layers[layer].mlp_rows
        column = self.graph.reader_columns(layer, "mlp").start
        changed = self._changed_inputs([column], run, given, n_rows) if n_rows else None
        if changed is None:
            return
        if column not in given:
            run.inputs.append((*changed, None))
        written = self._mlp_output(layer, changed[1][0])
        room = run.add([writer], self._written([writer], n_rows))[0]
        torch.sub(written, room, out=room)

    def _written(self, writers: Sequence[int], n_rows: int) -> Float[Tensor, "writer n_rows d_model"]:
        """What some writers add to the stream in the circuit as it stands."""
        first, end = writers[0], writers[-1] + 1
        written = self.differences[first:end, :n_rows] + self.ablated[first:end, :n_rows]
        return written if len(written) == len(writers) else written[[writer - first for writer in writers]]

    def _mlp_output(self, layer: int, x: Float[Tensor, "row *trial d_model"]) -> Float[Tensor, "row *trial d_model"]:
        """What a layer's MLP adds to the stream."""
        block = self.wiring.blocks[layer]
        if layer not in self._mlps:
            self._mlps[layer] = packed_mlp(block)
        return block.mlp_contribution(self._mlps[layer](block.mlp_norm(x)))

    def _changed_inputs(
        self, columns: Sequence[int], run: Changes, given: Mapping[int, Tensor], n_rows: int
    ) -> tuple[list[int], Float[Tensor, "changed n_rows trial d_model"]] | None:
        """Which of these readers see something new, and what they see."""
        fixed = [column for column in columns if column in given]
        if fixed:  # the readers under trial; their neighbours read only what lies below them
            return fixed, torch.stack([given[column][:n_rows] for column in fixed])
        if not (run.writers and columns):
            return None
        known = self._reached.get(columns[0])
        if known is None or (known.writers, known.columns, known.n_rows) != (run.writers, columns, n_rows):
            edges = self.mask[run.writers][:, columns]
            some = edges.any(0)
            seen = [column for column, any_edge in zip(columns, some.tolist(), strict=True) if any_edge]
            sums = edge_sums(edges[:, some], n_rows, run.buffer) if seen else None
            known = self._reached[columns[0]] = _Reached(list(run.writers), list(columns), n_rows, seen, sums)
        if known.sums is None:
            return None
        self._freshen(self.graph.readers[known.seen[0]].layer, known.seen)
        changed = run.summed(known.sums)
        changed += self._inputs[known.seen, :n_rows][:, :, None]
        return known.seen, changed

    def _attend(
        self,
        layer: int,
        heads: Sequence[int],
        columns: Sequence[int],
        projected: Float[Tensor, "reader n_rows trial d_head"],
        n_trials: int,
    ) -> tuple[Float[Tensor, "head n_rows_trial d_head"], Float[Tensor, "head d_head d_model"]]:
        """Outputs z of some heads, with new projections of some readers, and the weights that bring them to the stream."""
        attention, needs = self.wiring.blocks[layer].attention, self.needs.layers[layer]
        self._freshen(layer, needs.columns)
        place = {column: i for i, column in enumerate(columns)}
        q, k, v = (
            self._projections(list(of_kind), place, projected, needs.read_rows, n_trials)
            for of_kind in zip(*(self._columns_of(layer, head) for head in heads), strict=True)
        )
        if self.rows.tree is not None:
            q, k, v = (rearrange(x, "h row k d -> k row h d") for x in (q[:, : needs.head_rows], k, v))
            z = attention.attend(q, k, v, tree=self.rows.tree.first(needs.read_rows))
            z = rearrange(z, "k row h d -> h (row k) d")
        else:
            z = self._attend_prompts(layer, heads, q, k, v)
        (W_O,) = self._of_heads(layer, "o", heads, attention.W_O)
        return z, W_O

    def _attend_prompts(
        self, layer: int, heads: Sequence[int], *projected: Float[Tensor, "head row trial d_head"]
    ) -> Float[Tensor, "head row_trial d_head"]:
        """The attention of some heads prompt by prompt, from and to rows."""
        attention, needs = self.wiring.blocks[layer].attention, self.needs.layers[layer]
        row_of = self.rows.row_of.clamp(max=needs.read_rows - 1)  # rows beyond are not needed, whatever stands there
        n_trials = projected[0].shape[2]
        q, k, v = (rearrange(x[:, row_of], "h b p k d -> (k b) p h d") for x in projected)
        past = self.context.of_layer(layer)
        if past is not None:
            group = [head // attention.group_size for head in heads]
            past = (past[0][:, :, group], past[1][:, :, group])
        z = rearrange(attention.attend(q, k, v, past), "(k b) p h d -> (b p) k h d", k=n_trials)
        return rearrange(z[self.rows.first[: needs.head_rows]], "row k h d -> h (row k) d")

    def _of_heads(self, layer: int, kind: str, heads: Sequence[int], *weights: Tensor) -> tuple[Tensor, ...]:
        """Some heads' share of weights; kept, as one trial after the other reaches the same heads."""
        known = self._chosen.get((layer, kind))
        if known is None or known[0] != heads:
            known = list(heads), tuple(weight[list(heads)] for weight in weights)
            self._chosen[layer, kind] = known
        return known[1]

    def _projections(
        self, columns: Sequence[int], place: Mapping[int, int], projected: Tensor, n_rows: int, n_trials: int
    ) -> Float[Tensor, "reader n_rows trial d_head"]:
        """What some readers project in a run: anew where there is something new, else as the circuit stands."""
        new = [place.get(column, -1) for column in columns]
        if min(new) >= 0:
            return projected[new]
        stacked = self._projected[columns, :n_rows][:, :, None].repeat(1, 1, n_trials, 1)
        changed = [i for i, at in enumerate(new) if at >= 0]
        if not changed:
            return stacked
        return stacked.index_copy(0, torch.tensor(changed, device=stacked.device), projected[[new[i] for i in changed]])

    def _project(
        self, layer: int, columns: Sequence[int], x: Float[Tensor, "reader row trial d_model"]
    ) -> Float[Tensor, "reader row trial d_head"]:
        """Queries, keys or values of some readers of a layer, given in the graph's order."""
        attention = self.wiring.blocks[layer].attention
        scale, parts, done = attention.norm.scale(x), [], 0
        for kind in "qkv":
            if (layer, kind) not in self._folded:
                self._folded[layer, kind] = attention.norm.folded(*attention.weights(kind))
            weight, bias = self._folded[layer, kind]
            readers = self.graph.reader_columns(layer, kind)
            own = [
                (column - readers.start) * weight.shape[0] // (readers.stop - readers.start)
                for column in columns
                if readers.start <= column < readers.stop
            ]
            if own:
                here = slice(done, done + len(own))
                W, b = self._of_heads(layer, kind, own, weight, bias)
                parts.append(scale[here] * torch.einsum("vrkd,vdh->vrkh", x[here], W) + b[:, None, None])
                done += len(own)
        return torch.cat(parts)

    def _losses(self, x: Float[Tensor, "row trial d_model"]) -> Iterator[Float[Tensor, ""]]:
        """Loss of one trial after the other from the logits' input."""
        yield from self.losses(rearrange(x[self.rows.answers], "b a k d -> k b a d").contiguous())

    # --- what readers see --------------------------------------------------------------------------------------------

    def _columns_of(self, layer: int, head: int) -> tuple[int, int, int]:
        """The query, key and value reader that serve a head."""
        group = head * self.graph.n_kv_readers // self.graph.n_heads
        q, k, v = (self.graph.reader_columns(layer, kind).start for kind in "qkv")
        return q + head, k + group, v + group

    @torch.no_grad()
    def _freshen(self, layer: int, columns: Sequence[int]) -> None:
        """Sum the inputs of some readers anew, and project them, where what they read has changed since."""
        of_columns = self._stale[columns]
        if not of_columns.any():
            return
        stale = [column for column, is_stale in zip(columns, of_columns.tolist(), strict=True) if is_stale]
        edges = self.mask[: self.graph.readers[stale[-1]].n_writers, stale]
        differences = self.differences[: len(edges), :, None]
        summed = edge_sums(edges, len(self.rows), differences).of(differences)
        self._inputs[stale] = summed[:, :, 0] + self._base[stale]
        self._stale[stale] = False
        if self.graph.readers[stale[0]].kind in "qkv":
            self._projected[stale] = self._project(layer, stale, self._inputs[stale][:, :, None])[:, :, 0]

    def _seen(self, column: int) -> Float[Tensor, "row d_model"]:
        """What a reader sees in the circuit."""
        self._freshen(self.graph.readers[column].layer, [column])
        return self._inputs[column]

    def _final(self) -> Float[Tensor, "answer_row d_model"]:
        return self._seen(self.last)[: self.n_answer_rows]

    def _buffer_for(self, n_trials: int) -> Tensor:
        """Room for what a call can change; one allocation serves all calls of up to so many trials."""
        n = self.ablated.numel() * n_trials
        if self._buffer.numel() < n:
            self._buffer = self.ablated.new_empty(n)
        return self._buffer[:n].view(*self.ablated.shape[:2], n_trials, -1)
