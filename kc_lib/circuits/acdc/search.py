"""ACDC: remove edges one by one, from the logits down, as long as the metric stays (Conmy et al. 2023, arXiv:2304.14997).

Readers are visited in reverse topological order. At a reader, each edge of the present circuit is removed in turn; the
removal stands if the loss (the metric, signed so that lower is better) rises by less than ``tau`` against the present
circuit, and is undone otherwise. A reader none of whose nodes is read any more loses its edges untested. With zero ablation
and match-NLL this is the discovery of *Knowledge Circuits* (Yao et al. 2024, arXiv:2405.17969; tau = 0.02, 0.01, 0.005).

The edge set is the one that testing every edge with a full run gives, and the effects are its effects; the work is less:

1. when a reader of layer l is tested, nothing below l has changed, and above l only what the present circuit reaches from
   the reader is run (``kernels/removals.py``);
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
from jaxtyping import Bool
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.circuits.acdc.edge_tests import Edge, EdgeTests
from kc_lib.circuits.acdc.losses import stream_losses
from kc_lib.circuits.acdc.removals import RunningCircuit
from kc_lib.circuits.attribution import attribute_edges
from kc_lib.circuits.selection import select
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit, Graph
from kc_lib.metrics import Metric, get_metric
from kc_lib.models.model import Model
from kc_lib.residual.activations import INTERVENTIONS, ablation
from kc_lib.residual.logits import full_logits, reference_means
from kc_lib.residual.prefix_cache import shared_context
from kc_lib.results import hash_of
from kc_lib.tasks.batches import Batch, TokenPair, make_batch

ORDERS = ("reverse", "normal", "random")
NORMALIZATIONS = ("answer", "positions")
TESTS_PER_CHECKPOINT = 512
ROWS_AT_ONCE = 1024  # rows times tests of one batch: more only costs memory


def acdc(
    model: Model,
    pairs: Sequence[TokenPair],
    *,
    tau: float = 0.01,
    metric: str | Metric = "match_nll",
    intervention: str = "zero",
    order: str = "reverse",
    absolute: bool = False,
    normalize: str = "answer",
    skip: Sequence[str] = (),
    prefilter: int | None = None,
    grouped: bool = True,
    full_answer: bool = False,
    seed: int = 0,
    edges_at_once: int = 32,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> Circuit:
    """The circuit ACDC leaves; its scores are the measured effects of the edges (rise of the loss), NaN where untested.

    Args:
        tau: an edge stays if removing it raises the loss by at least this much, in units of the metric.
        intervention: what a removed edge carries: "zero", the corrupted prompt's output ("patching"), or the "mean" or
            "positional_mean" over the pairs' clean prompts.
        order: in which order a reader's writers are tested: from the latest ("reverse"), from the input ("normal"), random.
        absolute: undo a removal also if the loss *falls* by tau or more.
        normalize: the loss is the mean over *answer* tokens; "positions" divides the answer tokens' sum by all positions
            of the prompt, as the published Knowledge Circuits code does, which dilutes tau by prompt length.
        skip: nodes ("a3.h5", "m2", "logits") whose incoming edges are kept untested, unless nothing reads the node.
        prefilter: start from the pruned circuit of the n best edges by EAP-IG (|score|, ``ig_rule="right"``), instead of the
            whole graph.
        edges_at_once: tests per batch; changes the speed only.
        checkpoint: a file that keeps the state; if it is there, work goes on from it.

    The circuit is as found, not pruned: under zero ablation a node that nothing feeds still writes what its biases give.

    Raises:
        MethodError: a parameter out of range, a loss that is not finite, or a checkpoint of another run.
        ModelError: a model whose residual stream is no sum of writers.
    """
    metric = get_metric(metric)
    check_acdc(
        tau=tau,
        metric=metric,
        intervention=intervention,
        order=order,
        absolute=absolute,
        normalize=normalize,
        prefilter=prefilter,
        edges_at_once=edges_at_once,
    )
    settings = {
        "model": model.name,
        "method": "acdc",
        "tau": tau,
        "metric": metric.name,
        "unit": metric.unit,
        "intervention": intervention,
        "order": order,
        "absolute": absolute,
        "normalize": normalize,
        "skip": list(skip),
        "prefilter": prefilter,
        "full_answer": full_answer,
        "n_pairs": len(pairs),
        "seed": seed,
    }
    decoder = model.residual
    graph = decoder.graph(grouped)
    skipped = _readers_of(graph, skip)
    batch = make_batch(pairs, full_answer, decoder.device)
    context = shared_context(decoder, batch, intervention)
    whole = full_logits(decoder, batch, context)
    means = reference_means(decoder, intervention, pairs, len(pairs), full_answer)
    weights = _example_weights(batch, normalize)

    losses = stream_losses(decoder, metric, batch, whole, weights)
    file = None if checkpoint is None else _Checkpoint(Path(checkpoint), _identity(model, graph, pairs, settings))
    kept = None if file is None else file.read()
    if kept is None:
        start = graph.edges if prefilter is None else _prefiltered(model, pairs, graph, prefilter, metric, settings)
        kept = 0, start, torch.full(start.shape, math.nan), {}
    first, mask, effects, ratios = kept
    ablated = ablation(decoder, intervention, batch, means, context)
    running = RunningCircuit(decoder, graph, mask, batch, ablated, losses, context)
    widest = max(1, min(edges_at_once, ROWS_AT_ONCE // len(running.rows)))
    tests = EdgeTests(running, effects, ratios, tau, absolute, widest)
    with tqdm(total=int(mask.sum()), desc="ACDC", unit="edge", disable=not progress) as bar:
        built = tests.n_done()
        for place, together in _groups(graph, first):
            if tests.n_done() // TESTS_PER_CHECKPOINT > built // TESTS_PER_CHECKPOINT:
                built = tests.n_done()
                if file is not None:
                    file.write(place, running.mask, effects, tests.ratios)
                running.build()
                tests = EdgeTests(running, effects, tests.ratios, tau, absolute, widest)
            n_before = int(running.mask[:, together].sum())
            waiting: list[Edge] = []
            for column in together:
                name = graph.readers[column].name
                if _unread(graph, running.mask, column):
                    if running.post_norm:  # what is removed then changes the loss, and comes in its turn
                        tests.test(waiting)
                        waiting = []
                    tests.remove_untested(column)
                elif column not in skipped:
                    writers = running.mask[:, column].nonzero()[:, 0].tolist()
                    waiting += [(writer, column) for writer in _ordered(writers, order, f"{seed} {name}")]
            tests.test(waiting)
            bar.update(n_before)
            bar.set_postfix(reader=name, kept=int(running.mask.sum()), loss=f"{tests.loss:.4g}")
    loss_full = float((metric.loss(whole, batch, whole) * weights).mean())
    settings |= {"n_tested": tests.n_done(), "loss_full": loss_full, "loss": tests.loss}
    return Circuit(graph, running.mask, effects, settings)


def check_acdc(
    *,
    tau: float = 0.01,
    metric: str | Metric = "match_nll",
    intervention: str = "zero",
    order: str = "reverse",
    absolute: bool = False,
    normalize: str = "answer",
    prefilter: int | None = None,
    edges_at_once: int = 32,
) -> None:
    """Refuse what ``acdc`` would refuse, before a model is loaded.

    Raises:
        MethodError: a parameter that is unknown or out of range.
    """
    get_metric(metric)
    if not (isinstance(tau, (int, float)) and 0 < tau < math.inf):
        raise MethodError(f"tau is {tau}; it must be a number above 0, in units of the metric (published: 0.005 to 0.02)")
    for name, value, known in (
        ("intervention", intervention, INTERVENTIONS),
        ("order", order, ORDERS),
        ("normalize", normalize, NORMALIZATIONS),
    ):
        if value not in known:
            raise MethodError(f"unknown {name} {value!r}: use one of {', '.join(known)}")
    if not isinstance(absolute, bool):
        raise MethodError(f"absolute is {absolute!r}; it must be true or false")
    if prefilter is not None and (isinstance(prefilter, bool) or not isinstance(prefilter, int) or prefilter < 1):
        raise MethodError(f"prefilter is {prefilter!r}; give the number of edges that ACDC starts from")
    if edges_at_once < 1:
        raise MethodError(f"edges_at_once is {edges_at_once}; it must be at least 1")


def _groups(graph: Graph, first: int) -> Iterator[tuple[int, list[int]]]:
    """Places, from the first on, and the readers there: from the logits down, those of a layer's attention together."""

    def together(place: int) -> tuple[int, bool]:
        reader = graph.readers[-1 - place]
        return reader.layer, reader.kind in "qkv"

    for _, places in groupby(range(first, len(graph.readers)), together):
        some = list(places)
        yield some[0], [len(graph.readers) - 1 - place for place in some]


