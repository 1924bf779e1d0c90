"""Facts as sentences with one token left out, in many wordings, for causal and masked language models alike.

What looks for the neurons of a fact asks for it in several paraphrases and keeps what they share (Dai et al. 2022,
arXiv:2104.08696). A masked LM sees the whole sentence with a mask; a causal LM sees it up to the answer, so only sentences
that end with their answer serve it. The published codes take answers of one token; here every token of an answer has a
cloze of its own, those before it filled in.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from kc_lib.errors import MethodError, TaskError
from kc_lib.models.model import Model
from kc_lib.neurons.options import ClozeOptions
from kc_lib.options import names_in
from kc_lib.reading import read_json
from kc_lib.results import hash_of
from kc_lib.tasks.known import ranks_at
from kc_lib.tasks.pararel import ANSWER, MASK, SUBJECT, FactText, fact_texts, parse_pararel, read_patterns
from kc_lib.tasks.relations import SLOT, Relation, load_relation, parse_relation, relation_files
from kc_lib.tasks.tokens import Tokenizer, tokenizer_of


@dataclass(frozen=True)
class Cloze:
    """One sentence with one answer token left out, as one model reads it."""

    tokens: tuple[int, ...]  # causal: up to and including the position that predicts; masked: [CLS] ... [MASK] ... [SEP]
    position: int  # index in tokens where the token is predicted: the mask, or the last token
    target: int


@dataclass(frozen=True)
class ClozePrompt:
    """A paraphrase and one cloze per answer token; in ``text``, ``[MASK]`` stands for the answer of a masked LM."""

    text: str
    clozes: tuple[Cloze, ...]

    def filled(self, answer: str) -> str:
        """The sentence with its answer."""
        return self.text.replace(MASK, answer) if MASK in self.text else f"{self.text} {answer}."


@dataclass(frozen=True)
class ClozeFact:
    """A fact, the paraphrases its neurons are found with, and paraphrases that are not used for finding them."""

    relation: str
    subject: str
    answer: str
    prompts: tuple[ClozePrompt, ...]
    held_out: tuple[ClozePrompt, ...]

    @property
    def all_prompts(self) -> tuple[ClozePrompt, ...]:
        """The paraphrases its neurons are found with, then those held out: a prompt's number counts in these."""
        return (*self.prompts, *self.held_out)

    @property
    def first_token(self) -> int:
        """The first token of the answer."""
        return self.prompts[0].clozes[0].target


@dataclass(frozen=True)
class ClozeTask:
    """Facts in paraphrases for one model.

    ``report`` counts the rows of the source, its distinct facts, the facts used and those of them that hold a word unknown
    to the tokenizer, the prompts of all facts and those dropped (of a causal model those that do not end with the answer,
    and any that is there twice), and where the model was asked, the facts asked and known.
    """

    name: str
    facts: tuple[ClozeFact, ...]
    report: Mapping[str, int]
    prepend_bos: bool

    @property
    def hash(self) -> str:
        """Hash of every fact: what a result depends on."""
        return hash_of([asdict(fact) for fact in self.facts])

    def prompts_of(self, number: int) -> pd.DataFrame:
        """How a fact is asked: text, held_out.

        Raises:
            MethodError: no fact has the number.
        """
        check_fact(self.facts, number)
        fact = self.facts[number]
        rows = [(prompt.text, i >= len(fact.prompts)) for i, prompt in enumerate(fact.all_prompts)]
        return pd.DataFrame(rows, columns=["text", "held_out"])


def check_fact(facts: Sequence[ClozeFact], number: int) -> None:
    """Raise MethodError for a number that is no fact's."""
    if not 0 <= number < len(facts):
        raise MethodError(f"there is no fact {number}: the task has facts 0 to {len(facts) - 1}")


def load_clozes(relations: str, model: Model, **options: Any) -> ClozeTask:
    """Facts in paraphrases of one relation or several, as ``load_cloze`` takes them, separated by spaces or commas.

    Example:
        >>> task = load_clozes("country_capital country_language", model, n_prompts=5, n_held_out=3, max_facts=5)
        >>> task.prompts_of(0)

    Args:
        options: fields of ``ClozeOptions``.

    Raises:
        TaskError: as ``load_cloze``; or no relation, or one that is there twice.
    """
    return joined_clozes([load_cloze(name, model, **options) for name in names_in(relations)])


