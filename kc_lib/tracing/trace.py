"""Causal tracing: which states, restored in a run on a corrupted subject, bring the answer back (Meng et al. 2022, ROME).

Three runs: *clean*; *corrupted* (noise on the subject's tokens); corrupted *with restoration* of one clean state. With p the
probability of the answer's first token, the total effect is TE = p_clean - p_corrupted, and the indirect effect of a state
IE = p_restored - p_corrupted, each the mean over noise samples, which are the same for all runs of a fact (the authors' code
draws afresh for every forward pass). What is restored, at one token and layer (``mediators``):

- ``state``: the block's output;
- ``attention_severed``, ``mlp_severed``: the block's output, while at that token the attention or MLP outputs of all layers
  above are held at what they are in the corrupted run (section 2.2, figure 3);
- ``attention``, ``mlp``: the attention or MLP outputs at that token in a window of layers around the layer (figure 1f, g).

Tokens left of the subject are the same in all runs, so that nothing can be restored there: they are left out.
``restore.py`` says how a run is computed; averages over facts, with intervals, are in ``effects.py``.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.errors import MethodError, TaskError
from kc_lib.models.model import Model
from kc_lib.residual.decoder import Decoder
from kc_lib.results import hash_of, save_whole
from kc_lib.tasks.facts import FactPrompt
from kc_lib.tasks.known import answer_ranks
from kc_lib.tracing.effects import COLUMNS, TracingResult
from kc_lib.tracing.noise import noise_scale, noised, replaced
from kc_lib.tracing.options import TraceOptions
from kc_lib.tracing.restore import Cells, FactRuns, answer_probabilities, fact_runs, restored_probabilities


def trace(
    model: Model,
    facts: Sequence[FactPrompt],
    *,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    **options: Any,
) -> TracingResult:
    """Trace every fact that the model knows, at every token from the subject on and at every layer.

    Args:
        checkpoint: a file that keeps the facts that are done; if it is there, work goes on from it.
        options: fields of ``TraceOptions``. The size of the noise comes from all the given facts, known or not. Facts that
            the model does not know are dropped before anything is traced, and counted. A few ``positions`` take a
            fraction of the time.

    Example:
        >>> facts = kc.load_facts("person_occupation", model)
        >>> kc.trace(model, facts.facts, max_facts=5, positions="last subject token, last token").summary()

    Raises:
        MethodError: an option out of range, a probability that is not finite, or a checkpoint of another run.
        TaskError: no fact is left to trace.
        ModelError: a model whose residual stream is no sum of writers (masked language models among them).
    """
    asked = TraceOptions.of(options)
    decoder = model.residual
    scale = noise_scale(decoder, facts, asked.noise, asked.level, asked.sigma) if facts else None
    chosen, dropped = _chosen(model, facts, asked)
    provenance: dict[str, Any] = {"model": model.name, **asked.determining(), "position_classes": asked.position_classes}
    provenance |= {
        "scale": None if scale is None or scale.ndim else float(scale),
        "n_given": len(facts),
        "n_traced": len(chosen),
        "dropped": dropped,
        "n_layers": decoder.n_layers,
    }
    file = None if checkpoint is None else Path(checkpoint)
    identity = hash_of([model.hash, provenance, [asdict(fact) for fact in facts]])
    frames, rows = _resumed(file, identity)
    bar = tqdm(chosen, desc="tracing", unit="fact", disable=not progress)
    for number, fact in enumerate(bar):
        if number < len(rows):
            continue
        runs = _runs(decoder, fact, facts, scale, asked)
        row = _fact_row(decoder, number, fact, runs)
        bar.set_postfix(p_clean=f"{row['p_clean']:.2f}", p_corrupted=f"{row['p_corrupted']:.2f}")
        frames.append(_traced(model, fact, runs, row, asked))
        rows.append(row)
        if file is not None:
            partial = TracingResult(pd.concat(frames, ignore_index=True), pd.DataFrame(rows), {"identity": identity})
            save_whole(partial, file)
    return TracingResult(pd.concat(frames, ignore_index=True), pd.DataFrame(rows), provenance)


def self_checks(
    model: Model, facts: Sequence[FactPrompt], *, only: Sequence[FactPrompt] | None = None, **options: Any
) -> pd.DataFrame:
    """What must hold of every fact, and by how much it does not: one row per fact and check, with the largest ``gap``.

    - ``everything``: restoring all tokens at any layer gives p_clean;
    - ``last layer, last token``: restoring that state alone gives p_clean;
    - ``nothing``: restoring none gives p_corrupted of every sample.

    Facts are taken as they are, known or not. Exact up to the rounding of the weights' type.

    Args:
        only: check some of the facts, with the noise they have among all.
        options: fields of ``TraceOptions``, of which those of the noise count.

    Raises:
        MethodError, ModelError: as ``trace``; also for a fact that has no other subject to be replaced by.
    """
    asked = TraceOptions.of(options)
    decoder = model.residual
    scale = noise_scale(decoder, facts, asked.noise, asked.level, asked.sigma)
    rows = []
    for number, fact in enumerate(facts if only is None else only):
        runs = _runs(decoder, fact, facts, scale, asked)
        clean, corrupted = (answer_probabilities(decoder, runs, kept) for kept in (runs.clean, runs.corrupted))
        layers = torch.arange(decoder.n_layers, device=decoder.device)
        every = torch.ones(decoder.n_layers, _n_positions(fact), dtype=torch.bool, device=decoder.device)
        last = every.clone()
        last[:, :-1] = False
        checks = {
            "everything": (Cells("state", layers, every), clean),
            "last layer, last token": (Cells("state", layers[-1:], last[-1:]), clean),
            "nothing": (Cells("state", layers, ~every), corrupted),
        }
        for check, (cells, expected) in checks.items():
            gap = (restored_probabilities(decoder, runs, cells) - expected).abs().max()
            rows.append({"fact": number, "check": check, "p": float(expected.mean()), "gap": float(gap)})
    return pd.DataFrame(rows)


def _chosen(model: Model, facts: Sequence[FactPrompt], asked: TraceOptions) -> tuple[list[FactPrompt], dict[str, int]]:
    """The facts to trace, in the order given, and how many were dropped for which reason."""
    if not facts:
        raise TaskError("no facts to trace: the task gave none")
    reasons: list[str] = [""] * len(facts)
    if asked.known_only:
        ranks = answer_ranks(model, [fact.tokens for fact in facts], [fact.answer for fact in facts])
        reasons = ["" if rank <= asked.known_rank else f"answer not known (rank above {asked.known_rank})" for rank in ranks]
        if all(reasons):
            raise TaskError(
                f"no known fact left: the model ranks none of the {len(facts)} answers within the first {asked.known_rank}; "
                "use another template, known_rank or known_only=False"
            )
    if asked.noise == "replacement":
        for i, fact in enumerate(facts):
            if not reasons[i] and replaced(fact, facts, asked.n_samples, asked.seed) is None:
                reasons[i] = "no other subject of equal token length"
        if all(reasons):
            raise TaskError(
                "no fact left: none of those the model knows has another subject of equal token length and another answer; "
                "use noise 'gaussian'"
            )
    could = [i for i, reason in enumerate(reasons) if not reason]
    drawn = set(random.Random(asked.seed).sample(could, min(len(could), asked.max_facts or len(could))))
    dropped = Counter(reason for reason in reasons if reason) + Counter({"beyond max_facts": len(could) - len(drawn)})
    return [fact for i, fact in enumerate(facts) if i in drawn], dict(dropped)


def _n_positions(fact: FactPrompt) -> int:
    return len(fact.tokens) - fact.subject[0]


def _runs(
    decoder: Decoder, fact: FactPrompt, facts: Sequence[FactPrompt], scale: Tensor | None, asked: TraceOptions
) -> FactRuns:
    """Clean and corrupted runs; the corrupted ones are made here once, so every restoration meets the same noise."""
    if scale is None:
        tokens = replaced(fact, facts, asked.n_samples, asked.seed)
        if tokens is None:
            raise MethodError(f"{fact.name} has no other subject of equal token length: use noise 'gaussian'")
        corrupted = decoder.embed(tokens)[:, fact.subject[0] :]
    else:
        corrupted = noised(decoder, fact, asked.noise, scale, asked.n_samples, asked.seed)
    return fact_runs(decoder, torch.tensor(fact.tokens), fact.subject[0], corrupted, fact.answer)


def _fact_row(decoder: Decoder, number: int, fact: FactPrompt, runs: FactRuns) -> dict[str, Any]:
    clean, corrupted = (answer_probabilities(decoder, runs, kept) for kept in (runs.clean, runs.corrupted))
    texts = {key: fact.text.get(key, "") for key in ("prompt", "subject", "answer")}
    p_clean, p_corrupted = float(clean[0]), float(corrupted.double().mean())
    effects = {"p_clean": p_clean, "p_corrupted": p_corrupted, "total_effect": p_clean - p_corrupted}
    return {"fact": number, **texts, "n_samples": len(corrupted), **effects}


def _traced(model: Model, fact: FactPrompt, runs: FactRuns, row: Mapping[str, Any], asked: TraceOptions) -> pd.DataFrame:
    """The rows of one fact."""
    decoder = model.residual
    positions = [i for i in range(len(fact.tokens)) if fact.position_class(i) in asked.position_classes]
    grid = torch.cartesian_prod(torch.arange(decoder.n_layers), torch.tensor(positions)).reshape(-1, 2)
    layers = grid[:, 0].to(decoder.device)
    restored = torch.eye(len(fact.tokens), dtype=torch.bool)[grid[:, 1], fact.subject[0] :].to(decoder.device)
    cell_positions = grid[:, 1].tolist()
    columns = {
        "fact": row["fact"],
        "layer": grid[:, 0].tolist(),
        "position": cell_positions,
        "token": [model.tokenizer.decode([fact.tokens[i]]) for i in cell_positions],
        "position_class": [fact.position_class(i) for i in cell_positions],
        "p_clean": row["p_clean"],
        "p_corrupted": row["p_corrupted"],
    }
    frames = []
    for mediator in asked.mediators if positions else ():
        cells = Cells(mediator, layers, restored, asked.window)
        probabilities = restored_probabilities(decoder, runs, cells, asked.batch_size).double().cpu()
        if not probabilities.isfinite().all():
            raise MethodError(f"{fact.name}: a probability is no finite number; use dtype float32")
        n_samples = probabilities.shape[1]
        std = probabilities.std(1) if n_samples > 1 else torch.full((len(probabilities),), float("nan"))
        measured = {"mediator": mediator, "p": probabilities.mean(1).numpy(), "std": std.numpy()}
        frames.append(pd.DataFrame(columns | measured))
    return pd.concat(frames, ignore_index=True)[list(COLUMNS)] if frames else pd.DataFrame(columns=list(COLUMNS))


def _resumed(file: Path | None, identity: str) -> tuple[list[pd.DataFrame], list[dict[str, Any]]]:
    """What an earlier run left in its checkpoint: rows of frame and facts."""
    done = TracingResult.resumed(file, identity)
    if done is None:
        return [], []
    return [done.frame], [{str(key): value for key, value in row.items()} for row in done.facts.to_dict("records")]
