"""Attribution to knowledge neurons against the published procedure, and the time of thirty facts in five paraphrases.

The plain implementation (``tests/oracles/neurons.py``) does what the published code does for every prompt and layer: a clean
pass of the whole model on the prompt padded to 128 tokens, then all points of the integral as one batch of such passes.
Every layer and prompt costs it nearly the same, so on SmolLM2 a few layers of one prompt are run, compared and timed, and
multiplied; the nano models are run whole. Both use the left rule with twenty points; the time of the thirty facts is that of
the default, to a tolerance. Seconds on shared machines are noise: look at the operations too.

    make bench-neurons                           # python bench/neurons.py, a quarter of an hour on two cores
    make bench-neurons ARGS="--facts 0"          # the comparison alone
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from measure import flops, timed
from rich.console import Console
from rich.table import Table

from kc_lib.models.load import load_model
from kc_lib.models.model import Model
from kc_lib.neurons.attribute import knowledge_neurons
from kc_lib.neurons.cloze import load_cloze
from kc_lib.neurons.integrate import Paths, answer_states, integrated_gradients, quadrature
from kc_lib.neurons.refine import refine_neurons

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from oracles.neurons import published_attribution  # the plain implementation lives with the tests

KINDS = {"LlamaForCausalLM": "llama", "BertForMaskedLM": "bert", "GPTNeoXForCausalLM": "neox"}
LAYERS = {"smollm2": (0, 14, 29)}  # compared, on one prompt; of other models every layer and prompt
PROMPTS = 24  # facts asked, of which those of one length are compared


def main(
    relation: Annotated[str, typer.Option(help="a relation")] = "country_language",
    models: Annotated[str, typer.Option(help="compared, separated by spaces")] = "smollm2 nano-bert nano",
    steps: Annotated[int, typer.Option(help="points of the integral")] = 20,
    facts: Annotated[int, typer.Option(help="facts of the second part, on SmolLM2; 0 leaves it out")] = 30,
    paraphrases: Annotated[int, typer.Option(help="of each of them")] = 5,
) -> None:
    """Print times and operations of both, their ratios, the largest difference, and the time of the thirty facts."""
    console = Console(width=124)
    table = Table(
        *("model", "prompts", "layers", "ours (s)", "published", "faster"),
        *("GFLOP", "published", "fewer", "largest score", "difference"),
    )
    for name in models.split():
        table.add_row(name, *compare(load_model(name, device="cpu"), relation, steps, LAYERS.get(name)))
    if table.rows:
        console.print(table)
    if facts:
        model = load_model("smollm2", device="cpu")
        task = load_cloze(relation, model, n_prompts=paraphrases, max_facts=facts)
        attributions, seconds = timed(lambda: knowledge_neurons(model, task.facts, progress=True))
        neurons = refine_neurons(attributions).frame["method"].eq("knowledge").sum() / len(task.facts)
        console.print(
            f"SmolLM2, {len(task.facts)} facts of {relation} in {paraphrases} paraphrases, to a tolerance: {seconds:.0f} s "
            f"with {torch.get_num_threads()} threads; {neurons:.2f} neurons per fact"
        )


def compare(model: Model, relation: str, steps: int, layers: tuple[int, ...] | None) -> list[str]:
    """Both on the first paraphrase of some facts, by the rule of the published code, which takes one prompt at a time."""
    decoder = model.mlp_residual
    clozes = [fact.prompts[0].clozes[0] for fact in load_cloze(relation, model, max_facts=PROMPTS).facts]
    lengths = Counter(len(cloze.tokens) for cloze in clozes)
    clozes = [cloze for cloze in clozes if len(cloze.tokens) == lengths.most_common(1)[0][0]]
    every, some = range(decoder.n_layers), list(layers or range(decoder.n_layers))
    asked = clozes if layers is None else clozes[:1]  # by the published procedure, which is slow
    kind, pad = KINDS[model.cfg.architecture], int(model.tokenizer.pad_token_id or 0)
    points, weights = quadrature(steps, "left")

    def published() -> list[torch.Tensor]:
        about = (model.bridge.original_model, kind)
        return [
            torch.stack(
                [
                    published_attribution(*about, c.tokens, c.position, c.target, layer, points, weights, pad)
                    for layer in some
                ]
            )
            for c in asked
        ]

    def ours() -> torch.Tensor:
        states = answer_states(decoder, torch.tensor([c.tokens for c in clozes]), torch.tensor([c.position for c in clozes]))
        paths = Paths(decoder, states, torch.tensor([c.target for c in clozes]))
        return integrated_gradients(paths, steps, "left")

    times = len(every) / len(some) * len(clozes) / len(asked)
    plain, plain_seconds = timed(published)
    plain_seconds, plain_flops = plain_seconds * times, flops(published) * times
    ours()  # warm
    scores, seconds = timed(ours)
    operations = flops(ours)
    gap = max(float((scores[some, i] - expected).abs().max()) for i, expected in enumerate(plain))
    return [
        *(str(len(clozes)), f"{len(some)} of {len(every)}"),
        *(f"{seconds:.2f}", f"{plain_seconds:.1f}", f"{plain_seconds / seconds:.0f}x"),
        *(f"{operations / 1e9:.1f}", f"{plain_flops / 1e9:.0f}", f"{plain_flops / operations:.0f}x"),
        *(f"{float(scores.max()):.2g}", f"{gap:.1e}"),
    ]


if __name__ == "__main__":
    typer.run(main)
