"""Facts as single prompts: where their subjects lie, from every kind of file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import SmallModel, known, written

from kc_lib.errors import TaskError
from kc_lib.models.model import Model
from kc_lib.tasks.facts import FactPrompt, load_facts
from kc_lib.tasks.options import POSITION_CLASSES
from kc_lib.tasks.relations import load_relation
from kc_lib.tasks.task import load_task

ROOT = Path(__file__).resolve().parents[2]
KNOWN = ROOT.parent / "shared" / "data" / "known_1000.json"


def fact(n_tokens: int, subject: tuple[int, ...]) -> FactPrompt:
    return FactPrompt(tuple(range(n_tokens)), subject, 7, {"prompt": "a b", "subject": "b"})


def test_position_classes() -> None:
    first, middle, last, after, further, end = POSITION_CLASSES

    def of(n_tokens: int, subject: tuple[int, ...]) -> list[str | None]:
        return [fact(n_tokens, subject).position_class(i) for i in range(n_tokens)]

    assert of(9, (2, 3, 4, 5)) == [None, None, first, middle, middle, last, after, further, end]
    assert of(5, (1, 2)) == [None, first, last, after, end]
    assert of(3, (1,)) == [None, last, end]  # the only subject token is its last, the last token is no "first after"
    assert of(4, (2, 3)) == [None, None, first, last]


@pytest.mark.parametrize("subject", [(), (2, 4), (7,), (-1, 0), (3, 2)])
def test_a_subject_is_a_run_of_the_prompts_tokens(subject: tuple[int, ...]) -> None:
    with pytest.raises(TaskError, match="no run of its tokens"):
        fact(5, subject)


def test_facts_of_a_relation_are_those_of_its_pairs(small_model: SmallModel, tmp_path: Path) -> None:
    relation = {"name": "numbers", "prompt_templates": ["w3 {} w5", "{} w6"]}
    relation["samples"] = [{"subject": f"w{20 + i} w9", "object": f"w{100 + i}"} for i in range(6)]
    path, model = written(tmp_path / "numbers.json", relation), small_model("gpt2")
    facts = load_facts(path, model)
    assert (facts.name, facts.report, facts.prepend_bos) == ("numbers", {"rows": 6, "facts": 6}, True)
    pairs = {pair.text["clean"]: pair for pair in load_task(path, model, known_only=False, test_fraction=0.0).discovery}
    assert len(pairs) == 6
    for one in facts.facts:
        pair = pairs[one.text["prompt"]]
        assert (one.tokens, one.subject, one.answer) == (pair.clean, pair.positions["subject"], pair.answer[0])
    second = load_facts(path, model, template=1, prepend_bos=False)
    assert [one.subject for one in second.facts] == [(0, 1)] * 6
    assert second.hash != facts.hash
    with pytest.raises(TaskError, match="template=2"):
        load_facts(path, model, template=2)
    with pytest.raises(TaskError, match="reverse_templates"):
        load_facts(path, model, reverse=True)


def test_a_subject_is_where_the_template_puts_it(small_model: SmallModel, tmp_path: Path) -> None:
    relation = {"prompt_templates": ["{} w4 w10"], "samples": [{"subject": "w10", "object": "w20"}]}
    facts = load_facts(written(tmp_path / "twice.json", relation), small_model("gpt2"))
    assert facts.facts[0].subject == (1,)  # not the last "w10"


def test_known_facts(small_model: SmallModel, tmp_path: Path) -> None:
    rows = [known(), known(known_id=1), known(prompt="w10 w11 ", attribute="w21", subject="w10")]
    facts = load_facts(written(tmp_path / "known_few.json", rows), small_model("gpt2"))
    assert (facts.name, facts.report) == ("known_few", {"rows": 3, "facts": 2})
    assert [one.subject for one in facts.facts] == [(2, 3), (1,)]
    assert [one.answer for one in facts.facts] == [20, 21]
    assert facts.facts[0].text == {"prompt": "w5 w10 w11 w6", "subject": "w10 w11", "answer": "w20"}


@pytest.mark.parametrize(
    ("content", "options", "parts"),
    [
        ("[", {}, ("known.json", "JSON")),
        ([], {}, ("known.json", "no facts")),
        (["w3"], {}, ("known.json: row 0", "prompt")),
        ([known(), known(subject=5)], {}, ("known.json: row 1", "subject is 5")),
        ([known(attribute=" ")], {}, ("known.json: row 0", "attribute")),
        ([known(), known(subject="w99")], {}, ("known.json: row 1", "'w99'", "not in the prompt")),
        ([known(subject="w5 w10", prompt="w5 w10 ")], {}, ("known.json: row 0", "whole prompt")),
        ([known()], {"template": 1}, ("known.json", "no relation")),
        ([known()], {"reverse": True}, ("known.json", "no relation")),
        ({"prompt_templates": ["w3"]}, {}, ("known.json", "samples")),
        ({"prompt_templates": ["{}"], "samples": [{"subject": "w4", "object": "w5"}]}, {}, ("whole prompt", "'w4'")),
    ],
    ids=str,
)
def test_bad_files_are_one_line(
    small_model: SmallModel, tmp_path: Path, content: Any, options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    path = written(tmp_path / "known.json", content)
    with pytest.raises(TaskError) as error:
        load_facts(path, small_model("gpt2"), **options)
    for part in parts:
        assert part in str(error.value)


def test_pairs_need_subjects(small_model: SmallModel, tmp_path: Path) -> None:
    model = small_model("gpt2")
    row = {"clean": "w3 w4 w5", "corrupted": "w3 w6 w5", "answer": "w9", "subject": "w4"}
    facts = load_facts(written(tmp_path / "own.jsonl", json.dumps(row)), model)
    assert [one.subject for one in facts.facts] == [(2,)]
    row.pop("subject")
    with pytest.raises(TaskError, match=r"own\.jsonl: row 1: has no subject"):
        load_facts(written(tmp_path / "own.jsonl", json.dumps(row)), model)
    row["subject"] = "w99"
    with pytest.raises(TaskError, match=r"own\.jsonl: row 1: the subject 'w99' is not in the prompt"):
        load_facts(written(tmp_path / "own.jsonl", json.dumps(row)), model)


def test_unknown_tasks(small_model: SmallModel) -> None:
    for name, part in (
        ("no_such_relation", "country_capital"),
        ("absent.json", "absent.json"),
        ("absent.csv", "absent.csv"),
    ):
        with pytest.raises(TaskError, match=part):
            load_facts(name, small_model("gpt2"))


def test_subjects_of_the_projects_relations(smollm2: Model) -> None:
    for name in ("country_capital", "landmark_country", "person_occupation"):
        facts = load_facts(name, smollm2, template=1)
        assert len(facts.facts) == len(load_relation(name).facts)
        for one in facts.facts:
            check_span(smollm2, one)
    facts = load_facts("ioi", smollm2, seed=1)
    assert len(facts.facts) == facts.report["rows"] == 100
    for one in facts.facts:
        check_span(smollm2, one)


@pytest.mark.slow
@pytest.mark.skipif(not KNOWN.exists(), reason="the published file is not at hand")
def test_every_subject_of_the_published_file_is_found(smollm2: Model) -> None:
    facts = load_facts(str(KNOWN), smollm2)
    assert facts.report == {"rows": 1209, "facts": 1208}  # one fact is there twice
    for one in facts.facts:
        check_span(smollm2, one)


def check_span(model: Model, one: FactPrompt) -> None:
    """The subject's tokens hold the subject, and none of them could be left out; a token may hold what follows it, too."""
    first, end = one.subject[0], one.subject[-1] + 1
    whole, without_first, without_last = (
        model.tokenizer.decode(list(one.tokens[a:b])) for a, b in ((first, end), (first + 1, end), (first, end - 1))
    )
    subject = one.text["subject"]
    assert whole.strip().startswith(subject), one
    assert len(whole.strip()) <= len(subject) + 1
    assert subject not in without_first
    assert subject not in without_last
