"""Training both nano models into a folder, with a manifest of how they were made, and comparing two such manifests."""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kc_lib.models.shipped import CAUSAL, MANIFEST, MASKED, file_hashes, read_manifest
from tools.train_nano.corpus import fact_sentences
from tools.train_nano.evaluation import evaluate
from tools.train_nano.train import CAUSAL_PLAN, MASKED_PLAN, Plan, deterministic, train_causal, train_masked

COMMAND = "make nano"
PER_MODEL = ("plans", "parameters", "seconds", "made_on", "figures")  # what the manifest holds by model


def build(
    models: Path,
    *,
    names: Collection[str] = (CAUSAL, MASKED),
    threads: int = 2,
    causal_plan: Plan = CAUSAL_PLAN,
    masked_plan: Plan = MASKED_PLAN,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train the models, save them and their manifest into a folder, and return the manifest.

    Figures are of the weights as saved, in half precision.

    Args:
        names: which of the models.
        threads: torch's; on one machine the weights depend on their number and on nothing else.
        say: is told of every checkpoint.
    """
    plans = {CAUSAL: causal_plan, MASKED: masked_plan}
    figures: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    n_parameters: dict[str, int] = {}

    def kept(name: str, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
        n_parameters[name] = sum(parameter.numel() for parameter in model.parameters())
        return evaluate(save(model, tokenizer, folder), tokenizer)

    if CAUSAL in names:
        started = time.perf_counter()
        figures[CAUSAL] = {}
        with deterministic(causal_plan.seed, threads):
            for step, model, tokenizer in train_causal(causal_plan):
                found = kept(CAUSAL, models / CAUSAL / f"step{step}", model, tokenizer)
                figures[CAUSAL][str(step)] = found
                seconds[CAUSAL] = round(time.perf_counter() - started, 1)
                say(f"{CAUSAL} step {step} ({seconds[CAUSAL]:.0f} s): {in_one_line(found)}")
    if MASKED in names:
        started = time.perf_counter()
        with deterministic(masked_plan.seed, threads):
            masked, tokenizer = train_masked(masked_plan)
            figures[MASKED] = kept(MASKED, models / MASKED, masked, tokenizer)
            seconds[MASKED] = round(time.perf_counter() - started, 1)
            say(f"{MASKED} ({seconds[MASKED]:.0f} s): {in_one_line(figures[MASKED])}")
    manifest = {
        "command": COMMAND,
        "plans": {name: asdict(plans[name]) for name in figures},
        "steps": [int(step) for step in figures.get(CAUSAL, ())],
        "parameters": n_parameters,
        "sentences": {split: len(sentences) for split, sentences in fact_sentences().items()},
        "seconds": seconds,
        "made_on": {name: made_on() | {"threads": str(threads)} for name in figures},
        "figures": figures,
        "files": file_hashes(models),
    }
    write_manifest(manifest, models)
    return read_manifest(models)


def write_manifest(manifest: Mapping[str, Any], models: Path) -> None:
    (models / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def merged(made: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest of one model trained again and of the other as it was."""
    others = known["figures"].keys() - made["figures"].keys()
    files = _files_of(known, others)
    found = {key: {name: known[key][name] for name in others} | made[key] for key in PER_MODEL}
    steps = made["steps"] or known["steps"]
    return {**made, **found, "steps": steps, "files": dict(sorted((files | made["files"]).items()))}


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedModel:
    """A complete Hugging Face folder with weights in half precision, meant to be run in float32; returns what it holds."""
    half = copy.deepcopy(model).half()
    half.save_pretrained(folder)
    held = copy.deepcopy(model)
    held.load_state_dict(half.state_dict())  # .half() rounds what is not saved too: frequencies of positions
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return held


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
    """Lines that say whether the files of a manifest are those of a known one and, where not, how far figures lie apart."""
    theirs = _files_of(known, made["figures"].keys())
    paths = sorted(theirs.keys() | made["files"].keys())
    other = [path for path in paths if theirs.get(path) != made["files"].get(path)]
    if not other:
        return [f"all {len(paths)} files are the manifest's, byte for byte"]
    lines = [f"{len(other)} of {len(paths)} files differ from the manifest's (the first: {other[0]})"]
    for name in made["figures"]:
        here, there = made["made_on"][name], known["made_on"].get(name, {})
        changed = [f"{key} {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
        said = "; ".join(changed) or "nothing on record (perhaps the processor)"
        lines.append(f"where {name} was made differs in: {said}")
        mine, other_figures = made["figures"][name], known["figures"].get(name, {})
        if name == CAUSAL:
            last = str(max(made["steps"]))
            mine, other_figures = mine[last], other_figures.get(last, {})
        lines += [f"{name}, {key}: {other_figures.get(key)} in the manifest, {value} here" for key, value in mine.items()]
    return lines


def _files_of(manifest: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    return {path: digest for path, digest in manifest["files"].items() if path.split("/")[0] in names}


def in_one_line(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
