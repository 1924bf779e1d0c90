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
    if name_or_path in relation_files() or path.suffix.lower() == ".json":
        relation = load_relation(name_or_path)
        relation = relation.reversed() if asked.reverse else relation
        return _relation_task(relation, model, tokenizer, asked)
    if asked.reverse or asked.template:
        raise TaskError(f"task {name_or_path!r} is no relation: template and reverse do not apply to it")
    if name_or_path in GENERATED:
        pairs = generated_pairs(name_or_path, tokenizer, asked.max_facts or DEFAULT_GENERATED, asked.seed)
        return _pair_task(name_or_path, pairs, model, tokenizer, asked)
    if is_pair_file(name_or_path):
        return _pair_task(path.stem, read_pairs(path), model, tokenizer, asked)
    raise TaskError(
        f"unknown task {name_or_path!r}: give one of {', '.join([*GENERATED, *relation_files()])}, a relation file "
        f"(.json) or a file of pairs ({', '.join(SUFFIXES)})"
    )


def _split(items: Sequence[Item], asked: TaskOptions) -> dict[str, list[Item]]:
    """The items by split, drawn by seed, "test" and "validation" first."""
    drawn = list(items)
    random.Random(asked.seed).shuffle(drawn)
    drawn = drawn[: asked.max_facts]
    n_test, n_validation = round(len(drawn) * asked.test_fraction), round(len(drawn) * asked.validation_fraction)
    ends = {"test": n_test, "validation": n_test + n_validation, "discovery": len(drawn)}
    parts, start = {}, 0
    for (name, end), share in zip(ends.items(), (asked.test_fraction, asked.validation_fraction, 1.0), strict=True):
        parts[name], start = drawn[start:end], end
        if share and not parts[name]:
            raise TaskError(f"{len(drawn)} facts are too few to split: none is left for {name}; lower the fractions")
    return parts


def _no_known(name: str, n_facts: int, asked: TaskOptions, advice: str) -> TaskError:
    return TaskError(
        f"no known fact left: the model ranks none of the {n_facts} answers of {name!r} within the first "
        f"{asked.known_rank}; use {advice} or known_only=False"
    )


def _relation_task(relation: Relation, model: Model, tokenizer: Tokenizer, asked: TaskOptions) -> Task:
    if asked.template >= len(relation.templates):
        raise TaskError(
            f"relation {relation.name!r} has templates 0 to {len(relation.templates) - 1}; template={asked.template} is none"
        )
    template, facts = relation.templates[asked.template], relation.facts
    if asked.known_only:
        texts = [template.replace(SLOT, fact.subject) for fact in facts]
        answers = [tokenizer.answer(text, fact.object)[0] for text, fact in zip(texts, facts, strict=True)]
        ranks = answer_ranks(model, [tokenizer.encode(text) for text in texts], answers, asked.batch_size)
        facts = tuple(fact for fact, rank in zip(facts, ranks, strict=True) if rank <= asked.known_rank)
    if not facts:
        raise _no_known(relation.name, len(relation.facts), asked, "another template, known_rank")
    pairs = {name: _pair_within(part, template, tokenizer, asked.seed) for name, part in _split(facts, asked).items()}
    if not pairs["discovery"] or (asked.test_fraction and not pairs["test"]):
        raise TaskError(
            f"{relation.name!r}: no two of the {len(facts)} kept facts of a split have subjects of equal token length and "
            "different answers; use more facts, another template or known_only=False"
        )
    return _task(relation.name, pairs, {"facts": len(relation.facts), "known": len(facts)}, relation.dropped, tokenizer)


def _task(
    name: str,
    pairs: Mapping[str, Sequence[TokenPair]],
    counts: Mapping[str, int],
    dropped: Mapping[str, int],
    tokenizer: Tokenizer,
) -> Task:
    discovery, validation, test = (tuple(pairs[split]) for split in ("discovery", "validation", "test"))
    report = {**counts, "used": sum(map(len, pairs.values())), **dropped}
    return Task(name, discovery, validation, test, report, tokenizer.prepend_bos)


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


def _pair_task(name: str, texts: Sequence[PairText], model: Model, tokenizer: Tokenizer, asked: TaskOptions) -> Task:
    pairs = [_token_pair(text, tokenizer, model) for text in texts]
    if asked.known_only:
        right = [pair.right or pair.answer[:1] for pair in pairs]
        ranks = best_ranks(model, [pair.clean for pair in pairs], right, asked.batch_size)
        pairs = [pair for pair, rank in zip(pairs, ranks, strict=True) if rank <= asked.known_rank]
    if not pairs:
        raise _no_known(name, len(texts), asked, "a higher known_rank")
    return _task(name, _split(pairs, asked), {"facts": len(texts), "known": len(pairs)}, {}, tokenizer)


def _token_pair(pair: PairText, tokenizer: Tokenizer, model: Model) -> TokenPair:
    try:
        clean, corrupted = tokenizer.encode(pair.clean), tokenizer.encode(pair.corrupted)
        answer = tokenizer.answer(pair.clean, pair.answer, pair.between)
        if pair.distractor is not None:
            distractor = tokenizer.answer(pair.clean, pair.distractor, pair.between)[0]
        else:
            logits = next(last_logits(model, [corrupted]))
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
