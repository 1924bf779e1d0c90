"""ACDC against the loop that runs the full model once per tested edge, on a GPT-2-shaped model of four layers.

The loop (``tests/oracles/acdc.py``) tests the same edges in the same order and must leave the same edge set. Every run of
it costs the same, so its operations are those of one run times the number of tests; the times are measured, unless
``--quick`` multiplies there too. Weights are random, large enough for single edges to matter, and the answers are the
model's own first choices. Seconds on shared machines are noise: look at the floating-point operations.

    make bench-acdc                              # python bench/acdc.py: the loop in full, some minutes
    make bench-acdc ARGS="--quick"               # half a minute
    make bench-acdc ARGS="--quick --smollm2"     # and ACDC on SmolLM2, capital cities, 10 facts
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import flops, timed
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from kc_lib.circuits.acdc.search import acdc
from kc_lib.metrics import get_metric
from kc_lib.models.load import load_model
from kc_lib.models.model import Model
from kc_lib.tasks.batches import TokenPair
from kc_lib.tasks.task import load_task

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import save_tokenizer  # what the tests are made of lives with them
from oracles.acdc import loss_of_edges, plain_acdc
from oracles.eap import edge_exists

EMBEDDING_SCALE, WEIGHT_SCALE = 10.0, 3.0  # on GPT-2's initial weights (standard deviation 0.02)
FACTS = 10  # of the SmolLM2 part


def main(
    metric: Annotated[str, typer.Option(help="match_nll, logit_difference, kl, log_probability")] = "match_nll",
    tau: Annotated[float, typer.Option(help="threshold, in units of the metric")] = 0.1,
    pairs: Annotated[int, typer.Option(help="number of pairs")] = 8,
    tokens: Annotated[int, typer.Option(help="tokens of a prompt, give or take one")] = 12,
    layers: Annotated[int, typer.Option(help="layers of the GPT-2-shaped model")] = 4,
    edges_at_once: Annotated[int, typer.Option(help="tests per batch")] = 32,
    quick: Annotated[bool, typer.Option(help="count the plain loop from one run instead of running it")] = False,
    smollm2: Annotated[bool, typer.Option(help="also run ACDC on SmolLM2, in full and with a prefilter")] = False,
) -> None:
    """Print tests, times and operation counts of both, their ratios, and how far the effects differ."""
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as folder:
        save_random_gpt2(Path(folder), layers)
        model = load_model(folder, device="cpu")
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    compare(console, model, reference, random_pairs(reference, pairs, tokens), metric, tau, edges_at_once, quick)
    if smollm2:
        run_on_smollm2(console, edges_at_once)


def compare(
    console: Console,
    model: Model,
    reference: PreTrainedModel,
    pairs: list[TokenPair],
    metric: str,
    tau: float,
    edges_at_once: int,
    quick: bool,
) -> None:
    def ours() -> Any:
        return acdc(model, pairs, metric=metric, tau=tau, grouped=False, edges_at_once=edges_at_once)

    whole = edge_exists(reference, ungrouped=True)
    every, answers = "logits at every position", "logits at the answers"
    loss_of = {
        what: loss_of_edges(reference, pairs, metric=metric, ungrouped=True, all_positions=everywhere)
        for what, everywhere in ((every, True), (answers, False))
    }
    circuit, own_seconds = timed(ours)
    n_tests, lengths = circuit.provenance["n_tested"], [len(pair.clean) for pair in pairs]
    own_operations = flops(ours)
    operations, times = {}, {}
    for what, loss in loss_of.items():
        operations[what] = n_tests * flops(lambda loss=loss: loss(whole))
        times[what] = n_tests * min(timed(lambda loss=loss: loss(whole))[1] for _ in range(3))
    console.print(
        f"{len(pairs)} pairs of {min(lengths)} to {max(lengths)} tokens, zero ablation, {metric}, tau = {tau:g}, "
        f"{torch.get_num_threads()} threads; kept {circuit.n_edges:,} of {circuit.graph.n_edges:,} edges "
        f"({circuit.share:.1%}) after {n_tests:,} tests"
    )
    if not quick:
        found, times[answers] = timed(lambda: plain_acdc(reference, pairs, tau, metric=metric, ungrouped=True))
        difference = (circuit.scores - found.effects).nan_to_num().abs().max().item()
        same = torch.equal(circuit.mask, found.mask) and torch.equal(circuit.scores.isnan(), found.effects.isnan())
        closest = (found.effects[~found.effects.isnan()] - tau).abs().min().item()
        console.print(
            f"edge sets and tests {'are identical' if same else 'DIFFER'}; largest difference of effects {difference:.1e}, "
            f"closest effect to tau {closest:.1e}"
        )
    table = Table("", "tests", "seconds", "GFLOP", "operations per test", title="ACDC")
    own = f"{own_operations / 1e9:,.0f}", f"{own_operations / n_tests / 1e9:.3f} GFLOP"
    table.add_row("kc_lib", f"{n_tests:,}", f"{own_seconds:.1f}", *own)
    if not get_metric(metric).answers_only:  # else a few columns of the unembedding do
        at_answers = flops(lambda: model.bridge.unembed(torch.zeros(1, len(pairs), model.cfg.d_model)))
        table.add_row(
            "  of which logits, at least", "", "", f"{n_tests * at_answers / 1e9:,.0f}", f"{at_answers / 1e9:.3f} GFLOP"
        )
    for what, total in operations.items():
        spent = f"{times[what]:.1f}" if what == answers and not quick else f"~{times[what]:.1f}"
        table.add_row(
            f"plain loop, {what}", f"{n_tests:,}", spent, f"{total / 1e9:,.0f}", f"{total / n_tests / 1e9:.3f} GFLOP"
        )
        table.add_row("  ratio", "", f"{times[what] / own_seconds:.1f}x", f"{total / own_operations:.1f}x", "")
    console.print(table)
    if not quick and not same:
        raise typer.Exit(1)


def run_on_smollm2(console: Console, edges_at_once: int) -> None:
    model = load_model("smollm2", device="cpu")
    pairs = load_task("country_capital", model, test_fraction=0.0, max_facts=2 * FACTS).discovery[:FACTS]
    title = f"ACDC on SmolLM2, country_capital, {len(pairs)} facts, zero ablation, match-NLL, tau = 0.01"
    table = Table("start from", "seconds", "edges kept", "tests", "loss", title=title)
    for prefilter in (5000, None):
        circuit, seconds = timed(
            lambda prefilter=prefilter: acdc(
                model, pairs, tau=0.01, prefilter=prefilter, edges_at_once=edges_at_once, progress=True
            )
        )
        table.add_row(
            "all edges" if prefilter is None else f"{prefilter:,} of EAP-IG",
            f"{seconds:.0f}",
            f"{circuit.n_edges:,} of {circuit.graph.n_edges:,}",
            f"{circuit.provenance['n_tested']:,}",
            f"{circuit.provenance['loss']:.3f}",
        )
    console.print(table)


def save_random_gpt2(folder: Path, layers: int) -> None:
    """A random model in the shape of GPT-2 small with fewer layers, and a tokenizer, as a folder."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(EMBEDDING_SCALE if "wte" in name or "wpe" in name else WEIGHT_SCALE)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder)


def random_pairs(reference: PreTrainedModel, n: int, tokens: int) -> list[TokenPair]:
    """Prompts of random tokens, one of which the corrupted prompt changes; the answer is what the model ranks first."""
    rng = random.Random(0)
    pairs = []
    for i in range(n):
        clean = [rng.randrange(3, reference.config.vocab_size) for _ in range(tokens + (-1, 0, 0, 1)[i % 4])]
        corrupted = list(clean)
        corrupted[rng.randrange(1, len(clean))] = rng.randrange(3, reference.config.vocab_size)
        with torch.no_grad():
            answer, distractor = reference(torch.tensor([clean])).logits[0, -1].topk(2).indices.tolist()
        pairs.append(TokenPair(tuple(clean), tuple(corrupted), (answer,), distractor, {}, {}))
    return pairs


if __name__ == "__main__":
    typer.run(main)