def _unread(graph: Graph, mask: Bool[Tensor, "writer reader"], column: int) -> bool:
    """Does nothing read the nodes that this reader serves?"""
    serves = graph.serves[:, column]
    return bool(serves.any()) and not bool(mask[serves].any())


def _ordered(writers: Sequence[int], order: str, seed: str) -> list[int]:
    ordered = list(reversed(writers)) if order == "reverse" else list(writers)
    if order == "random":
        random.Random(seed).shuffle(ordered)
    return ordered


def _example_weights(batch: Batch, normalize: str) -> Tensor:
    """What turns an example's mean over answer tokens into its part of the loss."""
    n_answers = batch.answer_mask.sum(-1).float()
    return torch.ones_like(n_answers) if normalize == "answer" else n_answers / batch.lengths.to(n_answers)


def _readers_of(graph: Graph, nodes: Sequence[str]) -> set[int]:
    known = {*graph.writers[1:], "logits"}
    unknown = [node for node in nodes if node not in known]
    if unknown:
        raise MethodError(f"skip: the graph has no node {unknown[0]!r} that reads; name nodes like a0.h0, m0 or logits")
    columns = {len(graph.readers) - 1} if "logits" in nodes else set()
    for node in set(nodes) - {"logits"}:
        columns |= set(graph.serves[graph.writer_index[node]].nonzero()[:, 0].tolist())
    return columns


