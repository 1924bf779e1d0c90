"""ACDC: remove edges one by one, from the logits down, as long as the metric stays (Conmy et al. 2023, arXiv:2304.14997).

Readers are visited in reverse topological order. At a reader, each edge of the present circuit is removed in turn; the
removal stands if the loss (the metric, signed so that lower is better) rises by less than ``tau`` against the present
circuit, and is undone otherwise. A reader none of whose nodes is read any more loses its edges untested. With zero ablation
and match-NLL this is the discovery of *Knowledge Circuits* (Yao et al. 2024, arXiv:2405.17969; tau = 0.02, 0.01, 0.005).

The edge set is the one that testing every edge with a full run gives, and the effects are its effects; the work is less:

1. when a reader of layer l is tested, nothing below l has changed, and above l only what the present circuit reaches from
   the reader is run (``removals.py``);
2. many tests, into one reader or into those of a layer's attention, run as one batch, in which each assumes that those
   before it turn out as *predicted* (``edge_tests.py``).

Every 512 tests, between layers, the activations are computed afresh from the mask and, if asked, the state is written
to a file. Work resumed from that file gives the identical result.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.circuits.acdc.edge_tests import Edge, EdgeTests
from kc_lib.circuits.acdc.losses import stream_losses
from kc_lib.circuits.acdc.removals import RunningCircuit
from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.options import AcdcOptions
from kc_lib.circuits.scoring.prepared import Prepared
from kc_lib.circuits.selection import select
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit, Graph
from kc_lib.metrics import get_metric
from kc_lib.models.model import Model
from kc_lib.residual.activations import ablation, shared_prefix
from kc_lib.residual.logits import full_logits, reference_means
from kc_lib.results import hash_of
from kc_lib.tasks.batches import TokenPair, make_batch

TESTS_PER_CHECKPOINT = 512


def acdc(
    model: Model,
    pairs: Sequence[TokenPair],
    *,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    **options: Any,
) -> Circuit:
    """The circuit ACDC leaves; its scores are the measured effects of the edges (rise of the loss), NaN where untested.

    The circuit is as found, not pruned: under zero ablation a node that nothing feeds still writes what its biases give.

    Args:
        checkpoint: a file that keeps the state; if it is there, work goes on from it.
        options: fields of ``AcdcOptions``. A removed edge carries "zero", the corrupted prompt's output ("patching"), or
            the "mean" or "positional_mean" over the pairs' clean prompts. Nodes in ``skip`` lose their incoming edges
            only where nothing reads the node. A ``prefilter`` starts from the pruned circuit of the best edges by EAP-IG
            (|score|, ``ig_rule="right"``).

    Example:
        >>> circuit = kc.acdc(model, task.discovery, tau=0.01, prefilter=3000)
        >>> circuit.pruned().to_frame().head()

    Raises:
        MethodError: an option out of range, a loss that is not finite, or a checkpoint of another run.
        ModelError: a model whose residual stream is no sum of writers.
    """
    asked = AcdcOptions.of(options)
    graph = model.residual.graph(asked.grouped)
    skipped = _readers_of(graph, asked.skip)
    settings = _provenance(model, pairs, asked)
    prepared, weights = _prepared(model, pairs, asked)
    identity = hash_of([model.hash, asdict(graph), [asdict(pair) for pair in pairs], settings])
    file = None if checkpoint is None else _Checkpoint(Path(checkpoint), identity)
    place, mask, effects, ratios = (file and file.read()) or _start(model, pairs, graph, asked)

    whole = torch.as_tensor(prepared.reference)
    losses = stream_losses(model.residual, prepared.metric, prepared.batch, whole, weights)
    running = RunningCircuit(model.residual, graph, mask, prepared, losses)
    tests = EdgeTests(running, effects, ratios, asked)
    n_refreshed = tests.n_done()
    with tqdm(total=int(mask.sum()), desc="ACDC", unit="edge", disable=not progress) as bar:
        for first, readers in _from_the_logits(graph, place):
            if tests.n_done() // TESTS_PER_CHECKPOINT > n_refreshed // TESTS_PER_CHECKPOINT:
                n_refreshed = tests.n_done()
                if file is not None:
                    file.write(first, running.mask, effects, tests.ratios)
                tests.refresh()
            n_before = int(running.mask[:, readers].sum())
            waiting: list[Edge] = []  # the readers of a layer's attention are tested together: none reads another
            for reader in readers:
                if _is_unread(graph, running.mask, reader):
                    if running.post_norm:  # then what is removed moves the loss, and comes in its turn
                        tests.test(waiting)
                        waiting = []
                    tests.remove_untested(reader)
                elif reader not in skipped:
                    waiting += [(writer, reader) for writer in _in_order(running.mask, graph, reader, asked)]
            tests.test(waiting)
            bar.update(n_before)
            bar.set_postfix(reader=graph.readers[readers[-1]].name, kept=int(running.mask.sum()), loss=f"{tests.loss:.4g}")

    loss_full = float((prepared.metric.loss(whole, prepared.batch, whole) * weights).mean())
    settings |= {"n_tested": tests.n_done(), "loss_full": loss_full, "loss": tests.loss}
    return Circuit(graph, running.mask, effects, settings)


def _from_the_logits(graph: Graph, place: int) -> Iterator[tuple[int, list[int]]]:
    """Readers from the logits down, from a place on; those of a layer's attention together, with the first's place."""

    def together(place: int) -> tuple[int, bool]:
        reader = graph.readers[-1 - place]
        return reader.layer, reader.kind in "qkv"

    for _, places in groupby(range(place, len(graph.readers)), together):
        some = list(places)
        yield some[0], [len(graph.readers) - 1 - place for place in some]


def _is_unread(graph: Graph, mask: Bool[Tensor, "writer reader"], column: int) -> bool:
    """Does nothing read the nodes that this reader serves?"""
    serves = graph.serves[:, column]
    return bool(serves.any()) and not bool(mask[serves].any())


def _in_order(mask: Bool[Tensor, "writer reader"], graph: Graph, reader: int, asked: AcdcOptions) -> list[int]:
    """The writers of a reader's edges in the order in which they are tested."""
    writers: list[int] = mask[:, reader].nonzero()[:, 0].tolist()
    if asked.order == "random":
        random.Random(f"{asked.seed} {graph.readers[reader].name}").shuffle(writers)
    return writers[::-1] if asked.order == "reverse" else writers


