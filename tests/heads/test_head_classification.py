"""The notebook head_classification on small models, the words it ends with, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import relation, run_cells, visible_runs

from kc_lib import runs
from kc_lib.errors import KnowledgeCircuitsError
from kc_lib.heads.ablation import HeadAblation, head_headline, recurrence
from kc_lib.heads.classes import HeadClasses
from kc_lib.heads.head_scores import GeneralHeadScores, HeadScores

NOTEBOOK = runs.NOTEBOOKS / "head_classification.ipynb"
SmallFolder = Callable[[str], Path]


@pytest.fixture
def usual(small_folder: SmallFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Parameters of a short run in an empty folder: two relations, the second too small."""
    monkeypatch.chdir(tmp_path)
    facts = [{"subject": f"w{20 + i}", "object": f"w{100 + i}"} for i in range(16)]
    Path("large.json").write_text(relation(name="large", samples=facts))
    Path("small.json").write_text(relation(name="small", samples=facts[:4]))
    options = {"task.known_only": False, "model.device": "cpu", "classes.n_null": 200}
    usual = {"model": str(small_folder("llama")), "options": options, "out": "out"}
    return usual | {"relations": "large.json small.json", "level": 0.9, "k": 60, "n_random": 3}


@pytest.mark.slow
def test_the_notebook_leaves_small_relations_out_and_finds_its_run_again(
    usual: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the small model's words are no answers of the project's relations: ranges are drawn from its own
    monkeypatch.setattr("kc_lib.heads.classes.answer_tokens", lambda tokenizer, without: list(range(120, 199)))
    run_cells(NOTEBOOK, **usual)
    (folder,) = visible_runs(tmp_path / "out")
    printed = capsys.readouterr().out
    assert "small.json is left out: 2 facts with 2 different answers" in printed
    assert "induction is not defined here: a sequence of 2 x 100 random tokens does not fit" in printed
    files = {file.name for file in folder.iterdir()}
    assert {"classes_large.parquet", "head_scores", "run.json"} <= files
    assert "classes_small.parquet" not in files
    found = HeadClasses.load(folder / "classes_large.parquet")
    record = runs.read_record(folder)
    for kind in ("mover", "relation"):
        assert (f"ablation_large_{kind}.parquet" in files) == bool(found.of_class(kind))
        assert (record["headline"][f"{kind} heads, large.json"] == "none") == (not found.of_class(kind))
    assert (found.heads["class"] != "").any()
    run_cells(NOTEBOOK, **usual)
    assert visible_runs(tmp_path / "out") == [folder]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"level": 2}, "level is 2"),
        ({"scores": "inductoin"}, "unknown name 'inductoin' in scores: use some of .*induction"),
        ({"relations": "small.json", "level": 0.01}, "it takes 7 facts with different answers"),
        ({"relations": "nowhere.json"}, "nowhere.json"),
        ({"relations": ""}, "relations is empty"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(
    given: dict[str, Any], message: str, usual: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kc_lib.heads.classes.answer_tokens", lambda tokenizer, without: list(range(120, 199)))
    with pytest.raises(KnowledgeCircuitsError, match=message) as error:
        run_cells(NOTEBOOK, **usual | given)
    assert "\n" not in str(error.value)
    assert visible_runs(tmp_path / "out") == []


def test_a_masked_model_is_refused(usual: dict[str, Any], small_folder: SmallFolder, tmp_path: Path) -> None:
    with pytest.raises(KnowledgeCircuitsError) as error:
        run_cells(NOTEBOOK, **usual | {"model": str(small_folder("bert"))})
    assert "\n" not in str(error.value)
    assert visible_runs(tmp_path / "out") == []


# --- the words ---------------------------------------------------------------------------------------------------


def classes_with(mover: list[int], relation_heads: list[int]) -> HeadClasses:
    """Six heads in two layers, some of them classified."""
    names = [
        ("mixture" if i in relation_heads else "mover") if i in mover else "relation" if i in relation_heads else ""
        for i in range(6)
    ]
    return HeadClasses(pd.DataFrame({"layer": [0, 0, 0, 1, 1, 1], "head": [0, 1, 2] * 2, "class": names}))


def scores_of(name: str, passing: list[tuple[int, int]]) -> HeadScores:
    passes = torch.zeros(2, 3, dtype=torch.bool)
    for head in passing:
        passes[head] = True
    return HeadScores(name, passes.float(), passes, 0.5)


def test_the_headline_says_what_recurs_what_costs_and_what_is_missing() -> None:
    classes = {"a": classes_with([3, 4], [5]), "b": classes_with([3], [])}
    needed = pd.DataFrame({"full": [0.9, 0.8, 0.9], "heads": [0.2, 0.1, 0.3], "random #1": [0.9, 0.8, 0.8]})
    idle = pd.DataFrame({"full": [0.9, 0.8, 0.9], "heads": [0.9, 0.8, 0.9], "random #1": [0.1, 0.3, 0.2]})
    ablations = {"a: mover": HeadAblation(needed, 2, "probability"), "b: mover": HeadAblation(idle, 1, "probability")}
    general = GeneralHeadScores({"induction": scores_of("induction", [(1, 2)]), "successor": scores_of("successor", [])}, {})
    movers = {name: found.of_class("mover") for name, found in classes.items()}
    assert recurrence(movers, 6).set_index("relations").loc[2, "heads"] == 1
    more = [ablations[f"{name}: mover"].summary().set_index("ablated").loc["more", "drop_low"] for name in ("a", "b")]
    assert [low > 0 for low in more] == [True, False]
    assert general.summary()[["name", "layer", "head"]].to_numpy().tolist() == [["induction", 1, 2]]
    headline = head_headline(classes, ablations, general)
    assert headline["mover heads, a"] == "a1.h0, a1.h1"
    assert headline["relation heads, b"] == "none"
    assert headline["without them, a, mover"].startswith("probability -0.667 [")
    assert headline["successor heads"] == "none"
    assert headline["induction heads"] == "a1.h2"
    assert headline["relation heads, a"] == "a1.h2"
    assert not [
        key for key in head_headline(classes, {}, GeneralHeadScores({}, {})) if "without" in key or "induction" in key
    ]
