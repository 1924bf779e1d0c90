"""The wheel in an empty folder, in an environment of its own: notebooks, data and small models come with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

from kc_lib.resources import DATA, NOTEBOOKS

pytestmark = pytest.mark.slow
SOURCES = ("kc_lib", "data", "notebooks", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def called(*command: object, cwd: Path) -> str:
    """What a command prints; the environment is a user's, without this checkout on any path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")  # nbconvert's templates, as in site_packages
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools leaves its work beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, folder / "source" / name)
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, "./source")
    called(sys.executable, *build, cwd=folder)
    (built,) = folder.glob("kc_lib-*.whl")
    return built


@pytest.fixture(scope="module")
def kc(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``kc`` of a new environment that has the wheel installed and finds its dependencies in the present one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    # The lines of a .pth file are paths only: an editable kc_lib of the present environment is not seen.
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    install = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    called(sys.executable, *install, cwd=folder)
    return folder / "bin" / "kc"


def test_it_carries_what_comes_with_the_project(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder, name in ((DATA, "data"), (NOTEBOOKS, "notebooks")):
        files = [path for path in folder.rglob("*") if path.is_file() and "external" not in path.parts]
        shipped = {f"kc_lib/{name}/{path.relative_to(folder).as_posix()}" for path in files if path.suffix != ".pyc"}
        assert {path for path in inside if path.startswith(f"kc_lib/{name}/")} == shipped
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kc_lib").rglob("*.py")}
    assert modules | {"kc_lib/py.typed"} <= inside
    assert not [path for path in inside if path.startswith(("tests/", "tools/", "bench/"))]


def test_a_run_goes_to_the_folder_where_it_was_called(kc: Path, tmp_path: Path) -> None:
    called(kc, "run", "circuit_discovery", "-p", "model", "nano", "-p", "size", "0.05", cwd=tmp_path)
    (record,) = (tmp_path / "outputs" / "circuit_discovery" / "nano" / "country_capital").glob("*/run.json")
    assert json.loads(record.read_text())["git_commit"] is None
    assert {"circuit_discovery.ipynb", "report.html", "circuit.json"} <= {path.name for path in record.parent.iterdir()}
    assert record.parent.name in called(kc, "runs", cwd=tmp_path)


def test_tasks_come_with_it(kc: Path, tmp_path: Path) -> None:
    tasks = called(kc, "tasks", cwd=tmp_path)
    assert "country_capital" in tasks
    assert "ioi" in tasks
    assert not list(tmp_path.iterdir())


def test_notebooks_are_copied_from_it(kc: Path, tmp_path: Path) -> None:
    called(kc, "notebooks", "copy", "mine", cwd=tmp_path)
    copies = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    assert copies == {path.name: path.read_bytes() for path in NOTEBOOKS.glob("*.ipynb")}