def _readers_of(graph: Graph, nodes: Sequence[str]) -> set[int]:
    known = {*graph.writers[1:], "logits"}
    unknown = [node for node in nodes if node not in known]
    if unknown:
        raise MethodError(f"skip: the graph has no node {unknown[0]!r} that reads; name nodes like a0.h0, m0 or logits")
    columns = {len(graph.readers) - 1} if "logits" in nodes else set()
    for node in set(nodes) - {"logits"}:
        columns |= set(graph.serves[graph.writer_index[node]].nonzero()[:, 0].tolist())
    return columns


def _prepared(model: Model, pairs: Sequence[TokenPair], asked: AcdcOptions) -> tuple[Prepared, Float[Tensor, " pair"]]:
    """All pairs as one batch, and what turns an example's mean over answer tokens into its part of the loss."""
    decoder, intervention = model.residual, asked.intervention
    batch = make_batch(pairs, asked.full_answer, decoder.device)
    prefix = shared_prefix(decoder, batch, intervention)
    means = reference_means(decoder, intervention, pairs, len(pairs), asked.full_answer)
    ablated = ablation(decoder, intervention, batch, means, prefix)
    n_answers = batch.answer_mask.sum(-1).float()
    weights = torch.ones_like(n_answers) if asked.normalize == "answer" else n_answers / batch.lengths.to(n_answers)
    return Prepared(batch, get_metric(asked.metric), ablated, full_logits(decoder, batch, prefix), prefix), weights


State = tuple[int, Bool[Tensor, "writer reader"], Float[Tensor, "writer reader"], Mapping[str, Sequence[float]]]


def _start(model: Model, pairs: Sequence[TokenPair], graph: Graph, asked: AcdcOptions) -> State:
    """The place of the first reader, the edges to start from, no effects, and no outcomes that would predict others."""
    mask, size = graph.edges, asked.prefilter
    if size is not None:
        if size > graph.n_edges:
            raise MethodError(f"prefilter is {size}; it must be at most {graph.n_edges}, the number of edges, or none")
        shared = {name: asked[name] for name in ("metric", "intervention", "grouped", "full_answer")}
        # "right" leaves out the ablated end of the path: at a zero embedding (zero ablation) a norm has no usable gradient
        scores = score_edges(model, pairs, "eap_ig", ig_rule="right", **shared)
        mask = select(scores, "absolute", size, fill=False).mask
        if not mask.any():
            raise MethodError(f"prefilter {size}: the {size} best edges make no path from the input to the logits; use more")
    return 0, mask, torch.full(mask.shape, math.nan), {}


def _provenance(model: Model, pairs: Sequence[TokenPair], asked: AcdcOptions) -> dict[str, Any]:
    metric = get_metric(asked.metric)
    about = {name: value for name, value in asked.determining().items() if name != "grouped"}
    about |= {"model": model.name, "method": "acdc", "metric": metric.name, "unit": metric.unit, "n_pairs": len(pairs)}
    return about


class _Checkpoint:
    """A file with the mask, the effects, the next reader and what predicts its tests.

    It is valid for one model, one task and one set of parameters.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity

    def read(self) -> State | None:
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                about = file.metadata() or {}
                mask, effects = file.get_tensor("mask").bool(), file.get_tensor("effects")
        except (OSError, SafetensorError) as error:
            raise MethodError(f"{self.path}: cannot be read as a checkpoint of ACDC ({error}); delete it") from error
        if about.get("identity") != self.identity:
            raise MethodError(
                f"{self.path}: is a checkpoint of another model, task or set of parameters; delete it or name another file"
            )
        return int(about["next_reader"]), mask, effects, json.loads(about.get("ratios", "{}"))

    def write(self, next_reader: int, mask: Tensor, effects: Tensor, ratios: Mapping[str, Iterable[float]]) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        of_kinds = json.dumps({kind: list(some) for kind, some in ratios.items()})
        about = {"identity": self.identity, "next_reader": str(next_reader), "ratios": of_kinds}
        save_file({"mask": mask.to(torch.uint8), "effects": effects}, partial, about)
        partial.replace(self.path)
