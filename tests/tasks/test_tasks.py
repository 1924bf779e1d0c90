"""Tasks: tokens and spans, relation files, splits, known facts, files of pairs, IOI, batches."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from kc_lib.errors import TaskError
from kc_lib.models.model import Model
from kc_lib.tasks.batches import TokenPair, batches, make_batch
from kc_lib.tasks.files import read_pairs
from kc_lib.tasks.generated import NAMES, ioi_pairs
from kc_lib.tasks.known import answer_ranks
from kc_lib.tasks.relations import load_relation
from kc_lib.tasks.task import Task, load_task
from kc_lib.tasks.tokens import Tokenizer, tokenizer_of

TEMPLATE = "w3 w4 {} w5"


@pytest.fixture
def llama(small_model: Callable[[str], Model]) -> Model:
    return small_model("llama")


@pytest.fixture(scope="module")
def byte_level() -> tf.PreTrainedTokenizerFast:
    """A byte-level tokenizer whose tokens hold their leading space, and that adds a BOS of its own when allowed to."""
    inner = RawTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    texts = ["The capital city of Papua New Guinea is Port Moresby", "The capital city of France is Paris"] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def relation_document(n: int = 40, **changes: Any) -> dict[str, Any]:
    """Facts w20 -> w100, w21 -> w101 ... under two templates."""
    document: dict[str, Any] = {
        "name": "numbers",
        "prompt_templates": [TEMPLATE, "w6 {} w7"],
        "prompt_templates_zs": ["w8 {} w9"],
        "properties": {"relation_type": "factual"},
        "samples": [{"subject": f"w{20 + i}", "object": f"w{100 + i}"} for i in range(n)],
    }
    document |= changes
    return {key: value for key, value in document.items() if value is not None}


def write_relation(folder: Path, document: Any, name: str = "numbers.json") -> str:
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return str(path)


def subjects(pairs: tuple[TokenPair, ...]) -> set[str]:
    return {pair.text["subject"] for pair in pairs}


def others(pairs: tuple[TokenPair, ...], template: str = TEMPLATE) -> set[str]:
    """The subjects of the corrupted prompts."""
    before, after = template.split("{}")
    return {pair.text["corrupted"].removeprefix(before).removesuffix(after) for pair in pairs}


def one_line(error: pytest.ExceptionInfo[TaskError]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------- tokens


def test_bos_is_there_once_even_when_the_tokenizer_adds_its_own(byte_level: tf.PreTrainedTokenizerFast) -> None:
    text = "The capital city of France is"
    with_bos, without = Tokenizer(byte_level, True), Tokenizer(byte_level, False)
    assert with_bos.encode(text)[0] == byte_level.bos_token_id
    assert with_bos.encode(text).count(byte_level.bos_token_id) == 1
    assert with_bos.encode(text)[1:] == without.encode(text)
    assert byte_level.bos_token_id not in without.encode(text)
    assert byte_level.bos_token_id not in with_bos.answer(text, "Paris")


def test_prepend_bos_default_and_choice_reach_the_prompts(llama: Model, tmp_path: Path) -> None:
    path = write_relation(tmp_path, relation_document())
    for choice, first in ((True, 1), (False, 3)):
        task = load_task(path, llama, known_only=False, prepend_bos=choice)
        assert task.prepend_bos is choice
        for pair in task.discovery + task.test:
            assert pair.clean[0] == pair.corrupted[0] == first
            assert list(pair.clean).count(1) == list(pair.corrupted).count(1) == int(choice)
    assert load_task(path, llama, known_only=False).prepend_bos is bool(llama.cfg.default_prepend_bos)


def test_no_bos_token_is_an_error(byte_level: tf.PreTrainedTokenizerFast) -> None:
    bare = copy.deepcopy(byte_level)
    bare.bos_token = None
    with pytest.raises(TaskError, match="prepend_bos=False") as error:
        Tokenizer(bare, True).encode("The")
    one_line(error)


@pytest.mark.parametrize("bos", [True, False])
def test_answer_tokens_are_those_that_follow_in_context(byte_level: tf.PreTrainedTokenizerFast, bos: bool) -> None:
    tokenizer = Tokenizer(byte_level, bos)
    prompt = "The capital city of Papua New Guinea is"
    answer = tokenizer.answer(prompt, "Port Moresby")
    assert tokenizer.encode(prompt) + answer == tokenizer.encode(prompt + " Port Moresby")
    assert byte_level.decode(answer) == " Port Moresby"
    assert answer != tuple(byte_level("Port Moresby", add_special_tokens=False).input_ids)
    assert tokenizer.answer(prompt, "  Port Moresby ") == answer


def test_an_answer_without_a_token_of_its_own_is_an_error(llama: Model) -> None:
    with pytest.raises(TaskError, match="does not start a new token") as error:
        tokenizer_of(llama).answer("w5 w6", " ")
    one_line(error)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("subject", ["Papua New Guinea", "The", "is", "Guinea"])
def test_spans_hold_exactly_the_part(byte_level: tf.PreTrainedTokenizerFast, bos: bool, subject: str) -> None:
    tokenizer = Tokenizer(byte_level, bos)
    text = "The capital city of Papua New Guinea is"
    span, tokens = tokenizer.span(text, subject), tokenizer.encode(text)
    assert span == tuple(range(span[0], span[-1] + 1))
    assert byte_level.decode([tokens[i] for i in span]).strip() == subject
    if " " in subject:
        assert len(span) >= 3


def test_a_span_is_that_of_the_last_occurrence(llama: Model) -> None:
    assert Tokenizer(llama.tokenizer, False).span("w5 w6 w5 w7", "w5") == (2,)
    assert Tokenizer(llama.tokenizer, True).span("w5 w6 w5 w7", "w5 w7") == (3, 4)


def test_a_span_of_what_is_not_there_is_an_error(llama: Model) -> None:
    for part in ("w9", ""):
        with pytest.raises(TaskError, match="is not in the prompt") as error:
            tokenizer_of(llama).span("w5 w6", part)
        assert "subject" in one_line(error)


def test_positions_of_a_subject_of_several_tokens(llama: Model, tmp_path: Path) -> None:
    samples = [{"subject": f"w{20 + i} w{60 + i} w{30 + i}", "object": f"w{100 + i}"} for i in range(8)]
    path = write_relation(tmp_path, relation_document(samples=samples))
    task = load_task(path, llama, known_only=False, prepend_bos=True)
    for pair in task.discovery + task.test:
        assert pair.positions == {"subject": (3, 4, 5), "relation": (1, 2, 6)}
        assert llama.tokenizer.decode([pair.clean[i] for i in (3, 4, 5)]) == pair.text["subject"]
    pair = load_task(path, llama, known_only=False, prepend_bos=False).discovery[0]
    assert pair.positions == {"subject": (2, 3, 4), "relation": (0, 1, 5)}


def test_a_subject_that_is_also_in_the_template_is_taken_from_its_slot(llama: Model, tmp_path: Path) -> None:
    document = relation_document(8, prompt_templates=["w20 w4 {} w5 w20"])
    task = load_task(write_relation(tmp_path, document), llama, known_only=False, prepend_bos=True)
    assert {pair.positions["subject"] for pair in task.discovery + task.test} == {(3,)}


# ---------------------------------------------------------------------------------------------------- relation files


def test_a_relation_file_is_read_whole(tmp_path: Path) -> None:
    document = relation_document(5)
    document["samples"][0] = {"subject": " w20 ", "object": "w100 "}
    relation = load_relation(write_relation(tmp_path, document))
    assert relation.name == "numbers"
    assert relation.kind == "factual"
    assert relation.templates == (TEMPLATE, "w6 {} w7", "w8 {} w9")
    assert [(fact.subject, fact.object) for fact in relation.facts] == [(f"w{20 + i}", f"w{100 + i}") for i in range(5)]


def test_a_relation_without_a_name_is_called_by_its_file(tmp_path: Path) -> None:
    assert load_relation(write_relation(tmp_path, relation_document(name=None), "mine.json")).name == "mine"


def sample(row: int, value: Any) -> dict[str, Any]:
    document = relation_document(6)
    document["samples"][row] = value
    return document


MALFORMED: dict[str, tuple[Any, str]] = {
    "not json": ("{'name': 1,", "JSON"),
    "list": ([1, 2], "JSON object"),
    "no samples": (relation_document(samples=None), "lacks samples"),
    "no templates": (relation_document(prompt_templates=None), "lacks prompt_templates"),
    "empty templates": (relation_document(prompt_templates=[]), "prompt_templates is empty"),
    "template no list": (relation_document(prompt_templates=TEMPLATE), "prompt_templates must be a list"),
    "without slot": (relation_document(prompt_templates=[TEMPLATE, "w3 w4"]), "prompt_templates[1]"),
    "two slots": (relation_document(prompt_templates=["{} w4 {}"]), "prompt_templates[0]"),
    "zero-shot without slot": (relation_document(prompt_templates_zs=["w3"]), "prompt_templates_zs[0]"),
    "reverse without slot": (relation_document(reverse_templates=["{} w3", "w3"]), "reverse_templates[1]"),
    "template no text": (relation_document(prompt_templates=[5]), "prompt_templates[0]"),
    "unknown key": (relation_document(sample=[]), "unknown key 'sample'"),
    "empty samples": (relation_document(samples=[]), "samples"),
    "samples no list": (relation_document(samples={"w1": "w2"}), "samples"),
    "missing subject": (sample(3, {"object": "w9"}), "samples[3]"),
    "missing object": (sample(2, {"subject": "w9"}), "samples[2]"),
    "unknown fact key": (sample(1, {"subject": "w9", "object": "w8", "note": "x"}), "samples[1]"),
    "empty object": (sample(4, {"subject": "w9", "object": " "}), "samples[4]"),
    "empty subject": (sample(4, {"subject": "", "object": "w9"}), "samples[4]"),
    "number": (sample(5, {"subject": "w9", "object": 1984}), "samples[5]"),
    "null": (sample(5, {"subject": None, "object": "w9"}), "samples[5]"),
    "no fact": (sample(0, "w9"), "samples[0]"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_relation_names_file_and_row(name: str, llama: Model, tmp_path: Path) -> None:
    document, where = MALFORMED[name]
    path = write_relation(tmp_path, document)
    for load in (load_relation, lambda p: load_task(p, llama, known_only=False)):
        with pytest.raises(TaskError) as error:
            load(path)
        message = one_line(error)
        assert path in message
        assert where in message


def test_a_relation_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.json"
    path.write_bytes('{"name": "Málaga"}'.encode("latin-1"))
    with pytest.raises(TaskError, match="UTF-8") as error:
        load_relation(path)
    assert str(path) in one_line(error)


def test_a_missing_relation_file_is_named_with_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "absent.json"
    with pytest.raises(TaskError) as error:
        load_relation(path)
    assert str(path) in one_line(error)
    assert "country_capital" in str(error.value)


def test_reversed_asks_from_the_objects(llama: Model, tmp_path: Path) -> None:
    samples = [{"subject": f"w{20 + i}", "object": f"w{100 + i}"} for i in range(8)]
    samples += [{"subject": "w50", "object": "w150"}, {"subject": "w51", "object": "w150"}]  # w150 has no single answer
    document = relation_document(samples=samples, reverse_templates=["{} w9"])
    path = write_relation(tmp_path, document)
    backward = load_relation(path).reversed()
    assert backward.templates == ("{} w9",)
    assert [(fact.subject, fact.object) for fact in backward.facts] == [(f"w{100 + i}", f"w{20 + i}") for i in range(8)]
    task = load_task(path, llama, reverse=True, known_only=False)
    assert task.name == "numbers_reversed"
    for pair in task.discovery + task.test:
        subject = pair.text["subject"]
        assert pair.text["clean"] == f"{subject} w9"
        assert pair.answer == (int(subject[1:]) - 80,)


def test_a_relation_without_reverse_templates_cannot_be_reversed(llama: Model, tmp_path: Path) -> None:
    path = write_relation(tmp_path, relation_document())
    for ask in (load_relation(path).reversed, lambda: load_task(path, llama, reverse=True)):
        with pytest.raises(TaskError, match="reverse_templates") as error:
            ask()
        one_line(error)


# ---------------------------------------------------------------------------------------------------- pairs and splits


def test_template_chooses_the_sentence(llama: Model, tmp_path: Path) -> None:
    path = write_relation(tmp_path, relation_document())
    for index, template in enumerate([TEMPLATE, "w6 {} w7", "w8 {} w9"]):
        task = load_task(path, llama, template=index, known_only=False)
        assert all(pair.text["clean"] == template.replace("{}", pair.text["subject"]) for pair in task.discovery)
    for index in (3, -1):
        with pytest.raises(TaskError, match=f"template is {index}|template={index}") as error:
            load_task(path, llama, template=index, known_only=False)
        one_line(error)


def test_pairs_have_equal_length_and_another_answer(llama: Model, tmp_path: Path) -> None:
    samples = [
        {"subject": " ".join([f"w{20 + i}"] * (1 + i % 3)), "object": f"w{100 + i % 2}"}  # 3 lengths, 2 answers
        for i in range(36)
    ]
    task = load_task(write_relation(tmp_path, relation_document(samples=samples)), llama, known_only=False)
    pairs = task.discovery + task.test
    assert len(pairs) == task.report["used"] == 36
    for pair in pairs:
        assert len(pair.clean) == len(pair.corrupted)
        assert pair.clean != pair.corrupted
        assert pair.distractor != pair.answer[0]
        assert pair.text["distractor"] != pair.text["answer"]
        fact = next(row for row in samples if row["subject"] in others((pair,)))
        assert fact["object"] == pair.text["distractor"]
        assert pair.distractor == int(fact["object"][1:])


def test_facts_without_a_partner_are_left_out(llama: Model, tmp_path: Path) -> None:
    samples = relation_document(10)["samples"] + [{"subject": "w70 w71 w72", "object": "w170"}]
    task = load_task(write_relation(tmp_path, relation_document(samples=samples)), llama, known_only=False, test_fraction=0)
    assert task.report == {"facts": 11, "known": 11, "used": 10}
    assert "w70 w71 w72" not in subjects(task.discovery)


def test_splits_share_no_fact(llama: Model, tmp_path: Path) -> None:
    path = write_relation(tmp_path, relation_document())
    task = load_task(path, llama, known_only=False, test_fraction=0.25, validation_fraction=0.25)
    parts = [task.discovery, task.validation, task.test]
    assert [len(part) for part in parts] == [20, 10, 10]
    seen: set[str] = set()
    for part in parts:  # a corrupted prompt is a fact as well, and must not tell of another split
        mine = subjects(part) | others(part)
        assert not mine & seen
        seen |= mine
    assert seen == {f"w{20 + i}" for i in range(40)}


def test_the_split_follows_the_seed_and_not_the_file_order(llama: Model, tmp_path: Path) -> None:
    path = write_relation(tmp_path, relation_document())

    def split(seed: int) -> Task:
        return load_task(path, llama, known_only=False, seed=seed)

    first, again, other = split(0), split(0), split(1)
    assert first == again
    assert first.hash == again.hash
    assert subjects(first.test) != subjects(other.test)
    assert first.hash != other.hash
    rows = [f"w{20 + i}" for i in range(40)]
    for task in (first, other):
        assert subjects(task.test) not in (set(rows[:20]), set(rows[20:]), set(rows[::2]), set(rows[1::2]))


def test_hash_depends_on_tokens_and_split(llama: Model, tmp_path: Path) -> None:
    path = write_relation(tmp_path, relation_document())
    task = load_task(path, llama, known_only=False)
    moved = Task(task.name, task.test, task.validation, task.discovery, task.report, task.prepend_bos)
    assert moved.hash != task.hash
    assert load_task(path, llama, known_only=False, template=1).hash != task.hash
    renamed = Task("another", task.discovery, task.validation, task.test, {}, task.prepend_bos)
    assert renamed.hash == task.hash


def test_without_test_fraction_every_pair_serves_discovery(llama: Model, tmp_path: Path) -> None:
    task = load_task(write_relation(tmp_path, relation_document()), llama, known_only=False, test_fraction=0.0)
    assert len(task.discovery) == 40
    assert task.test == task.validation == ()


def test_max_facts_are_drawn_by_seed(llama: Model, tmp_path: Path) -> None:
    path = write_relation(tmp_path, relation_document())
    tasks = [load_task(path, llama, known_only=False, max_facts=12, seed=seed) for seed in (0, 1)]
    drawn = [subjects(task.discovery + task.test) for task in tasks]
    assert [len(part) for part in drawn] == [12, 12]
    assert [task.report["used"] for task in tasks] == [12, 12]
    assert drawn[0] != drawn[1]
    assert all(part != {f"w{20 + i}" for i in range(12)} for part in drawn)
    assert len(subjects(load_task(path, llama, known_only=False, max_facts=99, test_fraction=0).discovery)) == 40


@pytest.mark.parametrize(
    "options",
    [
        {"test_fraction": 1.0},
        {"test_fraction": -0.1},
        {"test_fraction": 0.5, "validation_fraction": 0.5},
        {"validation_fraction": -0.5},
        {"max_facts": 0},
        {"max_facts": 1},
        {"max_facts": 2},
    ],
    ids=str,
)
def test_splits_that_cannot_be_made_are_refused(options: dict, llama: Model, tmp_path: Path) -> None:
    path = write_relation(tmp_path, relation_document())
    with pytest.raises(TaskError) as error:
        load_task(path, llama, known_only=False, **options)
    one_line(error)


def test_too_few_facts_are_refused(llama: Model, tmp_path: Path) -> None:
    path = write_relation(tmp_path, relation_document(1))
    with pytest.raises(TaskError, match="too few") as error:
        load_task(path, llama, known_only=False)
    one_line(error)
    same_answer = [{"subject": f"w{20 + i}", "object": "w100"} for i in range(10)]
    path = write_relation(tmp_path, relation_document(samples=same_answer))
    with pytest.raises(TaskError, match="different answers") as error:
        load_task(path, llama, known_only=False)
    assert "numbers" in one_line(error)


# ---------------------------------------------------------------------------------------------------- known facts


@torch.no_grad()
def naive_order(model: Model, prompt: str) -> list[int]:
    """All tokens from the most to the least probable, one unpadded prompt at a time."""
    tokens = [1, *(int(word[1:]) for word in prompt.split())]
    return model.bridge(torch.tensor([tokens]))[0, -1].sort(descending=True).indices.tolist()


@pytest.fixture
def graded(llama: Model) -> tuple[dict[str, Any], dict[str, int]]:
    """A relation of 30 facts with answers near the ranks 1, 3 and 12, and each answer's naive rank."""
    samples, ranks = [], {}
    for i in range(30):
        subject = " ".join(f"w{20 + i}" for _ in range(1 + i % 2))
        order = naive_order(llama, TEMPLATE.replace("{}", subject))
        rank = next(r for r in range((0, 2, 11)[i % 3], 200) if order[r] >= 3 and order[r] != 20 + i)
        samples.append({"subject": subject, "object": f"w{order[rank]}"})
        ranks[subject] = rank + 1
    return relation_document(samples=samples), ranks


