"""Run folders: found, resumed, named by what determines them, and refused with one line when they cannot be used."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pandas as pd
import papermill
import pytest
import torch

from kc_lib import __version__, runs
from kc_lib.errors import KnowledgeCircuitsError, MethodError, RunError
from kc_lib.models.load import load_model
from kc_lib.models.model import Model
from kc_lib.options import Notebook, Options, option
from kc_lib.runs import Run, catalogue, find_run, open_run, read_record
from kc_lib.tasks.batches import TokenPair
from kc_lib.tasks.task import Task

PARAMETERS: dict[str, Any] = {"method": "eap", "steps": 5, "seed": 3, "batch_size": 8, "device": None, "out": None}
TASK = Task(
    "numbers",
    (TokenPair((1, 5, 6), (1, 7, 6), (8,), 9, {"subject": (1,)}, {"clean": "w5 w6"}),),
    (),
    (TokenPair((1, 10, 6), (1, 11, 6), (12,), 13, {"subject": (1,)}, {"clean": "w10 w6"}),),
    {"facts": 3, "known": 2, "used": 2},
    True,
)


class Numbers:
    """The smallest thing a run can keep."""

    def __init__(self, values: list[int]) -> None:
        self.values = values

    def save(self, path: Path) -> Path:
        pd.DataFrame({"value": self.values}).to_parquet(path)
        return path

    @classmethod
    def load(cls, path: Path) -> Numbers:
        return cls(pd.read_parquet(path)["value"].tolist())


def numbers(*values: int) -> Numbers:
    return Numbers(list(values))


class Half(Numbers):
    """Whose writing is interrupted."""

    def save(self, path: Path) -> Path:
        path.write_bytes(b"PAR1")
        raise KeyboardInterrupt


def half() -> Half:
    return Half([1])


def never() -> Numbers:
    raise AssertionError("computed again")


def interrupted() -> Numbers:
    raise KeyboardInterrupt


@pytest.fixture
def model(small_model: Callable[[str], Model]) -> Model:
    return small_model("gpt2")


Opener = Callable[..., Run]


@pytest.fixture
def opener(model: Model, tmp_path: Path) -> Opener:
    def open_with(parameters: Mapping[str, Any] = PARAMETERS, task: Task = TASK, experiment: str = "circuits") -> Run:
        return open_run(experiment, model, task, parameters, tmp_path / "out")

    return open_with


def finished(run: Run) -> Run:
    run.keep("numbers.parquet", numbers, 1, 2, 3)
    return run.finish({"faithfulness": 0.9})


def visible(root: Path) -> list[Path]:
    """Run folders in sight under an output folder."""
    return [path for path in root.glob("*/*/*/*") if not path.name.startswith(".")]


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


def test_a_finished_run_is_found_and_not_repeated(opener: Opener, tmp_path: Path) -> None:
    first = opener()
    assert not first.found
    done = finished(first)
    assert done.found
    assert visible(tmp_path / "out") == [done.folder]
    assert done.folder.parts[-4:-1] == ("circuits", "gpt2", "numbers")
    assert sorted(path.name for path in done.folder.iterdir()) == ["numbers.parquet", "run.json"]
    again = opener()
    assert again.found
    assert again.folder == done.folder
    assert again.keep("numbers.parquet", never).values == [1, 2, 3]
    before = (done.folder / "run.json").read_text()
    again.finish({"faithfulness": 0.1})
    assert (done.folder / "run.json").read_text() == before


@pytest.mark.parametrize("change", [{"steps": 6}, {"method": "exact"}, {"seed": 4}, {"new": 1}], ids=str)
def test_a_parameter_makes_another_run(change: dict[str, Any], opener: Opener, tmp_path: Path) -> None:
    first = finished(opener())
    other = opener(PARAMETERS | change)
    assert not other.found
    assert other.folder != first.folder
    finished(other)
    assert len(visible(tmp_path / "out")) == 2
    assert opener().folder == first.folder


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"device": "cpu"}, {"out": "elsewhere"}], ids=str)
def test_what_does_not_determine_the_result_makes_no_other_run(change: dict[str, Any], opener: Opener) -> None:
    first = finished(opener())
    assert opener(PARAMETERS | change).folder == first.folder
    assert opener(dict(reversed(PARAMETERS.items()))).folder == first.folder


def test_experiment_and_task_make_another_run(opener: Opener) -> None:
    first = opener()
    pair = TASK.discovery[0]
    others = [
        opener(experiment="another"),
        opener(task=replace(TASK, discovery=(replace(pair, distractor=10),))),
        opener(task=replace(TASK, discovery=(replace(pair, clean=(1, 5, 7)),))),
        opener(task=replace(TASK, discovery=TASK.test, test=TASK.discovery)),
    ]
    assert len({run.folder.name for run in [first, *others]}) == 5


def test_weights_make_another_run(small_folder: Callable[[str], Path], opener: Opener, tmp_path: Path) -> None:
    first = opener()
    model = load_model(str(small_folder("gpt2")), device="cpu")
    assert open_run("circuits", model, TASK, PARAMETERS, tmp_path / "out").folder == first.folder
    with torch.no_grad():
        next(iter(model.bridge.parameters())).view(-1)[0] += 0.01
    assert open_run("circuits", model, TASK, PARAMETERS, tmp_path / "out").folder != first.folder


def test_other_code_makes_another_run(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opener()
    assert first.record["code_hash"] == runs.code_hash()
    monkeypatch.setattr(runs, "code_hash", lambda: "0" * 16)
    assert opener().folder != first.folder


def test_code_hash_is_of_every_source_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "kc_lib"
    shutil.copytree(Path(runs.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    before = runs.code_hash()
    monkeypatch.setattr(runs, "__file__", str(package / "runs.py"))
    assert runs.code_hash() == before  # wherever it is installed
    with (package / "circuits" / "run.py").open("a") as file:
        file.write("# changed\n")
    assert runs.code_hash() != before


def test_an_interrupted_run_goes_on_from_what_it_kept(opener: Opener, tmp_path: Path) -> None:
    run = opener()
    run.keep("first.parquet", numbers, 4)
    with pytest.raises(KeyboardInterrupt):
        run.keep("second.parquet", interrupted)
    assert visible(tmp_path / "out") == []
    assert catalogue(tmp_path / "out").empty
    assert run.working.name.startswith(".")
    resumed = opener()
    assert not resumed.found
    assert resumed.working == run.working
    assert resumed.keep("first.parquet", never).values == [4]
    assert resumed.keep("second.parquet", numbers, 5).values == [5]
    assert visible(tmp_path / "out") == []
    resumed.finish({})
    assert visible(tmp_path / "out") == [resumed.folder]
    assert not run.working.exists() or run.working == resumed.folder
    assert sorted(path.name for path in resumed.folder.iterdir()) == ["first.parquet", "run.json", "second.parquet"]


def test_a_result_written_by_half_does_not_count(opener: Opener) -> None:
    run = opener()
    with pytest.raises(KeyboardInterrupt):
        run.keep("numbers.parquet", half)
    assert opener().keep("numbers.parquet", numbers, 2).values == [2]


@pytest.mark.parametrize("spoil", [b"", b"PAR1 nothing of the kind"])
def test_a_spoiled_result_names_file_and_remedy(spoil: bytes, opener: Opener) -> None:
    done = finished(opener())
    path = done.folder / "numbers.parquet"
    path.write_bytes(spoil)
    with pytest.raises(RunError) as error:
        opener().keep("numbers.parquet", never)
    message = one_line(error)
    assert str(path) in message
    assert f"delete the folder {done.folder}" in message
    shutil.rmtree(done.folder)  # the remedy helps
    assert finished(opener()).folder == done.folder


@pytest.mark.parametrize("content", ["{", "[]", "{}", None])
def test_a_spoiled_record_names_file_and_remedy(content: str | None, opener: Opener) -> None:
    done = finished(opener())
    path = done.folder / "run.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    for read in (opener, lambda: read_record(done.folder)):
        with pytest.raises(RunError) as error:
            read()
        message = one_line(error)
        assert str(path) in message
        assert "delete the folder" in message


def test_an_output_folder_that_cannot_be_written(model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunError, match="--out") as error:
            open_run("circuits", model, TASK, PARAMETERS, out)
        assert str(out) in one_line(error)
    blocked = tmp_path / "out"
    blocked.mkdir()
    (blocked / "circuits").touch()
    with pytest.raises(RunError, match="--out") as error:
        open_run("circuits", model, TASK, PARAMETERS, blocked)
    assert str(blocked) in one_line(error)


def test_the_output_folder_is_probed_without_a_trace(tmp_path: Path) -> None:
    root = runs.output_root(tmp_path / "new" / "out")
    assert root.is_dir()
    assert list(root.iterdir()) == []


def test_the_record_says_what_the_run_was_made_from(opener: Opener, model: Model) -> None:
    done = finished(opener())
    record = json.loads((done.folder / "run.json").read_text())
    assert record == read_record(done.folder)
    assert record["run_id"] == done.folder.name
    assert record["experiment"] == "circuits"
    assert record["parameters"] == PARAMETERS
    assert record["seed"] == 3
    assert record["model"]["hash"] == model.hash
    assert record["model"]["name"].endswith("gpt2")
    assert "float32" in record["model"]["dtype"]
    assert record["task"] == {"name": "numbers", "hash": TASK.hash, "prepend_bos": True, "facts": 3, "known": 2, "used": 2}
    assert record["device"] == "cpu"
    assert record["versions"]["kc_lib"] == __version__
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "transformers", "transformer_lens", "numpy", "pandas"} <= set(record["versions"])
    assert all(re.match(r"\d+\.\d+", version) for version in record["versions"].values())
    assert record["headline"] == {"faithfulness": 0.9}
    assert 0 <= record["wall_seconds"] < 60
    assert record["peak_memory_mb"] > 50
    assert datetime.fromisoformat(record["started"]) <= datetime.fromisoformat(record["finished"])


def test_the_record_names_the_commit(opener: Opener) -> None:
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=runs.CHECKOUT, capture_output=True, text=True, check=False)
    if asked.returncode:
        pytest.skip("no git repository here")
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"],
        cwd=runs.CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    commit = asked.stdout.strip()
    assert opener().record["git_commit"] == (f"{commit}-dirty" if changed.stdout.strip() else commit)


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "CHECKOUT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runs.git_commit() is None


def write_record(root: Path, run_id: str, finished: str) -> Path:
    folder = root / "circuits" / "tiny" / "numbers" / run_id
    folder.mkdir(parents=True)
    record = {
        "run_id": run_id,
        "experiment": "circuits",
        "model": {"name": "tiny"},
        "task": {"name": "numbers"},
        "finished": finished,
        "headline": {"faithfulness": 0.5, "n": 3},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_catalogue_lists_finished_runs_newest_first(opener: Opener, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert catalogue(out).empty
    assert list(catalogue(out).columns) == ["run_id", "experiment", "model", "task", "finished", "headline", "folder"]
    write_record(out, "aa11", "2024-01-01T00:00:00+00:00")
    write_record(out, "ab22", "2024-03-01T00:00:00+00:00")
    write_record(out, "cc33", "2024-02-01T00:00:00+00:00")
    opener()  # begun, not finished
    frame = catalogue(out)
    assert frame["run_id"].tolist() == ["ab22", "cc33", "aa11"]
    assert frame["headline"].iloc[0] == "faithfulness 0.5; n 3"
    assert frame[["experiment", "model", "task"]].iloc[0].tolist() == ["circuits", "tiny", "numbers"]
    done = finished(opener())
    assert catalogue(out)["run_id"].iloc[0] == done.folder.name


def test_runs_are_found_by_folder_id_and_prefix(tmp_path: Path) -> None:
    folders = {name: write_record(tmp_path, name, "2024") for name in ("aa11", "ab22", "cc33")}
    assert find_run(str(folders["aa11"]), tmp_path) == folders["aa11"]
    assert find_run("ab22", tmp_path) == folders["ab22"]
    assert find_run("c", tmp_path) == folders["cc33"]
    for name, what in (("a", "2 runs"), ("dd", "no run"), ("", "no run"), ("11", "no run")):
        with pytest.raises(RunError, match=f"^{what} named {name!r}") as error:
            find_run(name, tmp_path)
        assert "kc runs" in one_line(error)


def test_tables_are_kept_too_and_state_is_gone_when_the_run_is(opener: Opener) -> None:
    def table(n: int) -> pd.DataFrame:
        return pd.DataFrame({"value": range(n)})

    run = opener()
    run.state("half.bin").write_bytes(b"1")
    assert opener().state("half.bin").read_bytes() == b"1"
    assert run.keep("table.parquet", table, 3)["value"].tolist() == [0, 1, 2]
    assert run.keep("table.parquet", table, 5)["value"].tolist() == [0, 1, 2]
    assert sorted(path.name for path in run.finish({}).folder.iterdir()) == ["run.json", "table.parquet"]


def test_what_is_kept_says_what_it_is(opener: Opener) -> None:
    with pytest.raises(TypeError, match="returns"):
        opener().keep("numbers.parquet", lambda: Numbers([1]))


# --- settings: the parameters and options of a notebook ------------------------------------------------------------


@dataclass(frozen=True)
class Cell(Options):
    model: str = option("nano", "model", determines=False)
    metric: str = option("kl", "metric", among=("kl", "nll"))
    seed: int = option(0, "seed")
    out: str | None = option(None, "folder", determines=False)


@dataclass(frozen=True)
class Search(Options):
    metric: str = option("nll", "metric", among=("kl", "nll"))
    tau: float = option(0.01, "threshold", least=0)
    batch_size: int = option(8, "at once", least=1, determines=False)


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    module = ModuleType("notebooks_of_a_slice")
    module.NOTEBOOKS = {"searching": Notebook(Cell, {"search": Search})}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(runs.DECLARED_IN, "searching", module.__name__)
    return {"model": "nano", "metric": "kl", "seed": 0, "out": None, "options": {}, "unrelated": 1}


def test_groups_take_their_fields_from_the_cell_unless_options_name_them(declared: Mapping[str, Any]) -> None:
    plain = runs.settings("searching", declared)
    assert dict(**plain.search) == {"metric": "kl", "tau": 0.01, "batch_size": 8}
    named = runs.settings("searching", declared | {"options": {"search.metric": "nll", "search.tau": 1}})
    assert dict(**named.search) == {"metric": "nll", "tau": 1, "batch_size": 8}
    assert named.parameters() == {
        "model": "nano",
        "metric": "kl",
        "seed": 0,
        "out": None,
        "search.metric": "nll",
        "search.tau": 1,
        "search.batch_size": 8,
    }
    with pytest.raises(AttributeError, match="search"):
        _ = named.absent


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"options": {"search.tua": 1}}, RunError, ["no option 'search.tua'", "search.tau", "search.metric"]),
        ({"options": {"tau": 1}}, RunError, ["no option 'tau'"]),
        ({"options": {"search.tau": -1}}, MethodError, ["tau is -1", "at least 0"]),
        ({"metric": "kll"}, MethodError, ["'kll'", "kl, nll"]),
        ({"seed": 1.5}, MethodError, ["seed is 1.5", "whole number"]),
    ],
    ids=str,
)
def test_a_wrong_setting_is_one_line(
    change: dict[str, Any], kind: type[KnowledgeCircuitsError], words: list[str], declared: Mapping[str, Any]
) -> None:
    with pytest.raises(kind) as error:
        runs.settings("searching", declared | change)
    assert all(word in one_line(error) for word in words)


def test_a_run_depends_on_the_settings_that_determine_it(declared: Mapping[str, Any], model: Model, tmp_path: Path) -> None:
    values = declared | {"out": str(tmp_path)}

    def folder(inputs: dict[str, str] | None = None, **options: Any) -> Path:
        return runs.settings("searching", values | {"options": options}).open(model, TASK, **(inputs or {})).folder

    same = folder()
    assert folder(**{"search.batch_size": 2}) == same
    assert folder(**{"search.metric": "kl"}) == same  # the cell says that already
    others = [folder(**{"search.tau": 1.0}), folder(**{"search.metric": "nll"}), folder({"circuit": "ab"})]
    assert len({same, *others}) == 4


def test_every_notebook_asks_for_what_its_slice_declares() -> None:
    for path in sorted(runs.NOTEBOOKS.glob("*.ipynb")):
        notebook = runs.notebook_of(path.stem)
        assert notebook is not None, path.name
        cell = papermill.inspect_notebook(str(path))
        assert list(cell) == [*notebook.cell.declared(), "options"], path.name
        assert len(cell) <= 13, path.name  # 12 plain parameters, and options
        for name, declared in notebook.cell.declared().items():
            assert ast.literal_eval(cell[name]["default"]) == declared.default, (path.name, name)
            assert cell[name]["help"] == declared.metadata["help"], (path.name, name)
        assert cell["options"]["default"] == "{}"


def test_no_cell_of_a_notebook_is_long() -> None:
    for path in sorted(runs.NOTEBOOKS.glob("*.ipynb")):
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
            if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
                assert len(cell.source.splitlines()) <= 15, (path.name, number)
