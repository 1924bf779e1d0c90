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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.errors import MethodError, TaskError, check_counts, first_line
from kc_lib.models.model import Model
from kc_lib.residual.decoder import Decoder
from kc_lib.results import hash_of, save_table, save_whole
from kc_lib.tasks.facts import POSITION_CLASSES, FactPrompt
from kc_lib.tasks.known import answer_ranks
from kc_lib.tracing.noise import noise_scale, noised, replaced
from kc_lib.tracing.restore import MEDIATORS, Cells, FactRuns, answer_probabilities, fact_runs, restored_probabilities

DEFAULT_MEDIATORS = ("state", "attention_severed", "mlp_severed")
COLUMNS = ("fact", "mediator", "layer", "position", "token", "position_class", "p", "std", "p_clean", "p_corrupted")


@dataclass(frozen=True)
class TracingResult:
    """What every restoration gives on every fact.

    ``frame`` has one row per fact, mediator, layer and position: the token, its class (``FactPrompt.position_class``), p
    (the mean over noise samples of the answer's probability), std (over samples, NaN for a single one), and the fact's
    p_clean and p_corrupted. ``facts`` has one row per fact: prompt, subject, answer, n_samples, p_clean, p_corrupted and
    total_effect. ``provenance`` says with what it was computed, how many facts were dropped, and why.
    """

    frame: pd.DataFrame
    facts: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """``frame`` with the indirect effect of every row."""
        return self.frame.assign(indirect_effect=self.frame["p"] - self.frame["p_corrupted"])

    def save(self, path: str | Path) -> Path:
        """Write ``frame`` as parquet; facts and provenance go into the file's metadata."""
        return save_table(self.frame, path, {"facts": self.facts.to_dict("list"), "provenance": dict(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> TracingResult:
        """Read what ``save`` wrote.

        Raises:
            MethodError: the file is not there or is no tracing result.
        """
        try:
            frame = pd.read_parquet(path)
            about = {name: frame.attrs.pop(name) for name in ("facts", "provenance")}
            frame = frame[list(COLUMNS)]
        except (OSError, ValueError, KeyError) as error:
            raise MethodError(f"{path}: cannot be read as a tracing result ({first_line(error)})") from error
        return cls(frame, pd.DataFrame(about["facts"]), about["provenance"])


def trace(
    model: Model,
    facts: Sequence[FactPrompt],
    *,
    mediators: Sequence[str] = DEFAULT_MEDIATORS,
    window: int = 10,
    noise: str = "gaussian",
    level: float = 3.0,
    sigma: float | None = None,
    n_samples: int = 10,
    position_classes: Sequence[str] = POSITION_CLASSES,
    known_only: bool = True,
    known_rank: int = 1,
    max_facts: int | None = None,
    seed: int = 0,
    batch_size: int = 24,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> TracingResult:
    """Trace every fact that the model knows, at every token from the subject on and at every layer.

    Args:
        mediators: what is restored, of ``MEDIATORS`` (see the head of this file).
        window: layers of a window of ``attention`` and ``mlp``; 1 is the layer alone.
        noise, level, sigma: see ``noise.noise_scale``; its size comes from all the given facts, known or not.
            ``replacement`` puts other facts' subjects of equal token length in place of noise, at most ``n_samples``.
        n_samples: noise samples of a fact.
        position_classes: at which tokens something is restored; few of them take a fraction of the time.
        known_only: trace facts whose answer's first token has rank <= ``known_rank`` among all tokens; others are dropped
            before anything is traced, and counted.
        max_facts: at most so many, drawn by seed from those that could be traced.
        batch_size: (token, layer) cells run at once, each with all samples; changes no result.
        checkpoint: a file that keeps the facts that are done; if it is there, work goes on from it.

    Raises:
        MethodError: a parameter out of range, a probability that is not finite, or a checkpoint of another run.
        TaskError: no fact is left to trace.
        ModelError: a model whose residual stream is no sum of writers (masked language models among them).
    """
    check_tracing(mediators, window, n_samples, position_classes, batch_size, max_facts)
    decoder = model.residual
    scale = noise_scale(decoder, facts, noise, level, sigma) if facts else None
    chosen, dropped = _chosen(model, facts, noise, n_samples, known_only, known_rank, max_facts, seed)
    settings = {
        "model": model.name,
        "mediators": list(mediators),
        "window": window,
        "noise": noise,
        "level": level,
        "sigma": sigma,
        "scale": None if scale is None or scale.ndim else float(scale),
        "n_samples": n_samples,
        "position_classes": list(position_classes),
        "known_only": known_only,
        "known_rank": known_rank,
        "max_facts": max_facts,
        "seed": seed,
        "n_given": len(facts),
        "n_traced": len(chosen),
        "dropped": dropped,
        "n_layers": decoder.n_layers,
    }
    file = None if checkpoint is None else Path(checkpoint)
    identity = _identity(model, facts, settings)
    frames, rows = _resumed(file, identity)
    bar = tqdm(chosen, desc="tracing", unit="fact", disable=not progress)
    for number, fact in enumerate(bar):
        if number < len(rows):
            continue
        runs = _runs(decoder, fact, facts, noise, scale, n_samples, seed)
        row = _fact_row(decoder, number, fact, runs)
        bar.set_postfix(p_clean=f"{row['p_clean']:.2f}", p_corrupted=f"{row['p_corrupted']:.2f}")
        positions = [i for i in range(len(fact.tokens)) if fact.position_class(i) in position_classes]
        frames.append(_traced(model, decoder, fact, runs, row, mediators, window, positions, batch_size))
        rows.append(row)
        if file is not None:
            partial = TracingResult(pd.concat(frames, ignore_index=True), pd.DataFrame(rows), {"identity": identity})
            save_whole(partial, file)
    return TracingResult(pd.concat(frames, ignore_index=True), pd.DataFrame(rows), settings)


def check_tracing(
    mediators: Sequence[str] = DEFAULT_MEDIATORS,
    window: int = 10,
    n_samples: int = 10,
    position_classes: Sequence[str] = POSITION_CLASSES,
    batch_size: int = 24,
    max_facts: int | None = None,
) -> None:
    """Raise MethodError for a mediator, position class or number that ``trace`` cannot use."""
    for what, given, known in (
        ("mediator", mediators, MEDIATORS),
        ("position class", position_classes, POSITION_CLASSES),
    ):
        unknown = [name for name in given if name not in known] if given else [""]
        if unknown:
            raise MethodError(f"unknown {what} {unknown[0]!r}: use some of {', '.join(known)}")
    check_counts(1, window=window, n_samples=n_samples, batch_size=batch_size)
    if max_facts is not None:
        check_counts(1, max_facts=max_facts)


def self_checks(
    model: Model,
    facts: Sequence[FactPrompt],
    *,
    noise: str = "gaussian",
    level: float = 3.0,
    sigma: float | None = None,
    n_samples: int = 10,
    seed: int = 0,
    only: Sequence[FactPrompt] | None = None,
) -> pd.DataFrame:
    """What must hold of every fact, and by how much it does not: one row per fact and check, with the largest ``gap``.

    - ``everything``: restoring all tokens at any layer gives p_clean;
    - ``last layer, last token``: restoring that state alone gives p_clean;
    - ``nothing``: restoring none gives p_corrupted of every sample.

    Facts are taken as they are, known or not; ``only`` checks some of them, with the noise they have among all. Exact up to
    the rounding of the weights' type.

    Raises:
        MethodError, ModelError: as ``trace``; also for a fact that has no other subject to be replaced by.
    """
    decoder = model.residual
    scale = noise_scale(decoder, facts, noise, level, sigma)
    rows = []
    for number, fact in enumerate(facts if only is None else only):
        runs = _runs(decoder, fact, facts, noise, scale, n_samples, seed)
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


def _chosen(
    model: Model,
    facts: Sequence[FactPrompt],
    noise: str,
    n_samples: int,
    known_only: bool,
    known_rank: int,
    max_facts: int | None,
    seed: int,
) -> tuple[list[FactPrompt], dict[str, int]]:
    """The facts to trace, in the order given, and how many were dropped for which reason."""
    if not facts:
        raise TaskError("no facts to trace: the task gave none")
    reasons: list[str] = [""] * len(facts)
    if known_only:
        ranks = answer_ranks(model, [fact.tokens for fact in facts], [fact.answer for fact in facts])
        reasons = ["" if rank <= known_rank else f"answer not known (rank above {known_rank})" for rank in ranks]
        if all(reasons):
            raise TaskError(
                f"no known fact left: the model ranks none of the {len(facts)} answers within the first {known_rank}; use "
                "another template, known_rank or known_only=False"
            )
    if noise == "replacement":
        for i, fact in enumerate(facts):
            if not reasons[i] and replaced(fact, facts, n_samples, seed) is None:
                reasons[i] = "no other subject of equal token length"
        if all(reasons):
            raise TaskError(
                "no fact left: none of those the model knows has another subject of equal token length and another answer; "
                "use noise 'gaussian'"
            )
    could = [i for i, reason in enumerate(reasons) if not reason]
    drawn = set(random.Random(seed).sample(could, min(len(could), max_facts or len(could))))
    dropped = Counter(reason for reason in reasons if reason) + Counter({"beyond max_facts": len(could) - len(drawn)})
    return [fact for i, fact in enumerate(facts) if i in drawn], dict(dropped)


def _n_positions(fact: FactPrompt) -> int:
    return len(fact.tokens) - fact.subject[0]


def _runs(
    decoder: Decoder,
    fact: FactPrompt,
    facts: Sequence[FactPrompt],
    noise: str,
    scale: Tensor | None,
    n_samples: int,
    seed: int,
) -> FactRuns:
    """Clean and corrupted runs; the corrupted ones are made here once, so every restoration meets the same noise."""
    if scale is None:
        tokens = replaced(fact, facts, n_samples, seed)
        if tokens is None:
            raise MethodError(f"{fact.name} has no other subject of equal token length: use noise 'gaussian'")
        corrupted = decoder.embed(tokens)[:, fact.subject[0] :]
    else:
        corrupted = noised(decoder, fact, noise, scale, n_samples, seed)
    return fact_runs(decoder, torch.tensor(fact.tokens), fact.subject[0], corrupted, fact.answer)


def _fact_row(decoder: Decoder, number: int, fact: FactPrompt, runs: FactRuns) -> dict[str, Any]:
    clean, corrupted = (answer_probabilities(decoder, runs, kept) for kept in (runs.clean, runs.corrupted))
    about = {"fact": number, **{key: fact.text.get(key, "") for key in ("prompt", "subject", "answer")}}
    p_clean, p_corrupted = float(clean[0]), float(corrupted.double().mean())
    effects = {"p_clean": p_clean, "p_corrupted": p_corrupted, "total_effect": p_clean - p_corrupted}
    return about | {"n_samples": len(corrupted)} | effects


def _traced(
    model: Model,
    decoder: Decoder,
    fact: FactPrompt,
    runs: FactRuns,
    row: Mapping[str, Any],
    mediators: Sequence[str],
    window: int,
    positions: Sequence[int],
    batch_size: int,
) -> pd.DataFrame:
    """The rows of one fact."""
    grid = torch.cartesian_prod(torch.arange(decoder.n_layers), torch.tensor(positions)).reshape(-1, 2)
    layers = grid[:, 0].to(decoder.device)
    restored = torch.eye(len(fact.tokens), dtype=torch.bool)[grid[:, 1], fact.subject[0] :].to(decoder.device)
    at = grid[:, 1].tolist()
    about = {
        "fact": row["fact"],
        "layer": grid[:, 0].tolist(),
        "position": at,
        "token": [model.tokenizer.decode([fact.tokens[i]]) for i in at],
        "position_class": [fact.position_class(i) for i in at],
        "p_clean": row["p_clean"],
        "p_corrupted": row["p_corrupted"],
    }
    frames = []
    for mediator in mediators if at else ():
        found = restored_probabilities(decoder, runs, Cells(mediator, layers, restored, window), batch_size).double().cpu()
        if not found.isfinite().all():
            raise MethodError(f"{fact.name}: a probability is no finite number; use dtype float32")
        std = found.std(1) if found.shape[1] > 1 else torch.full((len(found),), float("nan"))
        frames.append(pd.DataFrame(about | {"mediator": mediator, "p": found.mean(1).numpy(), "std": std.numpy()}))
    return pd.concat(frames, ignore_index=True)[list(COLUMNS)] if frames else pd.DataFrame(columns=list(COLUMNS))


def _identity(model: Model, facts: Sequence[FactPrompt], settings: Mapping[str, Any]) -> str:
    """Hash of what determines the result."""
    return hash_of([model.hash, dict(settings), [asdict(fact) for fact in facts]])


def _resumed(file: Path | None, identity: str) -> tuple[list[pd.DataFrame], list[dict[str, Any]]]:
    """What an earlier run left in its checkpoint: rows of frame and facts."""
    if file is None or not file.exists():
        return [], []
    try:
        done = TracingResult.load(file)
    except MethodError as error:
        raise MethodError(f"{file}: cannot be read as a checkpoint of tracing ({error}); delete it") from error
    if done.provenance.get("identity") != identity:
        raise MethodError(
            f"{file}: is a checkpoint of another model, task or set of parameters; delete it or name another file"
        )
    return [done.frame], [{str(key): value for key, value in row.items()} for row in done.facts.to_dict("records")]