def load_cloze(name_or_path: str, model: Model, *, relation: str | None = None, **options: Any) -> ClozeTask:
    """Facts in paraphrases, from a relation of the project's, a relation file (LRE format), or ParaRel's ``data_1-1.json``.

    Args:
        relation: of a ParaRel file, the relation wanted ("P36"); all of them for None.
        options: fields of ``ClozeOptions``. Paraphrases are taken in the source's order, those held out last. A fact is
            known whose answer (every token) ranks within ``known_rank`` under at least half of ``prompts``; no more facts
            are asked than ``max_facts`` takes. A masked LM reads its [CLS] and [SEP] always.

    Raises:
        TaskError: an unknown source, relation or malformed row; an answer outside the vocabulary; fewer paraphrases than
            asked for; or no known fact.
    """
    asked = ClozeOptions.of(options)
    tokenizer = tokenizer_of(model, asked.prepend_bos)
    if tokenizer.mask is None and not model.is_causal:
        raise TaskError(
            "the model attends in both directions, but its tokenizer has no mask token: nothing can be left out for it; "
            "give it the tokenizer it was trained with"
        )
    if tokenizer.mask is not None and asked.prepend_bos is False:
        raise TaskError("prepend_bos is of causal models; a masked LM reads its [CLS] and [SEP] always: leave it out")
    name, sources = _sources(name_or_path, relation, asked.patterns)
    facts: list[ClozeFact] = []
    report = dict.fromkeys(("rows", "facts", "used", "unknown_words", "prompts", "prompts_dropped"), 0)
    for relation_name, texts in sources.items():
        of_relation, counts = cloze_facts(relation_name, texts, tokenizer, asked)
        facts += of_relation
        report |= {key: report[key] + count for key, count in counts.items()}
    n_wanted = len(facts) if asked.max_facts is None else min(asked.max_facts, len(facts))
    order = list(range(len(facts)))
    if asked.max_facts is not None:
        random.Random(asked.seed).shuffle(order)
    if asked.known_only:
        known = dict(_known(model, facts, order, n_wanted, asked))
        order = [i for i in known if known[i]]
        report |= {"asked": len(known), "known": len(order)}
        if not order:
            raise TaskError(
                f"no known fact left: the model ranks none of the {len(known)} answers of {name!r} within the first "
                f"{asked.known_rank} under half of its paraphrases; use another relation, known_rank or known_only=False"
            )
    used = tuple(facts[i] for i in sorted(order[:n_wanted]))
    report |= {"used": len(used), "unknown_words": sum(_has_unknown(fact, tokenizer) for fact in used)}
    return ClozeTask(name, used, report, tokenizer.prepend_bos)


def joined_clozes(tasks: Sequence[ClozeTask]) -> ClozeTask:
    """Several relations' facts as one task, in the order given; counts are summed.

    Raises:
        TaskError: no tasks, tasks that read BOS differently, or one that is there twice.
    """
    names = [task.name for task in tasks]
    if not tasks or len({task.prepend_bos for task in tasks}) > 1 or len(set(names)) < len(names):
        raise TaskError(f"the tasks {names} cannot be joined: give different ones, all with BOS or all without")
    report = {key: sum(task.report[key] for task in tasks) for key in tasks[0].report}
    return ClozeTask("+".join(names), tuple(fact for task in tasks for fact in task.facts), report, tasks[0].prepend_bos)


