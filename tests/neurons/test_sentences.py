"""Sentences in which neurons are read: which fact they belong to, where they are read, and how text is split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import SmallModel

from kc_lib.errors import TaskError
from kc_lib.models.model import Model
from kc_lib.neurons.cloze import load_cloze
from kc_lib.neurons.sentences import (
    ReadSentence,
    distant_sentences,
    holds,
    own_sentences,
    read_corpus,
    read_sentences,
    split_sentences,
)
from kc_lib.tasks.relations import load_relation

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TREX, KNOWN = SHARED / "trex", SHARED / "known_1000.json"
needs_trex = pytest.mark.skipif(not TREX.exists() or not KNOWN.exists(), reason="the published files are not at hand")


def written(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------ where neurons are read


def test_a_masked_model_reads_at_the_tails_mask(masked_model: Model) -> None:
    sentence = "Paris is in France and Paris is a city."
    (read,) = read_sentences(masked_model, [sentence], subject="France", answer="Paris")
    assert read == ReadSentence(sentence, (2, 4, 13, 14, 20, 17, 21, 13, 15, 11, 5, 3), 1)  # the first of two
    (delhi,) = read_sentences(masked_model, ["In India see New Delhi."], subject="India", answer="New Delhi")
    assert (delhi.tokens, delhi.position) == ((2, 1, 24, 18, 4, 4, 4, 5, 3), 4)
    assert read_sentences(masked_model, ["Parisian people", "Rome"], answer="Paris") == ()  # no whole word


def test_a_causal_model_reads_before_the_tail_and_after_the_head(small_model: SmallModel) -> None:
    gpt2 = small_model("gpt2")
    sentences = ["w10 w5 w20 w6", "w20 w10", "w5 w20 w10 w6 w20", "w5 w20 w10"]
    read = read_sentences(gpt2, sentences, subject="w10", answer="w20")
    assert read == (
        ReadSentence(sentences[0], (1, 10, 5), 2),
        ReadSentence(sentences[2], (1, 5, 20, 10, 6), 4),  # its first "w20" comes before the subject
    )
    first, *_ = read_sentences(gpt2, sentences[1:], answer="w20", prepend_bos=False)
    assert first == ReadSentence(sentences[2], (5,), 0)  # and without a subject "w20" starts the first sentence


def test_random_places_are_seeded_and_not_the_subjects(small_model: SmallModel, masked_model: Model) -> None:
    sentence = "The people of New Delhi see Paris , Rome and Madrid"
    places = set()
    for seed in range(60):
        read = read_sentences(masked_model, [sentence], subject="New Delhi", seed=seed)
        assert read == read_sentences(masked_model, ["Rome", sentence], subject="New Delhi", seed=seed)[1:]
        (one,) = read
        assert one.tokens[one.position] == 4
        assert one.tokens[4:7] == (25, 26, 27)
        places.add(one.position)
    assert places == {1, 2, 3, 7, 8, 10, 11, 12}  # all words but the subject's, and no comma
    causal = {
        read_sentences(small_model("gpt2"), ["w5 w6 w10 w7 w8 w9"], subject="w10", seed=seed)[0].tokens for seed in range(40)
    }
    assert causal == {(1, 5, 6, 10), (1, 5, 6, 10, 7), (1, 5, 6, 10, 7, 8)}
    anywhere = {read_sentences(small_model("gpt2"), ["w5 w6 w7"], seed=seed)[0].tokens for seed in range(40)}
    assert anywhere == {(1, 5), (1, 5, 6)}
    assert read_sentences(small_model("gpt2"), ["w10", "w5 w10", ""], subject="w10") == ()


def test_long_sentences_are_cut_around_the_place(small_model: SmallModel, masked_model: Model) -> None:
    words = [f"w{i}" for i in range(40, 140)]
    sentence = " ".join(words)
    for answer, first in (("w40", 40), ("w90", 85), ("w139", 130)):
        (read,) = read_sentences(masked_model, [sentence], answer=answer, max_tokens=12)
        expected = [4 if f"w{i}" == answer else i for i in range(first, first + 10)]
        assert read.tokens == (2, *expected, 3)
        assert read.tokens[read.position] == 4
    (read,) = read_sentences(small_model("gpt2"), [sentence], answer="w90", max_tokens=5)
    assert read == ReadSentence(sentence, (1, 86, 87, 88, 89), 4)
    (read,) = read_sentences(small_model("gpt2"), [sentence], answer="w139")  # the context has 64 positions
    assert read == ReadSentence(sentence, (1, *range(76, 139)), 63)
    with pytest.raises(TaskError, match="max_tokens is 3; it must be at least 4"):
        read_sentences(small_model("gpt2"), [sentence], max_tokens=3)


# ------------------------------------------------------------------------------------------------ distant supervision

BAGS = [
    {
        "th_bags": ["In France, French is spoken.", "French (France)"],
        "h_bags": ["See France.", "France and French food", "A France!"],
    },
    {"th_bags": ["Spain: Spanish"], "h_bags": ["Visit Spain", "Frances of Spain"]},
    {"th_bags": ["Spanish is spoken"], "h_bags": ["Visit Italy", "Visit Rome"]},
    {"th_bags": [], "h_bags": ["New Spain was large"]},
    {"th_bags": ["Basque too"], "h_bags": []},
]
FACTS = [("France", "French"), ("Spain", "Spanish"), ("New Spain", "Spanish"), ("Italy", "Italian")]


def test_bags_belong_to_the_fact_they_name(tmp_path: Path) -> None:
    task = distant_sentences(written(tmp_path / "distant.json", BAGS), FACTS, n_random=4)
    assert [(fact.subject, fact.answer) for fact in task.facts] == [
        ("France", "French"),
        ("Spain", "Spanish"),
        ("New Spain", "Spanish"),
    ]
    france, spain, new_spain = task.facts
    assert france.head_and_tail == ("In France, French is spoken.", "French (France)")
    assert france.head_only == ("See France.", "A France!")  # not the one that holds the answer
    assert new_spain.head_and_tail == ()
    assert new_spain.head_only == ("New Spain was large",)
    assert set(spain.random) < {
        "In France, French is spoken.",
        "French (France)",
        "See France.",
        "France and French food",
    } | {
        "A France!",
        "Visit Italy",
        "Visit Rome",
        "Basque too",
    }
    assert len(spain.random) == 4
    expected = {"bags": 5, "unmatched": 2, "ambiguous": 0, "facts": 3, "head_and_tail": 3, "head_only": 5, "random": 12}
    assert task.report == expected | {
        "facts_without_head_and_tail": 1,
        "facts_without_head_only": 0,
        "facts_without_random": 0,
    }
    again = distant_sentences(str(tmp_path / "distant.json"), FACTS, n_random=4, seed=1)
    assert again.hash != task.hash
    both = [{"th_bags": ["In Paris, French and English"], "h_bags": ["Paris"]}, *BAGS]
    doubtful = distant_sentences(written(tmp_path / "b.json", both), [*FACTS, ("Paris", "French"), ("Paris", "English")])
    assert doubtful.report["ambiguous"] == 1


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "cannot be read as JSON"),
        ({}, "is no JSON list"),
        ([], "is no JSON list"),
        ([BAGS[0], {"th_bags": ["a"]}], "row 1: h_bags is 'None'"),
        ([BAGS[0], ["a"]], "row 1: th_bags is 'None'"),
        ([{"th_bags": [3], "h_bags": []}], "row 0: th_bags is '[3]'"),
        (BAGS[2:], "none of its 3 bags belongs to a fact"),
    ],
    ids=str,
)
def test_bad_files_are_one_line(tmp_path: Path, content: Any, part: str) -> None:
    path = written(tmp_path / "distant.json", content)
    with pytest.raises(TaskError) as error:
        distant_sentences(path, FACTS[:1])
    assert part in str(error.value)
    assert "distant.json" in str(error.value)


@needs_trex
@pytest.mark.parametrize(("relation", "n_facts"), [("P37", 46), ("P103", 47)])
def test_published_sentences_of_known_facts(smollm2: Model, relation: str, n_facts: int) -> None:
    rows = json.loads(KNOWN.read_text(encoding="utf-8"))
    facts = [(row["subject"], row["attribute"]) for row in rows if row["relation_id"] == relation]
    task = distant_sentences(TREX / f"distant_{relation}.json", facts)
    assert len(task.facts) == n_facts
    assert task.report["bags"] >= task.report["unmatched"] + task.report["ambiguous"] + n_facts  # a fact may be there twice
    for fact in task.facts:
        assert all(holds(s, fact.subject) and holds(s, fact.answer) for s in fact.head_and_tail)
        assert all(holds(s, fact.subject) and not holds(s, fact.answer) for s in fact.head_only)
        assert not any(holds(s, fact.subject) or holds(s, fact.answer) for s in fact.random)
        assert len(fact.random) == 10
    fact = task.facts[0]
    for read in read_sentences(smollm2, fact.head_and_tail, subject=fact.subject, answer=fact.answer):
        seen = smollm2.tokenizer.decode(list(read.tokens[1:]))
        assert fact.subject in seen
        assert fact.answer in read.text[len(seen) :]


# ------------------------------------------------------------------------------------------------ our own


def test_sentences_of_our_own_facts(smollm2: Model) -> None:
    task = load_cloze("country_language", smollm2, n_prompts=4, n_held_out=2, max_facts=4, known_only=False)
    corpus = ["People love Spain.", *(f"{fact.subject} is far away." for fact in task.facts), "It rained.", "It snowed."]
    sentences = own_sentences(task, n_random=5)
    with_corpus = own_sentences(task, corpus, n_random=2)
    capitals = {fact.subject: fact.object for fact in load_relation("country_capital").facts}
    for fact, own, more in zip(task.facts, sentences.facts, with_corpus.facts, strict=True):
        assert own.head_and_tail == tuple(f"{prompt.text} {fact.answer}." for prompt in fact.held_out)
        assert f"The capital city of {fact.subject} is {capitals[fact.subject]}." in own.head_only
        assert all(holds(s, fact.subject) and not holds(s, fact.answer) for s in own.head_only)
        assert not any(holds(s, fact.subject) or holds(s, fact.answer) for s in own.random)
        assert len(own.random) == 5
        assert more.head_only == (*own.head_only, f"{fact.subject} is far away.")
        assert set(more.random) < set(corpus)
    assert sentences.report["facts_without_head_only"] == 0
    assert sentences == own_sentences(task, n_random=5)
    assert sentences.hash != own_sentences(task, n_random=5, seed=1).hash
    with pytest.raises(TaskError, match="'country_language' has no held-out paraphrases"):
        own_sentences(load_cloze("country_language", smollm2, max_facts=4, known_only=False))


def test_own_sentences_are_of_words_the_model_has(small_model: SmallModel, tmp_path: Path) -> None:
    """The small models know w3 to w199; every other word is one and the same token to them."""
    model = small_model("gpt2")
    relation = {"prompt_templates": ["w5 {} w6", "w7 {} w8"], "samples": [{"subject": "w30", "object": "w100"}]}
    file = tmp_path / "relation.json"
    file.write_text(json.dumps(relation))
    task = load_cloze(str(file), model, known_only=False, n_prompts=1, n_held_out=1)
    corpus = ["w9 w30 w10", "w9 w11", "w30 is far away", "It rained"]
    (plain,), (chosen,) = (own_sentences(task, corpus, model=m).facts for m in (None, model))
    assert plain.head_only == ("w9 w30 w10", "w30 is far away")
    assert set(plain.random) == {"w9 w11", "It rained"}
    assert chosen.head_only == ("w9 w30 w10",)
    assert chosen.random == ("w9 w11",)


def test_masked_sentences_hold_the_answer_in_the_masks_place(masked_model: Model, tmp_path: Path) -> None:
    rows = [
        [[f"The capital of {x} is [MASK].", y, "P36"], [f"[MASK] is in {x}.", y, "P36"]]
        for x, y in (("France", "Paris"), ("Italy", "Rome"))
    ]
    task = load_cloze(written(tmp_path / "data.json", rows), masked_model, n_held_out=1, known_only=False)
    assert own_sentences(task).facts[1].head_and_tail == ("Rome is in Italy.",)


# ------------------------------------------------------------------------------------------------ corpora


def test_text_is_split_into_sentences() -> None:
    text = """Dr. J. Smith came in.  "Sit down!" he said.