@pytest.mark.parametrize("known_rank", [1, 3, 15])
def test_known_only_keeps_exactly_the_known_facts(
    graded: tuple[dict[str, Any], dict[str, int]], known_rank: int, llama: Model, tmp_path: Path
) -> None:
    document, ranks = graded
    known = {subject for subject, rank in ranks.items() if rank <= known_rank}
    assert 5 <= len(known) <= 30
    options = {"known_rank": known_rank, "prepend_bos": True, "test_fraction": 0.0}
    task = load_task(write_relation(tmp_path, document), llama, **options, batch_size=7)
    assert task.report["facts"] == 30
    assert task.report["known"] == len(known)
    assert subjects(task.discovery) | others(task.discovery) <= known
    assert len(known) - len(subjects(task.discovery)) <= 2  # but for facts with no partner
    everything = load_task(write_relation(tmp_path, document), llama, **options, known_only=False)
    assert everything.report["known"] == 30


def test_answer_ranks_do_not_depend_on_the_batch(graded: tuple[dict[str, Any], dict[str, int]], llama: Model) -> None:
    document, ranks = graded
    prompts, answers = [], []
    for row in document["samples"]:
        prompts.append((1, *(int(word[1:]) for word in TEMPLATE.replace("{}", row["subject"]).split())))
        answers.append(int(row["object"][1:]))
    for batch_size in (1, 7, 64):
        assert answer_ranks(llama, prompts, answers, batch_size) == list(ranks.values())


