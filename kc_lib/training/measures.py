"""What is measured at one checkpoint of a training, as rows for ``over_training``.

``behaviour``: how well the model does each task. ``circuit``: the smallest circuit that keeps a faithfulness, beside random
ones, evaluated on held-out prompts. ``direct``: what each head does to the logits itself. ``heads``: the general head
scores, which know no task. ``consistency``: the share of IOI that is done by the published algorithm. Every measure takes a
model and the drawn tasks; ``training_measures`` gives those that are asked for. ``swaps.py`` has one more, which needs a
second model.

Where the prompts have next to no effect there is nothing to be faithful to, and any ratio is noise: the circuit is undefined
there and its rows say why. The effect is the metric's mean difference between the clean and the corrupted prompts; it counts
if it is at least ``minimal_effect`` and its 95% interval over prompts is above 0, on the prompts for finding and on those
held out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.baselines import complement, random_baselines
from kc_lib.circuits.criteria import jaccard, resampled_circuits
from kc_lib.circuits.evaluate import evaluate, metric_values
from kc_lib.circuits.scores import FactScores
from kc_lib.circuits.scoring.exact import patch_single_edges
from kc_lib.circuits.smallest import smallest_faithful
from kc_lib.components.attention import head_names, heads_of
from kc_lib.graph import Circuit
from kc_lib.heads.general import head_scores
from kc_lib.models.model import Model
from kc_lib.stats import interval, resampled_means
from kc_lib.tasks.batches import TokenPair
from kc_lib.tasks.task import load_task
from kc_lib.training.behaviour import behaviour_rows
from kc_lib.training.drawn import DrawnTask, DrawnTasks, metric_of
from kc_lib.training.ioi_algorithm import STEPS as ALGORITHM
from kc_lib.training.ioi_algorithm import algorithm_shares
from kc_lib.training.options import TRAINING_MEASURES, CircuitOptions, MeasureOptions
from kc_lib.training.over_training import Measure
from kc_lib.training.result import CIRCUIT_FIGURES, measured_row, measured_rows

Interval = tuple[float, float, float]  # a figure, and its ends
UNDEFINED = ("share_of_edges", *(name for name in CIRCUIT_FIGURES if name != "effect"))  # without a circuit
SHARES_OF_STEPS = ("share_absolute", "share_signed")
NO_EFFECT = "the prompts have next to no effect: {effect:.3g} [{low:.3g}, {high:.3g}], at least {least:g} is asked for"


def training_measures(measures: str | Sequence[str] = TRAINING_MEASURES, **options: Any) -> dict[str, Measure]:
    """The measures that are asked for, with their options, by name.

    Args:
        measures: some of ``TRAINING_MEASURES``.
        options: fields of ``MeasureOptions``.

    Raises:
        MethodError: an unknown measure, score, method or metric, or a number out of range.
    """
    asked = MeasureOptions.of({"measures": measures, **options})
    circuit = {name: asked[name] for name in CircuitOptions.declared()}
    known: dict[str, Measure] = {
        "behaviour": behaviour_rows,
        "circuit": partial(circuit_rows, **circuit),
        "direct": partial(direct_rows, metric=asked.metric, batch_size=asked.batch_size),
        "heads": partial(head_rows, scores=asked.scores),
        "consistency": partial(consistency_rows, **circuit),
    }
    return {name: known[name] for name in asked.measures}


def head_rows(model: Model, tasks: DrawnTasks, *, scores: Sequence[str] = ("all",)) -> pd.DataFrame:
    """Every head's general scores, by seed of the draws; a score that is not defined has one row, with the reason."""
    rows: list[Mapping[Any, Any]] = []
    for seed in tasks.seeds:
        found = head_scores(model, scores, seed=seed, keep_undefined=True)
        of_seed: dict[str, Any] = {"task": "", "seed": seed}
        frame = found.to_frame().rename(columns={"name": "quantity", "score": "value"})
        parts = head_names(zip(frame["layer"], frame["head"], strict=True))
        rows += frame.assign(part=parts, passes=frame["passes"].astype(bool), **of_seed).to_dict("records")
        rows += [of_seed | {"quantity": name, "note": why} for name, why in found.undefined.items()]
    return measured_rows(rows)