He sat (as always.) Then 3.5 metres
of rain fell? Yes.

1. Wash the
bowl. 2 eggs follow.

A heading without a stop

...
"""
    assert split_sentences(text) == [
        "Dr. J. Smith came in.",
        '"Sit down!" he said.',
        "He sat (as always.)",
        "Then 3.5 metres of rain fell?",
        "Yes.",
        "1. Wash the bowl.",
        "2 eggs follow.",
        "A heading without a stop",
    ]


def test_a_corpus_is_a_file_a_folder_or_our_own(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    written(tmp_path / "b.txt", "One. Two.")
    written(tmp_path / "more" / "a.txt", "Three. One.")
    written(tmp_path / "c.csv", "Four.")
    assert read_corpus(tmp_path / "b.txt") == ["One.", "Two."]
    assert read_corpus(str(tmp_path)) == ["One.", "Two.", "Three."]
    own = read_corpus()
    assert len(own) == len(set(own)) > 150
    assert "The crew knew her well." in own
    (tmp_path / "empty").mkdir()
    for path, part in ((tmp_path / "no.txt", "no.txt"), (tmp_path / "empty", "holds no .txt file"), ("nowhere", "nowhere")):
        with pytest.raises(TaskError) as error:
            read_corpus(path)
        assert part in str(error.value)
    written(tmp_path / "empty" / "e.txt", " ")
    with pytest.raises(TaskError, match="empty"):
        read_corpus(tmp_path / "empty")
