"""The house of docs: which slice may import which, what sizes files and slices have, and what a function asks for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

from tools.loc import code_lines

LIBRARY = ROOT / "kc_lib"
FILES = sorted(LIBRARY.rglob("*.py"))
CORE = {"errors", "stats", "options", "reading", "resources", "results", "metrics", "plotting", "graph"}
CORE |= {"models", "tasks", "residual"}
ABOVE = {"cli", "runs", "sweep"}  # what starts notebooks stands on everything, and nothing stands on it
ARROWS = {
    "circuits": set(),
    "tracing": set(),
    "neurons": set(),
    "components": {"circuits"},
    "heads": {"components"},
    "editing": {"circuits", "tracing", "neurons", "components"},
    "behaviours": {"circuits", "heads", "components"},
    "training": {"circuits", "heads", "components"},
    "browser": {"circuits", "components", "heads"},
}
SLICES = sorted(path.name for path in LIBRARY.iterdir() if path.is_dir() and path.name in ARROWS)


def imported(path: Path) -> Iterator[str]:
    """The modules of the library that a file imports, as ``slice.module``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kc_lib."):
            yield node.module.removeprefix("kc_lib.")
        elif isinstance(node, ast.ImportFrom) and node.module == "kc_lib":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("kc_lib.") for alias in node.names if alias.name.startswith("kc_lib."))


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_imports_the_core_and_what_stands_below_it(name: str) -> None:
    allowed = CORE | ARROWS[name] | {name}
    for path in (LIBRARY / name).rglob("*.py"):
        for module in imported(path):
            assert module.partition(".")[0] in allowed, f"{path.relative_to(ROOT)} imports {module}"


def test_the_core_imports_no_slice() -> None:
    for path in FILES:
        first = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
        if first in CORE:
            for module in imported(path):
                assert module.partition(".")[0] in CORE, f"{path.relative_to(ROOT)} imports {module}"


def test_every_folder_is_part_of_the_house() -> None:
    folders = {path.name for path in LIBRARY.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= CORE | set(ARROWS)


def test_no_init_but_the_root_re_exports() -> None:
    for path in LIBRARY.rglob("__init__.py"):
        if path.parent != LIBRARY:
            assert not list(imported(path)), path.relative_to(ROOT)


# --- sizes ---------------------------------------------------------------------------------------------------------

LINES_OF_SLICES = {"circuits": 3_500, "neurons": 2_500}  # of code; others have at most 1,500
LONGEST_FILE = 450  # lines of code
SHARED_NAMES = {"__init__.py", "figures.py", "options.py", "effects.py"}  # files that mean the same wherever they are
MOST_ARGUMENTS = 8


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_can_be_read_in_an_hour(name: str) -> None:
    lines = sum(code_lines(path.read_text(encoding="utf-8")) for path in (LIBRARY / name).rglob("*.py"))
    assert lines <= LINES_OF_SLICES.get(name, 1_500)


def test_no_file_is_long() -> None:
    lines = {path.relative_to(ROOT): code_lines(path.read_text(encoding="utf-8")) for path in FILES}
    assert not {path: n for path, n in lines.items() if n > LONGEST_FILE}


def test_the_library_is_thin() -> None:
    assert sum(code_lines(path.read_text(encoding="utf-8")) for path in FILES) < 14_000


def test_no_name_of_a_file_means_two_things() -> None:
    seen: dict[str, Path] = {}
    for path in FILES:
        if path.parent != LIBRARY and path.name not in SHARED_NAMES:
            assert path.name not in seen, f"{path} and {seen[path.name]}"
            seen[path.name] = path


def test_no_function_asks_for_too_much() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert len([name for name in names if name not in ("self", "cls")]) <= MOST_ARGUMENTS, (path, node.name)
