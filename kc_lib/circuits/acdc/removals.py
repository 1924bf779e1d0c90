"""Removing edges from a circuit one reader at a time, when only what lies above the reader and is reached from it runs.

A ``RunningCircuit`` holds the activations of a circuit: what every writer adds to the stream, as its difference from the
ablated value, and what every reader sees. Trials at one reader leave all nodes below it as they are. Above it, a node runs
again only if an edge of the circuit leads to it from a node that changed, and only at the positions from which the circuit
leads on to an answer. All trials of a call are one batch, and positions that prompts share run once
(``plans.py``). So a trial's cost follows the circuit above the reader, not the model.

Shapes: ``[row, trial, d_model]``, rows first, so that the rows a node needs are the first n of a contiguous block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from kc_lib.circuits.acdc.losses import StreamLosses
from kc_lib.circuits.acdc.plans import Heads, Needs, Plan, Projection, Run, Sums, layer_projection, rows_of
from kc_lib.circuits.acdc.products import edge_sums, packed_mlp
from kc_lib.circuits.scoring.prepared import Prepared
from kc_lib.graph import Graph
from kc_lib.residual.activations import ablated_inputs
from kc_lib.residual.decoder import Decoder


class RunningCircuit:
    """A circuit's activations on one batch, and trial removals at some of its readers; see the head of this file.

    Readers are tried from the logits down, those of one layer's attention together or one by one: writers below the readers
    under trial must not depend on them. ``losses`` gives the loss of runs from their final streams at the answers
    (``losses.py``).
    """

    def __init__(
        self,
        decoder: Decoder,
        graph: Graph,
        mask: Bool[Tensor, "writer reader"],
        prepared: Prepared,
        losses: StreamLosses,
    ) -> None:
        self.decoder, self.graph, self.prefix, self.losses = decoder, graph, prepared.prefix, losses
        self.mask = mask.clone()
        self.rows = rows_of(prepared.batch, prepared.ablation.kind, self.prefix)
        self.ablated = self.rows.take(prepared.ablation.outputs)
        self.embedded = self.rows.take(decoder.embed(prepared.batch.clean)[None, :, self.prefix.start :])[0]
        self.post_norm = decoder.blocks[0].attention.post_norm is not None  # then heads nothing reads still move the others
        self.last = len(graph.readers) - 1
        self.n_answer_rows = int(self.rows.answers.max()) + 1
        self._base = ablated_inputs(decoder, graph, self.ablated)
        self._buffer = self.ablated.new_empty(0)
        self._mlps: dict[int, Callable[[Tensor], Tensor]] = {}  # packed when a layer is first reached
        self._projections: dict[int, Projection] = {}
        self.build()

    # --- the circuit as it stands ------------------------------------------------------------------------------------

    @torch.no_grad()
    def build(self) -> None:
        """Run the circuit of the present mask afresh: what follows depends on the mask alone, not on how it came about."""
        graph = self.graph
        self._plans: dict[tuple[int, str], Plan] = {}
        self._feeding: dict[tuple[int, str], set[int]] = {}
        self.needs = Needs(graph, self.rows, self.post_norm)
        for layer in reversed(range(graph.n_layers)):
            self.needs.find(layer, self.mask)
        self.differences = torch.zeros_like(self.ablated)
        self.differences[0] = self.embedded - self.ablated[0]
        for layer in range(graph.n_layers):
            needs, mlp = self.needs.layers[layer], graph.reader_columns(layer, "mlp").start
            if needs.heads:
                run = Run(self._buffer_for(1))
                heads = self._heads(layer, needs.columns)
                self._run_heads(layer, heads, self._inputs(needs.columns, needs.read_rows)[:, :, None], run)
                self._take(run, 0)
            if needs.mlp_rows:
                run = Run(self._buffer_for(1))
                self._run_mlp(layer, self._inputs([mlp], needs.mlp_rows)[0, :, None], run)
                self._take(run, 0)
        self.final = self._inputs([self.last], self.n_answer_rows)[0]

    def full_loss(self) -> float:
        """The circuit's loss."""
        return float(next(self._losses(self.final[:, None])))

    # --- trials ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def trial_losses(self, removed: Mapping[int, Bool[Tensor, "trial writer"]]) -> Iterator[float]:
        """Loss of the circuit without the ``removed`` edges into some readers, trial by trial; ``accept`` makes one real.

        The readers are one, or some of one layer's attention. All trials run to the logits' input together; the unembedding,
        often the larger part, as losses are asked for.
        """
        layer = self.graph.readers[next(iter(removed))].layer
        self.needs.find(layer, self.mask)
        n_trials = len(next(iter(removed.values())))
        run = Run(self._buffer_for(n_trials))
        given = {column: self._without(column, some) for column, some in sorted(removed.items())}
        final = self._propagate(given, run)
        self._trial = (removed, run, final)
        yield from map(float, self._losses(final))

    @torch.no_grad()
    def accept(self, trial: int) -> None:
        """Make a trial of the last call the circuit."""
        removed, run, final = self._trial
        for column, some in removed.items():
            self.mask[some[trial], column] = False
        self._take(run, trial)
        self.final = final[:, trial].clone()

    @torch.no_grad()
    def shares(self, column: int) -> Float[Tensor, " writer"]:
        """How much of what a reader sees each writer's edge carries: the norms' quotient, its mean over the rows."""
        seen = torch.linalg.vector_norm(self._inputs([column], len(self.rows))[0], dim=-1)
        carried = torch.linalg.vector_norm(self.differences, dim=-1)
        least = torch.finfo(seen.dtype).eps
        return (carried / seen.clamp(min=least)).mean(-1).clamp(min=least)

    # --- runs --------------------------------------------------------------------------------------------------------

    def _propagate(self, given: Mapping[int, Float[Tensor, "row trial d_model"]], run: Run) -> Tensor:
        """The logits' input when some readers of a layer see what is given: all nodes above that this reaches run again."""
        graph = self.graph
        reader = graph.readers[next(iter(given))]
        if reader.kind == "logits":
            return given[self.last][: self.n_answer_rows]
        for layer in range(reader.layer, graph.n_layers):
            here, needs = given if layer == reader.layer else {}, self.needs.layers[layer]
            if not (here and reader.kind == "mlp"):
                plan = self._plan(layer, "heads", needs.columns, needs.read_rows, run, here)
                if plan.heads is not None:
                    self._run_heads(layer, plan.heads, self._new_inputs(plan, needs.read_rows, run, here), run)
                if here:
                    self._write_other_heads(layer, run)
            if not (here and reader.kind != "mlp" and graph.parallel):
                mlps = [graph.reader_columns(layer, "mlp").start] if needs.mlp_rows else []
                plan = self._plan(layer, "mlp", mlps, needs.mlp_rows, run, here)
                if plan.columns:
                    self._run_mlp(layer, self._new_inputs(plan, needs.mlp_rows, run, here)[0], run)
        plan = self._plan(graph.n_layers, "logits", [self.last], self.n_answer_rows, run, {})
        if not plan.columns:
            return self.final[:, None].expand(-1, run.n_trials, -1)
        return self._new_inputs(plan, self.n_answer_rows, run, {})[0]

    def _run_heads(self, layer: int, heads: Heads, x: Float[Tensor, "reader n_rows trial d_model"], run: Run) -> None:
        """Run some heads of a layer again: what they add to the stream goes to the run's buffer."""
        attention, needs = self.decoder.blocks[layer].attention, self.needs.layers[layer]
        start, n_rows = self.graph.head_writers(layer).start, needs.head_rows
        writers = [start + head for head in heads.heads]
        z = self._attend(layer, heads, heads.projected(x))
        written = torch.bmm(z, attention.W_O[heads.heads]).view(len(writers), n_rows, run.n_trials, -1)
        run.buffer[writers, :n_rows] = attention.contributions(written)
        self._wrote(run, writers, n_rows)

    def _write_other_heads(self, layer: int, run: Run) -> None:
        """The heads of a layer that do not run again write what they wrote.

        Edges from them are then no part of what plans above take as settled, and these last while the layer's readers are
        under trial, whichever heads a call changes.
        """
        start = self.graph.head_writers(layer).start
        others = [start + head for head in self.needs.layers[layer].heads if start + head not in run.writers]
        run.buffer[others] = (self.ablated[others] + self.differences[others])[:, :, None]
        run.writers = sorted([*run.writers, *others])

    def _run_mlp(self, layer: int, x: Float[Tensor, "n_rows trial d_model"], run: Run) -> None:
        """Run a layer's MLP again; as ``_run_heads``."""
        block, writer = self.decoder.blocks[layer], self.graph.head_writers(layer).stop
        if layer not in self._mlps:
            self._mlps[layer] = packed_mlp(block)
        run.buffer[writer, : len(x)] = block.mlp_contribution(self._mlps[layer](x))
        self._wrote(run, [writer], len(x))

    def _wrote(self, run: Run, writers: Sequence[int], n_rows: int) -> None:
        """Writers of a run have written at so many rows; at the others, which nothing needs, they are worth nothing."""
        if n_rows < len(self.rows):
            run.buffer[writers, n_rows:] = self.ablated[writers, n_rows:, None]
        run.writers += writers

    def _take(self, run: Run, trial: int) -> None:
        """Keep what a run's writers wrote in one trial."""
        self.differences[run.writers] = run.buffer[run.writers, :, trial] - self.ablated[run.writers]

    def _attend(
        self, layer: int, heads: Heads, projected: Sequence[Float[Tensor, "head n_rows trial d_head"]]
    ) -> Float[Tensor, "head n_rows_trial d_head"]:
        """Outputs z of some heads from their queries, keys and values, prompt by prompt, from and to rows."""
        attention, needs = self.decoder.blocks[layer].attention, self.needs.layers[layer]
        row_of = self.rows.row_of.clamp(max=needs.read_rows - 1)  # rows beyond are not needed, whatever stands there
        q, k, v = (rearrange(x[:, row_of], "h b p k d -> (k b) p h d") for x in projected)
        past = self.prefix.of_heads(layer, torch.tensor(heads.heads) // attention.group_size)
        z = rearrange(attention.attend(q, k, v, past), "(k b) p h d -> (b p) k h d", k=projected[0].shape[2])
        return rearrange(z[self.rows.first[: needs.head_rows]], "row k h d -> h (row k) d")

    def _losses(self, x: Float[Tensor, "row trial d_model"]) -> Iterator[Float[Tensor, ""]]:
        """Loss of one trial after the other from the logits' input."""
        yield from self.losses(rearrange(x[self.rows.answers], "b a k d -> k b a d").contiguous())

    # --- plans of runs -----------------------------------------------------------------------------------------------

    def _plan(
        self, layer: int, part: str, columns: Sequence[int], n_rows: int, run: Run, given: Mapping[int, Tensor]
    ) -> Plan:
        """Which of these readers, all those that matter of a part of the model, see something new in a run, and how.

        Kept while the same writers change. The edges into readers above those under trial are settled; and as every call
        runs through all that is above, a plan is of the last call, which changed no writer that the plan takes as settled.
        """
        under_trial = [column for column in columns if column in given]  # their neighbours read only what lies below them
        if not under_trial and (layer, part) not in self._feeding:
            self._feeding[layer, part] = set(self.mask[:, columns].any(1).nonzero()[:, 0].tolist())
        feeding = set() if under_trial else self._feeding[layer, part]
        key = under_trial, [writer for writer in run.writers if writer in feeding]
        plan = self._plans.get((layer, part))
        if plan is None or plan.key != key:
            plan = self._plans[layer, part] = self._new_plan(layer, part, columns, n_rows, key)
        return plan

    def _new_plan(
        self, layer: int, part: str, columns: Sequence[int], n_rows: int, key: tuple[list[int], list[int]]
    ) -> Plan:
        under_trial, writers = key
        if under_trial:
            return Plan(key, under_trial, heads=self._heads(layer, under_trial) if part == "heads" else None)
        reached = self.mask[writers][:, columns].any(0).tolist()
        seen = [column for column, is_reached in zip(columns, reached, strict=True) if is_reached]
        if not seen:
            return Plan(key, seen)
        changed = torch.zeros(len(self.mask), 1, dtype=torch.bool)
        changed[writers] = True
        edges = edge_sums(self.mask[:, seen] & changed, n_rows, self.ablated[:, :, None])
        # writers that run again give what they write, not how that differs from what ablation puts in its place
        settled = self._sums(self.mask[:, seen] & ~changed, seen, n_rows) - edges.of(self.ablated[:, :, None])[:, :, 0]
        return Plan(key, seen, Sums(settled, edges), self._heads(layer, seen) if part == "heads" else None)

    def _new_inputs(
        self, plan: Plan, n_rows: int, run: Run, given: Mapping[int, Float[Tensor, "row trial d_model"]]
    ) -> Float[Tensor, "reader n_rows trial d_model"]:
        """What the readers of a plan see in a run."""
        if plan.sums is None:
            return torch.stack([given[column][:n_rows] for column in plan.columns])
        return plan.sums.of(run.buffer)

    def _heads(self, layer: int, changed: Sequence[int]) -> Heads:
        """The heads that run again when these readers of a layer see something new; a norm on its output ties them all."""
        graph, needs = self.graph, self.needs.layers[layer]
        if layer not in self._projections:
            self._projections[layer] = layer_projection(self.decoder.blocks[layer].attention, graph, layer)
        start = graph.reader_columns(layer, "q").start
        writers = graph.head_writers(layer).start
        # of each head its query, key and value reader
        serving = {head: graph.serves[writers + head].nonzero()[:, 0].tolist() for head in needs.heads}
        heads = [head for head in needs.heads if self.post_norm or not set(serving[head]).isdisjoint(changed)]
        others = sorted({column for head in heads for column in serving[head]} - set(changed))
        place = {column: i for i, column in enumerate([*changed, *others])}
        projection = self._projections[layer]
        unchanged = self._base.new_zeros(0, needs.read_rows, projection.weight.shape[-1])
        if others:
            x = self._inputs(others, needs.read_rows)[:, :, None]
            unchanged = projection.some([column - start for column in others]).of(x)[:, :, 0]
        served = tuple(
            torch.tensor([place[column] for column in of_kind], device=unchanged.device)
            for of_kind in zip(*(serving[head] for head in heads), strict=True)
        )
        return Heads(heads, projection.some([column - start for column in changed]), unchanged, served)

    # --- what readers see --------------------------------------------------------------------------------------------

    def _inputs(self, columns: Sequence[int], n_rows: int) -> Float[Tensor, "reader n_rows d_model"]:
        """What some readers see in the circuit as it stands."""
        return self._sums(self.mask[:, list(columns)], columns, n_rows)

    def _sums(
        self, edges: Bool[Tensor, "writer reader"], columns: Sequence[int], n_rows: int
    ) -> Float[Tensor, "reader n_rows d_model"]:
        """What some readers see by some of their edges."""
        differences = self.differences[:, :, None]
        return edge_sums(edges, n_rows, differences).of(differences)[:, :, 0] + self._base[list(columns), :n_rows]

    def _without(self, column: int, removed: Bool[Tensor, "trial writer"]) -> Float[Tensor, "row trial d_model"]:
        """What a reader sees without some of its edges."""
        # what stays is summed, not the rest subtracted: a reader that loses every edge must see exactly nothing, because
        # norms blow up what rounding leaves of it
        n_below = self.graph.readers[column].n_writers
        edges = (self.mask[:n_below, column] & ~removed[:, :n_below]).to(self.differences)
        stay = rearrange(edges @ self.differences[:n_below].flatten(1), "k (row d) -> row k d", row=len(self.rows))
        return stay + self._base[column][:, None]

    def _buffer_for(self, n_trials: int) -> Tensor:
        """Room for what a call can change; one allocation serves all calls of up to so many trials."""
        n = self.ablated.numel() * n_trials
        if self._buffer.numel() < n:
            self._buffer = self.ablated.new_zeros(n)  # a sum over edges may read what is not set, times zero
        return self._buffer[:n].view(*self.ablated.shape[:2], n_trials, -1)