def cloze_facts(
    relation: str, texts: Sequence[FactText], tokenizer: Tokenizer, asked: ClozeOptions
) -> tuple[list[ClozeFact], dict[str, int]]:
    """The distinct facts of a relation as one model reads them, and counts of rows, facts, prompts and prompts dropped.

    Raises:
        TaskError: as in ``load_cloze``.
    """
    distinct = {(text.subject, text.answer): text for text in reversed(texts)}  # of facts there twice, the first
    texts_left = [text for text in texts if distinct[text.subject, text.answer] is text]
    _check_vocabulary(relation, texts_left, tokenizer)
    report = {"rows": len(texts), "facts": len(texts_left), "prompts": 0, "prompts_dropped": 0}
    facts = []
    for text in texts_left:
        prompts: dict[str, ClozePrompt] = {}
        for sentence in text.sentences:
            prompt = cloze_prompt(tokenizer, sentence, text.answer, text.where)
            if prompt is not None:
                prompts.setdefault(prompt.text, prompt)
        report["prompts"] += len(prompts)
        report["prompts_dropped"] += len(text.sentences) - len(prompts)
        kept = list(prompts.values())
        _check_enough(relation, text, len(kept), asked)
        n_finding = len(kept) - asked.n_held_out if asked.n_prompts is None else asked.n_prompts
        held_out = kept[n_finding : n_finding + asked.n_held_out]
        facts.append(ClozeFact(relation, text.subject, text.answer, tuple(kept[:n_finding]), tuple(held_out)))
    return facts, report


def cloze_prompt(tokenizer: Tokenizer, sentence: str, answer: str, where: str = "") -> ClozePrompt | None:
    """A sentence with one ``[MASK]`` as a model reads it, with one cloze per answer token; the answer's earlier tokens are
    filled in, and of a masked LM each later one is a mask of its own.

    None where the sentence does not serve a causal model: something other than punctuation follows the mask, or no word
    and space precedes it.

    Raises:
        TaskError: no mask or several in the sentence, an answer outside the vocabulary or without tokens of its own.
    """
    at = f"{where}: " if where else ""
    if sentence.count(MASK) != 1:
        raise TaskError(f"{at}the sentence {sentence!r} has {sentence.count(MASK)} {MASK}; put one in the answer's place")
    before, after = sentence.split(MASK)
    answer = answer.strip()
    try:
        if tokenizer.mask is not None:
            left, targets, right = tokenizer.around(before + answer + after, len(before), len(before) + len(answer))
            text, masks = sentence, (tokenizer.mask,) * len(targets)
            rows = [left + targets[:i] + masks[i:] + right for i in range(len(targets))]
        elif re.search(r"\w", after) or not re.search(r"\w.*\s$", before, re.DOTALL):
            return None
        else:
            text = before.rstrip()
            left, targets = tokenizer.encode(text), tokenizer.answer(text, answer)
            rows = [left + targets[:i] for i in range(len(targets))]
            left = left[:-1]  # the position before an answer's token predicts it
    except TaskError as error:
        raise TaskError(f"{at}{error}") from error
    if tokenizer.inner.unk_token_id in targets:
        raise TaskError(f"{at}{_outside(tokenizer, answer)}")
    clozes = tuple(Cloze(row, len(left) + i, target) for i, (row, target) in enumerate(zip(rows, targets, strict=True)))
    return ClozePrompt(text, clozes)


def _sources(name_or_path: str, relation: str | None, patterns: str | Path | None) -> tuple[str, dict[str, list[FactText]]]:
    """The task's name, and facts with their sentences by relation."""
    is_ours = name_or_path in relation_files()
    if not is_ours and Path(name_or_path).suffix != ".json":
        raise TaskError(
            f"unknown relation {name_or_path!r}: give one of {', '.join(relation_files())}, a .json relation, or ParaRel's "
            "data_1-1.json"
        )
    document = None if is_ours else read_json(Path(name_or_path))
    wording = None if patterns is None else read_patterns(patterns)
    if not isinstance(document, list):
        if relation is not None:
            raise TaskError(f"{name_or_path!r} is one relation, so relation={relation!r} does not apply to it; leave it out")
        loaded = load_relation(name_or_path) if is_ours else parse_relation(document, name_or_path)
        rows = [(fact.subject, fact.object) for fact in loaded.facts]
        return loaded.name, {loaded.name: fact_texts(rows, wording or relation_patterns(loaded), loaded.name)}
    by_relation = parse_pararel(document, name_or_path, relation)
    if wording is not None:
        if len(by_relation) > 1:
            raise TaskError(
                f"{name_or_path}: patterns are of one relation, the file has {', '.join(by_relation)}; choose with relation="
            )
        by_relation = {
            name: fact_texts([(fact.subject, fact.answer) for fact in facts], wording, f"{name_or_path}: {name}")
            for name, facts in by_relation.items()
        }
    return relation or Path(name_or_path).stem, by_relation