def _prefiltered(
    model: Model, pairs: Sequence[TokenPair], graph: Graph, size: int, metric: Metric, settings: dict[str, Any]
) -> Bool[Tensor, "writer reader"]:
    if size > graph.n_edges:
        raise MethodError(f"prefilter is {size}, but the graph has only {graph.n_edges} edges: leave it out, or use fewer")
    # "right" leaves out the ablated end of the path: at a zero embedding (zero ablation) a norm has no usable gradient
    scores = attribute_edges(
        model,
        pairs,
        "eap_ig",
        ig_rule="right",
        metric=metric,
        intervention=settings["intervention"],
        grouped=graph.grouped,
        full_answer=settings["full_answer"],
    )
    mask = select(scores, "absolute", size, fill=False).mask
    if not mask.any():
        raise MethodError(f"prefilter {size}: the {size} best edges make no path from the input to the logits; use more")
    return mask


def _identity(model: Model, graph: Graph, pairs: Sequence[TokenPair], settings: dict[str, Any]) -> str:
    described = [model.hash, asdict(graph), [asdict(pair) for pair in pairs], settings]
    return hash_of(described)


class _Checkpoint:
    """A file with the mask, the effects, the next reader and what predicts its tests.

    It is valid for one model, one task and one set of parameters.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity

    def read(self) -> tuple[int, Tensor, Tensor, dict[str, list[float]]] | None:
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
