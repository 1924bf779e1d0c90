"""``kc notebooks`` lists the notebooks and copies them to a folder of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from kc_lib.cli import app
from kc_lib.errors import RunError
from kc_lib.resources import NOTEBOOKS


def call(*arguments: str) -> None:
    app(arguments, standalone_mode=False)


def test_the_notebooks_are_listed_with_their_question(capsys: pytest.CaptureFixture[str]) -> None:
    call("notebooks")
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(listed) == {path.stem for path in NOTEBOOKS.glob("*.ipynb")}
    assert listed["circuit_discovery"] == "Which edges carry a fact?"


def test_copies_are_the_same_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("notebooks", "copy", str(tmp_path / "new" / "mine"))
    assert str(tmp_path / "new" / "mine") in capsys.readouterr().out
    copies = sorted((tmp_path / "new" / "mine").iterdir())
    assert [path.name for path in copies] == sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
    assert all(path.read_bytes() == (NOTEBOOKS / path.name).read_bytes() for path in copies)


def test_no_file_of_the_users_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "circuit_discovery.ipynb").write_text("mine")
    with pytest.raises(RunError, match=r"already holds circuit_discovery\.ipynb: name another folder"):
        call("notebooks", "copy", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["circuit_discovery.ipynb"]
    assert (tmp_path / "circuit_discovery.ipynb").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be copied to"):
        call("notebooks", "copy", str(tmp_path / "file" / "below"))
