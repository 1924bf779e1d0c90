"""The command kc: bad input is one line and exit code 2, a run leaves a whole folder and is found again."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import torch
from helpers import (
    NOTEBOOK,
    Done,
    assert_one_line_and_code_2,
    assert_refused,
    kc,
    relation,
    rows,
    run_cells,
    visible_runs,
    write_csv,
)
from papermill.exceptions import PapermillExecutionError

from kc_lib import cli, runs
from kc_lib.circuits.baselines import random_circuit
from kc_lib.errors import KnowledgeCircuitsError, MethodError, RunError, TaskError
from kc_lib.graph import Circuit, Graph
from kc_lib.models.smollm2 import wheel_file
from kc_lib.resources import DATA

# ---------------------------------------------------------------------------------------------------- one good run


@dataclass
class Finished:
    done: Done
    arguments: list[str]
    out: Path
    folder: Path


@pytest.fixture(scope="module")
def good(small_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """kc run circuit_discovery on the small llama and a file of pairs."""
    root = tmp_path_factory.mktemp("good")
    task, out = write_csv(root / "own.csv", rows()), root / "results"
    given = {
        "model": small_folder("llama"),
        "task": task.name,  # relative to where kc is called
        "task.known_only": "false",
        "size": 0.1,
        "n_random": 2,
        "score.steps": 2,
    }
    arguments = ["run", "circuit_discovery", "--out", str(out)]
    arguments += [str(part) for key, value in given.items() for part in ("-p", key, value)]
    done = kc(*arguments, cwd=root)
    assert done.code == 0, done.err[-3000:]
    folders = visible_runs(out)
    assert len(folders) == 1
    return Finished(done, arguments, out, folders[0])


@pytest.mark.slow
def test_a_run_leaves_a_whole_folder(good: Finished) -> None:
    names = sorted(path.name for path in good.folder.iterdir())
    assert names == [
        "circuit.json",
        "circuit_discovery.ipynb",
        "evaluation.parquet",
        "evaluation_examples.parquet",
        "report.html",
        "run.json",
        "scores.parquet",
    ]
    assert good.folder.parent.parts[-3:] == ("circuit_discovery", "llama", "own")
    assert str(good.folder) in good.done.out
    assert all(name in good.done.out for name in names)
    assert "faithfulness" in good.done.out
    assert [path for path in good.folder.parent.iterdir() if path.name.startswith(".")] == []
    assert "Traceback" not in good.done.err


@pytest.mark.slow
def test_a_run_keeps_its_scores_circuit_and_evaluation(good: Finished) -> None:
    scores = pd.read_parquet(good.folder / "scores.parquet")
    assert list(scores.columns) == ["writer", "reader", "score"]
    assert scores["score"].dtype.kind == "f"
    assert scores["score"].notna().all()
    assert scores["score"].abs().max() > 0
    assert not scores.duplicated(["writer", "reader"]).any()
    heads = {kind: {int(name[4]) for name in scores["reader"] if name.endswith(f"<{kind}>")} for kind in "qkv"}
    assert heads == {"q": {0, 1, 2, 3}, "k": {0, 1}, "v": {0, 1}}  # keys and values by key-value head
    assert {"input", "a0.h0", "a2.h3", "m2"} <= set(scores["writer"])
    assert "logits" in set(scores["reader"])
    document = json.loads((good.folder / "circuit.json").read_text())
    assert document
    summary = pd.read_parquet(good.folder / "evaluation.parquet")
    assert {"circuit", "full", "empty"} <= set(summary["circuit"])
    baselines = summary[(summary["kind"] == "random baseline") & (summary["of"] == "circuit")]
    assert set(baselines["draw"]) == {1, 2}
    assert set(summary["split"]) == {"discovery", "held_out"}
    whole = summary[summary["circuit"] == "full"]
    assert (whole["faithfulness"] - 1).abs().max() < 1e-4


@pytest.mark.slow
def test_a_run_records_its_parameters(good: Finished) -> None:
    record = runs.read_record(good.folder)
    assert record["run_id"] == good.folder.name
    parameters = record["parameters"]
    assert parameters["task.known_only"] is False
    assert parameters["size"] == 0.1
    assert parameters["n_random"] == 2
    assert parameters["metric"] == "logit_difference"
    assert record["task"]["used"] == 8
    assert record["headline"]
    executed = nbformat.read(good.folder / "circuit_discovery.ipynb", as_version=4)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]


@pytest.mark.slow
def test_the_report_loads_nothing_from_elsewhere(good: Finished) -> None:
    html = (good.folder / "report.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in html
    assert len(html) > 3_000_000  # plotly.js is in it
    markup = re.sub(r"(<script\b[^>]*>).*?</script>", r"\1</script>", html, flags=re.DOTALL)
    for pattern in (
        r"<script[^>]*\bsrc=(?!\"\"|'')",
        r"<link[^>]*\bhref=[\"']?(https?:)?//",
        r"<(img|iframe|source|video|audio|embed)[^>]*\bsrc=[\"']?(https?:)?//",
        r"@import\s+(url\()?[\"']?(https?:)?//",
        r"url\([\"']?(https?:)?//",
    ):
        assert re.findall(pattern, markup) == [], pattern
    for match in re.finditer(r"<script\b[^>]*>(.{0,2000}?)</script>", html, flags=re.DOTALL):
        assert not re.search(r"(import\s+.*from|import\(|\.src\s*=)\s*[\"']https?://", match[1]), match[1][:300]


@pytest.mark.slow
def test_the_same_call_finds_the_run(good: Finished) -> None:
    before = {path.name: path.read_bytes() for path in good.folder.iterdir() if path.suffix in (".parquet", ".json")}
    again = kc(*good.arguments, "-p", "score.batch_size", 3, cwd=good.out.parent)
    assert again.code == 0, again.err[-3000:]
    assert visible_runs(good.out) == [good.folder]
    assert str(good.folder) in again.out
    assert {name: (good.folder / name).read_bytes() for name in before} == before
    shown = [line for line in good.done.out.splitlines() if "faithfulness" in line]
    assert shown
    assert [line for line in again.out.splitlines() if "faithfulness" in line] == shown


@pytest.mark.slow
def test_runs_and_show(good: Finished) -> None:
    listed = kc("runs", "--out", good.out, cwd=good.out.parent)
    assert listed.code == 0, listed.err
    assert good.folder.name in listed.out
    assert "circuit_discovery" in listed.out
    shown = kc("show", good.folder.name[:5], "--out", good.out, cwd=good.out.parent)
    assert shown.code == 0, shown.err
    for part in (good.folder.name, "parameters.size", "headline.", "model.hash", "scores.parquet", "git_commit", "seed"):
        assert part in shown.out


@pytest.mark.slow
def test_a_spoiled_result_of_a_found_run_is_named(good: Finished) -> None:
    path = good.folder / "scores.parquet"
    kept = path.read_bytes()
    try:
        path.write_bytes(kept[:100])
        done = kc(*good.arguments, cwd=good.out.parent)
    finally:
        path.write_bytes(kept)
    assert_one_line_and_code_2(done, str(path), "delete the folder")


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.slow
def test_a_bad_value_is_one_line_and_leaves_no_run(tmp_path: Path) -> None:
    done = kc("run", "circuit_discovery", "-p", "size", 5.5, "--out", tmp_path / "out", cwd=tmp_path)
    assert_one_line_and_code_2(done, "5.5")
    assert visible_runs(tmp_path / "out") == []


@pytest.mark.slow
def test_a_malformed_relation_is_one_line_and_leaves_no_run(small_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"prompt_templates": ["w3 {}", "no slot"], "samples": []}')
    arguments = ["-p", "task", "mine.json", "-p", f"model={small_folder('llama')}", "--out", "out"]
    done = kc("run", "circuit_discovery", *arguments, cwd=tmp_path)
    assert_one_line_and_code_2(done, "mine.json", "prompt_templates[1]")
    assert visible_runs(tmp_path / "out") == []


@pytest.mark.slow
def test_an_unknown_parameter_stops_kc_at_once(tmp_path: Path) -> None:
    done = kc("run", "circuit_discovery", "-p", "sizes", 5, "--out", "out", cwd=tmp_path)
    assert_one_line_and_code_2(done, "'sizes'", "n_random")
    assert len(done.err.splitlines()) == 1
    assert visible_runs(tmp_path / "out") == []


def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Done:
    """kc in this process, for what needs no notebook."""
    monkeypatch.setattr(sys, "argv", ["kc", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "250")
    code: Any = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr()
    return Done(code or 0, told.out, told.err)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("run", "no_such_notebook"), ("no_such_notebook", "circuit_discovery")),
        (("run", "absent.ipynb"), ("absent.ipynb",)),
        (("run", "circuit_discovery", "-p", "unknown", "1"), ("'unknown'", "metric")),
        (("run", "circuit_discovery", "-p", "size"), ("size", "no value")),
        (("run", "circuit_discovery", "-p", "seed", "1", "--out", "file/below"), ("file/below", "--out")),
        (("show", "nothing", "--out", "out"), ("'nothing'", "kc runs")),
        (("tasks", "--model", "./absent"), ("'./absent'",)),
    ],
    ids=str,
)
def test_bad_arguments_are_one_line(
    arguments: tuple[str, ...],
    parts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    done = called(monkeypatch, capsys, *arguments)
    assert_one_line_and_code_2(done, *parts)
    assert [path for path in tmp_path.rglob("*") if path.name not in ("file", "out")] == []


def test_a_spoiled_record_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "circuits" / "tiny" / "numbers" / "aa11" / "run.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    for arguments in (("runs",), ("show", "aa11")):
        assert_one_line_and_code_2(called(monkeypatch, capsys, *arguments, "--out", tmp_path), str(path))


BAD_FILES: dict[str, str | list[dict[str, str]]] = {
    "spoiled.json": '{"name": ',
    "slotless.json": relation(prompt_templates=["w3 w4"]),
    "missing_object.json": relation(samples=[{"subject": "w5"}]),
    "good.json": relation(),
    "good.csv": rows(),
    "subject.csv": [*rows(3), rows()[4] | {"subject": "w99"}],
    "lengths.csv": [*rows(3), rows()[4] | {"corrupted": "w3 w4"}],
    "few.csv": rows(1),
}
BAD_VALUES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"model": "./no/such/model"}, ("./no/such/model",)),
    ({"model": "."}, ("config.json",)),
    ({"model.dtype": "float8"}, ("float8",)),
    ({"model.device": "toaster"}, ("toaster",)),
    ({"model.checkpoint": 5}, ("checkpoint=5",)),
    ({"task": "no_such_relation"}, ("no_such_relation", "country_capital")),
    ({"task": "absent.json"}, ("absent.json",)),
    ({"task": "absent.csv"}, ("absent.csv",)),
    ({"task": "spoiled.json"}, ("spoiled.json", "JSON")),
    ({"task": "slotless.json"}, ("slotless.json", "prompt_templates[0]")),
    ({"task": "missing_object.json"}, ("missing_object.json", "samples[0]")),
    ({"task": "good.json", "task.template": 7}, ("template=7",)),
    ({"task": "good.json", "task.reverse": True}, ("reverse_templates",)),
    ({"task": "subject.csv"}, ("subject.csv: row 5", "w99")),
    ({"task": "lengths.csv"}, ("lengths.csv: row 5", "length")),
    ({"task": "few.csv"}, ("too few",)),
    ({"task": "good.json", "task.known_only": True, "task.known_rank": 0}, ("known_rank is 0",)),
    ({"task.test_fraction": 1.5}, ("test_fraction is 1.5",)),
    ({"task.max_facts": 0}, ("max_facts is 0",)),
    ({"method": "magic"}, ("'magic'", "eap_ig")),
    ({"metric": "magic"}, ("'magic'", "logit_difference")),
    ({"selection": "magic"}, ("'magic'", "greedy")),
    ({"intervention": "magic"}, ("'magic'", "patching")),
    ({"score.ig_rule": "magic"}, ("'magic'", "midpoint")),
    ({"score.steps": 0}, ("steps is 0",)),
    ({"size": 5.5}, ("5.5",)),
    ({"size": "many"}, ("'many'",)),
    ({"size": -1}, ("-1",)),
    ({"selection": "threshold"}, ("threshold",)),
    ({"method": "clean_corrupted", "intervention": "zero"}, ("clean_corrupted",)),
    ({"method": "acdc", "acdc.tau": 0}, ("tau is 0", "above 0")),
    ({"method": "acdc", "acdc.order": "magic"}, ("'magic'", "reverse")),
    ({"method": "acdc", "acdc.normalize": "magic"}, ("'magic'", "positions")),
    ({"method": "acdc", "acdc.prefilter": 0}, ("prefilter is 0",)),
    ({"score.batch_size": 0}, ("batch_size is 0",)),
    ({"size": 10_000_000, "score.steps": 1}, ("10000000", "edges")),
]


@pytest.mark.parametrize(("given", "parts"), BAD_VALUES, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_bad_values_in_the_notebook_are_ours_and_leave_no_run(
    given: dict[str, Any],
    parts: tuple[str, ...],
    small_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in BAD_FILES.items():
        if isinstance(content, str):
            Path(name).write_text(content)
        else:
            write_csv(Path(name), content)
    usual = {
        "model": str(small_folder("llama")),
        "task": "good.csv",
        "task.known_only": False,
        "model.device": "cpu",
        "out": "out",
    }
    assert_refused(NOTEBOOK, parts, **(usual | given))


SMALL_RUN = {"task.known_only": False, "model.device": "cpu", "out": "out", "score.steps": 2, "size": 0.2}


@pytest.mark.parametrize(
    "given",
    [
        {"method": "acdc", "metric": "match_nll", "intervention": "zero", "acdc.tau": 0.1},
        {"method": "acdc", "intervention": "patching", "acdc.tau": 0.1, "acdc.prefilter": 120, "acdc.absolute": True},
        {"selection": "bootstrap"},
        {"selection": "faithful", "select.faithfulness": 0.5},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_every_way_to_choose_a_circuit_runs_to_the_end(
    given: dict[str, Any], small_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    # one fact after different first words, so that resamples agree even on random weights
    same = {"corrupted": "w3 w50 w4 w5", "clean": "w3 w20 w4 w5", "answer": "w100", "distractor": "w120", "subject": "w20"}
    facts = [same | {key: same[key].replace("w3", f"w{60 + i}") for key in ("clean", "corrupted")} for i in range(16)]
    write_csv(Path("own.csv"), facts)
    run_cells(model=str(small_folder("llama")), task="own.csv", n_random=1, **(SMALL_RUN | given))
    (folder,) = visible_runs(tmp_path / "out")
    found = Circuit.load(folder / "circuit.json")
    assert 0 < found.n_edges < found.graph.n_edges
    assert runs.read_record(folder)["headline"]["size"].startswith(f"{found.n_edges} of ")


EVERY_FACT = {"task.known_only": False, "model.device": "cpu"}


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "ungrouped"])
def test_the_evaluation_takes_a_saved_circuit_and_tells_one_from_another(
    grouped: bool, small_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(Path("own.csv"), rows(12))
    graph = Graph(n_layers=3, n_heads=4, n_kv_heads=2, d_model=32, grouped=grouped)  # the small llama's
    usual = {"model": str(small_folder("llama")), "task": "own.csv", "circuit": "mine.json", "size": 0.2, "out": "out"}
    usual |= {"n_random": 1, "n_edges": 3}
    usual["options"] = EVERY_FACT | {"score.steps": 2, "stability.n_resamples": 2, "stability.other_methods": "eap"}
    folders = []
    for seed in (0, 1):  # the same file name, another circuit in it
        mine = random_circuit(graph, 60, seed)
        mine.save("mine.json")
        run_cells(runs.NOTEBOOKS / "circuit_evaluation.ipynb", **usual)
        (folder,) = [folder for folder in visible_runs(tmp_path / "out") if folder not in folders]
        folders.append(folder)
        evaluated = Circuit.load(folder / "circuit.json")
        assert evaluated.graph == graph
        assert torch.equal(evaluated.mask, mine.mask)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("absent.json", ("absent.json",)),
        ("spoiled.json", ("spoiled.json",)),
        ("foreign.json", ("foreign.json", "another model")),
        ("against.json", ("against.json", "against the flow")),
        ("unknown.json", ("unknown.json", "a9.h0")),
    ],
)
def test_a_circuit_that_is_none_of_the_models_is_refused_by_the_evaluation(
    name: str,
    parts: tuple[str, ...],
    small_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(Path("good.csv"), rows())
    graph = Graph(n_layers=3, n_heads=4, n_kv_heads=2, d_model=32)  # the small llama's
    whole = Circuit(graph, graph.edges).save("whole.json").read_text()
    Path("spoiled.json").write_text(whole[:1000])
    Path("against.json").write_text(whole.replace('"input->m0"', '"m2->m0"'))
    Path("unknown.json").write_text(whole.replace('"input->m0"', '"input->a9.h0<q>"'))
    other = Graph(n_layers=2, n_heads=4, n_kv_heads=2, d_model=32)
    Circuit(other, other.edges).save("foreign.json")
    usual = {"model": str(small_folder("llama")), "task": "good.csv", "out": "out", "options": EVERY_FACT}
    with pytest.raises(KnowledgeCircuitsError) as error:
        run_cells(runs.NOTEBOOKS / "circuit_evaluation.ipynb", **usual, circuit=name)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert visible_runs(tmp_path / "out") == []


@pytest.mark.parametrize(
    "given",
    [
        {"seed": "many"},
        {"score.steps": "many"},
        {"task.max_facts": "many"},
        {"task.test_fraction": "half"},
        {"task.known_rank": "first", "task.known_only": "true"},
        {"n_random": "many"},
        {"score.batch_size": "many"},
        {"model.checkpoint": "last"},
        {"task.known_only": "perhaps"},
    ],
    ids=str,
)
def test_values_of_the_wrong_type_are_ours(
    given: dict[str, str], small_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Text where a number belongs is refused, when kc reads it or where the notebook uses it."""
    monkeypatch.chdir(tmp_path)
    write_csv(Path("good.csv"), rows())
    usual = {
        "model": str(small_folder("llama")),
        "task": "good.csv",
        "task.known_only": False,
        "model.device": "cpu",
        "out": "out",
    }
    usual |= {"n_random": 1, "score.steps": 1, "size": 0.2}
    with pytest.raises(KnowledgeCircuitsError) as error:
        run_cells(**(usual | cli.parse_parameters(NOTEBOOK, given)))
    assert next(iter(given.values())) in str(error.value)