def test_no_known_fact_left_is_an_error(llama: Model, tmp_path: Path) -> None:
    samples = []
    for i in range(6):
        worst = next(
            token for token in reversed(naive_order(llama, f"w3 w4 w{20 + i} w5")) if token not in (0, 1, 2, 20 + i)
        )
        samples.append({"subject": f"w{20 + i}", "object": f"w{worst}"})
    path = write_relation(tmp_path, relation_document(samples=samples))
    with pytest.raises(TaskError, match="no known fact left") as error:
        load_task(path, llama, prepend_bos=True, known_rank=5)
    assert "numbers" in one_line(error)
    rows = [{"clean": f"w3 w4 {row['subject']} w5", "corrupted": "w3 w4 w60 w5", "answer": row["object"]} for row in samples]
    for row in rows:
        row["distractor"] = "w198" if row["answer"] != "w198" else "w197"
    with pytest.raises(TaskError, match="no known fact left") as error:
        load_task(write_pairs(tmp_path / "pairs.jsonl", rows), llama, prepend_bos=True, known_rank=5)
    assert "pairs" in one_line(error)


# ---------------------------------------------------------------------------------------------------- files of pairs


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as CSV or JSONL, by the file's suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        columns = list(rows[0])
        lines = [",".join(columns)] + [",".join(f'"{row[column]}"' for column in columns) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    return str(path)


def good_rows(n: int = 8) -> list[dict[str, Any]]:
    return [
        {
            "clean": f"w3 w{20 + i} w{21 + i} w4",
            "corrupted": f"w3 w{50 + i} w{51 + i} w4",
            "answer": f"w{100 + i} w9",
            "distractor": f"w{120 + i}",
            "subject": f"w{20 + i} w{21 + i}",
            "relation": "w4",
        }
        for i in range(n)
    ]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_pairs_of_a_file(suffix: str, llama: Model, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / f"own{suffix}", good_rows())
    task = load_task(path, llama, known_only=False, prepend_bos=True, test_fraction=0.25)
    assert task.name == "own"
    assert (len(task.discovery), len(task.validation), len(task.test)) == (6, 0, 2)
    pairs = {pair.text["subject"]: pair for pair in task.discovery + task.test}
    for i in range(8):
        pair = pairs[f"w{20 + i} w{21 + i}"]
        assert pair.clean == (1, 3, 20 + i, 21 + i, 4)
        assert pair.corrupted == (1, 3, 50 + i, 51 + i, 4)
        assert pair.answer == (100 + i, 9)
        assert pair.distractor == 120 + i
        assert pair.positions == {"subject": (2, 3), "relation": (4,)}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_spaces_before_answers_change_nothing(suffix: str, llama: Model, tmp_path: Path) -> None:
    plain = load_task(write_pairs(tmp_path / f"plain{suffix}", good_rows()), llama, known_only=False)
    rows = [row | {key: f" {row[key]}" for key in ("answer", "distractor")} for row in good_rows()]
    spaced = load_task(write_pairs(tmp_path / f"spaced{suffix}", rows), llama, known_only=False)
    assert spaced.hash == plain.hash


def test_only_the_required_columns_are_required(llama: Model, tmp_path: Path) -> None:
    rows = [{key: row[key] for key in ("clean", "corrupted", "answer")} for row in good_rows()]
    task = load_task(write_pairs(tmp_path / "own.csv", rows), llama, known_only=False)
    assert all(pair.positions == {} for pair in task.discovery + task.test)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_missing_distractor_is_the_models_own_corrupted_answer(suffix: str, llama: Model, tmp_path: Path) -> None:
    rows = [row | {"distractor": ""} for row in good_rows()]
    special = next(row for row in rows if naive_order(llama, row["corrupted"])[0] >= 3)
    top = naive_order(llama, special["corrupted"])
    special["answer"] = f"w{top[0]}"  # the answer itself cannot be the distractor
    path = write_pairs(tmp_path / f"own{suffix}", rows)
    task = load_task(path, llama, known_only=False, prepend_bos=True, test_fraction=0)
    expected = {row["clean"]: naive_order(llama, row["corrupted"])[0] for row in rows} | {special["clean"]: top[1]}
    assert {pair.text["clean"]: pair.distractor for pair in task.discovery} == expected


def test_known_only_holds_for_files_of_pairs(llama: Model, tmp_path: Path) -> None:
    rows = good_rows(12)
    for row in rows[:5]:
        row["answer"] = next(f"w{token}" for token in naive_order(llama, row["clean"])[:3] if token >= 3)
    known = {row["subject"] for row in rows if naive_order(llama, row["clean"]).index(int(row["answer"].split()[0][1:])) < 3}
    assert 5 <= len(known) < 12
    path = write_pairs(tmp_path / "own.csv", rows)
    task = load_task(path, llama, known_rank=3, prepend_bos=True, test_fraction=0)
    assert subjects(task.discovery) == known


def changed(row: int, **changes: Any) -> list[dict[str, Any]]:
    rows = good_rows(4)
    rows[row] |= changes
    return rows


BAD_ROWS: dict[str, tuple[list[dict[str, Any]], int, str]] = {
    "empty answer": (changed(2, answer=" "), 2, "answer is empty"),
    "empty clean": (changed(0, clean=""), 0, "clean is empty"),
    "empty corrupted": (changed(3, corrupted=""), 3, "corrupted is empty"),
    "unequal lengths": (changed(1, corrupted="w3 w4"), 1, "differ in length"),
    "subject not in prompt": (changed(2, subject="w77"), 2, "'w77' is not in the prompt"),
    "relation not in prompt": (changed(2, relation="w78"), 2, "'w78' is not in the prompt"),
    "answer is distractor": (changed(1, distractor=" w101 w9"), 1, "w101"),
    "same first token": (changed(1, distractor="w101"), 1, "w101"),
    "same prompts": (changed(1, corrupted="w3 w21 w22 w4"), 1, "the same"),
    "duplicate": (good_rows(4) + good_rows(1), 4, "repeats row"),
}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_with_its_file(name: str, suffix: str, llama: Model, tmp_path: Path) -> None:
    rows, index, what = BAD_ROWS[name]
    path = write_pairs(tmp_path / f"own{suffix}", rows)
    with pytest.raises(TaskError) as error:
        load_task(path, llama, known_only=False)
    message = one_line(error)
    assert f"{path}: row {index + (2 if suffix == '.csv' else 1)}" in message  # a CSV's first row is its header
    assert what in message


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("own.csv", "clean,corrupted,answer,answr\nw3,w4,w5,w6\n", "'answr'"),
        ("own.csv", "clean,answer\nw3,w4\n", "lacks corrupted"),
        ("own.csv", "clean,corrupted,answer\n", "no rows"),
        ("own.csv", "", "CSV"),
        ("own.csv", "clean,corrupted,answer\nw3,w4,w5\nw3,w4,w5,w6\n", "row 3"),
        ("own.jsonl", "", "no rows"),
        ("own.jsonl", '{"clean": "w3", "corrupted": "w4", "answer": "w5"}\n\n{"clean": \n', "row 3"),
        ("own.jsonl", '["w3"]\n', "row 1"),
        ("own.jsonl", '{"clean": "w3", "corrupted": "w4", "answer": 5}\n', "row 1"),
        ("own.jsonl", '{"clean": "w3", "corrupted": "w4", "answer": "w5", "note": "x"}\n', "'note'"),
        ("own.jsonl", '{"clean": "w3", "answer": "w5"}\n', "row 1 lacks corrupted"),
    ],
)
def test_a_malformed_file_of_pairs_is_named(name: str, text: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(TaskError) as error:
        read_pairs(path)
    message = one_line(error)
    assert str(path) in message
    assert what in message


@pytest.mark.parametrize("extra", [1, 2])
def test_unquoted_commas_do_not_shift_the_columns(extra: int, tmp_path: Path) -> None:
    """Every row with too many fields: a reader may take the first ones for an index and shift the rest."""
    path = tmp_path / "own.csv"
    rows = [f"w{i}{f', w{20 + i}' * extra},w{40 + i},w{60 + i}" for i in range(3, 6)]
    path.write_text("clean,corrupted,answer\n" + "\n".join(rows) + "\n")
    with pytest.raises(TaskError) as error:
        read_pairs(path)
    assert str(path) in one_line(error)


def test_rows_are_counted_as_an_editor_shows_them(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("clean,corrupted,answer\nw3,w4,w5\n\nw6,w7,\n")
    with pytest.raises(TaskError, match="row 4: answer is empty"):
        read_pairs(path)


@pytest.mark.parametrize("name", ["absent.csv", "absent.jsonl"])
def test_a_missing_file_of_pairs_is_named(name: str, llama: Model, tmp_path: Path) -> None:
    with pytest.raises(TaskError) as error:
        load_task(str(tmp_path / name), llama)
    assert str(tmp_path / name) in one_line(error)


def test_unknown_tasks_and_options_that_do_not_apply(llama: Model, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="country_capital") as error:
        load_task("no_such_task", llama)
    assert "'no_such_task'" in one_line(error)
    path = write_pairs(tmp_path / "own.csv", good_rows())
    for options in ({"reverse": True}, {"template": 1}):
        with pytest.raises(TaskError, match="do not apply") as error:
            load_task(path, llama, **options)
        one_line(error)


# ---------------------------------------------------------------------------------------------------- IOI


def test_ioi_needs_names_of_one_token(byte_level: tf.PreTrainedTokenizerFast) -> None:
    with pytest.raises(TaskError, match="single tokens") as error:
        ioi_pairs(Tokenizer(byte_level, True), 10, 0)
    one_line(error)


@pytest.mark.slow
def test_ioi_prompts(smollm2: Model) -> None:
    tokenizer = tokenizer_of(smollm2)
    texts = ioi_pairs(tokenizer, 40, seed=0)
    assert len({text.clean for text in texts}) == 40
    orders = []
    for text in texts:
        words = [word.strip(",.") for word in text.clean.split()]
        corrupted = [word.strip(",.") for word in text.corrupted.split()]
        at = [i for i, word in enumerate(words) if word in NAMES]
        first, second, last = (words[i] for i in at)
        assert first != second
        assert last == text.subject == text.distractor
        assert {text.answer, text.subject} == {first, second}
        orders.append("BABA" if last == first else "ABBA")
        assert [i for i in range(len(words)) if words[i] != corrupted[i]] == [at[2]]  # only the second mention differs
        assert corrupted[at[2]] == text.answer
    assert orders.count("ABBA") == orders.count("BABA") == 20
    assert ioi_pairs(tokenizer, 40, seed=0) == texts
    assert ioi_pairs(tokenizer, 40, seed=1) != texts


@pytest.mark.slow
def test_ioi_task(smollm2: Model) -> None:
    task = load_task("ioi", smollm2, max_facts=20)
    pairs = task.discovery + task.test
    assert task.report["facts"] == 20
    assert task.report["known"] == len(pairs) >= 10
    bos = smollm2.tokenizer.bos_token_id
    for pair in pairs:
        assert len(pair.clean) == len(pair.corrupted)
        assert sum(a != b for a, b in zip(pair.clean, pair.corrupted, strict=True)) == 1
        assert len(pair.answer) == 1
        assert pair.clean.count(bos) == int(task.prepend_bos)
        (position,) = pair.positions["subject"]
        assert pair.clean[position] == pair.distractor
        assert pair.corrupted[position] == pair.answer[0]


@pytest.mark.slow
def test_capitals_in_smollm2_have_subjects_of_several_tokens(smollm2: Model) -> None:
    task = load_task("country_capital", smollm2, known_only=False)
    long = 0
    for pair in task.discovery + task.test:
        span = pair.positions["subject"]
        long += len(span) > 1
        assert smollm2.tokenizer.decode([pair.clean[i] for i in span]).strip() == pair.text["subject"]
        assert smollm2.tokenizer.decode(pair.answer) == f" {pair.text['answer']}"
        assert len(pair.clean) == len(pair.corrupted)
    assert long >= 2


# ---------------------------------------------------------------------------------------------------- batches

PAIRS = (
    TokenPair((1, 5, 6), (1, 7, 6), (8, 9, 10), 11, {}, {}),
    TokenPair((1, 5, 6, 7, 12), (1, 5, 6, 7, 13), (14,), 15, {}, {}),
)


def test_make_batch_pads_right_and_reads_the_last_token() -> None:
    batch = make_batch(PAIRS)
    assert len(batch) == 2
    assert batch.clean.tolist() == [[1, 5, 6, 0, 0], [1, 5, 6, 7, 12]]
    assert batch.corrupted.tolist() == [[1, 7, 6, 0, 0], [1, 5, 6, 7, 13]]
    assert batch.lengths.tolist() == [3, 5]
    assert batch.answers.tolist() == [[8], [14]]
    assert batch.answer_positions.tolist() == [[2], [4]]
    assert batch.answer_mask.tolist() == [[True], [True]]
    assert batch.distractors.tolist() == [11, 15]


def test_full_answers_are_teacher_forced() -> None:
    batch = make_batch(PAIRS, full_answer=True)
    assert batch.clean.tolist() == [[1, 5, 6, 8, 9], [1, 5, 6, 7, 12]]
    assert batch.corrupted.tolist() == [[1, 7, 6, 8, 9], [1, 5, 6, 7, 13]]
    assert batch.lengths.tolist() == [5, 5]
    assert batch.answers.tolist() == [[8, 9, 10], [14, 0, 0]]
    assert batch.answer_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.answer_positions[0].tolist() == [2, 3, 4]
    assert batch.answer_positions[1, 0].item() == 4
    assert batch.answer_positions.max() < batch.clean.shape[1]


def test_padding_does_not_change_what_is_read(llama: Model) -> None:
    batch = make_batch(PAIRS, full_answer=True)
    logits = llama.bridge(batch.clean)
    for row, pair in enumerate(PAIRS):
        alone = llama.bridge(torch.tensor([[*pair.clean, *pair.answer[:-1]]]))[0]
        for column in range(len(pair.answer)):
            position = int(batch.answer_positions[row, column])
            torch.testing.assert_close(logits[row, position], alone[len(pair.clean) - 1 + column], rtol=1e-4, atol=1e-4)


def test_batches_keep_order_and_size() -> None:
    pairs = [TokenPair((1, i), (1, i + 1), (i,), 0, {}, {}) for i in range(3, 10)]
    parts = list(batches(pairs, 3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert [row for part in parts for row in part.answers[:, 0].tolist()] == list(range(3, 10))
    with pytest.raises(TaskError, match="batch_size"):
        list(batches(pairs, 0))


def test_pairs_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(TaskError, match="differ in length"):
        TokenPair((1, 2), (1,), (3,), 4, {}, {"clean": "w1", "corrupted": "w2"})
    with pytest.raises(TaskError, match="empty answer"):
        TokenPair((1, 2), (1, 3), (), 4, {}, {"clean": "w1"})
    with pytest.raises(TaskError, match="no pairs"):
        make_batch([])


@pytest.mark.parametrize(
    ("row", "value", "dropped"),
    [
        (3, {"subject": "w9", "object": " w9"}, {"object is subject": 1}),
        (5, {"subject": "w20", "object": "w100"}, {"repeated subjects": 1}),
        (5, {"subject": "w21", "object": "w150"}, {"repeated subjects": 1}),
    ],
    ids=["object is subject", "the same fact", "the same subject"],
)
def test_rows_that_are_no_facts_of_their_own_are_dropped_and_counted(
    row: int, value: dict[str, str], dropped: dict[str, int], llama: Model, tmp_path: Path
) -> None:
    path = write_relation(tmp_path, sample(row, value))
    relation = load_relation(path)
    assert relation.dropped == dropped
    assert len(relation.facts) == 5
    assert [fact.object for fact in relation.facts if fact.subject == "w21"] == ["w101"]
    assert dropped.items() <= load_task(path, llama, known_only=False, test_fraction=0.0).report.items()


def test_a_relation_whose_objects_are_all_its_subjects_is_refused(tmp_path: Path) -> None:
    path = write_relation(tmp_path, relation_document(samples=[{"subject": "w9", "object": "w9"}]))
    with pytest.raises(TaskError, match="leaks"):
        load_relation(path)
