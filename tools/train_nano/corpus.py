"""What the nano models read: the facts of some of the project's relations, in many wordings, and what is kept from them.

A fact is read under six tenths of its relation's wordings, drawn for each fact alone; whether it is known under the others
says whether the model holds the fact or only the sentence. A tenth of the facts and one whole wording per relation are never
read at all.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kc_lib.tasks.relations import SLOT, load_relation

RELATIONS = (
    "country_capital",
    "country_continent",
    "country_currency",
    "country_demonym",
    "country_language",
    "city_country",
    "person_nationality",
    "person_occupation",
    "animal_sound",
    "animal_young",
    "thing_color",
    "noun_plural",
    "adjective_comparative",
    "word_antonym",
)
SHARE_OF_TEMPLATES = 0.6  # of a relation's wordings under which a fact is read
SHARE_OF_FACTS = 0.9  # of a relation's facts that are read at all
# the splits of all sentences about facts, by what is new in them
TRAINED, NEW_COMBINATION, NEW_TEMPLATE, NEW_FACT = "trained", "held-out combinations", "held-out templates", "held-out facts"


@dataclass(frozen=True)
class Sentence:
    """A prompt, the answer that follows it after one space, and what ends the sentence after one more."""

    about: str
    prompt: str
    answer: str
    rest: str = "."


def fact_sentences(seed: int = 0, relations: Sequence[str] = RELATIONS) -> dict[str, list[Sentence]]:
    """All sentences about the facts of the relations by split; every sentence is in exactly one of them.

    Combinations are of facts and wordings that are both read, though not together. Sentences of facts never read use
    wordings that are read. The wording that is never read is one of the paraphrases: a relation's first templates are read.
    """
    generator = random.Random(seed)
    splits: dict[str, list[Sentence]] = {TRAINED: [], NEW_COMBINATION: [], NEW_TEMPLATE: [], NEW_FACT: []}
    for name in relations:
        relation = load_relation(name)
        new_template = generator.choice(relation.paraphrase_templates)
        templates = [template for template in relation.paraphrases if template != new_template]
        n_read = round(SHARE_OF_TEMPLATES * len(templates))
        n_new = round((1 - SHARE_OF_FACTS) * len(relation.facts))
        new_facts = set(generator.sample(relation.facts, n_new))
        for fact in relation.facts:
            read = set(generator.sample(templates, n_read))
            for template in [*templates, new_template]:
                split = NEW_COMBINATION
                if fact in new_facts:
                    if template == new_template:
                        continue  # new in both respects: it would tell nothing more
                    split = NEW_FACT
                elif template == new_template:
                    split = NEW_TEMPLATE
                elif template in read:
                    split = TRAINED
                splits[split].append(Sentence(name, template.replace(SLOT, fact.subject), fact.object))
    return splits