def test_only_our_errors_become_a_line() -> None:
    for kind in (TaskError, MethodError, RunError):
        ours = cli._as_ours(PapermillExecutionError(1, 1, "", kind.__name__, "what to do", []))
        assert type(ours) is kind
        assert str(ours) == "what to do"
    for name in ("ValueError", "KeyError", "annotations", "__name__"):
        told = PapermillExecutionError(1, 1, "", name, "a fault of ours", [])
        assert cli._as_ours(told) is told


# ---------------------------------------------------------------------------------------------------- the small commands


def test_parameters_are_read_as_the_notebook_means_them() -> None:
    given = {
        "size": "200",
        "task.known_only": "False",
        "task.reverse": "true",
        "task.max_facts": "none",
        "task": "5",
        "model": "none",
        "task.test_fraction": "0.25",
        "out": "/some/where",
    }
    assert cli.parse_parameters(NOTEBOOK, given) == {
        "size": 200,
        "task": "5",  # its default is text
        "model": "none",
        "out": "/some/where",
        "options": {
            "task.known_only": False,
            "task.reverse": True,
            "task.max_facts": None,
            "task.test_fraction": 0.25,
        },
    }
    assert isinstance(cli.parse_parameters(NOTEBOOK, given)["size"], int)


def test_parameters_as_two_words_or_one() -> None:
    assert cli._joined(["run", "x", "-p", "a", "1", "-p", "b=2", "--out", "o"]) == [
        "run",
        "x",
        "-p",
        "a=1",
        "-p",
        "b=2",
        "--out",
        "o",
    ]
    assert cli._joined(["-p", "a"]) == ["-p", "a"]
    assert cli._joined(["--parameter", "a", "-1"]) == ["--parameter", "a=-1"]
    assert cli._key_value("a=b=c") == ("a", "b=c")
    with pytest.raises(RunError, match="-p a VALUE"):
        cli._key_value("a")


