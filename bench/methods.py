"""Every discovery method on one relation and on IOI, SmolLM2, judged alike: the table of docs/results.md.

A method ranks the edges on the discovery half; its circuits at MIB's ten sizes run on the held-out half. CPR is that of
signed selection, CMD that of absolute selection (as in MIB), each beside random circuits of the same sizes. ACDC gives one
circuit and no ranking: it is judged at its own size. ``exact`` patches every edge by itself and is left out: on SmolLM2 it
takes hours where the others take seconds.

    make bench-methods                           # python bench/methods.py, about half an hour on two cores
    make bench-methods ARGS="--tasks ioi --methods eap,gim --out /tmp/table.md"
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from measure import timed
from rich.console import Console

from kc_lib.circuits.acdc.search import acdc
from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.baselines import Labelled, circuits_by_size
from kc_lib.circuits.criteria_figures import method_bars
from kc_lib.circuits.discovery import ensemble
from kc_lib.circuits.evaluate import evaluate
from kc_lib.circuits.options import METHODS
from kc_lib.circuits.scores import EdgeScores
from kc_lib.circuits.smallest import areas
from kc_lib.graph import Circuit
from kc_lib.models.load import load_model
from kc_lib.models.model import Model
from kc_lib.tasks.task import Task, load_task

AT = 0.005  # the share of the edges at which faithfulness is shown
ENSEMBLE = ("eap_ig", "qk_fix", "gim")
TAU = {"country_capital": 0.01, "ioi": 0.01}  # of ACDC, logits


def main(
    tasks: Annotated[str, typer.Option(help="comma-separated")] = "country_capital,ioi",
    methods: Annotated[str, typer.Option(help="comma-separated; default: all but exact")] = "",
    pairs: Annotated[int, typer.Option(help="at most so many pairs in either half")] = 24,
    prefilter: Annotated[int, typer.Option(help="edges ACDC starts from; 0 leaves ACDC out")] = 3000,
    out: Annotated[Path | None, typer.Option(help="Markdown file for the tables; a picture goes beside it")] = None,
) -> None:
    """Print, and if asked write, one table per task."""
    chosen = methods.split(",") if methods else [method for method in METHODS if method != "exact"]
    model = load_model("smollm2", device="cpu")
    console = Console(width=150)
    frames, text = [], []
    for name in tasks.split(","):
        task = load_task(name, model, max_facts=None if name != "ioi" else 4 * pairs)  # it answers more than half
        frame = compare(model, task, chosen, pairs, prefilter)
        frames.append(frame.assign(task=name))
        about = f"{name}: {len(task.discovery[:pairs])} pairs to rank the edges, {len(task.test[:pairs])} held out to judge"
        console.print(about)
        table = markdown(frame)
        console.print(table, markup=False)
        text.append(f"### {about}\n\n{table}\n")
    if out is not None:
        out.write_text("\n".join(text))
        figure = method_bars(pd.concat([frame.dropna(subset="cpr") for frame in frames]))
        figure.write_image(out.with_suffix(".png"), width=1000, height=520, scale=2)


def compare(model: Model, task: Task, methods: Sequence[str], pairs: int, prefilter: int) -> pd.DataFrame:
    """One row per method: seconds, areas and faithfulness on the held-out pairs."""
    discovery, held_out = task.discovery[:pairs], task.test[:pairs]
    scores: dict[str, EdgeScores] = {}
    seconds: dict[str, float] = {}
    for method in methods:
        scores[method], seconds[method] = timed(lambda method=method: score_edges(model, discovery, method))
    circuits: dict[str, Circuit | Labelled] = {}
    for method, found in scores.items():
        for selection in ("absolute", "signed"):
            circuits |= circuits_by_size(found, selection, n_random=0, label=f"{method} {selection}")
    circuits |= circuits_by_size(next(iter(scores.values())), n_random=1)
    ranked = list(scores)
    if set(ENSEMBLE) <= set(scores):
        name = f"mean of {', '.join(ENSEMBLE)}"
        parts = [scores[method] for method in ENSEMBLE]
        for absolute in (True, False):  # standardised scores are ranked as they are: 0 is the average edge
            label = f"{name} {'absolute' if absolute else 'signed'}"
            circuits |= circuits_by_size(ensemble(parts, "mean", absolute), "signed", n_random=0, label=label)
        seconds[name] = sum(seconds[method] for method in ENSEMBLE)
        ranked.append(name)
    if prefilter:
        circuits["acdc"], seconds["acdc"] = timed(
            lambda: acdc(
                model,
                discovery,
                tau=TAU.get(task.name, 0.01),
                metric="logit_difference",
                intervention="patching",
                prefilter=prefilter,
                progress=True,
            )
        )
    evaluation = evaluate(model, circuits, {"held_out": held_out}, batch_size=len(held_out), progress=True)
    curves = areas(evaluation).set_index(["ranking", "draw"])
    rows = []
    for method in [*ranked, "random"]:
        is_random = method == "random"
        signed, absolute = (
            curves.loc[("top", 1) if is_random else (f"{method} {selection}", 0)] for selection in ("signed", "absolute")
        )
        at = evaluation.row(f"random baseline 1 of top {AT:g}" if is_random else f"{method} absolute {AT:g}", "held_out")
        row = {"method": method, "seconds": seconds.get(method, float("nan")), "n_edges": at.n_edges}
        row |= {f"cpr{end}": signed[f"cpr{end}"] for end in ("", "_low", "_high")}
        row |= {f"cmd{end}": absolute[f"cmd{end}"] for end in ("", "_low", "_high")}
        row |= {"log_area": absolute.log_area}
        rows.append(row | {f"faithfulness{end}": at[f"faithfulness{end}"] for end in ("", "_low", "_high")})
    if "acdc" in circuits:
        at = evaluation.row("acdc", "held_out")
        row = {"method": f"acdc (of the {prefilter:,} best by eap_ig)", "seconds": seconds["acdc"], "n_edges": at.n_edges}
        rows.append(row | {f"faithfulness{end}": at[f"faithfulness{end}"] for end in ("", "_low", "_high")})
    return pd.DataFrame(rows)


def markdown(frame: pd.DataFrame) -> str:
    """The table as Markdown, best CPR first."""
    lines = [
        f"| method | seconds | CPR (signed) | CMD (absolute) | log area | edges | faithfulness at {AT:.1%} |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, row in frame.sort_values("cpr", ascending=False).iterrows():
        cells = [row.method, "" if pd.isna(row.seconds) else f"{row.seconds:.1f}"]
        cells += [interval(row, "cpr"), interval(row, "cmd"), "" if pd.isna(row.log_area) else f"{row.log_area:.2f}"]
        cells += [f"{row.n_edges:.0f}", interval(row, "faithfulness")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval(row: pd.Series, name: str) -> str:
    if pd.isna(row[name]):
        return ""
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"


if __name__ == "__main__":
    typer.run(main)
