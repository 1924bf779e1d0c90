"""Facts as one prompt each: where the subject lies in it, and the token that answers it.

What traces or edits a fact needs no corrupted partner, so every fact of a relation serves. Facts come from the project's
relations, from a file of relations or pairs (pairs need a subject), and from ``known_1000.json``, the facts of ROME (Meng et
al. 2022): a JSON list of ``{"known_id", "subject", "attribute", "template", "prediction", "prompt", "relation_id"}``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kc_lib.errors import TaskError
from kc_lib.models.model import Model
from kc_lib.reading import read_json
from kc_lib.results import hash_of
from kc_lib.tasks.files import SUFFIXES, PairText, is_pair_file, read_pairs
from kc_lib.tasks.generated import GENERATED, generated_pairs
from kc_lib.tasks.options import POSITION_CLASSES
from kc_lib.tasks.relations import SLOT, load_relation, parse_relation, relation_files
from kc_lib.tasks.tokens import Tokenizer, tokenizer_of

KNOWN_KEYS = ("subject", "attribute", "prompt")  # of a row of known_1000.json; its other keys are not needed


@dataclass(frozen=True)
class FactPrompt:
    """A prompt (BOS included), the indices of its subject's tokens (consecutive), and the first token of its answer."""

    tokens: tuple[int, ...]
    subject: tuple[int, ...]
    answer: int
    text: Mapping[str, str]  # prompt, subject, answer

    def __post_init__(self) -> None:
        first, end = (self.subject[0], self.subject[-1] + 1) if self.subject else (0, 0)
        if not 0 <= first < end <= len(self.tokens) or self.subject != tuple(range(first, end)):
            raise TaskError(
                f"{self.name}: its subject is at tokens {self.subject} of {len(self.tokens)}: no run of its tokens"
            )

    @property
    def name(self) -> str:
        """The fact as errors name it."""
        return f"the fact {self.text.get('prompt', '')!r} (subject {self.text.get('subject', '')!r})"

    def position_class(self, position: int) -> str | None:
        """The class of a token: one of ``POSITION_CLASSES``, None left of the subject.

        A token has one class. The only token of a subject is its last; the prompt's last token is "last token", also where
        it is the first after the subject, unless it belongs to the subject.
        """
        first, last = self.subject[0], self.subject[-1]
        if position < first:
            return None
        if position <= last:
            return POSITION_CLASSES[2 if position == last else 0 if position == first else 1]
        if position == len(self.tokens) - 1:
            return POSITION_CLASSES[5]
        return POSITION_CLASSES[3 if position == last + 1 else 4]


@dataclass(frozen=True)
class FactTask:
    """The facts of a task for one model, not yet filtered by what the model knows."""

    name: str
    facts: tuple[FactPrompt, ...]
    report: Mapping[str, int]
    prepend_bos: bool

    @property
    def hash(self) -> str:
        """Hash of every fact: what a result depends on."""
        rows = [asdict(fact) for fact in self.facts]
        return hash_of(rows)


