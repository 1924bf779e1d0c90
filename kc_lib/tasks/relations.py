"""Relations in the LRE format: templates and facts (Hernandez et al. 2024, arXiv:2308.09124).

``{"name", "prompt_templates", "prompt_templates_zs", "properties", "samples": [{"subject", "object"}]}``, and of our own
``"reverse_templates"``, whose slot takes the object and whose answer is the subject, and ``"paraphrase_templates"``, further
sentences that ask the same. The project's relations lie in ``data/relations/<kind>/<name>.json``; a file of the user's
serves as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kc_lib.errors import TaskError
from kc_lib.reading import read_json
from kc_lib.resources import DATA

SLOT = "{}"
TEMPLATE_KEYS = ("prompt_templates", "prompt_templates_zs", "reverse_templates", "paraphrase_templates")
KEYS = {"name", *TEMPLATE_KEYS, "properties", "samples"}
FACT_KEYS = {"subject", "object"}


@dataclass(frozen=True)
class Fact:
    """A subject and the object that answers for it."""

    subject: str
    object: str


@dataclass(frozen=True)
class Relation:
    """Facts that share a meaning, and the sentences that ask for them; ``templates`` lists zero-shot ones last."""

    name: str
    prompt_templates: tuple[str, ...]
    prompt_templates_zs: tuple[str, ...]
    reverse_templates: tuple[str, ...]
    properties: Mapping[str, Any]
    facts: tuple[Fact, ...]
    path: str = field(default="", compare=False)
    paraphrase_templates: tuple[str, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)  # rows of the file by reason

    @property
    def templates(self) -> tuple[str, ...]:
        return self.prompt_templates + self.prompt_templates_zs

    @property
    def paraphrases(self) -> tuple[str, ...]:
        """Distinct sentences that ask the same; the zero-shot ones, which may hold examples or options, are left out."""
        return tuple(dict.fromkeys(self.prompt_templates + self.paraphrase_templates))

    @property
    def kind(self) -> str:
        return str(self.properties.get("relation_type", "unknown"))

    def reversed(self) -> Relation:
        """The relation asked from its objects.

        Raises:
            TaskError: the relation has no reverse templates.
        """
        if not self.reverse_templates:
            raise TaskError(f"relation {self.name!r} has no reverse_templates, so it cannot be asked in reverse")
        seen: dict[str, Fact] = {}
        for fact in self.facts:  # an object of several subjects has no single answer
            seen[fact.object] = Fact(fact.object, fact.subject) if fact.object not in seen else Fact("", "")
        facts = tuple(fact for fact in seen.values() if fact.subject)
        return Relation(
            f"{self.name}_reversed", self.reverse_templates, (), (), self.properties, facts, self.path, (), self.dropped
        )


def relation_files() -> dict[str, Path]:
    """The project's own relations by name."""
    return {path.stem: path for path in sorted((DATA / "relations").glob("*/*.json"))}


def relation_templates(name_or_path: str) -> tuple[str, ...]:
    """The sentences of a relation in the order of ``load_task``'s ``template``; none for a task that is no relation."""
    is_relation = name_or_path in relation_files() or Path(name_or_path).suffix.lower() == ".json"
    return load_relation(name_or_path).templates if is_relation else ()


def load_relation(name_or_path: str | Path) -> Relation:
    """A relation of the project's by name, or any file in the LRE format, checked row by row.

    Raises:
        TaskError: no such relation, or a file that is malformed; the message names the file and the row.
    """
    path = relation_files().get(str(name_or_path), Path(name_or_path))
    if not path.exists():
        names = ", ".join(relation_files()) or "none"
        raise TaskError(f"no file {str(name_or_path)[:200]!r}; relations that come with the project: {names}")
    return parse_relation(read_json(path), str(path))


def parse_relation(document: Any, source: str) -> Relation:
    """A relation from a parsed file; ``source`` names it in errors."""
    if not isinstance(document, dict):
        raise TaskError(f"{source}: a relation is a JSON object with the keys {', '.join(sorted(KEYS))}")
    missing = {"prompt_templates", "samples"} - document.keys()
    unknown = document.keys() - KEYS
    if missing or unknown:
        what = f"lacks {', '.join(sorted(missing))}" if missing else f"has the unknown key {sorted(unknown)[0]!r}"
        raise TaskError(f"{source}: {what}; a relation has the keys {', '.join(sorted(KEYS))}")
    if not isinstance(document.get("properties", {}), dict):
        raise TaskError(f"{source}: properties is {document['properties']!r}; it must be an object such as {{}}")
    name = str(document.get("name") or Path(source).stem)
    templates = {key: _templates(document, key, source) for key in TEMPLATE_KEYS}
    facts, dropped = _facts(document["samples"], source)
    relation = Relation(
        name=name, properties=document.get("properties", {}), facts=facts, path=source, dropped=dropped, **templates
    )
    if not relation.prompt_templates:
        raise TaskError(f"{source}: prompt_templates is empty; give at least one sentence with one {SLOT}")
    return relation


def _templates(document: Mapping[str, Any], key: str, source: str) -> tuple[str, ...]:
    templates = document.get(key, [])
    if not isinstance(templates, list):
        raise TaskError(f"{source}: {key} must be a list of sentences")
    for row, template in enumerate(templates):
        if not isinstance(template, str) or template.count(SLOT) != 1:
            raise TaskError(f"{source}: {key}[{row}] is {template!r}; a template holds exactly one {SLOT} for the subject")
    return tuple(template.rstrip() for template in templates)


def _facts(samples: Any, source: str) -> tuple[tuple[Fact, ...], dict[str, int]]:
    """The facts, and how many rows were dropped: those whose subject was there before, and those that leak their answer."""
    if not isinstance(samples, list) or not samples:
        raise TaskError(f"{source}: samples must be a list of facts with subject and object, and not empty")
    facts: dict[str, Fact] = {}
    dropped = {"repeated subjects": 0, "object is subject": 0}
    for row, sample in enumerate(samples):
        where = f"{source}: samples[{row}]"
        if not isinstance(sample, dict) or set(sample) != FACT_KEYS:
            raise TaskError(f"{where} is {sample!r}; a fact has exactly the keys subject and object")
        subject, answer = sample["subject"], sample["object"]
        if not isinstance(subject, str) or not isinstance(answer, str) or not subject.strip() or not answer.strip():
            raise TaskError(f"{where} has an empty subject or object: {sample!r}; fill it in or remove the row")
        subject, answer = subject.strip(), answer.strip()
        if subject == answer:
            dropped["object is subject"] += 1
        elif subject in facts:
            dropped["repeated subjects"] += 1
        else:
            facts[subject] = Fact(subject, answer)
    if not facts:
        raise TaskError(f"{source}: in every sample the object is the subject, which leaks the answer; give other facts")
    return tuple(facts.values()), {reason: count for reason, count in dropped.items() if count}