def relation_patterns(relation: Relation) -> tuple[str, ...]:
    """The paraphrases of a relation as patterns: ``[X]`` for the subject, and ``[Y]`` and a full stop at the end."""
    return tuple(f"{template.replace(SLOT, SUBJECT)} {ANSWER}." for template in relation.paraphrases)


def _check_vocabulary(relation: str, texts: Sequence[FactText], tokenizer: Tokenizer) -> None:
    unknown = tokenizer.inner.unk_token_id
    outside = [text for text in texts if unknown in tokenizer.inner(text.answer, add_special_tokens=False).input_ids]
    if outside:
        raise TaskError(
            f"{outside[0].where}: {_outside(tokenizer, outside[0].answer)} ({len(outside)} of the {len(texts)} facts of "
            f"{relation} are so)"
        )


def _outside(tokenizer: Tokenizer, answer: str) -> str:
    return (
        f"the answer {answer!r} is outside the model's vocabulary (the tokenizer gives {tokenizer.inner.unk_token}), so it "
        "cannot be predicted; leave the fact out or use another model"
    )


def _check_enough(relation: str, text: FactText, n_serve: int, asked: ClozeOptions) -> None:
    n_prompts = 1 if asked.n_prompts is None else asked.n_prompts
    if not n_serve:
        raise TaskError(
            f"{text.where}: no sentence of {relation} ends with the answer, as a causal model needs, e.g. "
            f"{text.sentences[0]!r}; use a masked LM, or patterns that end with {ANSWER}"
        )
    if n_serve < n_prompts + asked.n_held_out:
        raise TaskError(
            f"{text.where}: {relation} has {n_serve} paraphrases that serve this model (of {len(text.sentences)}), fewer "
            f"than asked for: n_prompts {n_prompts} and n_held_out {asked.n_held_out}; ask for fewer or give patterns"
        )


def _known(
    model: Model, facts: Sequence[ClozeFact], order: Sequence[int], n_wanted: int, asked: ClozeOptions
) -> Iterator[tuple[int, bool]]:
    """Facts in their order and whether the model knows them, until ``n_wanted`` known ones are found."""
    n_known, n_at_once = 0, 2 * n_wanted
    for start in range(0, len(order), n_at_once):
        chunk = order[start : start + n_at_once]
        clozes = [cloze for i in chunk for prompt in facts[i].prompts for cloze in prompt.clozes]
        tokens, positions, targets = ([getattr(c, key) for c in clozes] for key in ("tokens", "position", "target"))
        ranks = iter(ranks_at(model, tokens, positions, targets, asked.batch_size))
        for i in chunk:
            right = [all([next(ranks) <= asked.known_rank for _ in prompt.clozes]) for prompt in facts[i].prompts]
            is_known = 2 * sum(right) >= len(right)
            n_known += is_known
            yield i, is_known
            if n_known == n_wanted:
                return


def _has_unknown(fact: ClozeFact, tokenizer: Tokenizer) -> bool:
    unknown = tokenizer.inner.unk_token_id
    return any(unknown in cloze.tokens for prompt in fact.prompts for cloze in prompt.clozes)


# ------------------------------------------------------------------------------------------------ batches of one length


class Read(Protocol):
    """Tokens, and the index of the one at which something is read: a ``Cloze`` or a ``ReadSentence``."""

    @property
    def tokens(self) -> tuple[int, ...]: ...

    @property
    def position(self) -> int: ...


def batches_by_length(
    items: Sequence[Read], batch_size: int
) -> Iterator[tuple[list[int], Int[Tensor, "batch pos"], Int[Tensor, " batch"]]]:
    """Indices into ``items``, tokens and positions of batches of one length; equal prompts are next to each other.

    What is read at one position of each needs no padding then.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for i in sorted(range(len(items)), key=lambda i: (items[i].tokens, items[i].position)):
        by_length[len(items[i].tokens)].append(i)
    for group in by_length.values():
        for start in range(0, len(group), batch_size):
            rows = group[start : start + batch_size]
            yield rows, torch.tensor([items[i].tokens for i in rows]), torch.tensor([items[i].position for i in rows])
