"""What is measured at one checkpoint of a training, as rows for ``over_training``.

``behaviour``: how well the model does each task. ``circuit``: the smallest circuit that keeps a faithfulness, beside random
ones, judged on held-out prompts. ``direct``: what each head does to the logits itself. ``heads``: the general head scores,
which know no task. ``consistency``: the share of IOI that is done by the published algorithm. Every measure takes a model
and the drawn tasks; ``training_measures`` gives those that are asked for with their settings. One more, which needs a
second model, is in ``swaps.py``.

Where the prompts have next to no effect there is nothing to be faithful to, and any ratio is noise: the circuit is undefined
there and its rows say why. The effect is the metric's mean difference between the clean and the corrupted prompts; it counts
if it is at least ``minimal_effect`` and its 95% interval over prompts is above 0, on the prompts for finding and on those
held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from kc_lib.circuits.attribution import attribute_facts
from kc_lib.circuits.baselines import complement, random_nulls
from kc_lib.circuits.evaluate import evaluate_circuits, metric_values
from kc_lib.circuits.options import check_attribution
from kc_lib.circuits.scores import FactScores
from kc_lib.circuits.scoring.exact import patch_single_edges
from kc_lib.circuits.smallest import RANKINGS, smallest_faithful
from kc_lib.circuits.stability import jaccard, resampled_circuits
from kc_lib.errors import MethodError, check_counts
from kc_lib.graph import Circuit
from kc_lib.heads.general import check_scores, general_head_scores
from kc_lib.models.model import Model
from kc_lib.stats import interval, resampled_means
from kc_lib.tasks.batches import TokenPair
from kc_lib.tasks.task import load_task
from kc_lib.training.behaviour import behaviour
from kc_lib.training.drawn import DrawnTask, DrawnTasks
from kc_lib.training.ioi_algorithm import STEPS as ALGORITHM
from kc_lib.training.ioi_algorithm import algorithm_shares
from kc_lib.training.over_training import Measure
from kc_lib.training.rows import METRICS_OF_SETS, measured_row, measured_rows, metric_of

TRAINING_MEASURES = ("behaviour", "circuit", "direct", "heads", "consistency")
SHARES_OF_STEPS = ("share_absolute", "share_signed")
NO_EFFECT = "the prompts have next to no effect: {effect:.3g} [{low:.3g}, {high:.3g}], at least {least:g} is asked for"


def training_measures(
    which: Sequence[str] = TRAINING_MEASURES,
    *,
    scores: Sequence[str] | None = None,
    method: str = "eap_ig",
    steps: int = 5,
    metric: str | None = None,
    faithfulness: float = 0.8,
    selection: str = "greedy",
    minimal_effect: float = 0.05,
    n_random: int = 3,
    n_resamples: int = 5,
    batch_size: int = 32,
) -> dict[str, Measure]:
    """The measures that are asked for, with their settings, by name.

    Args:
        scores: head scores for ``heads``; None takes those that the model allows.
        method, steps: edge attribution (``circuits.attribution``).
        metric: None takes the probability difference for tasks with sets of answers, else the logit difference.
        faithfulness: what the smallest circuit keeps on the prompts it is found on.
        minimal_effect: in units of the metric; see the head of this file.
        n_random: random circuits of the same size.
        n_resamples: resamples of the prompts, for how much of the circuit depends on them.

    Raises:
        MethodError: an unknown measure, score, method or metric, or a number out of range.
    """
    unknown = [name for name in which if name not in TRAINING_MEASURES]
    if unknown or not which:
        given = repr(unknown[0]) if unknown else "nothing"
        raise MethodError(f"{given} is no measure over training: use some of {', '.join(TRAINING_MEASURES)}")
    check_scores(scores)
    check_attribution(method, steps=steps)
    if metric not in (None, *METRICS_OF_SETS.values()):
        raise MethodError(f"metric {metric!r}: circuits over training take {' or '.join(METRICS_OF_SETS.values())}")
    if selection not in RANKINGS:
        raise MethodError(f"selection {selection!r}: the search for a size takes {', '.join(RANKINGS)}")
    if not 0 < faithfulness <= 1 or not 0 < minimal_effect < np.inf:
        raise MethodError(
            f"faithfulness {faithfulness!r}, minimal_effect {minimal_effect!r}: give a share above 0 and an effect above 0"
        )
    check_counts(1, n_random=n_random, batch_size=batch_size)
    check_counts(2, n_resamples=n_resamples)
    search: dict[str, Any] = {"method": method, "steps": steps, "faithfulness": faithfulness, "selection": selection}
    search |= {"minimal_effect": minimal_effect, "batch_size": batch_size}
    circuit = partial(circuit_rows, metric=metric, n_random=n_random, n_resamples=n_resamples, **search)
    heads = partial(head_rows, scores=None if scores is None else tuple(scores))
    direct = partial(direct_rows, metric=metric, batch_size=batch_size)
    known: dict[str, Measure] = {
        "behaviour": behaviour_rows,
        "circuit": circuit,
        "direct": direct,
        "heads": heads,
        "consistency": partial(consistency_rows, **search),
    }
    return {name: known[name] for name in which}


def behaviour_rows(model: Model, tasks: DrawnTasks) -> pd.DataFrame:
    """Every behaviour on all prompts of every draw, with its interval over prompts; quantities are ``BEHAVIOURS``."""
    rows = []
    for draw in tasks.draws:
        found = behaviour(model, [*draw.task.discovery, *draw.task.test], batch_size=64).to_frame(draw.seed)
        for row in found.to_dict("records"):
            rows.append(measured_row(draw, row["measure"], row["value"], row["value_low"], row["value_high"]))
    return measured_rows(rows)


def head_rows(model: Model, tasks: DrawnTasks, *, scores: Sequence[str] | None = None) -> pd.DataFrame:
    """Every head's general scores, by seed of the draws; a score that is not defined has one row, with the reason."""
    rows = []
    for seed in tasks.seeds:
        found = general_head_scores(model, scores, seed=seed, keep_undefined=True)
        about = {"task": "", "seed": seed}
        for row in found.to_frame().to_dict("records"):
            part = f"a{row['layer']}.h{row['head']}"
            rows.append(
                about | {"quantity": row["name"], "part": part, "value": row["score"], "passes": bool(row["passes"])}
            )
        rows += [about | {"quantity": name, "part": "", "note": why} for name, why in found.undefined.items()]
    return measured_rows(rows)