def direct_rows(model: Model, tasks: DrawnTasks, *, metric: str | None = None, batch_size: int = 32) -> pd.DataFrame:
    """Every head's ``direct_effect`` on each task, on all prompts of every draw, in units of the metric.

    What the metric loses when only the logits read what the head writes on the corrupted prompt: path patching to the logits
    (Wang et al. 2023, arXiv:2211.00593, section 3.1), measured, not estimated.
    """
    graph = model.residual.graph()
    heads = head_names(product(range(graph.n_layers), range(graph.n_heads)))
    rows = []
    for draw in tasks.draws:
        pairs, edges = [*draw.task.discovery, *draw.task.test], [f"{head}->logits" for head in heads]
        effects = patch_single_edges(model, pairs, edges, metric=metric_of(draw, metric), batch_size=batch_size)["score"]
        rows += [measured_row(draw, "direct_effect", value, part=head) for head, value in zip(heads, effects, strict=True)]
    return measured_rows(rows)


def circuit_rows(model: Model, tasks: DrawnTasks, **options: Any) -> pd.DataFrame:
    """A circuit of every draw: edge attribution, then the smallest stable size that is faithful (``smallest_faithful``).

    Options are the fields of ``CircuitOptions``.

    Quantities, of held-out prompts where the task has any:

    - ``effect``: what clean prompts have over corrupted ones, of which faithfulness is a share; always defined, as are
      ``model_parameters`` and ``model_edges``, the model's size;
    - ``n_edges``, ``share_of_edges``, ``n_nodes``: the circuit's size;
    - ``faithfulness``: of the circuit alone, all else corrupted (normalised denoising); ``null_faithfulness``: the mean of
      random circuits of the size, from the lowest to the highest;
    - ``noising``: 1 minus the faithfulness of the model without the circuit; ``kl``: full model to circuit (nats);
    - ``resampled_jaccard``: overlap with the circuits of that size that resampled prompts give, mean, lowest and highest;
    - ``edge``, ``node``: the circuit itself, one row for each part; an edge's value is its score.
    """
    asked, rows = CircuitOptions.of(options), []
    n_parameters, n_edges = model.n_parameters, model.residual.graph().n_edges
    for draw in tasks.draws:
        rows += [measured_row(draw, "model_parameters", n_parameters), measured_row(draw, "model_edges", n_edges)]
        metric = metric_of(draw, asked.metric)
        effects = _effects(model, draw, metric)
        rows.append(measured_row(draw, "effect", *effects[1]))
        why = _too_small(effects, asked.minimal_effect)
        if why:
            rows += [measured_row(draw, name, note=why) for name in UNDEFINED]
            continue
        circuit, fact_scores = _smallest(model, draw, metric, asked)
        rows += _evaluated(model, draw, circuit, metric, asked)
        rows.append(measured_row(draw, "resampled_jaccard", *_resampled(fact_scores, circuit, asked, draw.seed)))
        edges = circuit.to_frame()
        names = edges["writer"] + "->" + edges["reader"]
        rows += [measured_row(draw, "edge", score, part=name) for name, score in zip(names, edges["score"], strict=True)]
        rows += [measured_row(draw, "node", 1.0, part=node) for node in circuit.nodes]
    return measured_rows(rows)


def consistency_rows(model: Model, tasks: DrawnTasks, **options: Any) -> pd.DataFrame:
    """How much of IOI is done by the published algorithm, of every draw of ``ioi``: ``ioi_algorithm.algorithm_shares``.

    Candidates are the heads of the circuit, found as in ``circuit_rows`` on the logit difference; effects are measured on
    the held-out prompts, corrupted by three other names. Quantities ``share_absolute``, ``share_signed``, ``n_kind`` and
    ``n_candidates``; the part is the step. Undefined where there is no circuit, or no receiver. Options are the fields of
    ``CircuitOptions``.
    """
    asked, rows, metric = CircuitOptions.of(options), [], "logit_difference"
    for draw in (draw for draw in tasks.draws if draw.name == "ioi"):
        why, candidates = _too_small(_effects(model, draw, metric), asked.minimal_effect), []
        if not why:
            circuit, _ = _smallest(model, draw, metric, asked)
            candidates = heads_of(node for node in circuit.nodes if ".h" in node)
            why = "" if candidates else "the circuit has no heads"
        if why:
            rows += [measured_row(draw, name, part=step, note=why) for step in ALGORITHM for name in SHARES_OF_STEPS]
            continue
        scores = head_scores(model, seed=draw.seed).scores
        for share in algorithm_shares(model, _strangers(model, draw), candidates, scores, batch_size=asked.batch_size):
            rows.append(measured_row(draw, "share_absolute", share.absolute, part=share.step, note=share.note))
            rows.append(measured_row(draw, "share_signed", share.signed, part=share.step, note=share.note))
            rows.append(measured_row(draw, "n_kind", share.n_kind, part=share.step))
            rows.append(measured_row(draw, "n_candidates", share.n_candidates, part=share.step))
    return measured_rows(rows)


