"""The relations that come with the project, and the loader on the published LRE files where they are at hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from kc_lib.errors import TaskError
from kc_lib.tasks.relations import load_relation, parse_relation, relation_files

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "data" / "relations").glob("*/*.json"))
AT_LEAST = {"factual": 12, "commonsense": 4, "linguistic": 4, "bias": 4}
LRE = ROOT.parent / "shared" / "data" / "lre"
LRE_FILES = sorted(LRE.glob("*/*.json"))


def label(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_there_are_enough_relations_of_every_kind() -> None:
    counts = Counter(path.parent.name for path in FILES)
    assert set(counts) == set(AT_LEAST)
    for kind, least in AT_LEAST.items():
        assert counts[kind] >= least, kind
    names = [path.stem for path in FILES]
    assert len(set(names)) == len(names)
    assert relation_files() == {path.stem: path for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=label)
def test_relation(path: Path) -> None:
    raw = json.loads(path.read_text(encoding="utf-8"))
    wanted = {"name", "prompt_templates", "prompt_templates_zs", "reverse_templates", "properties", "samples"}
    assert set(raw) - {"paraphrase_templates"} == wanted
    assert raw["name"] == path.stem
    assert raw["properties"]["relation_type"] == path.parent.name
    assert set(raw["properties"]) == {"relation_type", "domain_name", "range_name", "symmetric"}
    assert len(raw["prompt_templates"]) >= 3
    assert len(raw["prompt_templates_zs"]) >= 1
    for key in ("prompt_templates", "prompt_templates_zs", "reverse_templates", "paraphrase_templates"):
        templates = raw.get(key, [])
        assert len(set(templates)) == len(templates), key
        for template in templates:
            assert template.count("{}") == 1
            assert template == template.strip()
    assert 25 <= len(raw["samples"]) <= 80
    subjects = [sample["subject"] for sample in raw["samples"]]
    assert len({subject.casefold() for subject in subjects}) == len(subjects)
    for sample in raw["samples"]:
        assert set(sample) == {"subject", "object"}
        for text in sample.values():
            assert text.strip() == text != ""
        assert sample["subject"].casefold() != sample["object"].casefold()
    assert len({sample["object"] for sample in raw["samples"]}) >= 2  # else no corrupted prompt has another answer


@pytest.mark.parametrize("path", FILES, ids=label)
def test_relation_loads_by_name(path: Path) -> None:
    raw = json.loads(path.read_text(encoding="utf-8"))
    relation = load_relation(path.stem)
    assert relation == load_relation(path)
    assert relation.kind == path.parent.name
    assert relation.templates == tuple(raw["prompt_templates"] + raw["prompt_templates_zs"])
    assert relation.paraphrases == tuple(raw["prompt_templates"] + raw.get("paraphrase_templates", []))
    assert [(fact.subject, fact.object) for fact in relation.facts] == [
        (sample["subject"], sample["object"]) for sample in raw["samples"]
    ]
    if raw["reverse_templates"]:
        backward = relation.reversed()
        assert len(backward.facts) >= 10
        assert {(fact.object, fact.subject) for fact in backward.facts} <= {(f.subject, f.object) for f in relation.facts}
    else:
        with pytest.raises(TaskError, match="reverse_templates"):
            relation.reversed()


def test_enough_relations_have_many_paraphrases() -> None:
    many = [path for path in FILES if "paraphrase_templates" in json.loads(path.read_text(encoding="utf-8"))]
    assert len(many) >= 15
    for path in many:
        relation = load_relation(path)
        assert len(relation.paraphrases) >= 8, path.stem
        assert len(set(relation.paraphrases)) == len(relation.paraphrases), path.stem


def test_paraphrases_are_optional_and_distinct() -> None:
    document = {"prompt_templates": ["{} is in", "See {} in"], "samples": [{"subject": "Lyon", "object": "France"}]}
    assert parse_relation(document, "r.json").paraphrases == ("{} is in", "See {} in")
    more = parse_relation(document | {"paraphrase_templates": ["See {} in ", "Go to {} in"]}, "r.json")
    assert more.paraphrases == ("{} is in", "See {} in", "Go to {} in")
    assert more.templates == ("{} is in", "See {} in")  # load_task counts these, so they stay
    with pytest.raises(TaskError, match=r"r.json: paraphrase_templates\[0\] is 'no slot'"):
        parse_relation(document | {"paraphrase_templates": ["no slot"]}, "r.json")
    with pytest.raises(TaskError, match=r"r.json: paraphrase_templates must be a list"):
        parse_relation(document | {"paraphrase_templates": "See {} in"}, "r.json")


def test_readme_lists_every_relation_with_its_counts() -> None:
    lines = (ROOT / "data" / "relations" / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = {row[0]: row[1:] for row in cells if len(row) == 7}
    for path in FILES:
        raw = json.loads(path.read_text(encoding="utf-8"))
        keys = ("samples", "prompt_templates", "prompt_templates_zs", "paraphrase_templates", "reverse_templates")
        assert rows.get(path.stem) == [path.parent.name, *(str(len(raw.get(key, []))) for key in keys)]


@pytest.mark.skipif(not LRE_FILES, reason="the published LRE files are not here")
@pytest.mark.parametrize("path", LRE_FILES, ids=label)
def test_every_published_lre_file_loads(path: Path) -> None:
    """Rows whose subject was there before, or whose object is their subject, are dropped and counted."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    relation = load_relation(path)
    kept = {sample["subject"].strip() for sample in raw["samples"] if sample["subject"].strip() != sample["object"].strip()}
    assert {fact.subject for fact in relation.facts} == kept
    assert len(relation.facts) + sum(relation.dropped.values()) == len(raw["samples"])
    assert relation.kind == path.parent.name
