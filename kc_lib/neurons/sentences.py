"""Sentences in which the neurons of a fact are read: with its subject and answer, with its subject alone, with neither.

Dai et al. (2022, section 4.4) compare the activation of knowledge neurons on distantly supervised sentences that hold head
and tail (T1), the head only (T2), and on random sentences (T3); their trigger examples come from the same sentences. Those
of T-REX relations are read from the published ``distant_P37.json``: a JSON list of ``{"th_bags": [...], "h_bags": [...]}``.
Of a relation without such a file, sentences are made from its held-out paraphrases and from other relations; a user's own
corpus serves as well.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kc_lib.errors import TaskError
from kc_lib.models.model import Model
from kc_lib.neurons.cloze import ClozeTask
from kc_lib.neurons.options import SentenceOptions
from kc_lib.reading import read_json
from kc_lib.results import hash_of
from kc_lib.tasks.files import load_text
from kc_lib.tasks.relations import SLOT, Relation, load_relation, relation_files
from kc_lib.tasks.tokens import Tokenizer, tokenizer_of

MAX_TOKENS = 128  # as the published code reads a sentence
# Not ends of sentences: initials, abbreviations that stand before a name or a number, the number of a list's item
ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Mt|vs|Fig|e\.g|i\.e)\.$|^\d+\.$")
END = re.compile(r"""(?<=[.!?])["'\u201d\u2019)\]]*\s+(?=["'\u201c\u2018(\[]*[A-Z0-9])""")


@dataclass(frozen=True)
class FactSentences:
    """Sentences by what of a fact they hold, in whole words."""

    subject: str
    answer: str
    head_and_tail: tuple[str, ...]  # T1: subject and answer
    head_only: tuple[str, ...]  # T2: the subject without the answer
    random: tuple[str, ...]  # T3: neither


@dataclass(frozen=True)
class SentenceTask:
    """Sentences of each fact that has some; ``report`` counts them and what was left out."""

    name: str
    facts: tuple[FactSentences, ...]
    report: Mapping[str, int]

    @property
    def hash(self) -> str:
        """Hash of every sentence: what a result depends on."""
        return hash_of([asdict(fact) for fact in self.facts])


@dataclass(frozen=True)
class ReadSentence:
    """A sentence as one model reads it, and the index in ``tokens`` where neurons are read.

    Of a masked LM that is the first mask in the place of the word that is left out, of a causal model the token before it,
    with which its tokens end.
    """

    text: str
    tokens: tuple[int, ...]
    position: int


def sentences_for(task: ClozeTask, model: Model, **options: Any) -> SentenceTask:
    """Sentences of a task's facts: of a distant-supervision file, or else the project's own.

    Args:
        options: fields of ``SentenceOptions``.

    Raises:
        TaskError: as ``distant_sentences`` and ``own_sentences``.
    """
    asked = SentenceOptions.of(options)
    if asked.sentences is None:
        return own_sentences(task, read_corpus(asked.corpus), model=model, seed=asked.seed)
    facts = [(fact.subject, fact.answer) for fact in task.facts]
    return distant_sentences(asked.sentences, facts, seed=asked.seed)


def distant_sentences(
    path: str | Path, facts: Sequence[tuple[str, str]], *, n_random: int = 10, seed: int = 0
) -> SentenceTask:
    """The sentences of a published distant-supervision file for those of the facts (subject, answer) that it has.

    The published code pairs its bags with facts by a file of queries that is not at hand. Here a bag belongs to the fact
    whose subject is in all of its ``h_bags`` and whose answer is in all of its ``th_bags``; of several, to that of
    the longest subject. ``report`` counts bags, those of no fact ("unmatched"), those of several ("ambiguous"), and facts.
    ``random`` is drawn by ``seed`` from all bags, without sentences that hold subject or answer.

    Raises:
        TaskError: no such file, another format, or no bag that belongs to a fact.
    """
    bags = _read_bags(Path(path))
    bags_of: dict[tuple[str, str], list[int]] = {}
    report = {"bags": len(bags), "unmatched": 0, "ambiguous": 0}
    for i, (both, head) in enumerate(bags):
        matching = [fact for fact in dict.fromkeys(facts) if head and _all_hold(head, fact[0]) and _all_hold(both, fact[1])]
        longest = max((len(subject) for subject, _ in matching), default=0)
        best = [fact for fact in matching if len(fact[0]) == longest]
        if len(best) == 1:
            bags_of.setdefault(best[0], []).append(i)
        else:
            report["ambiguous" if best else "unmatched"] += 1
    if not bags_of:
        raise TaskError(
            f"{path}: none of its {len(bags)} bags belongs to a fact given ({len(facts)}); give facts of its relation"
        )
    pool = [sentence for both, head in bags for sentence in (*both, *head)]
    sentences = []
    for (subject, answer), places in bags_of.items():
        both_bags = [sentence for i in places for sentence in bags[i][0] if holds(sentence, subject)]
        head_bags = [sentence for i in places for sentence in bags[i][1]]
        sentences.append(_sorted_out(subject, answer, both_bags, head_bags, pool, n_random, seed))
    return SentenceTask(Path(path).stem, tuple(sentences), report | _counts(sentences))


def own_sentences(
    task: ClozeTask,
    corpus: Sequence[str] = (),
    *,
    model: Model | None = None,
    n_random: int = 10,
    seed: int = 0,
) -> SentenceTask:
    """Sentences of the facts of a task from its held-out paraphrases, the project's other relations and a corpus.

    ``head_and_tail`` are the held-out paraphrases with the answer filled in. ``head_only`` are other relations' paraphrases
    about the same subject, with their own answer, and the corpus' sentences that name it. ``random`` is drawn by ``seed``
    from the corpus, or where that gives none from other relations' sentences. With a ``model``, sentences of which it does
    not have every word are left out: a small vocabulary knows the words of some relations only. ``report`` counts the facts
    that have none of a kind.

    Raises:
        TaskError: the task has no held-out paraphrases.
    """
    if not any(fact.held_out for fact in task.facts):
        raise TaskError(f"task {task.name!r} has no held-out paraphrases to make sentences of; load it with n_held_out")
    tokenizer = None if model is None else tokenizer_of(model)
    relations = [load_relation(name) for name in relation_files()]
    statements = {one.name: _known_words(tokenizer, _statements(one, one.paraphrases[:1])) for one in relations}
    corpus = _known_words(tokenizer, corpus)
    sentences = []
    for fact in task.facts:
        others = [relation for relation in relations if relation.name != fact.relation]
        about_subject = [text for other in others for text in _statements(other, other.paraphrases, fact.subject)]
        of_subject = _known_words(tokenizer, about_subject)
        of_subject += [sentence for sentence in corpus if holds(sentence, fact.subject)]
        pool = corpus or [sentence for relation in others for sentence in statements[relation.name]]
        filled = [prompt.filled(fact.answer) for prompt in fact.held_out]
        sentences.append(_sorted_out(fact.subject, fact.answer, filled, of_subject, pool, n_random, seed))
    return SentenceTask(task.name, tuple(sentences), _counts(sentences))


def read_sentences(
    model: Model,
    sentences: Sequence[str],
    *,
    subject: str = "",
    answer: str | None = None,
    max_tokens: int = MAX_TOKENS,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> tuple[ReadSentence, ...]:
    """Sentences as a model reads them, in their order, without those that have no place to read at.

    The place is the answer's first occurrence in whole words (T1), or for ``answer=None`` a word that is not the subject's,
    drawn by ``seed`` and the sentence (T2, T3, and a corpus for trigger sentences). A masked LM sees a mask per token there.
    A causal model reads at the token before, so a place that starts the sentence does not serve it, nor, where the sentence
    holds the subject, one that precedes it: there the model has not met the head yet (the paper's model is masked). A
    sentence longer than ``max_tokens`` or the model's context is cut to as many tokens around the place; for a causal model
    to those before it.
    """
    if max_tokens < 4:
        raise TaskError(f"max_tokens is {max_tokens}; it must be at least 4, for two special tokens, a mask and a word")
    tokenizer = tokenizer_of(model, prepend_bos)
    n_tokens = min(max_tokens, int(model.cfg.n_ctx))
    as_read = (_read(tokenizer, sentence, subject, answer, n_tokens, seed) for sentence in sentences)
    return tuple(read for read in as_read if read is not None)


def read_corpus(path: str | Path | None = None) -> list[str]:
    """The distinct sentences of a ``.txt`` file, of all such files of a folder and below, or of the project's own text.

    A sentence ends with ``.``, ``!`` or ``?`` before white space and a capital (A-Z) or digit, or with its paragraph;
    initials and a few abbreviations do not end one. That is a rule for running English text, not a trained splitter: for
    other text give one sentence per paragraph (an empty line between them).

    Raises:
        TaskError: the path does not exist, a file is not UTF-8, or there is no text.
    """
    if path is not None and Path(path).is_dir():
        files = sorted(Path(path).rglob("*.txt"))
        if not files:
            raise TaskError(f"the folder {path} holds no .txt file; give a folder with running text in .txt files")
        texts = [load_text(file) for file in files]
    else:
        texts = [load_text(None if path is None else Path(path))]
    return list(dict.fromkeys(sentence for text in texts for sentence in split_sentences(text)))


def split_sentences(text: str) -> list[str]:
    """Sentences of running text by the rule of ``read_corpus``; line breaks within a paragraph are spaces."""
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        rest = " ".join(paragraph.split())
        start = 0
        for end in END.finditer(rest):
            if not ABBREVIATION.search(rest[start : end.start()]):
                sentences.append(rest[start : end.end()].strip())
                start = end.end()
        sentences.append(rest[start:])
    return [sentence for sentence in sentences if re.search(r"\w", sentence)]


def holds(sentence: str, words: str) -> bool:
    """Whether the sentence holds the words as they are, in whole words."""
    return words in sentence and _whole(words).search(sentence) is not None


def _whole(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)")


def _all_hold(sentences: Sequence[str], words: str) -> bool:
    return all(holds(sentence, words) for sentence in sentences)


def _read(
    tokenizer: Tokenizer, sentence: str, subject: str, answer: str | None, n_tokens: int, seed: int
) -> ReadSentence | None:
    heads = [match.span() for match in _whole(subject).finditer(sentence)] if subject else []
    place = re.compile(r"\w+(?:['\u2019-]\w+)*") if answer is None else _whole(answer)
    free = [match.span() for match in place.finditer(sentence)]
    free = [(a, b) for a, b in free if all(b <= start or a >= end for start, end in heads)]
    if tokenizer.mask is None:
        head_end = heads[0][1] if heads else 0
        free = [(a, b) for a, b in free if a >= head_end and re.search(r"\w", sentence[:a])]
    if not free:
        return None
    start, end = random.Random(f"{seed}: {sentence}").choice(free) if answer is None else free[0]
    try:
        left, inside, right = tokenizer.around(sentence, start, end)
    except TaskError:  # the word shares a token with its neighbour, so there is nothing to leave out
        return None
    if tokenizer.mask is None:
        n_opening = len(tokenizer.opening)
        left = left[:n_opening] + left[n_opening:][-(n_tokens - n_opening) :]
        return ReadSentence(sentence, left, len(left) - 1)
    tokens, first = _window(left + (tokenizer.mask,) * len(inside) + right, len(left), n_tokens, tokenizer)
    return ReadSentence(sentence, tokens, first)


def _window(tokens: tuple[int, ...], position: int, n_tokens: int, tokenizer: Tokenizer) -> tuple[tuple[int, ...], int]:
    """At most ``n_tokens`` of the tokens around a position, between the special tokens of a whole sentence."""
    n_opening, n_closing = len(tokenizer.opening), len(tokenizer.closing)
    inner = tokens[n_opening : len(tokens) - n_closing]
    room = n_tokens - n_opening - n_closing
    start = max(0, min(position - n_opening - room // 2, len(inner) - room))
    return tokens[:n_opening] + inner[start : start + room] + tokens[len(tokens) - n_closing :], position - start


def _sorted_out(
    subject: str, answer: str, both: Sequence[str], of_subject: Sequence[str], pool: Sequence[str], n_random: int, seed: int
) -> FactSentences:
    neither = [s for s in dict.fromkeys(pool) if not holds(s, subject) and not holds(s, answer)]
    drawn = random.Random(f"{seed}: {subject}: {answer}").sample(neither, min(n_random, len(neither)))
    head_only = tuple(dict.fromkeys(s for s in of_subject if not holds(s, answer)))
    return FactSentences(subject, answer, tuple(dict.fromkeys(both)), head_only, tuple(drawn))


def _counts(sentences: Sequence[FactSentences]) -> dict[str, int]:
    kinds = ("head_and_tail", "head_only", "random")
    counts = {kind: sum(len(getattr(fact, kind)) for fact in sentences) for kind in kinds}
    without = {f"facts_without_{kind}": sum(not getattr(fact, kind) for fact in sentences) for kind in kinds}
    return {"facts": len(sentences)} | counts | without


def _known_words(tokenizer: Tokenizer | None, sentences: Sequence[str]) -> list[str]:
    """The sentences without a token for words that the tokenizer does not know."""
    if tokenizer is None or tokenizer.inner.unk_token_id is None or not sentences:
        return list(sentences)
    rows = tokenizer.inner(list(sentences), add_special_tokens=False).input_ids
    unknown = tokenizer.inner.unk_token_id
    return [sentence for sentence, row in zip(sentences, rows, strict=True) if unknown not in row]


def _statements(relation: Relation, templates: Sequence[str], subject: str | None = None) -> list[str]:
    """Every fact of the relation, or of one subject, in every wording."""
    facts = [fact for fact in relation.facts if subject in (None, fact.subject)]
    return [f"{template.replace(SLOT, fact.subject)} {fact.object}." for fact in facts for template in templates]


def _read_bags(path: Path) -> list[tuple[list[str], list[str]]]:
    document = read_json(path)
    if not isinstance(document, list) or not document:
        raise TaskError(f'{path}: is no JSON list of {{"th_bags": [sentences], "h_bags": [sentences]}}')
    bags = []
    for row, bag in enumerate(document):
        both, head = (bag.get("th_bags"), bag.get("h_bags")) if isinstance(bag, dict) else (None, None)
        for key, sentences in (("th_bags", both), ("h_bags", head)):
            if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
                raise TaskError(f"{path}: row {row}: {key} is {str(sentences)[:60]!r}; it must be a list of sentences")
        bags.append((both or [], head or []))
    return bags
