"""The notebooks of knowledge neurons on bad input, and where no neuron is found: told in one line, or told as a finding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_one_line_and_code_2, assert_refused, kc, relation, run_cells, visible_runs

from kc_lib import runs

NOTEBOOKS = {name: runs.NOTEBOOKS / f"{name}.ipynb" for name in ("knowledge_neurons", "fact_editing")}
SMALL = {"out": "out", "n_prompts": 3, "n_held_out": 1, "max_facts": 3, "n_random": 1}
OPTIONS = {"model.device": "cpu", "facts.known_only": False}

TEMPLATES = ["w3 {} w5", "w4 {} w5", "{} w6", "w7 w8 {} w9"]
PARAREL = [
    [
        [f"The capital of {subject} is [MASK].", city, "P36(capital)"],
        [f"{subject} is run from [MASK].", city, "P36(capital)"],
    ]
    for subject, city in (("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"))
]
WITHOUT_MASK = [
    [[row[0].replace("[MASK]", "Rome"), *row[1:]] if row[1] == "Rome" else row for row in fact] for fact in PARAREL
]
FILES = {
    "good.json": relation(prompt_templates=TEMPLATES),
    "many.json": relation(prompt_templates=[f"w{30 + i} w{60 + 3 * i} {{}} w{90 + i}" for i in range(13)]),
    "outside.json": relation(
        prompt_templates=[
            "The capital of {} is",
            "{} has its seat of government in",
            "{} is run from",
            "The capital city of {} is",
        ],
        samples=[{"subject": "France", "object": "Paris"}, {"subject": "Italy", "object": "Xyzzyqq"}],
    ),
    "pararel.json": json.dumps(PARAREL),
    "without_mask.json": json.dumps(WITHOUT_MASK),
    "patterns.jsonl": '{"pattern": "[X] without an answer"}',
}
BAD_VALUES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"attribute.rule": "magic"}, ("'magic'", "adaptive", "trapezoid")),
    ({"attribute.rule": "right", "attribute.steps": 0}, ("steps is 0",)),
    ({"attribute.tolerance": 0.0}, ("tolerance is 0.0",)),
    ({"refine.share": 1.5}, ("share is 1.5",)),
    ({"model": "./absent"}, ("./absent",)),
    ({"relation": "no_such_relation"}, ("no_such_relation", "country_capital")),
    ({"relation": "absent.json"}, ("absent.json",)),
    ({"relation": ""}, ("cannot be joined",)),
    ({"relation": "good.json good.json"}, ("cannot be joined",)),
    ({"facts.patterns": "patterns.jsonl"}, ("patterns.jsonl: row 1", "[Y]")),
    ({"n_prompts": 4, "n_held_out": 1}, ("4 paraphrases", "n_prompts 4 and n_held_out 1")),
    ({"n_prompts": 2}, ("2 paraphrases", "at least 3")),
    ({"max_facts": 0}, ("max_facts is 0",)),
    ({"facts.known_only": True, "facts.known_rank": 0}, ("known_rank is 0",)),
    ({"attribute.batch_size": 0}, ("batch_size is 0",)),
    ({"model": "nano-bert", "relation": "without_mask.json"}, ("without_mask.json: fact 1, row 0", "0 [MASK]")),
    ({"model": "nano-bert", "relation": "outside.json"}, ("'Italy'", "'Xyzzyqq'", "outside the model's vocabulary")),
    ({"model": "nano-bert", "facts.prepend_bos": False}, ("prepend_bos", "masked LM")),
    ({"fact": 77}, ("fact 77",)),
    ({"fact": -1}, ("fact -1",)),
]
BAD_EDITS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"l2": -1.0}, ("l2 is -1.0",)),
    ({"update.scale": "magic"}, ("'magic'", "paper")),
    ({"erase": "country_capital"}, ("'country_capital'", "numbers")),
    ({"erasure.n_neurons": 0}, ("n_neurons is 0",)),
    ({"update.n_other": -1}, ("n_other is -1",)),
]


@pytest.fixture
def usual(small_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Parameters of a run on the small llama, in a folder with files good and bad."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_text(content)
    return SMALL | {"model": str(small_folder("llama")), "relation": "good.json"}


def asked(usual: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a first cell, with everything of a group in its options."""
    grouped = {key: value for key, value in given.items() if "." in key}
    plain = {key: value for key, value in given.items() if "." not in key}
    return usual | plain | {"options": OPTIONS | grouped}


@pytest.mark.parametrize("notebook", NOTEBOOKS)
@pytest.mark.parametrize(("given", "parts"), BAD_VALUES, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_bad_values_are_ours_and_leave_no_run(
    notebook: str, given: dict[str, Any], parts: tuple[str, ...], usual: dict[str, Any]
) -> None:
    assert_refused(NOTEBOOKS[notebook], parts, **asked(usual, given))


@pytest.mark.parametrize(("given", "parts"), BAD_EDITS, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_bad_edits_are_ours_and_leave_no_run(given: dict[str, Any], parts: tuple[str, ...], usual: dict[str, Any]) -> None:
    assert_refused(NOTEBOOKS["fact_editing"], parts, **asked(usual, given))


@pytest.mark.parametrize("notebook", NOTEBOOKS)
@pytest.mark.parametrize(
    "given",
    [
        {"relation": "many.json", "n_prompts": 12, "refine.share": 1.0, "refine.adapt": False},
        {"max_facts": 1},
        {"n_held_out": 0, "n_prompts": 4},
    ],
    ids=str,
)
def test_what_finds_nothing_is_a_finding(notebook: str, given: dict[str, Any], usual: dict[str, Any]) -> None:
    """Random weights: no neuron is in every paraphrase; a single fact shares nothing and has no other answer."""
    if notebook == "knowledge_neurons" and "n_held_out" in given:  # its sentences are made of held-out paraphrases
        assert_refused(NOTEBOOKS[notebook], ("no held-out paraphrases",), **asked(usual, given))
        return
    for _ in range(2):  # the second time from what was stored
        run_cells(NOTEBOOKS[notebook], **asked(usual, given))
    (folder,) = visible_runs(Path("out"))
    headline = runs.read_record(folder)["headline"]
    assert "neurons per fact, knowledge" in headline
    if "refine.share" in given:
        assert "(3 of 3 facts without any)" in headline["neurons per fact, knowledge"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_kc_says_so_in_one_line(notebook: str, usual: dict[str, Any], tmp_path: Path) -> None:
    given = {"model": "nano-bert", "relation": "without_mask.json"}
    arguments = [part for key, value in given.items() for part in ("-p", f"{key}={value}")]
    done = kc("run", notebook, *arguments, "--out", "out", cwd=tmp_path)
    assert_one_line_and_code_2(done, "without_mask.json: fact 1, row 0", "[MASK]")
    assert visible_runs(tmp_path / "out") == []
