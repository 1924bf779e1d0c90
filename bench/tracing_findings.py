"""Where SmolLM2 reads a subject, and through which layers: the figures on causal tracing in docs/results.md.

Known facts of ``known_1000.json`` (ROME's; give its path) and of the project's factual relations (each asked by its first
sentence), 10 noise samples, restored at the last subject token and the last token. Interrupted work goes on from the files
in ``--out``.

    python bench/tracing_findings.py --known path/to/known_1000.json      # about 20 minutes on two cores
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kc_lib.models.load import load_model
from kc_lib.models.model import Model
from kc_lib.runs import OUTPUTS
from kc_lib.tasks.facts import FactPrompt, load_facts
from kc_lib.tasks.relations import load_relation, relation_files
from kc_lib.tracing.effects import TracingResult, average_effects, peaks, severing, total_effect
from kc_lib.tracing.figures import tracing_figure
from kc_lib.tracing.options import DEFAULT_MEDIATORS, WINDOWED
from kc_lib.tracing.trace import trace

CLASSES = ("last subject token", "last token")


def main(
    known: Annotated[Path | None, typer.Option(help="known_1000.json; without it only the project's relations")] = None,
    facts: Annotated[int, typer.Option(help="known facts of each source")] = 60,
    windowed: Annotated[int, typer.Option(help="known facts of the relations, for windows of outputs")] = 30,
    out: Annotated[Path, typer.Option(help="folder for the results")] = OUTPUTS / "tracing_findings",
) -> None:
    """Print, per source, total effect, peaks and what each severing costs."""
    console = Console(width=150)
    out.mkdir(parents=True, exist_ok=True)
    model = load_model("smollm2", device="cpu")
    if known is not None:
        report(console, "known_1000", traced(model, load_facts(str(known), model).facts, facts, out / "known_1000.parquet"))
    relations = [name for name in relation_files() if load_relation(name).kind == "factual"]
    own = [fact for name in relations for fact in load_facts(name, model).facts]
    report(console, f"{len(relations)} relations", traced(model, own, facts, out / "relations.parquet"))
    report(console, "the same, windows of 10", traced(model, own, windowed, out / "windows.parquet", WINDOWED))


def traced(
    model: Model, facts: Sequence[FactPrompt], n: int, path: Path, mediators: Sequence[str] = DEFAULT_MEDIATORS
) -> TracingResult:
    result = trace(
        model,
        facts,
        mediators=mediators,
        positions=CLASSES,
        max_facts=n,
        checkpoint=path.with_suffix(".partial.parquet"),
        progress=True,
    )
    result.save(path)
    tracing_figure(result).write_image(path.with_suffix(".png"), scale=2)
    return result


def report(console: Console, name: str, result: TracingResult) -> None:
    about = result.provenance
    console.print(f"\n{name}: {about['n_traced']} facts traced of {about['n_given']}, dropped {about['dropped']}")
    console.print(total_effect(result).round(3).to_string())
    console.print(peaks(result).round(3).to_string())
    if "state" in about["mediators"]:
        console.print(severing(result).round(3).to_string())
    averages = average_effects(result)
    table = averages.pivot_table(index="layer", columns=["position_class", "mediator"], values="aie")
    console.print(table.round(3).to_string())


if __name__ == "__main__":
    typer.run(main)
