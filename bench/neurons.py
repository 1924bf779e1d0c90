"""Attribution to knowledge neurons against the published procedure, and the time of thirty facts in five paraphrases.

The plain implementation (``tests/oracles/neurons.py``) does what the published code does for every prompt and layer: a clean
pass of the whole model on the prompt padded to 128 tokens, then all points of the integral as one batch of such passes.
Every layer costs it nearly the same, so on SmolLM2 a few layers of a prompt are run, compared and timed, and multiplied by
the number of layers; nano-bert is run whole. Seconds on shared machines are noise: look at the operations too.

    make bench-neurons                           # python bench/neurons.py, a quarter of an hour on two cores
    make bench-neurons ARGS="--facts 0"          # the comparison alone
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from measure import flops, timed
from rich.console import Console
from rich.table import Table
from transformer_lens.model_bridge import TransformerBridge

from kc_lib.kernels.knowledge_neurons import answer_states, integrated_gradients, quadrature
from kc_lib.methods.knowledge_neurons import attribute_knowledge, refine
from kc_lib.models import load_model
from kc_lib.tasks import load_cloze
from kc_lib.tasks.cloze import Cloze
from kc_lib.wiring import MlpWiring, mlp_wiring_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from oracles.neurons import published_attribution  # the plain implementation lives with the tests

KINDS = {"LlamaForCausalLM": "llama", "BertForMaskedLM": "bert", "GPTNeoXForCausalLM": "neox"}
LAYERS = {"smollm2": (0, 14, 29)}  # compared; of other models every layer


def main(
    relation: Annotated[str, typer.Option(help="a relation")] = "country_language",
    models: Annotated[str, typer.Option(help="compared, separated by spaces")] = "smollm2 nano-bert nano",
    steps: Annotated[int, typer.Option(help="points of the integral")] = 20,
    facts: Annotated[int, typer.Option(help="facts of the second part, on SmolLM2; 0 leaves it out")] = 30,
    paraphrases: Annotated[int, typer.Option(help="of each of them")] = 5,
) -> None:
    """Print times and operations of both, their ratios, the largest difference, and the time of the thirty facts."""
    console = Console(width=110)
    table = Table(
        *("model", "layers", "ours (s)", "published (s)", "faster"),
        *("ours (GFLOP)", "published", "fewer", "largest score", "difference"),
    )
    for name in models.split():
        table.add_row(name, *compare(load_model(name, device="cpu"), relation, steps, LAYERS.get(name)))
    console.print(table)
    if facts:
        model = load_model("smollm2", device="cpu")
        task = load_cloze(relation, model, n_prompts=paraphrases, max_facts=facts)
        found, seconds = timed(lambda: attribute_knowledge(model, task.facts, progress=True))
        neurons = refine(found).frame["method"].eq("knowledge").sum() / len(task.facts)
        console.print(
            f"SmolLM2, {len(task.facts)} facts of {relation} in {paraphrases} paraphrases, to a tolerance: {seconds:.0f} s "
            f"with {torch.get_num_threads()} threads; {neurons:.2f} neurons per fact"
        )


def compare(model: TransformerBridge, relation: str, steps: int, layers: tuple[int, ...] | None) -> list[str]:
    """Both on the first paraphrase of a fact, by the rule of the published code."""
    wiring = mlp_wiring_of(model)
    cloze = load_cloze(relation, model, max_facts=1).facts[0].prompts[0].clozes[0]
    every = range(wiring.n_layers)
    kind, pad = KINDS[model.cfg.architecture], int(model.tokenizer.pad_token_id or 0)
    points, weights = quadrature(steps, "left")

    def published(layer: int) -> torch.Tensor:
        return published_attribution(
            model.original_model, kind, cloze.tokens, cloze.position, cloze.target, layer, points, weights, pad
        )

    some = list(layers or every)
    plain = [timed(lambda layer=layer: published(layer)) for layer in some]
    plain_seconds = sum(seconds for _, seconds in plain) / len(some) * len(every)
    plain_flops = sum(flops(lambda layer=layer: published(layer)) for layer in some) / len(some) * len(every)
    ours(wiring, cloze, steps)  # warm
    found, seconds = timed(lambda: ours(wiring, cloze, steps))
    operations = flops(lambda: ours(wiring, cloze, steps))
    gap = max(float((found[layer] - scores).abs().max()) for layer, (scores, _) in zip(some, plain, strict=True))
    return [
        f"{len(some)} of {len(every)}",
        *(f"{seconds:.3f}", f"{plain_seconds:.1f}", f"{plain_seconds / seconds:.0f}x"),
        *(f"{operations / 1e9:.2f}", f"{plain_flops / 1e9:.0f}", f"{plain_flops / operations:.0f}x"),
        *(f"{float(found.max()):.2g}", f"{gap:.1e}"),
    ]


def ours(wiring: MlpWiring, cloze: Cloze, steps: int) -> torch.Tensor:
    """Attributions of one prompt, ``[layer, d_mlp]``."""
    states = answer_states(wiring, torch.tensor([cloze.tokens]), torch.tensor([cloze.position]))
    target = torch.tensor([cloze.target])
    return integrated_gradients(wiring, states, target, steps, "left")[:, 0]


if __name__ == "__main__":
    typer.run(main)