def direct_rows(model: Model, tasks: DrawnTasks, *, metric: str | None = None, batch_size: int = 32) -> pd.DataFrame:
    """Every head's ``direct_effect`` on each task, on all prompts of every draw, in units of the metric.

    What the metric loses when only the logits read what the head writes on the corrupted prompt: path patching to the logits
    (Wang et al. 2023, arXiv:2211.00593, section 3.1), measured, not estimated.
    """
    graph = model.residual.graph()
    heads = [f"a{layer}.h{head}" for layer in range(graph.n_layers) for head in range(graph.n_heads)]
    rows = []
    for draw in tasks.draws:
        found = patch_single_edges(
            model,
            [*draw.task.discovery, *draw.task.test],
            [f"{head}->logits" for head in heads],
            metric=metric_of(draw, metric),
            batch_size=batch_size,
        )
        rows += [
            measured_row(draw, "direct_effect", value, part=head) for head, value in zip(heads, found["score"], strict=True)
        ]
    return measured_rows(rows)


def circuit_rows(
    model: Model,
    tasks: DrawnTasks,
    *,
    method: str = "eap_ig",
    steps: int = 5,
    metric: str | None = None,
    faithfulness: float = 0.8,
    selection: str = "greedy",
    minimal_effect: float = 0.05,
    n_random: int = 3,
    n_resamples: int = 5,
    batch_size: int = 32,
) -> pd.DataFrame:
    """A circuit of every draw: edge attribution, then the smallest stable size that is faithful (``smallest_faithful``).

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
    rows = []
    n_parameters, n_edges = model.n_parameters, model.residual.graph().n_edges
    for draw in tasks.draws:
        rows += [measured_row(draw, "model_parameters", n_parameters), measured_row(draw, "model_edges", n_edges)]
        of = metric_of(draw, metric)
        held_out = draw.task.test or draw.task.discovery
        effects = [_effect(model, pairs, of, draw.seed) for pairs in (draw.task.discovery, held_out)]
        rows.append(measured_row(draw, "effect", *effects[1]))
        why = _too_small(effects, minimal_effect)
        if why:
            undefined = ("n_edges", "share_of_edges", "n_nodes", "faithfulness", "null_faithfulness", "noising", "kl")
            rows += [measured_row(draw, name, note=why) for name in (*undefined, "resampled_jaccard")]
            continue
        fact_scores = attribute_facts(model, draw.task.discovery, method, steps=steps, metric=of, batch_size=batch_size)
        circuit = _smallest(model, draw, fact_scores, of, faithfulness, selection, batch_size)
        rows += _judged(model, draw, circuit, held_out, of, n_random, 2 * batch_size)
        rows.append(
            measured_row(draw, "resampled_jaccard", *_resampled(fact_scores, circuit, selection, n_resamples, draw.seed))
        )
        edges = circuit.to_frame()
        rows += [
            measured_row(draw, "edge", score, part=f"{writer}->{reader}")
            for writer, reader, score in edges[["writer", "reader", "score"]].itertuples(index=False)
        ]
        rows += [measured_row(draw, "node", 1.0, part=node) for node in circuit.nodes]
    return measured_rows(rows)


def consistency_rows(
    model: Model,
    tasks: DrawnTasks,
    *,
    method: str = "eap_ig",
    steps: int = 5,
    faithfulness: float = 0.8,
    selection: str = "greedy",
    minimal_effect: float = 0.05,
    batch_size: int = 32,
) -> pd.DataFrame:
    """How much of IOI is done by the published algorithm, of every draw of ``ioi``: ``consistency.algorithm_shares``.

    Candidates are the heads of the circuit, found as in ``circuit_rows`` on the logit difference; effects are measured on
    the held-out prompts, corrupted by three other names. Quantities ``share_absolute``, ``share_signed``, ``n_kind`` and
    ``n_candidates``; the part is the step. Undefined where there is no circuit, or no receiver.
    """
    rows = []
    decoder, of = model.residual, "logit_difference"
    for draw in (draw for draw in tasks.draws if draw.name == "ioi"):
        effects = [_effect(model, pairs, of, draw.seed) for pairs in (draw.task.discovery, draw.task.test)]
        why, candidates = _too_small(effects, minimal_effect), []
        if not why:
            fact_scores = attribute_facts(model, draw.task.discovery, method, steps=steps, metric=of, batch_size=batch_size)
            circuit = _smallest(model, draw, fact_scores, of, faithfulness, selection, batch_size)
            heads = [(layer, head) for layer in range(decoder.n_layers) for head in range(decoder.n_heads)]
            candidates = [(layer, head) for layer, head in heads if f"a{layer}.h{head}" in circuit.nodes]
            why = "" if candidates else "the circuit has no heads"
        if why:
            rows += [measured_row(draw, name, part=step, note=why) for step in ALGORITHM for name in SHARES_OF_STEPS]
            continue
        scores = general_head_scores(model, seed=draw.seed).scores
        for share in algorithm_shares(model, _strangers(model, draw), candidates, scores, batch_size=batch_size):
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


def _too_small(effects: Sequence[tuple[float, float, float]], least: float) -> str:
    """Why effects with their intervals leave nothing to be faithful to; "" where they do not."""
    for effect, low, high in effects:
        if effect < least or not low > 0:
            return NO_EFFECT.format(effect=effect, low=low, high=high, least=least)
    return ""


def _smallest(
    model: Model,
    draw: DrawnTask,
    fact_scores: FactScores,
    metric: str,
    faithfulness: float,
    selection: str,
    batch_size: int,
) -> Circuit:
    circuit, _ = smallest_faithful(
        model,
        fact_scores.mean(),
        draw.task.discovery,
        faithfulness,
        selection=selection,
        stable=True,
        resolution=0.1,
        metric=metric,
        batch_size=2 * batch_size,
    )
    return circuit


def _effect(model: Model, pairs: Sequence[TokenPair], metric: str, seed: int) -> tuple[float, float, float]:
    """What the clean prompts have over the corrupted ones, with its interval over prompts."""
    values = metric_values(model, {}, pairs, metric=metric, batch_size=64)
    differences = (values["full"] - values["empty"]).to_numpy()
    low, high = interval(resampled_means(differences[:, None], seed)[:, 0])
    return float(differences.mean()), float(low), float(high)


def _judged(
    model: Model,
    draw: DrawnTask,
    circuit: Circuit,
    pairs: Sequence[TokenPair],
    metric: str,
    n_random: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """The rows of a circuit as run on held-out prompts."""
    nulls = random_nulls(circuit, n_random, draw.seed)
    circuits = {"circuit": circuit, "without circuit": complement(circuit)} | nulls
    judgement = evaluate_circuits(model, circuits, {"held_out": pairs}, metric=metric, batch_size=batch_size, seed=draw.seed)
    own, without = (judgement.row(name, "held_out") for name in ("circuit", "without circuit"))
    null = [float(judgement.row(name, "held_out")["faithfulness"]) for name in nulls]
    ends = [f"faithfulness{end}" for end in ("", "_low", "_high")]
    noising = [1 - without[end] for end in (ends[0], ends[2], ends[1])]
    return [
        measured_row(draw, "n_edges", circuit.n_edges),
        measured_row(draw, "share_of_edges", circuit.share),
        measured_row(draw, "n_nodes", len(circuit.nodes)),
        measured_row(draw, "faithfulness", *own[ends]),
        measured_row(draw, "null_faithfulness", float(np.mean(null)), min(null), max(null)),
        measured_row(draw, "noising", *noising),
        measured_row(draw, "kl", own["kl"]),
    ]


def _resampled(fact_scores: FactScores, circuit: Circuit, selection: str, n: int, seed: int) -> tuple[float, float, float]:
    """Overlap of the circuit with those of resampled prompts: mean, lowest and highest."""
    size = int(circuit.provenance["size"])
    again = resampled_circuits(fact_scores, n, seed, selection, size, fill=False)
    overlaps = [jaccard(circuit, other) for other in again.values()]
    return float(np.mean(overlaps)), min(overlaps), max(overlaps)
