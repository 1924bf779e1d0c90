"""All general head scores of SmolLM2, and CSPA against the loop over heads, positions and sources.

    make bench-heads
    make bench-heads ARGS="--out outputs/heads"     # keep the tables

Prints seconds, CPU seconds (all threads) and floating-point operations of every score, and the heads that pass. Seconds on
shared machines are noise; CPU seconds over the number of threads are nearer to what an idle machine takes.
The slow loop (``tests/oracles/heads.py``) is run for one head on two short windows; its time is per head and destination.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from measure import flops, timed
from rich.console import Console
from rich.table import Table

from kc_lib.heads.copying import copy_scores
from kc_lib.heads.general import repeat_scores
from kc_lib.heads.head_scores import GeneralHeadScores, HeadScores
from kc_lib.heads.inhibition import s_inhibition_scores
from kc_lib.heads.successor import successor_scores
from kc_lib.heads.suppression import SHARE, content_tokens, copy_suppression_scores, text_windows
from kc_lib.heads.suppression_runs import mean_head_outputs, suppression_divergences
from kc_lib.models.load import load_model
from kc_lib.tasks.files import load_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from oracles.heads import oracle_cspa  # the oracle lives with the tests


def main(
    seed: Annotated[int, typer.Option(help="seed of every draw")] = 0,
    count: Annotated[bool, typer.Option(help="count operations too, in a second run of each")] = True,
    out: Annotated[Path | None, typer.Option(help="folder for the scores")] = None,
) -> None:
    """Time every score once, print the passing heads, and compare CSPA with the slow loop."""
    console = Console(width=120)
    model = load_model("smollm2", device="cpu")
    decoder = model.residual
    found: dict[str, HeadScores] = {}
    steps: dict[str, Callable[[], dict[str, HeadScores]]] = {
        "previous token, duplicate token, induction": lambda: repeat_scores(model, seed=seed),
        "name mover, negative name mover": lambda: copy_scores(model, seed=seed),
        "copy suppression": lambda: {"copy_suppression": copy_suppression_scores(model, seed=seed)},
        "S-inhibition": lambda: {"s_inhibition": s_inhibition_scores(model, copies=found["name_mover"], seed=seed)},
        "successor": lambda: {"successor": successor_scores(model, seed=seed)},
    }
    table = Table("score", "seconds", "CPU seconds", "TFLOP", title=f"{decoder.n_layers * decoder.n_heads} heads of SmolLM2")
    seconds = cpu = operations = 0.0
    for name, step in steps.items():
        before = time.process_time()
        scores, took = timed(step)
        used = time.process_time() - before
        found |= scores
        seconds, cpu = seconds + took, cpu + used
        n = flops(step) / 1e12 if count else float("nan")
        operations += n
        table.add_row(name, f"{took:.1f}", f"{used:.1f}", f"{n:.2f}")
    table.add_row("all", f"{seconds:.1f}", f"{cpu:.1f}", f"{operations:.2f}")
    console.print(f"{torch.get_num_threads()} threads")
    console.print(table)
    every = GeneralHeadScores(found, {})
    _print_passing(console, every)
    if out is not None:
        every.save(out)
        console.print(f"scores in {out}")

    windows = text_windows(model, load_text(), 20)[:2]
    sources = content_tokens(model)
    layer, head = (found["copy_suppression"].heads() or [(20, 0)])[0]
    means = mean_head_outputs(decoder, [windows])
    (ablated, preserved), slow = timed(lambda: oracle_cspa(model, windows, windows, layer, head, sources, SHARE))
    ours, fast = timed(
        lambda: suppression_divergences(decoder, windows, means, sources, SHARE, torch.Generator().manual_seed(0))
    )
    n_heads, n_places = decoder.n_layers * decoder.n_heads, windows[:, 1:].numel()
    console.print(
        f"CSPA of a{layer}.h{head}, {n_places} destinations: slow loop {slow:.1f} s for one head, kernel {fast:.1f} s for "
        f"{n_heads}: {slow * n_heads / fast:.0f}x; KL {ablated:.6f} and {preserved:.6f} against "
        f"{float(ours.ablated[layer, head].mean()):.6f} and {float(ours.preserved[layer, head].mean()):.6f}"
    )


def _print_passing(console: Console, every: GeneralHeadScores) -> None:
    table = Table("kind", "threshold", "null (99%)", "heads that pass, best first (score)", title="by the criteria")
    for name, scores in every.scores.items():
        heads = ", ".join(f"a{layer}.h{head} ({scores.scores[layer, head]:.2f})" for layer, head in scores.heads())
        if not heads:
            best = int(scores.scores.argmax())
            layer, head = divmod(best, scores.scores.shape[1])
            heads = f"none; the best is a{layer}.h{head} ({scores.scores[layer, head]:.2f})"
        null = "" if scores.null is None else f"{scores.null:.3f}"
        table.add_row(name, f"{scores.threshold:.2f}", null, heads)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
