"""Training both nano models into a folder, with a manifest of how they were made, and comparing two such manifests."""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kc_lib.models.nano.corpus import fact_sentences
from kc_lib.models.nano.evaluation import evaluate
from kc_lib.models.nano.shipped import CAUSAL, MANIFEST, MASKED, file_hashes, read_manifest
from kc_lib.models.nano.train import CAUSAL_PLAN, MASKED_PLAN, Plan, deterministic, train_causal, train_masked

COMMAND = "make nano"


def build(
    models: Path,
    *,
    threads: int = 2,
    causal_plan: Plan = CAUSAL_PLAN,
    masked_plan: Plan = MASKED_PLAN,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train both models, save them and their manifest into a folder, and return the manifest.

    Figures are of the weights as saved, in half precision.

    Args:
        threads: torch's; on one machine the weights depend on their number and on nothing else.
        say: is told of every checkpoint.
    """
    figures: dict[str, Any] = {CAUSAL: {}}
    seconds: dict[str, float] = {}
    n_parameters: dict[str, int] = {}

    def kept(name: str, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
        n_parameters[name] = sum(parameter.numel() for parameter in model.parameters())
        return evaluate(save(model, tokenizer, folder), tokenizer)

    started = time.perf_counter()
    with deterministic(causal_plan.seed, threads):
        for step, model, tokenizer in train_causal(causal_plan):
            found = kept(CAUSAL, models / CAUSAL / f"step{step}", model, tokenizer)
            figures[CAUSAL][str(step)] = found
            seconds[CAUSAL] = round(time.perf_counter() - started, 1)
            say(f"{CAUSAL} step {step} ({seconds[CAUSAL]:.0f} s): {in_one_line(found)}")
    started = time.perf_counter()
    with deterministic(masked_plan.seed, threads):
        masked, tokenizer = train_masked(masked_plan)
        figures[MASKED] = kept(MASKED, models / MASKED, masked, tokenizer)
        seconds[MASKED] = round(time.perf_counter() - started, 1)
        say(f"{MASKED} ({seconds[MASKED]:.0f} s): {in_one_line(figures[MASKED])}")
    manifest = {
        "command": COMMAND,
        "threads": threads,
        "plans": {CAUSAL: asdict(causal_plan), MASKED: asdict(masked_plan)},
        "steps": [int(step) for step in figures[CAUSAL]],
        "parameters": n_parameters,
        "sentences": {split: len(sentences) for split, sentences in fact_sentences().items()},
        "seconds": seconds,
        "made_on": made_on(),
        "figures": figures,
        "files": file_hashes(models),
    }
    (models / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return read_manifest(models)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedModel:
    """A complete Hugging Face folder with weights in half precision, meant to be run in float32; returns what it holds."""
    half = copy.deepcopy(model).half()
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return half.float()


def made_on() -> dict[str, str]:
    """What floating-point results may depend on beside the number of threads."""
    return {
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def comparison(known: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    """Lines that say whether two manifests are of the same files and, where not, how far their figures lie apart."""
    names = sorted(known["files"].keys() | made["files"].keys())
    other = [name for name in names if known["files"].get(name) != made["files"].get(name)]
    if not other:
        return [f"all {len(names)} files are the manifest's, byte for byte"]
    lines = [f"{len(other)} of {len(names)} files differ from the manifest's (the first: {other[0]})"]
    here = {**made["made_on"], "threads": str(made["threads"])}
    there = {**known["made_on"], "threads": str(known["threads"])}
    changed = [f"{key} {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
    lines.append(f"where they were made differs in: {'; '.join(changed) or 'nothing on record (perhaps the processor)'}")
    last = str(max(made["steps"]))
    for name, mine, theirs in (
        (CAUSAL, made["figures"][CAUSAL][last], known["figures"][CAUSAL].get(last, {})),
        (MASKED, made["figures"][MASKED], known["figures"][MASKED]),
    ):
        lines += [f"{name}, {key}: {theirs.get(key)} in the manifest, {value} here" for key, value in mine.items()]
    return lines


def in_one_line(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
