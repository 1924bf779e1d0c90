"""Further sentences for the nano models, so that behaviours other than facts can appear over training.

Indirect objects, agreement of subject and verb across a phrase, pronouns by name and ranges of years, in the words and
sentences of the generated tasks (``kc_lib.tasks``), and counting. Each function returns what is read and, where something
is kept back, what is not.
"""

from __future__ import annotations

import random
from itertools import product

from kc_lib.tasks.generated import (
    AGREEMENT_TEMPLATES,
    CENTURIES,
    EVENTS,
    FEMALE,
    FEMALE_NAMES,
    FIRST_YEAR,
    LAST_YEAR,
    MALE,
    NAMES,
    PLACES,
    PLURAL,
    PRONOUN_QUESTION,
    SINGULAR,
    TEMPLATES,
    THINGS,
    YEARS_TEMPLATE,
    agreement_nouns,
)
from tools.train_nano.corpus import Sentence

SHARE_OF_STRANGERS = 0.1  # of indirect-object sentences in which a third person gives, and either of the two receives
PRONOUN_TEMPLATES = (
    ("{name} went home because", "was tired"),
    ("{name} said that", "liked the {place}"),
    ("When {name} came to the {place},", "looked for a {thing}"),
    ("{name} lost the {thing} that", "had found"),
)
AFTER_VERB = {
    "is": ("old", "new", "here"),
    "was": ("old", "new", "here"),
    "has": ("been here", "a name"),
    "are": ("old", "new", "here"),
    "were": ("old", "new", "here"),
    "have": ("been here", "a name"),
}
# fmt: off
SURNAMES = (
    "Smith", "Brown", "Miller", "Baker", "Fisher", "Hunter", "Carter", "Walker", "Turner", "Parker", "Cooper", "Taylor",
    "Mason", "Fletcher", "Archer", "Porter",
)
# fmt: on
SURNAME_TEMPLATES = (
    "{a} met {b} at the {place} . Then {again}",
    "{a} and {b} went to the {place} because {again}",
    "At the {place} {a} saw {b} . Now {again}",
)
# fmt: off
COUNTING = (
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"),
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
     "December"),
)
# fmt: on


def ioi_sentences(n: int, seed: int = 0) -> list[Sentence]:
    """ABBA and BABA sentences in equal parts, and a few in which someone else gives (ABC)."""
    generator = random.Random(seed)
    sentences = []
    for i in range(n):
        recipient, giver, stranger = generator.sample(NAMES, 3)
        first, second = (recipient, giver) if i % 2 == 0 else (giver, recipient)
        prompt = generator.choice(TEMPLATES).format(
            a=first,
            b=second,
            s=stranger if generator.random() < SHARE_OF_STRANGERS else giver,
            place=generator.choice(PLACES),
            thing=generator.choice(THINGS),
        )
        sentences.append(Sentence("ioi", prompt, recipient))
    return sentences


def agreement_sentences(seed: int = 0) -> tuple[list[Sentence], list[Sentence]]:
    """Nouns, singular or plural, with another between them and the verb: read, and a tenth of pairs of nouns kept back."""
    generator = random.Random(seed)
    nouns = agreement_nouns()
    read: list[Sentence] = []
    kept_back: list[Sentence] = []
    for noun, other in product(nouns, nouns):
        if noun == other:
            continue
        target = kept_back if generator.random() < 0.1 else read
        for number, other_number in product((0, 1), (0, 1)):
            template = generator.choice(AGREEMENT_TEMPLATES[:-1] if target is kept_back else AGREEMENT_TEMPLATES)
            verb = generator.choice((SINGULAR, PLURAL)[number])
            prompt = template.format(noun=noun[number], other=other[other_number])
            target.append(Sentence("agreement", prompt, verb, f"{generator.choice(AFTER_VERB[verb])} ."))
    return read, kept_back


def pronoun_sentences(seed: int = 0) -> tuple[list[Sentence], list[Sentence]]:
    """He or she by name. Every fifth name of either gender is never read in the question that tests it."""
    generator = random.Random(seed)
    read, kept_back = [], []
    for gender, pronoun in ((True, FEMALE), (False, MALE)):
        names = [name for name in NAMES if (name in FEMALE_NAMES) == gender]
        for i, name in enumerate(names):
            question = Sentence("pronoun", PRONOUN_QUESTION.format(name=name), pronoun, "?")
            if i % 5 == 0:
                kept_back.append(question)
            else:
                read += [question] * len(PLACES)  # as often as each of the other sentences
            for (prompt, rest), place in product(PRONOUN_TEMPLATES, PLACES):
                words = {"name": name, "place": place, "thing": generator.choice(THINGS)}
                read.append(Sentence("pronoun", prompt.format(**words), pronoun, f"{rest.format(**words)} ."))
    return read, kept_back


def year_sentences(n: int, seed: int = 0) -> list[Sentence]:
    """Ranges of years in one century; the later may be any after the first (Hanna et al. 2023, arXiv:2305.00586)."""
    generator = random.Random(seed)
    sentences = []
    for _ in range(n):
        start = generator.randint(FIRST_YEAR, LAST_YEAR)
        prompt = YEARS_TEMPLATE.format(
            event=generator.choice(EVENTS), century=generator.choice(CENTURIES), start=f"{start:02}"
        )
        sentences.append(Sentence("years", prompt, f"{generator.randint(start + 1, 99):02}"))
    return sentences


def surname_sentences(n: int, seed: int = 0) -> list[Sentence]:
    """Two people with random surnames, and one of them again: what induction is good for, in words."""
    generator = random.Random(seed)
    sentences = []
    for _ in range(n):
        first, second = generator.sample(NAMES, 2)
        surnames = dict(zip((first, second), generator.sample(SURNAMES, 2), strict=True))
        again = generator.choice((first, second))
        prompt = generator.choice(SURNAME_TEMPLATES).format(
            a=f"{first} {surnames[first]}", b=f"{second} {surnames[second]}", again=again, place=generator.choice(PLACES)
        )
        sentences.append(Sentence("surnames", prompt, surnames[again], "was tired ."))
    return sentences


def counting_sentences() -> list[Sentence]:
    """Every run of three to six words of a list that is counted in order."""
    runs = [
        words[start : start + length]
        for words in COUNTING
        for length in range(3, 7)
        for start in range(len(words) - length + 1)
    ]
    return [Sentence("counting", " ".join(run[:-1]), run[-1]) for run in runs]