def _strangers(model: Model, draw: DrawnTask) -> tuple[TokenPair, ...]:
    """The draw's held-out prompts, with three other names in the corrupted ones."""
    n = len(draw.task.discovery) + len(draw.task.test)
    bos = draw.task.prepend_bos
    return load_task("ioi_abc", model, known_only=False, max_facts=n, prepend_bos=bos, seed=draw.seed).test


def _held_out(draw: DrawnTask) -> Sequence[TokenPair]:
    return draw.task.test or draw.task.discovery


def _effects(model: Model, draw: DrawnTask, metric: str) -> list[Interval]:
    """What clean prompts have over corrupted ones, on the prompts for finding and on those held out."""
    effects = []
    for pairs in (draw.task.discovery, _held_out(draw)):
        values = metric_values(model, {}, pairs, metric=metric, batch_size=64)
        differences = (values["full"] - values["empty"]).to_numpy()
        low, high = interval(resampled_means(differences[:, None], draw.seed)[:, 0])
        effects.append((float(differences.mean()), float(low), float(high)))
    return effects


def _too_small(effects: Sequence[Interval], least: float) -> str:
    """Why effects leave nothing to be faithful to; "" where they do not."""
    for effect, low, high in effects:
        if effect < least or not low > 0:
            return NO_EFFECT.format(effect=effect, low=low, high=high, least=least)
    return ""


def _smallest(model: Model, draw: DrawnTask, metric: str, asked: CircuitOptions) -> tuple[Circuit, FactScores]:
    """The smallest stable circuit that is faithful on the prompts for finding, and the scores that ranked its edges."""
    batch_size, pairs = asked.batch_size, draw.task.discovery
    scoring = {"steps": asked.steps, "metric": metric, "batch_size": batch_size}
    fact_scores = score_edges(model, pairs, asked.method, per="fact", **scoring)
    circuit, _ = smallest_faithful(
        model,
        fact_scores.mean(),
        pairs,
        asked.faithfulness,
        selection=asked.selection,
        stable=True,
        resolution=0.1,
        metric=metric,
        batch_size=2 * batch_size,
    )
    return circuit, fact_scores


def _evaluated(model: Model, draw: DrawnTask, circuit: Circuit, metric: str, asked: CircuitOptions) -> list[dict[str, Any]]:
    """The rows of a circuit as run on held-out prompts."""
    baselines = random_baselines(circuit, asked.n_random, draw.seed)
    circuits = {"circuit": circuit, "without circuit": complement(circuit)} | baselines
    options: dict[str, Any] = {"metric": metric, "batch_size": 2 * asked.batch_size, "seed": draw.seed}
    evaluation = evaluate(model, circuits, {"held_out": _held_out(draw)}, **options)
    alone, without = (evaluation.row(name, "held_out") for name in ("circuit", "without circuit"))
    null = [float(evaluation.row(name, "held_out")["faithfulness"]) for name in baselines]
    ends = [f"faithfulness{end}" for end in ("", "_low", "_high")]
    noising = [1 - without[end] for end in (ends[0], ends[2], ends[1])]
    return [
        measured_row(draw, "n_edges", circuit.n_edges),
        measured_row(draw, "share_of_edges", circuit.share),
        measured_row(draw, "n_nodes", len(circuit.nodes)),
        measured_row(draw, "faithfulness", *alone[ends]),
        measured_row(draw, "null_faithfulness", float(np.mean(null)), min(null), max(null)),
        measured_row(draw, "noising", *noising),
        measured_row(draw, "kl", alone["kl"]),
    ]


def _resampled(fact_scores: FactScores, circuit: Circuit, asked: CircuitOptions, seed: int) -> Interval:
    """Overlap of the circuit with those of resampled prompts: mean, lowest and highest."""
    size = int(circuit.provenance["size"])
    again = resampled_circuits(fact_scores, asked.n_resamples, seed, asked.selection, size, fill=False)
    overlaps = [jaccard(circuit, other) for other in again.values()]
    return float(np.mean(overlaps)), min(overlaps), max(overlaps)
