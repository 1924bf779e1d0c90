"""A task for one model: token pairs, split into discovery, validation and test, with a report of what was dropped."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from kc_lib.errors import TaskError
from kc_lib.models.model import Model
from kc_lib.results import hash_of
from kc_lib.tasks.batches import TokenPair
from kc_lib.tasks.files import SUFFIXES, PairText, is_pair_file, read_pairs
from kc_lib.tasks.generated import DEFAULT_GENERATED, GENERATED, generated_pairs
from kc_lib.tasks.known import answer_ranks, best_ranks, last_logits
from kc_lib.tasks.options import TaskOptions
from kc_lib.tasks.relations import SLOT, Fact, Relation, load_relation, relation_files
from kc_lib.tasks.tokens import Tokenizer, tokenizer_of

Item = TypeVar("Item")


@dataclass(frozen=True)
class Task:
    """Pairs by split, and where they come from."""

    name: str
    discovery: tuple[TokenPair, ...]
    validation: tuple[TokenPair, ...]
    test: tuple[TokenPair, ...]
    report: Mapping[str, int]
    prepend_bos: bool

    @property
    def hash(self) -> str:
        """Hash of every token pair and its split: what a result depends on."""
        rows = [[_row(pair) for pair in split] for split in (self.discovery, self.validation, self.test)]
        return hash_of(rows)

    @property
    def splits(self) -> dict[str, tuple[TokenPair, ...]]:
        """What circuits are evaluated on: "discovery", and "held_out" where pairs are held out for the test."""
        return {"discovery": self.discovery} | ({"held_out": self.test} if self.test else {})

    def summary(self, n: int = 6) -> pd.DataFrame:
        """The first pairs in words: clean and corrupted prompt, answer and distractor."""
        return pd.DataFrame([pair.text for pair in self.discovery[:n]])[["clean", "corrupted", "answer", "distractor"]]


def _row(pair: TokenPair) -> dict[str, Any]:
    """A pair as what is hashed: without the sets of answers where it has none, as before there were any."""
    row = asdict(pair)
    return row if pair.right else {key: value for key, value in row.items() if key not in ("right", "wrong")}


def load_task(name_or_path: str, model: Model, **options: Any) -> Task:
    """Clean/corrupted token pairs of a built-in task, a relation file (LRE format) or a file of pairs.

    A relation's corrupted prompt asks the same of another subject of the same split with as many tokens; that
    subject's answer is the distractor. A pair without a distractor gets the model's own answer to its corrupted prompt.

    Args:
        name_or_path: a relation of the project's, one of ``GENERATED`` ("ioi", ...), a ``.json`` relation, or a ``.csv`` /
            ``.jsonl`` of pairs.
        options: fields of ``TaskOptions``.

    Example:
        >>> task = kc.load_task("country_capital", model, known_rank=3, test_fraction=0.3)
        >>> len(task.discovery), len(task.test)

    Raises:
        TaskError: unknown task, malformed data, or nothing left (the message says at which step).
    """
    asked = TaskOptions.of(options)
    if asked.test_fraction + asked.validation_fraction >= 1.0:
        raise TaskError(
            f"test_fraction {asked.test_fraction} and validation_fraction {asked.validation_fraction} must be >= 0, sum < 1"
        )
    tokenizer = tokenizer_of(model, asked.prepend_bos)
    path = Path(name_or_path)
    splitting = _Splitting(asked.test_fraction, asked.validation_fraction, asked.seed, asked.max_facts)
    known = _Known(model, asked.known_only, asked.known_rank, asked.batch_size)
    if name_or_path in relation_files() or path.suffix.lower() == ".json":
        relation = load_relation(name_or_path)
        relation = relation.reversed() if asked.reverse else relation
        return _relation_task(relation, asked.template, tokenizer, splitting, known)
    if asked.reverse or asked.template:
        raise TaskError(f"task {name_or_path!r} is no relation: template and reverse do not apply to it")
    if name_or_path in GENERATED:
        pairs = generated_pairs(name_or_path, tokenizer, asked.max_facts or DEFAULT_GENERATED, asked.seed)
        return _pair_task(name_or_path, pairs, tokenizer, splitting, known)
    if is_pair_file(name_or_path):
        return _pair_task(path.stem, read_pairs(path), tokenizer, splitting, known)
    raise TaskError(
        f"unknown task {name_or_path!r}: give one of {', '.join([*GENERATED, *relation_files()])}, a relation file "
        f"(.json) or a file of pairs ({', '.join(SUFFIXES)})"
    )


@dataclass(frozen=True)
class _Splitting:
    test_fraction: float
    validation_fraction: float
    seed: int
    max_facts: int | None

    def __call__(self, items: Sequence[Item]) -> dict[str, list[Item]]:
        items = list(items)
        random.Random(self.seed).shuffle(items)
        items = items[: self.max_facts]
        n_test = round(len(items) * self.test_fraction)
        n_validation = round(len(items) * self.validation_fraction)
        parts = {
            "test": items[:n_test],
            "validation": items[n_test : n_test + n_validation],
            "discovery": items[n_test + n_validation :],
        }
        for name, share in (("test", self.test_fraction), ("validation", self.validation_fraction), ("discovery", 1.0)):
            if share and not parts[name]:
                raise TaskError(f"{len(items)} facts are too few to split: none is left for {name}; lower the fractions")
        return parts


@dataclass(frozen=True)
class _Known:
    model: Model
    only: bool
    rank: int
    batch_size: int

    def __call__(self, prompts: Sequence[tuple[int, ...]], answers: Sequence[int]) -> list[bool]:
        if not self.only:
            return [True] * len(prompts)
        return [rank <= self.rank for rank in answer_ranks(self.model, prompts, answers, self.batch_size)]

    def of_pairs(self, pairs: Sequence[TokenPair]) -> list[bool]:
        prompts = [pair.clean for pair in pairs]
        if not self.only or not any(pair.right for pair in pairs):
            return self(prompts, [pair.answer[0] for pair in pairs])
        ranks = best_ranks(self.model, prompts, [pair.right or pair.answer[:1] for pair in pairs], self.batch_size)
        return [rank <= self.rank for rank in ranks]


def _relation_task(
    relation: Relation, template_index: int, tokenizer: Tokenizer, splitting: _Splitting, known: _Known
) -> Task:
    if not 0 <= template_index < len(relation.templates):
        raise TaskError(
            f"relation {relation.name!r} has templates 0 to {len(relation.templates) - 1}; template={template_index} is none"
        )
    template = relation.templates[template_index]
    prompts = [tokenizer.encode(template.replace(SLOT, fact.subject)) for fact in relation.facts]
    answers = [tokenizer.answer(template.replace(SLOT, fact.subject), fact.object) for fact in relation.facts]
    is_known = known(prompts, [answer[0] for answer in answers])
    facts = [fact for fact, yes in zip(relation.facts, is_known, strict=True) if yes]
    if not facts:
        raise TaskError(
            f"no known fact left: the model ranks none of the {len(is_known)} answers of {relation.name!r} within the "
            f"first {known.rank}; use another template, known_rank or known_only=False"
        )
    by_split = {name: _pair_within(part, template, tokenizer, splitting.seed) for name, part in splitting(facts).items()}
    paired = {name: pairs for name, pairs in by_split.items() if pairs}
    if "discovery" not in paired or (splitting.test_fraction and "test" not in paired):
        raise TaskError(
            f"{relation.name!r}: no two of the {len(facts)} kept facts of a split have subjects of equal token length and "
            "different answers; use more facts, another template or known_only=False"
        )
    report = {"facts": len(is_known), "known": len(facts), "used": sum(map(len, paired.values())), **relation.dropped}
    return Task(
        relation.name,
        tuple(paired["discovery"]),
        tuple(paired.get("validation", ())),
        tuple(paired.get("test", ())),
        report,
        tokenizer.prepend_bos,
    )


def _pair_within(facts: Sequence[Fact], template: str, tokenizer: Tokenizer, seed: int) -> list[TokenPair]:
    """Each fact with a corrupted prompt from another fact of equal length; facts without one are left out."""
    by_length: dict[int, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_length[len(tokenizer.encode(template.replace(SLOT, fact.subject)))].append(fact)
    partners: dict[Fact, Fact] = {}
    for group in by_length.values():
        order = list(group)
        random.Random(seed + 1).shuffle(order)
        firsts = [tokenizer.answer(template.replace(SLOT, fact.subject), fact.object)[0] for fact in order]
        for i, fact in enumerate(order):
            for step in range(1, len(order)):  # the next fact around the circle with another answer
                j = (i + step) % len(order)
                if firsts[j] != firsts[i]:
                    partners[fact] = order[j]
                    break
    return [_fact_pair(fact, partners[fact], template, tokenizer) for fact in facts if fact in partners]


def _fact_pair(fact: Fact, other: Fact, template: str, tokenizer: Tokenizer) -> TokenPair:
    clean, corrupted = template.replace(SLOT, fact.subject), template.replace(SLOT, other.subject)
    tokens = tokenizer.encode(clean)
    start = template.index(SLOT)
    subject = tokenizer.overlapping(clean, start, start + len(fact.subject))
    bos = 1 if tokenizer.prepend_bos else 0
    return TokenPair(
        clean=tokens,
        corrupted=tokenizer.encode(corrupted),
        answer=tokenizer.answer(clean, fact.object),
        distractor=tokenizer.answer(clean, other.object)[0],
        positions={"subject": subject, "relation": tuple(i for i in range(bos, len(tokens)) if i not in subject)},
        text={
            "clean": clean,
            "corrupted": corrupted,
            "answer": fact.object,
            "distractor": other.object,
            "subject": fact.subject,
        },
    )


def _pair_task(name: str, pairs: Sequence[PairText], tokenizer: Tokenizer, splitting: _Splitting, known: _Known) -> Task:
    tokens = [_token_pair(pair, tokenizer, known) for pair in pairs]
    is_known = known.of_pairs(tokens)
    kept = [pair for pair, yes in zip(tokens, is_known, strict=True) if yes]
    if not kept:
        raise TaskError(
            f"no known fact left: the model ranks none of the {len(tokens)} answers of {name!r} within the first "
            f"{known.rank}; use a higher known_rank or known_only=False"
        )
    parts = splitting(kept)
    report = {"facts": len(tokens), "known": len(kept), "used": sum(map(len, parts.values()))}
    return Task(
        name,
        tuple(parts["discovery"]),
        tuple(parts["validation"]),
        tuple(parts["test"]),
        report,
        tokenizer.prepend_bos,
    )


def _token_pair(pair: PairText, tokenizer: Tokenizer, known: _Known) -> TokenPair:
    try:
        clean, corrupted = tokenizer.encode(pair.clean), tokenizer.encode(pair.corrupted)
        answer = tokenizer.answer(pair.clean, pair.answer, pair.between)
        if pair.distractor is not None:
            distractor = tokenizer.answer(pair.clean, pair.distractor, pair.between)[0]
        else:
            logits = next(last_logits(known.model, [corrupted]))
            logits[answer[0]] = -float("inf")
            distractor = int(logits.argmax())
        if distractor == answer[0]:
            raise TaskError(
                f"answer {pair.answer!r} and distractor {pair.distractor!r} start with the same token; choose another"
            )
        named = {"subject": pair.subject, "relation": pair.relation}
        positions = {what: tokenizer.overlapping(pair.clean, *span) for what, span in pair.spans.items()}
        for what, part in named.items():
            if part is not None and what not in positions:
                positions[what] = tokenizer.span(pair.clean, part, what)
        text = {
            "clean": pair.clean,
            "corrupted": pair.corrupted,
            "answer": pair.answer,
            "distractor": pair.distractor or str(tokenizer.inner.decode([distractor])).strip(),
            "subject": pair.subject or "",
        }
        return TokenPair(clean, corrupted, answer, distractor, positions, text, pair.right, pair.wrong)
    except TaskError as error:
        raise TaskError(f"{pair.where}: {error}" if pair.where else str(error)) from error
