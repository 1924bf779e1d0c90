"""Generated tasks: prompts and their sets of answers, checked word by word for several kinds of tokenizers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from helpers import CONFIGS
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Inner

from kc_lib.errors import TaskError
from kc_lib.models.load import load_model
from kc_lib.models.model import Model
from kc_lib.tasks.batches import TokenPair, make_batch
from kc_lib.tasks.facts import load_facts
from kc_lib.tasks.generated import GENERATED, NAMES, generated_pairs
from kc_lib.tasks.known import best_ranks
from kc_lib.tasks.task import load_task
from kc_lib.tasks.tokens import Tokenizer
from tools.train_nano.train import vocabulary
from tools.train_nano.vocabulary import causal_tokenizer

WOMEN = {"Mary", "Jennifer", "Linda", "Sarah", "Emily", "Alice", "Ruth", "Maria", "Karen", "Jane"}
MEN = {"John", "James", "Robert", "David", "Paul", "Kevin", "Eric", "Adam", "Peter", "Henry"}
ONE = {"is", "was", "has", "does", "goes", "seems", "comes", "gives", "appears", "contains", "becomes"}
MANY = {"are", "were", "have", "do", "go", "seem", "come", "give", "appear", "contain", "become"}


@pytest.fixture(scope="session")
def nano_words() -> tf.PreTrainedTokenizerFast:
    """The tokenizer of the nano model: words, and years in two halves."""
    return causal_tokenizer(vocabulary())


@pytest.fixture(scope="session")
def wordy(nano_words: tf.PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small random GPT-NeoX that reads nano's words."""
    folder = tmp_path_factory.mktemp("wordy")
    torch.manual_seed(0)
    config = CONFIGS["neox"]()
    config.vocab_size = len(nano_words)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    model.save_pretrained(folder)
    nano_words.save_pretrained(folder)
    return load_model(str(folder), device="cpu")


