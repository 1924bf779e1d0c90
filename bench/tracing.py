"""Causal tracing against one plain forward pass per cell, and the time of twenty facts, on SmolLM2.

The plain implementation (``tests/oracles/tracing.py``) runs the whole Hugging Face model once per (mediator, layer, token),
its noise samples as one batch, as published code does. Every such run of a fact costs the same, so a few are run, compared
and timed, and multiplied; ``--every`` runs them all. Both do the same cells, those of the tokens from the subject on; "by
grid" counts the published grid, which also runs the tokens left of it, where nothing can change. Seconds on shared machines
are noise: look at the operations too.

    make bench-tracing                           # python bench/tracing.py, ten minutes on two cores
    make bench-tracing ARGS="--facts 0"          # the comparison alone
"""

from __future__ import annotations

import random
import statistics
import sys
from operator import mul
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import flops, timed
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from kc_lib.models.load import load_model
from kc_lib.models.model import Model
from kc_lib.models.smollm2 import cached_smollm2
from kc_lib.residual.decoder import Decoder
from kc_lib.tasks.facts import FactPrompt, FactTask, load_facts
from kc_lib.tasks.options import POSITION_CLASSES
from kc_lib.tracing.noise import noise_scale, noised
from kc_lib.tracing.options import DEFAULT_MEDIATORS
from kc_lib.tracing.restore import Cells, fact_runs, restored_probabilities
from kc_lib.tracing.trace import trace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from oracles.tracing import kept_run, oracle_restored  # the plain implementation lives with the tests


def main(
    task: Annotated[str, typer.Option(help="a relation, or a file such as known_1000.json")] = "person_occupation",
    facts: Annotated[int, typer.Option(help="known facts of the second part; 0 leaves it out")] = 20,
    compared: Annotated[int, typer.Option(help="facts of the comparison")] = 2,
    samples: Annotated[int, typer.Option(help="noise samples")] = 10,
    plain_cells: Annotated[int, typer.Option(help="plain runs timed per fact and mediator")] = 8,
    every: Annotated[bool, typer.Option(help="run every cell of the plain implementation")] = False,
) -> None:
    """Print times and operations of both, their ratios, the largest difference, and the time of the twenty facts."""
    console = Console(width=120)
    model = load_model("smollm2", device="cpu")
    loaded = load_facts(task, model)
    compare(console, model, loaded, compared, samples, None if every else plain_cells)
    if facts:
        result, seconds = timed(lambda: trace(model, loaded.facts, max_facts=facts, n_samples=samples, progress=True))
        n_classes = result.frame["position_class"].nunique()
        positions = result.frame.groupby("fact")["position"].nunique()
        console.print(
            f"{len(result.facts)} facts of {task}, {n_classes} of {len(POSITION_CLASSES)} position classes, "
            f"{len(DEFAULT_MEDIATORS)} mediators, {samples} samples, {positions.mean():.1f} tokens from subject to end on "
            f"average: {seconds:.0f} s with {torch.get_num_threads()} threads, the choice of the facts included"
        )


def compare(console: Console, model: Model, task: FactTask, n: int, samples: int, plain_cells: int | None) -> None:
    reference = AutoModelForCausalLM.from_pretrained(
        cached_smollm2(), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    decoder = model.residual
    scale = noise_scale(decoder, task.facts, "gaussian")
    largest = [fact for fact in task.facts if len({fact.position_class(i) for i in range(len(fact.tokens))}) == 7]
    table = Table(
        *("mediator", "cells", "ours (s)", "plain (s)", "faster", "by grid"),
        *("ours (GFLOP)", "plain", "fewer", "by grid", "difference"),
    )
    ratios, shares, grids = [], [], []
    for fact in (largest or task.facts)[:n]:
        for mediator in DEFAULT_MEDIATORS:
            row = _one(decoder, reference, fact, scale, mediator, samples, plain_cells)
            ratios.append(row["plain_seconds"] / row["seconds"])
            shares.append(row["plain_flops"] / row["flops"])
            grids.append(len(fact.tokens) / (len(fact.tokens) - fact.subject[0]))
            times = f"{row['seconds']:.1f}", f"{row['plain_seconds']:.0f}"
            operations = f"{row['flops'] / 1e9:,.0f}", f"{row['plain_flops'] / 1e9:,.0f}"
            ratio = (f"{ratios[-1]:.1f}x", f"{ratios[-1] * grids[-1]:.1f}x")
            share = (f"{shares[-1]:.1f}x", f"{shares[-1] * grids[-1]:.1f}x")
            table.add_row(mediator, str(row["cells"]), *times, *ratio, *operations, *share, f"{row['difference']:.0e}")
        after = len(fact.tokens) - fact.subject[0]
        console.print(f"{fact.text['prompt']!r}: {len(fact.tokens)} tokens, {after} from the subject on")
    table.title = (
        f"tracing on SmolLM2, {samples} samples, {torch.get_num_threads()} threads; median {statistics.median(ratios):.1f}x "
        f"faster, {statistics.median(shares):.1f}x fewer operations; against the published grid "
        f"{statistics.median(map(mul, ratios, grids)):.1f}x and {statistics.median(map(mul, shares, grids)):.1f}x"
    )
    console.print(table)


def _one(
    decoder: Decoder,
    reference: Any,
    fact: FactPrompt,
    scale: torch.Tensor,
    mediator: str,
    samples: int,
    plain_cells: int | None,
) -> dict[str, Any]:
    """Times, operations and the largest difference of one fact and mediator."""
    tokens, start = torch.tensor(fact.tokens), fact.subject[0]
    corrupted = noised(decoder, fact, "gaussian", scale, samples, 0)
    noise = (corrupted - decoder.embed(tokens[None])[:, start:])[:, : len(fact.subject)]
    positions = range(start, len(tokens))
    grid = torch.cartesian_prod(torch.arange(decoder.n_layers), torch.tensor(list(positions)))
    restored = torch.eye(len(tokens), dtype=torch.bool)[grid[:, 1], start:]

    def ours() -> torch.Tensor:
        runs = fact_runs(decoder, tokens, start, corrupted, fact.answer)
        return restored_probabilities(decoder, runs, Cells(mediator, grid[:, 0], restored))

    given = (tokens[None], fact.subject, noise, fact.answer)
    with torch.no_grad():
        kept = (kept_run(reference, *given[:2], torch.zeros_like(noise), fact.answer)[0], kept_run(reference, *given)[0])

    def plain(layer: int, position: int) -> torch.Tensor:
        return oracle_restored(reference, *given, mediator, layer, [position], 10, kept)

    chosen = list(range(len(grid)))
    if plain_cells is not None:
        chosen = random.Random(0).sample(chosen, min(plain_cells, len(chosen)))
    found, seconds = timed(ours)
    timings = [timed(lambda cell=cell: plain(*grid[cell].tolist())) for cell in chosen]
    one = statistics.median(time for _, time in timings)
    return {
        "cells": len(grid),
        "seconds": seconds,
        "plain_seconds": one * len(grid) if plain_cells is not None else sum(time for _, time in timings),
        "flops": flops(ours),
        "plain_flops": flops(lambda: plain(0, start)) * len(grid),
        "difference": max((found[cell] - p).abs().max().item() for cell, (p, _) in zip(chosen, timings, strict=True)),
    }


if __name__ == "__main__":
    typer.run(main)
