"""Facts as clozes: token ids by hand, which facts are known, ParaRel's files, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers import SmallModel
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers

from kc_lib.errors import MethodError, TaskError
from kc_lib.models.model import Model
from kc_lib.neurons.cloze import Cloze, ClozePrompt, ClozeTask, cloze_prompt, joined_clozes, load_cloze, load_clozes
from kc_lib.tasks.facts import load_facts
from kc_lib.tasks.pararel import parse_pararel, read_patterns
from kc_lib.tasks.relations import load_relation
from kc_lib.tasks.tokens import Tokenizer, tokenizer_of

PARAREL = Path(__file__).resolve().parents[3] / "shared" / "data" / "pararel"
PUBLISHED = PARAREL / "data_1-1.json"
needs_pararel = pytest.mark.skipif(not PUBLISHED.exists(), reason="the published files are not at hand")


def written(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def pattern_file(path: Path, *patterns: str) -> str:
    return written(path, "\n".join(json.dumps({"pattern": pattern, "tense": "present"}) for pattern in patterns) + "\n")


def capitals(*facts: tuple[str, str], label: str = "P36(capital)") -> list[Any]:
    asked = ("The capital of {} is [MASK].", "[MASK] is a capital of {}.", "{}, capital [MASK]")
    return [[[sentence.format(subject), answer, label] for sentence in asked] for subject, answer in facts]


TWO = capitals(("France", "Paris"), ("Italy", "Rome"))


# ------------------------------------------------------------------------------------------------ one sentence


def test_a_causal_model_reads_up_to_its_answer(small_model: SmallModel) -> None:
    tokenizer = tokenizer_of(small_model("gpt2"))
    prompt = cloze_prompt(tokenizer, "w5 w20 w6 [MASK].", "w100")
    assert prompt == ClozePrompt("w5 w20 w6", (Cloze((1, 5, 20, 6), 3, 100),))
    assert prompt.filled("w100") == "w5 w20 w6 w100."
    two = cloze_prompt(tokenizer_of(small_model("gpt2"), False), "w5 [MASK] .", "w100 w101")
    assert two == ClozePrompt("w5", (Cloze((5,), 0, 100), Cloze((5, 100), 1, 101)))
    for sentence in ("[MASK] w5", "w5 [MASK] w6.", " [MASK].", "w5 ([MASK])", ": [MASK]"):
        assert cloze_prompt(tokenizer, sentence, "w100") is None, sentence


def test_a_masked_model_reads_the_whole_sentence(masked_model: Model) -> None:
    assert masked_model.is_masked
    tokenizer = tokenizer_of(masked_model)
    sentence = "The capital of France is [MASK]."
    prompt = cloze_prompt(tokenizer, sentence, " Paris ")
    assert prompt == ClozePrompt(sentence, (Cloze((2, 9, 10, 12, 20, 13, 4, 5, 3), 6, 21),))
    assert prompt.filled("Paris") == "The capital of France is Paris."
    delhi = cloze_prompt(tokenizer, "[MASK] is a city in India", "New Delhi")
    assert delhi is not None
    assert delhi.clozes == (
        Cloze((2, 4, 4, 4, 13, 15, 11, 14, 24, 3), 1, 25),
        Cloze((2, 25, 4, 4, 13, 15, 11, 14, 24, 3), 2, 26),
        Cloze((2, 25, 26, 4, 13, 15, 11, 14, 24, 3), 3, 27),
    )


def test_special_tokens_are_those_of_the_models_own_tokenizer(masked_model: Model) -> None:
    tokenizer = tokenizer_of(masked_model)
    for sentence in ("France's capital, [MASK].", "[MASK], capital of Atlantis", "a country ([MASK])"):
        prompt = cloze_prompt(tokenizer, sentence, "Rome")
        assert prompt is not None
        (cloze,) = prompt.clozes
        own = masked_model.tokenizer(sentence).input_ids
        assert list(cloze.tokens) == own
        assert own.index(4) == cloze.position


def test_a_tokenizer_that_lost_its_template_gets_them_still() -> None:
    inner = Inner(models.WordLevel({"?": 0, "<m>": 1, "<c>": 2, "<s>": 3, "a": 4, "b": 5}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"unk_token": "?", "mask_token": "<m>", "cls_token": "<c>", "sep_token": "<s>"}
    tokenizer = Tokenizer(tf.PreTrainedTokenizerFast(tokenizer_object=inner, **named), True, mask=1)
    prompt = cloze_prompt(tokenizer, "a [MASK]", "b")
    assert prompt is not None
    assert prompt.clozes == (Cloze((2, 4, 1, 3), 2, 5),)
    with pytest.raises(TaskError, match=r"r: 'b' has no tokens of its own in 'a b\.'"):
        cloze_prompt(tokenizer, "a [MASK].", "b", "r")


@pytest.mark.parametrize(
    ("sentence", "answer", "parts"),
    [
        ("The capital of France is.", "Paris", ("here: ", "has 0 [MASK]")),
        ("[MASK] [MASK]", "Paris", ("here: ", "has 2 [MASK]")),
        ("The capital is [MASK].", "Lutetia", ("here: ", "'Lutetia' is outside", "[UNK]")),
        ("The capital is [MASK].", "New York", ("here: ", "'New York' is outside", "[UNK]")),
    ],
)
def test_sentences_that_cannot_be_asked(masked_model: Model, sentence: str, answer: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(TaskError) as error:
        cloze_prompt(tokenizer_of(masked_model), sentence, answer, "here")
    for part in parts:
        assert part in str(error.value)


def test_a_causal_answer_outside_the_vocabulary_is_refused(small_model: SmallModel) -> None:
    with pytest.raises(TaskError, match=r"'Paris' is outside .* \(the tokenizer gives <pad>\)"):
        cloze_prompt(tokenizer_of(small_model("gpt2")), "w5 [MASK].", "Paris")


# ------------------------------------------------------------------------------------------------ relations


def relation_file(path: Path, n_facts: int = 12) -> str:
    relation = {
        "prompt_templates": ["w41 {} w42", "w43 {} w44 w45", "w42 w41 {} w46"],
        "prompt_templates_zs": ["w50 is w51 and {} is"],
        "paraphrase_templates": ["{} w47", "w41 {} w42", "w48 w49 {} w50"],
        "samples": [{"subject": f"w{60 + i}", "object": f"w{100 + i}" + " w150" * (i % 3 == 0)} for i in range(n_facts)],
    }
    return written(path / "letters.json", relation)


def test_a_relation_in_paraphrases(small_model: SmallModel, tmp_path: Path) -> None:
    path = relation_file(tmp_path)
    task = load_cloze(path, small_model("llama"), n_prompts=2, n_held_out=2, known_only=False)
    assert (task.name, task.prepend_bos) == ("letters", True)
    assert task.report == {"rows": 12, "facts": 12, "used": 12, "unknown_words": 0, "prompts": 60, "prompts_dropped": 0}
    first, second = task.facts[:2]
    assert (first.relation, first.subject, first.answer) == ("letters", "w60", "w100 w150")
    assert [prompt.text for prompt in first.prompts] == ["w41 w60 w42", "w43 w60 w44 w45"]
    assert [prompt.text for prompt in first.held_out] == ["w42 w41 w60 w46", "w60 w47"]
    assert first.prompts[0].clozes == (Cloze((1, 41, 60, 42), 3, 100), Cloze((1, 41, 60, 42, 100), 4, 150))
    assert second.prompts[0].clozes == (Cloze((1, 41, 61, 42), 3, 101),)
    all_others = load_cloze(path, small_model("llama"), known_only=False, n_held_out=1)
    assert {(len(fact.prompts), len(fact.held_out)) for fact in all_others.facts} == {(4, 1)}
    assert load_cloze(path, small_model("llama"), n_prompts=2, n_held_out=1, known_only=False).hash != task.hash


def test_the_same_relation_masked(masked_model: Model, tmp_path: Path) -> None:
    task = load_cloze(relation_file(tmp_path), masked_model, known_only=False, n_prompts=3)
    assert task.facts[0].prompts[0] == ClozePrompt(
        "w41 w60 w42 [MASK].",
        (Cloze((2, 41, 60, 42, 4, 4, 5, 3), 4, 100), Cloze((2, 41, 60, 42, 100, 4, 5, 3), 5, 150)),
    )


def test_patterns_replace_a_relations_sentences(small_model: SmallModel, tmp_path: Path) -> None:
    path = relation_file(tmp_path)
    patterns = pattern_file(tmp_path / "p.jsonl", "[X] w55 [Y].", "[Y] w56 [X]", "w57 [X] [Y]", "[X] w55 [Y]")
    task = load_cloze(path, small_model("gpt2"), patterns=patterns, known_only=False)
    assert [prompt.text for prompt in task.facts[3].prompts] == ["w63 w55", "w57 w63"]
    assert (task.report["prompts"], task.report["prompts_dropped"]) == (24, 24)  # of 4, one is masked only, one there twice


def known_by_hand(model: Model, task: ClozeTask, rank: int) -> list[str]:
    """One unpadded forward per cloze."""
    known = []
    for fact in task.facts:
        right = 0
        for prompt in fact.prompts:
            ranks = []
            for cloze in prompt.clozes:
                with torch.no_grad():
                    row = model.bridge(torch.tensor([cloze.tokens]))[0, cloze.position]
                ranks.append(1 + int((row > row[cloze.target]).sum()))
            right += max(ranks) <= rank
        if right >= len(fact.prompts) / 2:
            known.append(fact.subject)
    return known


@pytest.mark.parametrize("masked", [False, True])
def test_known_facts_are_those_found_one_by_one(
    small_model: SmallModel, masked_model: Model, tmp_path: Path, masked: bool
) -> None:
    model, path = masked_model if masked else small_model("gpt2"), relation_file(tmp_path, 40)
    everything = load_cloze(path, model, n_prompts=4, n_held_out=1, known_only=False)
    known = known_by_hand(model, everything, 90)
    assert 2 <= len(known) < 38
    task = load_cloze(path, model, n_prompts=4, n_held_out=1, known_rank=90)
    assert [fact.subject for fact in task.facts] == known
    assert (task.report["asked"], task.report["known"], task.report["used"]) == (40, len(known), len(known))
    assert task == load_cloze(path, model, n_prompts=4, n_held_out=1, known_rank=90, batch_size=3)
    order = list(range(40))
    random.Random(5).shuffle(order)
    drawn = [s for i in order if (s := f"w{60 + i}") in known][:2]
    for batch_size in (1, 32):
        few = load_cloze(path, model, n_prompts=4, n_held_out=1, known_rank=90, max_facts=2, seed=5, batch_size=batch_size)
        assert [fact.subject for fact in few.facts] == sorted(drawn)
        assert few.report["known"] == 2 <= few.report["asked"]
    with pytest.raises(TaskError, match="no known fact left: the model ranks none of the 1 answers"):
        load_cloze(relation_file(tmp_path, 1), model)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"n_prompts": 3, "n_held_out": 3}, ("'w60'", "5 paraphrases", "n_prompts 3 and n_held_out 3")),
        ({"n_held_out": 5}, ("5 paraphrases", "n_held_out 5")),
        ({"n_prompts": 0}, ("n_prompts is 0", "at least 1")),
        ({"n_held_out": -1}, ("n_held_out is -1", "at least 0")),
        ({"max_facts": 0}, ("max_facts is 0",)),
        ({"known_rank": 0.5}, ("known_rank is 0.5",)),
        ({"relation": "P36"}, ("letters.json", "one relation", "'P36'")),
        ({"patterns": "absent.jsonl"}, ("absent.jsonl", "check the path")),
    ],
    ids=str,
)
def test_bad_options_are_one_line(
    small_model: SmallModel, tmp_path: Path, options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(TaskError) as error:
        load_cloze(relation_file(tmp_path), small_model("gpt2"), **options)
    for part in parts:
        assert part in str(error.value)


def test_unknown_sources_and_models(small_model: SmallModel, masked_model: Model, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"unknown relation 'no_such'.*country_capital"):
        load_cloze("no_such", small_model("gpt2"))
    with pytest.raises(TaskError, match=r"absent\.json"):
        load_cloze("absent.json", small_model("gpt2"))
    with pytest.raises(TaskError, match="tokenizer has no mask token"):
        load_cloze(relation_file(tmp_path), small_model("bert"))
    with pytest.raises(TaskError, match="prepend_bos is of causal models"):
        load_cloze(relation_file(tmp_path), masked_model, prepend_bos=False)
    first = pattern_file(tmp_path / "first.jsonl", "[Y] w56 [X]", "[Y] [X].")
    with pytest.raises(TaskError, match=r"no sentence of letters ends with the answer.*'\[MASK\] w56 w60'"):
        load_cloze(relation_file(tmp_path), small_model("gpt2"), patterns=first)
    relation = json.loads(Path(relation_file(tmp_path)).read_text())
    relation["samples"] += [{"subject": "w30", "object": "Paris"}, {"subject": "w31", "object": "w3 Rome"}]
    with pytest.raises(TaskError, match=r"letters: 'w30': the answer 'Paris' is outside.*2 of the 14 facts of letters"):
        load_cloze(written(tmp_path / "letters.json", relation), small_model("gpt2"))


# ------------------------------------------------------------------------------------------------ ParaRel


def test_a_pararel_file(masked_model: Model, tmp_path: Path) -> None:
    facts = capitals(("France", "Paris"), ("Italy", "Rome"), ("New Avalon", "Madrid"), ("France", "Paris"))
    other = capitals(("Spain", "Madrid"), ("India", "New Delhi"), label="P1376(capital of)")
    path = written(tmp_path / "data.json", facts + other)
    task = load_cloze(path, masked_model, relation="P36", known_only=False, n_held_out=1)
    assert task.name == "P36"
    expected = {"rows": 4, "facts": 3, "used": 3, "unknown_words": 1, "prompts": 9, "prompts_dropped": 0}
    assert task.report == expected  # Avalon is no word of the tokenizer's, which is no error
    assert [(fact.subject, fact.answer) for fact in task.facts] == [
        ("France", "Paris"),
        ("Italy", "Rome"),
        ("New Avalon", "Madrid"),
    ]
    assert task.facts[2].prompts[0].clozes[0].tokens == (2, 9, 10, 12, 25, 1, 13, 4, 5, 3)
    everything = load_cloze(path, masked_model, known_only=False)
    assert everything.name == "data"
    assert [fact.relation for fact in everything.facts] == ["P36"] * 3 + ["P1376"] * 2
    assert everything.report["rows"] == 6
    patterns = pattern_file(tmp_path / "P36.jsonl", "[X] is the country of [Y]")
    asked = load_cloze(path, masked_model, relation="P36", patterns=patterns, known_only=False)
    assert [fact.prompts[0].text for fact in asked.facts] == [
        f"{subject} is the country of [MASK]" for subject in ("France", "Italy", "New Avalon")
    ]
    with pytest.raises(TaskError, match="patterns are of one relation, the file has P36, P1376"):
        load_cloze(path, masked_model, patterns=patterns)


def test_subjects_are_found_in_whole_words() -> None:
    facts = capitals(("North Ireland", "A"), ("North Iceland", "B"), ("Mexico", "C"))
    assert [fact.subject for fact in parse_pararel(facts, "f")["P36"]] == ["North Ireland", "North Iceland", "Mexico"]
    # common words cannot be told from the pattern, parts of words can
    assert [fact.subject for fact in parse_pararel(facts[:2], "f")["P36"]] == ["Ireland", "Iceland"]


@pytest.mark.parametrize(
    ("facts", "parts"),
    [
        ([], ("f: holds no facts",)),
        ([{"subject": "w5"}], ("f: fact 0", "no ParaRel file")),
        ([*TWO, []], ("f: fact 2", "no list of rows")),
        ([*TWO, [["The capital [MASK].", "Paris"]]], ("f: fact 2, row 0", "a row is")),
        ([*TWO, [["The capital [MASK].", " ", "P36"]]], ("f: fact 2, row 0", "a row is")),
        ([*TWO, [["The capital.", "Paris", "P36"]]], ("f: fact 2, row 0", "has 0 [MASK]")),
        ([*TWO, [*TWO[0][:1], ["[MASK]!", "Rome", "P36(capital)"]]], ("f: fact 2, row 1", "Rome", "Paris")),
        ([*TWO, TWO[0][:2]], ("f: fact 2 has 2 rows", "3")),
        (TWO[:1], ("relation P36 has one fact", "at least two")),
        ([TWO[0], [["[MASK]!", "Rome", "P36(capital)"]] * 3], ("f: fact 0: no subject", "alike")),
        ([*TWO, *capitals(("Spain", "Madrid"), label="P1376")], ("f: has no relation 'P37'; it has P1376, P36",)),
    ],
    ids=str,
)
def test_bad_pararel_files_are_one_line(facts: list[Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(TaskError) as error:
        parse_pararel(facts, "f", "P37" if "P37" in parts[0] else None)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "holds no patterns"),
        ('{"pattern": "[X] is [Y]"}\n{', "row 2 cannot be read as JSON"),
        ('{"pattern": "[X] is"}', "row 1 has the pattern '[X] is'"),
        ('\n{"pattern": "is [Y]"}', "row 2 has the pattern 'is [Y]'"),
        ('{"lemma": "is"}', "row 1 has the pattern None"),
        ('["[X] is [Y]"]', "row 1 has the pattern None"),
    ],
)
def test_bad_pattern_files_are_one_line(tmp_path: Path, content: str, part: str) -> None:
    path = written(tmp_path / "p.jsonl", content)
    with pytest.raises(TaskError) as error:
        read_patterns(path)
    assert part in str(error.value)
    assert "p.jsonl" in str(error.value)


# ------------------------------------------------------------------------------------------------ real data


@needs_pararel
def test_the_published_subjects_fit_the_published_patterns() -> None:
    facts = parse_pararel(json.loads(PUBLISHED.read_text(encoding="utf-8")), "data_1-1.json")
    assert {name: len(found) for name, found in facts.items()} == {"P1376": 234, "P36": 703}
    for name, found in facts.items():
        patterns = read_patterns(PARAREL / "patterns" / f"{name}.jsonl")
        for fact in found:
            assert fact.sentences == tuple(p.replace("[X]", fact.subject).replace("[Y]", "[MASK]") for p in patterns)


@needs_pararel
def test_the_published_facts_for_a_causal_model(smollm2: Model) -> None:
    task = load_cloze(str(PUBLISHED), smollm2, relation="P36", known_only=False)
    expected = {"rows": 703, "facts": 702, "used": 702, "unknown_words": 0, "prompts": 8 * 702, "prompts_dropped": 6 * 702}
    assert task.report == expected
    for fact in task.facts[::50]:
        for prompt in fact.prompts:
            targets = [cloze.target for cloze in prompt.clozes]
            assert smollm2.tokenizer.decode(targets) == f" {fact.answer}"
            last = prompt.clozes[-1]
            assert smollm2.tokenizer.decode([*last.tokens[1:], targets[-1]]) == f"{prompt.text} {fact.answer}"
            assert all(cloze.position == len(cloze.tokens) - 1 for cloze in prompt.clozes)


@needs_pararel
def test_a_published_pattern_file_serves_our_relation(smollm2: Model) -> None:
    path = PARAREL / "patterns" / "P37.jsonl"
    task = load_cloze("country_language", smollm2, patterns=path, known_only=False)
    n_facts = len(load_relation("country_language").facts)
    assert (task.report["prompts"], task.report["prompts_dropped"]) == (n_facts, 8 * n_facts)
    assert task.facts[0].prompts[0].text == "The official language of Spain is"


@pytest.mark.slow
def test_our_capitals_in_a_real_model(smollm2: Model) -> None:
    task = load_cloze("country_capital", smollm2, n_prompts=2, n_held_out=6, max_facts=1)
    assert len(task.facts) == task.report["known"] == 1
    facts = {fact.text["prompt"]: fact for fact in load_facts("country_capital", smollm2).facts}
    for fact in task.facts:  # the same prompt is the same tokens in every task
        one = facts[fact.prompts[0].text]
        assert fact.prompts[0].clozes[0] == Cloze(one.tokens, len(one.tokens) - 1, one.answer)
        assert len({prompt.text for prompt in fact.prompts + fact.held_out}) == 8


def test_relations_are_joined(small_model: SmallModel, tmp_path: Path) -> None:
    model = small_model("gpt2")
    tasks = []
    for name, subject in (("first", "w30"), ("second", "w31")):
        rows = [{"subject": subject, "object": "w100"}, {"subject": "w32", "object": "w101"}]
        relation = {"prompt_templates": ["w5 {} w6", "w7 {} w8"], "samples": rows}
        tasks.append(load_cloze(written(tmp_path / f"{name}.json", relation), model, known_only=False))
    both = joined_clozes(tasks)
    assert both.name == "first+second"
    assert both.facts == (*tasks[0].facts, *tasks[1].facts)
    assert both.report["used"] == 4
    names = " ".join(str(tmp_path / f"{name}.json") for name in ("first", "second"))
    assert load_clozes(names, model, known_only=False) == both
    prompts = load_clozes(names, model, known_only=False, n_prompts=1, n_held_out=1).prompts_of(2)
    assert prompts.to_dict("list") == {"text": ["w5 w31 w6", "w7 w31 w8"], "held_out": [False, True]}
    with pytest.raises(MethodError, match="there is no fact 4: the task has facts 0 to 3"):
        both.prompts_of(4)
    for wrong in ([], [tasks[0], tasks[0]]):
        with pytest.raises(TaskError, match="cannot be joined"):
            joined_clozes(wrong)