def word_level(split: str, words: set[str]) -> Tokenizer:
    """A word-level tokenizer whose words are cut again by a pattern."""
    cut = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex(split), behavior="isolated")])
    inner = Inner(models.WordLevel({word: i for i, word in enumerate(["?", *sorted(words)])}, unk_token="?"))
    inner.pre_tokenizer = cut
    return Tokenizer(tf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?"), False)


@pytest.fixture(scope="session")
def byte_pairs() -> Tokenizer:
    """Byte-level BPE as GPT-2's kind, with a token for two digits, one for " 17" to " 19", and one for some whole years."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    digits = [f"{i:02}" for i in range(100)]
    merges = [(pair[0], pair[1]) for pair in digits] + [("Ġ", century) for century in ("17", "18", "19")]
    merges += [("Ġ17", "00"), ("Ġ17", "76"), ("Ġ19", "01")]
    tokens = [*alphabet, *("".join(merge) for merge in merges)]
    inner = Inner(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Tokenizer(tf.PreTrainedTokenizerFast(tokenizer_object=inner), False)


def one_line(error: pytest.ExceptionInfo[TaskError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------- Greater-Than


def test_years_after_the_start_are_right(wordy: Model) -> None:
    task = load_task("greater_than", wordy, known_only=False, max_facts=60, test_fraction=0.5)
    pairs = task.discovery + task.test
    assert len({pair.text["clean"] for pair in pairs}) == len(pairs) == 60
    decode = wordy.tokenizer.convert_ids_to_tokens
    centuries = set()
    for pair in pairs:
        found = re.fullmatch(r"The (\w+) lasted from the year (\d\d)(\d\d) to the year (\d\d)", pair.text["clean"])
        assert found is not None
        event, century, start, again = found.groups()
        assert century == again
        assert 2 <= int(start) <= 98
        centuries.add(century)
        assert pair.text["corrupted"] == pair.text["clean"].replace(century + start, century + "01")
        assert decode(list(pair.right)) == [f"{year:02}" for year in range(int(start) + 1, 100)]
        assert decode(list(pair.wrong)) == [f"{year:02}" for year in range(int(start) + 1)]
        assert pair.answer[0] in pair.right
        assert pair.distractor in pair.wrong
        named = {name: decode([pair.clean[i] for i in at]) for name, at in pair.positions.items()}
        assert named == {"subject": [century, start], "event": [event], "year": [start], "century": [century]}
        assert pair.positions["century"] == (len(pair.clean) - 1,)
        differ = [i for i, (a, b) in enumerate(zip(pair.clean, pair.corrupted, strict=True)) if a != b]
        assert tuple(differ) == pair.positions["year"]
    assert len(centuries) > 5


def test_years_of_one_token_are_left_out(byte_pairs: Tokenizer) -> None:
    assert byte_pairs.inner.tokenize(" 1732") == ["Ġ17", "32"]
    assert byte_pairs.inner.tokenize(" 1776") == ["Ġ1776"]
    pairs = generated_pairs("greater_than", byte_pairs, 10_000)
    years = {pair.subject for pair in pairs}
    # of the 19th there is no corrupted prompt; other centuries are no tokens
    expected = {
        f"{century}{start:02}"
        for century in (17, 18)
        for start in range(2, 99)
        if byte_pairs.inner.tokenize(f" {century}{start:02}") == [f"Ġ{century}", f"{start:02}"]
    }
    assert "1776" not in expected
    assert "1732" in expected
    assert years == expected
    assert len(pairs) == 10 * len(expected)  # events
    for pair in pairs[:5]:
        tokens = byte_pairs.inner.convert_ids_to_tokens(byte_pairs.answer(pair.clean, pair.answer, pair.between))
        assert tokens == [pair.answer]  # without a space of its own


@pytest.mark.parametrize("split", [r"\d", r"\d\d\d", r"\d\d\d\d"])
def test_other_ways_to_read_years_are_refused(split: str) -> None:
    words = {f"{i:0{width}}" for width in (1, 3, 4) for i in range(10**width)} | {"The", "year", "in"}
    with pytest.raises(TaskError, match="1732 as 17 and 32") as error:
        generated_pairs("greater_than", word_level(split, words))
    assert "'1732'" in one_line(error) or "'1', '7', '3', '2'" in one_line(error) or "'173', '2'" in one_line(error)


# ---------------------------------------------------------------------------------------------------- pronouns


def test_pronouns_by_name(wordy: Model) -> None:
    task = load_task("pronoun", wordy, known_only=False, test_fraction=0.0)
    names = [pair.text["subject"] for pair in task.discovery]
    assert sorted(names) == sorted(NAMES)
    (she, he) = wordy.tokenizer.convert_tokens_to_ids(["she", "he"])
    for pair in task.discovery:
        name = pair.text["subject"]
        assert pair.text["clean"] == f"So {name} is such a good cook, isn't"
        assert {pair.answer[0], pair.distractor} == {she, he}
        assert name not in WOMEN or pair.answer[0] == she
        assert name not in MEN or pair.answer[0] == he
        other = pair.text["corrupted"].split()[1]
        assert pair.text["corrupted"] == pair.text["clean"].replace(name, other)
        answers = {p.text["subject"]: p.answer[0] for p in task.discovery}
        assert answers[other] == pair.distractor
        assert wordy.tokenizer.convert_ids_to_tokens([pair.clean[i] for i in pair.positions["subject"]]) == [name]
        assert pair.right == pair.wrong == ()
    few = generated_pairs("pronoun", Tokenizer(wordy.tokenizer, True), 10)
    assert [pair.answer for pair in few] == ["she", "he"] * 5


# ---------------------------------------------------------------------------------------------------- agreement


def test_verbs_of_the_subjects_number_are_right(wordy: Model) -> None:
    task = load_task("agreement", wordy, known_only=False, max_facts=200, test_fraction=0.5)
    pairs = task.discovery + task.test
    decode = wordy.tokenizer.convert_ids_to_tokens
    numbers, between = [], []
    plurals = {row["object"] for row in noun_rows()}
    singular = {row["subject"]: row["object"] for row in noun_rows()}
    for pair in pairs:
        right, wrong = set(decode(list(pair.right))), set(decode(list(pair.wrong)))
        noun, other = (decode([pair.clean[i] for i in pair.positions[name]])[0] for name in ("subject", "other"))
        assert len(pair.positions["subject"]) == len(pair.positions["other"]) == 1
        words = pair.text["clean"].split()
        assert words[1] == noun == pair.text["subject"]
        assert words[-1] == other
        is_plural = noun in plurals
        assert right <= (MANY if is_plural else ONE)
        assert wrong <= (ONE if is_plural else MANY)
        assert {"is", "was", "has"} <= (wrong if is_plural else right)
        assert {"are", "were", "have"} <= (right if is_plural else wrong)
        form = {"is": "are", "was": "were", "has": "have"}
        verbs = (pair.text["answer"], pair.text["distractor"])
        assert verbs in (form.items() if not is_plural else {v: k for k, v in form.items()}.items())
        corrupted = pair.text["corrupted"].split()
        assert words[:1] + words[2:] == corrupted[:1] + corrupted[2:]
        assert noun == singular.get(corrupted[1]) or corrupted[1] == singular.get(noun)
        assert len(pair.clean) == len(pair.corrupted)
        numbers.append(is_plural)
        between.append((other in plurals) != is_plural)
    assert len({pair.text["clean"] for pair in pairs}) == 200
    assert sum(numbers) == 100
    assert sum(between) == 100  # attractors


def noun_rows() -> list[dict[str, str]]:
    path = Path(__file__).resolve().parents[2] / "data" / "relations" / "linguistic" / "noun_plural.json"
    return json.loads(path.read_text())["samples"]


def test_a_noun_inside_another_is_not_taken_for_it(wordy: Model) -> None:
    """The letters of "man" are the end of "woman", whatever stands last."""
    tokenizer, inside = Tokenizer(wordy.tokenizer, True), re.compile(r"The (man|men) .*\bwo\1")

    def has_one(seed: int) -> bool:
        return any(inside.match(pair.clean) for pair in generated_pairs("agreement", tokenizer, 100, seed))

    seed = next(seed for seed in range(500) if has_one(seed))
    task = load_task("agreement", wordy, known_only=False, max_facts=100, test_fraction=0.0, seed=seed, prepend_bos=True)
    for pair in task.discovery:
        assert pair.positions["subject"] == (2,), pair.text["clean"]  # after BOS and "The"


def test_nouns_that_grow_in_the_plural_are_left_out() -> None:
    words = {form for row in noun_rows() for form in row.values()} | ONE | MANY | {"es", "The", "house", "and"}
    words |= {word.removesuffix("es") for word in words}
    tokenizer = word_level(r"es\b", words)
    nouns = {pair.subject for pair in generated_pairs("agreement", tokenizer, 500)}
    assert {"dog", "dogs", "man", "men"} <= nouns
    assert not nouns & {"box", "boxes", "dish", "dishes", "hero", "heroes"}
    for pair in generated_pairs("agreement", tokenizer, 500):
        assert len(tokenizer.encode(pair.clean)) == len(tokenizer.encode(pair.corrupted))


# ---------------------------------------------------------------------------------------------------- IOI, ABC


def test_abc_prompts_have_three_other_names(wordy: Model) -> None:
    options = {"known_only": False, "max_facts": 50, "test_fraction": 0.3, "seed": 3}
    abba, abc = load_task("ioi", wordy, **options), load_task("ioi_abc", wordy, **options)
    assert [pair.clean for pair in abc.discovery + abc.test] == [pair.clean for pair in abba.discovery + abba.test]
    for pair in abc.discovery + abc.test:
        clean, corrupted = pair.text["clean"].split(), pair.text["corrupted"].split()
        at = [i for i, word in enumerate(clean) if word in NAMES]
        assert [i for i in range(len(clean)) if clean[i] != corrupted[i]] == at
        assert len({corrupted[i] for i in at} | {clean[i] for i in at}) == 5
        assert len(pair.clean) == len(pair.corrupted)


# ---------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", GENERATED)
def test_nano_has_every_word_of_every_task(name: str, wordy: Model) -> None:
    task = load_task(name, wordy, known_only=False, max_facts=300, test_fraction=0.0)
    unknown = wordy.tokenizer.unk_token_id
    for pair in task.discovery:
        assert unknown not in (*pair.clean, *pair.corrupted, *pair.answer, pair.distractor, *pair.right, *pair.wrong)
    again = load_task(name, wordy, known_only=False, max_facts=300, test_fraction=0.0)
    assert again.hash == task.hash
    assert load_task(name, wordy, known_only=False, max_facts=300, test_fraction=0.0, seed=1).hash != task.hash


@pytest.mark.parametrize("name", GENERATED)
def test_a_tokenizer_without_the_words_is_refused(name: str, small_model: Callable[[str], Model]) -> None:
    with pytest.raises(TaskError) as error:
        load_task(name, small_model("neox"), known_only=False)
    assert "this" in one_line(error)
    with pytest.raises(TaskError, match="no relation"):
        load_task(name, small_model("neox"), template=1)


def test_known_is_what_any_right_answer_makes_it(wordy: Model) -> None:
    pairs = load_task("greater_than", wordy, known_only=False, max_facts=40, test_fraction=0.0).discovery
    expected = []
    for pair in pairs:
        order = wordy.bridge(torch.tensor([pair.clean]))[0, -1].argsort(descending=True).tolist()
        first = next(place for place, token in enumerate(order) if token in pair.right)
        expected.append(1 + len([token for token in order[:first] if token not in pair.right]))
    for batch_size in (1, 7):
        assert best_ranks(wordy, [pair.clean for pair in pairs], [pair.right for pair in pairs], batch_size) == expected
    limit = sorted(expected)[len(expected) // 2]
    kept = load_task("greater_than", wordy, known_rank=limit, max_facts=40, test_fraction=0.0).discovery
    assert {pair.text["clean"] for pair in kept} == {
        pair.text["clean"] for pair, rank in zip(pairs, expected, strict=True) if rank <= limit
    }
    assert 0 < len(kept) < 40


def test_facts_have_one_answer(wordy: Model) -> None:
    facts = load_facts("pronoun", wordy).facts
    assert len(facts) == len(NAMES)
    assert all(wordy.tokenizer.convert_ids_to_tokens(fact.tokens[fact.subject[0]]) in NAMES for fact in facts)
    for name in ("greater_than", "agreement"):
        with pytest.raises(TaskError, match="several answers") as error:
            load_facts(name, wordy)
        one_line(error)


# ---------------------------------------------------------------------------------------------------- pairs and batches


def test_sets_are_padded_and_default_to_answer_and_distractor() -> None:
    pairs = [
        TokenPair((1, 3), (1, 4), (5, 6), 7, {}, {}),
        TokenPair((1, 3), (1, 4), (5,), 7, {}, {}, right=(5, 8, 9), wrong=(7, 10)),
    ]
    batch = make_batch(pairs)
    assert batch.right.tolist() == [[5, -1, -1], [5, 8, 9]]
    assert batch.wrong.tolist() == [[7, -1], [7, 10]]
    assert make_batch(pairs, full_answer=True).right.tolist() == batch.right.tolist()
    assert make_batch([replace(pairs[0], answer=(9,))]).right.tolist() == [[9]]
    for sets in ({"right": (5,)}, {"wrong": (7,)}, {"right": (5, 7), "wrong": (7,)}):
        with pytest.raises(TaskError, match="right and"):
            TokenPair((1, 3), (1, 4), (5,), 7, {}, {"clean": "w3"}, **sets)


def test_a_task_without_sets_has_the_hash_it_always_had(wordy: Model) -> None:
    task = load_task("pronoun", wordy, known_only=False)
    fields = ("clean", "corrupted", "answer", "distractor", "positions", "text")
    rows = [
        [{key: asdict(pair)[key] for key in fields} for pair in split]
        for split in (task.discovery, task.validation, task.test)
    ]
    assert task.hash == hashlib.blake2b(json.dumps(rows, sort_keys=True).encode(), digest_size=16).hexdigest()
    first = task.discovery[0]
    given = replace(first, right=first.answer, wrong=(first.distractor,))
    assert replace(task, discovery=(given, *task.discovery[1:])).hash != task.hash