def test_models(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    done = called(monkeypatch, capsys, "models")
    assert done.code == 0
    assert "smollm2" in done.out
    row = next(line for line in done.out.splitlines() if "smollm2" in line)
    assert ("yes" if wheel_file() else "make setup") in row
    assert "nano-bert" in done.out


def test_tasks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    done = called(monkeypatch, capsys, "tasks")
    assert done.code == 0
    names = [path.stem for path in (DATA / "relations").glob("*/*.json")]
    for name in [*names, "ioi"]:
        assert name in done.out
    assert "The capital city of … is" in done.out


def test_runs_of_an_empty_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    done = called(monkeypatch, capsys, "runs", "--out", tmp_path)
    assert done.code == 0
    assert "no runs yet" in done.out


def test_a_notebook_that_finishes_no_run_is_refused() -> None:
    document = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
    with pytest.raises(RunError, match=r"run\.finish"):
        cli._told_folder(document, Path("mine.ipynb"))


def test_a_notebook_runs_in_this_python_whatever_kernel_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another kernel of the usual name is installed; what it says is what its cell raises."""
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "other", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    cells = [nbformat.v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]})]
    cells.append(nbformat.v4.new_code_cell("import sys\nraise RuntimeError(f'{sys.executable} {x + 1}')"))
    document = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "ir", "display_name": "R"}})
    nbformat.write(document, tmp_path / "mine.ipynb")
    with pytest.raises(PapermillExecutionError) as error:
        cli.run_notebook(str(tmp_path / "mine.ipynb"), {"x": "2"}, tmp_path / "out")
    assert f"{sys.executable} 3" in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "{}", '{"cells": 5, "nbformat": 4}', "\xff"])
def test_what_is_no_notebook_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.ipynb"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError) as error:
        cli.run_notebook(str(path), {}, tmp_path / "out")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_copy_of_a_notebook_takes_its_options_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "circuit_discovery.ipynb"
    copy.write_bytes((runs.NOTEBOOKS / copy.name).read_bytes())
    monkeypatch.chdir(tmp_path)
    for path in (copy, Path(copy.name)):
        assert cli.parse_parameters(path, {"size": "0.1", "acdc.tau": "0.5"}) == {"size": 0.1, "options": {"acdc.tau": 0.5}}
        with pytest.raises(RunError, match=r"acdc\.tua"):
            cli.parse_parameters(path, {"acdc.tua": "0.5"})
    changed = nbformat.read(copy, as_version=4)
    next(cell for cell in changed.cells if "parameters" in cell.metadata.get("tags", [])).source = "mine = 1"
    nbformat.write(changed, copy)
    assert cli.parse_parameters(copy, {"mine": "2"}) == {"mine": 2}  # by the same name, but another notebook