def load_facts(
    name_or_path: str,
    model: Model,
    *,
    template: int = 0,
    reverse: bool = False,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> FactTask:
    """The facts of a built-in task, a relation file (LRE format), ``known_1000.json``, or a file of pairs with subjects.

    A fact that the file holds twice (same prompt and answer) is taken once; ``report`` counts rows and facts.

    Args:
        template, reverse, prepend_bos: as in ``load_task``.
        seed: of generated tasks.

    Example:
        >>> facts = kc.load_facts("person_occupation", model)
        >>> facts.facts[0].text["prompt"]

    Raises:
        TaskError: unknown task or malformed data; a subject that is not in the prompt, or is all of it.
    """
    tokenizer = tokenizer_of(model, prepend_bos)
    path = Path(name_or_path)
    document = None if name_or_path in relation_files() or path.suffix.lower() != ".json" else read_json(path)
    if isinstance(document, list):
        name, rows = path.stem, _known_rows(document, str(path))
    elif name_or_path in relation_files() or document is not None:
        relation = load_relation(name_or_path) if document is None else parse_relation(document, str(path))
        relation = relation.reversed() if reverse else relation
        if not 0 <= template < len(relation.templates):
            raise TaskError(
                f"relation {relation.name!r} has templates 0 to {len(relation.templates) - 1}; template={template} is none"
            )
        name, rows = relation.name, _relation_rows(relation.templates[template], relation.facts)
    elif name_or_path in GENERATED:
        name, rows = name_or_path, _pair_rows(generated_pairs(name_or_path, tokenizer, seed=seed))
    elif is_pair_file(name_or_path):
        name, rows = path.stem, _pair_rows(read_pairs(path))
    else:
        raise TaskError(
            f"unknown task {name_or_path!r}: give one of {', '.join([*GENERATED, *relation_files()])}, a .json relation, "
            f"known_1000.json, or a file of pairs ({', '.join(SUFFIXES)})"
        )
    if (reverse or template) and (isinstance(document, list) or name in GENERATED or is_pair_file(name_or_path)):
        raise TaskError(f"task {name_or_path!r} is no relation: template and reverse do not apply to it")
    facts: dict[tuple[tuple[int, ...], int], FactPrompt] = {}
    n_rows = 0
    for row in rows:
        n_rows += 1
        fact = fact_prompt(tokenizer, **row)
        facts.setdefault((fact.tokens, fact.answer), fact)
    return FactTask(name, tuple(facts.values()), {"rows": n_rows, "facts": len(facts)}, tokenizer.prepend_bos)


def fact_prompt(
    tokenizer: Tokenizer, prompt: str, subject: str, answer: str, start: int | None = None, where: str = ""
) -> FactPrompt:
    """One fact; ``start`` is the subject's first character, by default that of its last occurrence in the prompt.

    Raises:
        TaskError: the subject is not in the prompt or is all of it, or the answer does not start a token of its own.
    """
    at = f"{where}: " if where else ""
    if subject.strip() and subject.strip() == prompt.strip():
        raise TaskError(f"{at}the subject {subject!r} is the whole prompt: nothing asks about it; add a sentence that does")
    try:
        if start is None:
            span = tokenizer.span(prompt, subject)
        else:
            span = tokenizer.overlapping(prompt, start, start + len(subject))
        answers = tokenizer.answer(prompt, answer)
        text = {"prompt": prompt, "subject": subject, "answer": answer}
        return FactPrompt(tokenizer.encode(prompt), span, answers[0], text)
    except TaskError as error:
        raise TaskError(f"{at}{error}") from error


def _relation_rows(template: str, facts: Sequence[Any]) -> Iterator[dict[str, Any]]:
    start = template.index(SLOT)
    for fact in facts:
        yield {
            "prompt": template.replace(SLOT, fact.subject),
            "subject": fact.subject,
            "answer": fact.object,
            "start": start,
        }


def _pair_rows(pairs: Sequence[PairText]) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        if pair.subject is None:
            raise TaskError(f"{pair.where}: has no subject; add a column subject that says which words the fact is about")
        if pair.right:
            raise TaskError(f"several answers are right for {pair.clean!r}: a fact has one; use another task")
        start = pair.spans["subject"][0] if pair.spans else None
        yield {"prompt": pair.clean, "subject": pair.subject, "answer": pair.answer, "start": start, "where": pair.where}


def _known_rows(document: Sequence[Any], source: str) -> Iterator[dict[str, Any]]:
    if not document:
        raise TaskError(f"{source}: holds no facts; give at least one with {', '.join(KNOWN_KEYS)}")
    for row, known in enumerate(document):
        where = f"{source}: row {row}"
        if not isinstance(known, dict):
            raise TaskError(f"{where} is no JSON object with the keys {', '.join(KNOWN_KEYS)}")
        for key in KNOWN_KEYS:
            if not isinstance(known.get(key), str) or not known[key].strip():
                raise TaskError(f"{where}: {key} is {known.get(key)!r}; a fact has the texts {', '.join(KNOWN_KEYS)}")
        prompt, subject = known["prompt"].rstrip(), known["subject"].strip()
        yield {"prompt": prompt, "subject": subject, "answer": known["attribute"], "where": where}
