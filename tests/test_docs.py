"""What a reader is pointed to is there: links, anchors, files, targets and notebooks that pages name; the site builds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from kc_lib.resources import NOTEBOOKS
from kc_lib.runs import notebook_of

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "data").glob("*/README.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
# `kc_lib/heads/general.py` or `make demo`, in running text or in a block of commands.
FILE = re.compile(r"(?<![\w/.])((?:kc_lib|tests|tools|bench|data|docs|notebooks)/[\w./-]*\w)")
TARGET = re.compile(r"(?:`|^\s*)make ([a-z][a-z-]+)", re.MULTILINE)
RUN = re.compile(r"kc run ([a-z_]+)((?:[^`\n]|\\\n)*)")  # up to the end of the line, which a backslash carries over
PARAMETER = re.compile(r"-p ([a-z_\d.]+) ")
MADE_BY_THE_USER = {"data/external"}

each = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the code host and the site make them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@each
def test_links_lead_to_files_and_headings_of_the_repository(page: Path) -> None:
    for link in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} is not there"
        assert ROOT in target.parents, f"{link} lies outside the project"
        if anchor:
            assert anchor in anchors(target), f"{link}: {target.name} has no such heading"


@each
def test_files_targets_and_notebooks_that_are_named_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # names what was
    text = page.read_text(encoding="utf-8")
    for name in FILE.findall(text):
        assert (ROOT / name).exists() or name in MADE_BY_THE_USER, f"{name} is not there"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(TARGET.findall(text)) <= targets
    assert {name for name, _ in RUN.findall(text)} <= {path.stem for path in NOTEBOOKS.glob("*.ipynb")}


@each
def test_parameters_that_are_given_exist(page: Path) -> None:
    for name, rest in RUN.findall(page.read_text(encoding="utf-8")):
        notebook = notebook_of(name)
        assert notebook is not None
        assert set(PARAMETER.findall(rest)) <= {*notebook.cell.declared(), *notebook.option_names()}, f"kc run {name}{rest}"


def test_the_first_page_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_in_the_navigation() -> None:
    navigation = str(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    for page in (ROOT / "docs").rglob("*.md"):
        assert f"'{page.relative_to(ROOT / 'docs').as_posix()}'" in navigation
    for path in NOTEBOOKS.glob("*.ipynb"):
        assert f"'notebooks/{path.name}'" in navigation


@pytest.mark.slow
@pytest.mark.skipif(not (Path(sys.executable).with_name("mkdocs")).exists(), reason="mkdocs is not installed")
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Built from a copy, as the notebooks' plugin keeps a cache beside the configuration."""
    for name in ("docs", "notebooks", "data", "tools", "kc_lib"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for path in (ROOT / "mkdocs.yml", ROOT / "LICENSE", ROOT / "CITATION.cff", *ROOT.glob("*.md")):
        shutil.copyfile(path, tmp_path / path.name)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("mkdocs")), "build", "--strict", "--site-dir", "site"],
        cwd=tmp_path,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "gallery.html"} <= {page.name for page in pages}
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe)[^>]+src=\"?https?:", html), page
        assert not [tag for tag in re.findall(r"<link[^>]+>", html) if re.search(r"href=\"?https?:", tag)], page
