"""Edge attribution and circuit runs against the published procedure, in one run on SmolLM2.

The oracle (``tests/oracles/eap.py``) is the published EAP-IG procedure: one residual copy per head and reader, one
interpolation step at a time, contracted at every reader, logits at every position. It is leaner than the published code,
which caches more. Both get the same pairs; scores are compared before anything is timed. Seconds on shared machines are
noise: look at the ratio and at the floating-point operations.

    make bench                                   # python bench/attribution.py
    make bench ARGS="--pairs 24 --steps 10"
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from measure import flops, timed
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from kc_lib.circuits.attribution import path_points, score_edges
from kc_lib.circuits.run import run_circuit
from kc_lib.circuits.selection import select
from kc_lib.graph import Circuit
from kc_lib.models.load import load_model
from kc_lib.models.smollm2 import cached_smollm2
from kc_lib.residual.activations import ablation, shared_prefix
from kc_lib.residual.logits import full_logits
from kc_lib.tasks.batches import make_batch
from kc_lib.tasks.task import load_task

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from oracles import eap  # the oracle lives with the tests


def main(
    pairs: Annotated[int, typer.Option(help="pairs of the capital-city task")] = 12,
    steps: Annotated[int, typer.Option(help="interpolation steps")] = 5,
    repeats: Annotated[int, typer.Option(help="timed runs of each, after one warm-up")] = 3,
    ungrouped: Annotated[bool, typer.Option(help="a key and value reader per query head, as published code")] = True,
) -> None:
    """Print both times and operation counts, their ratios, and the largest difference of the scores."""
    console = Console(width=110)
    model = load_model("smollm2", device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(
        cached_smollm2(), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    task = load_task("country_capital", model, test_fraction=0.0, max_facts=2 * pairs)
    chosen = task.discovery[:pairs]
    batch = make_batch(chosen)
    points = path_points("eap_ig", steps)

    def ours() -> torch.Tensor:
        return score_edges(model, chosen, steps=steps, grouped=not ungrouped, batch_size=pairs).scores

    def published() -> torch.Tensor:
        return eap.oracle_edge_scores(
            reference,
            batch.clean,
            batch.corrupted,
            batch.answer_positions[:, 0],
            batch.answers[:, 0],
            batch.distractors,
            alphas=points,
            ungrouped=ungrouped,
        )

    decoder = model.residual

    def plain() -> torch.Tensor:
        return full_logits(decoder, batch)

    fast, slow = ours(), published()
    console.print(
        f"{len(chosen)} pairs of {batch.clean.shape[1]} tokens, m = {steps}, {torch.get_num_threads()} threads, "
        f"{'ungrouped' if ungrouped else 'grouped'} view; largest score {slow.abs().max():.2f}, "
        f"largest difference {(fast - slow).abs().max():.1e}"
    )
    times = {"kc_lib EAP-IG": [], "published procedure": [], "plain forward": []}
    for _ in range(repeats):  # in turn, so that a drift of the machine's speed meets all of them
        for name, call in zip(times, (ours, published, plain), strict=True):
            times[name].append(timed(call)[1])
    operations = {name: flops(call) for name, call in zip(times, (ours, published, plain), strict=True)}
    table = Table("", "seconds (median)", "GFLOP", title="EAP-IG (inputs) scores")
    for name, values in times.items():
        table.add_row(name, f"{statistics.median(values):.2f}", f"{operations[name] / 1e9:.0f}")
    ratios = [b / a for a, b in zip(times["kc_lib EAP-IG"], times["published procedure"], strict=True)]
    fewer = operations["published procedure"] / operations["kc_lib EAP-IG"]
    table.add_row("ratio (run by run)", f"{statistics.median(ratios):.1f}x faster", f"{fewer:.1f}x fewer")
    console.print(table)

    prefix = shared_prefix(decoder, batch, "patching")
    ablated = ablation(decoder, "patching", batch, prefix=prefix)
    scores = score_edges(model, chosen, steps=steps, batch_size=pairs)
    table = Table("edges", "seconds / plain forward", "GFLOP / plain forward", title="running a circuit")
    for share in (0.001, 0.005, 0.02, 0.1, 0.5, 1.0):
        circuit = select(scores, "absolute", share)

        def run(circuit: Circuit = circuit) -> torch.Tensor:
            return run_circuit(decoder, circuit.graph, circuit.mask, batch, ablated, prefix)

        run()
        slower = statistics.median(timed(run)[1] / timed(plain)[1] for _ in range(repeats))
        table.add_row(f"{share:.1%}", f"{slower:.2f}", f"{flops(run) / operations['plain forward']:.2f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
