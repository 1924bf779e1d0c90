"""What makes a fact's neurons fire: sentences with its subject and answer, with its subject, with neither; and triggers.

Dai et al. (2022), section 4.4: the mean activation of a fact's neurons where the answer is to be predicted, on sentences of
three kinds (T1, T2, T3), and sentences ranked by the summed activation. Base and random neurons are read beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kc_lib.errors import MethodError, check_counts
from kc_lib.models.model import Model
from kc_lib.neurons.cloze import ClozeFact, ClozeTask, batches_by_length
from kc_lib.neurons.effects import KINDS, OfFacts, by_relation, ends, figure, means_with_draws
from kc_lib.neurons.integrate import neuron_values
from kc_lib.neurons.options import ReadOptions, SentenceOptions
from kc_lib.neurons.sentences import ReadSentence, SentenceTask, read_corpus, read_sentences
from kc_lib.neurons.sets import Neuron, NeuronSets, n_empty, neurons_per_layer, sets_of_facts
from kc_lib.neurons.values import check_neurons
from kc_lib.results import Result
from kc_lib.stats import with_interval

SENTENCES = ("T1", "T2", "T3")  # subject and answer; subject alone; neither
CONTRASTS = {"T1 - T2": ("T1", "T2"), "T1 - T3": ("T1", "T3")}
PLACES = ("read", "largest")


@dataclass(frozen=True)
class NeuronActivations(OfFacts):
    """Mean activation of the neurons of every fact on sentences of every kind.

    ``frame`` has one row per fact, sentence, kind of neurons and draw: ``sentences`` is T1 (subject and answer), T2 (subject
    alone) or T3 (neither), ``sentence`` its number. A fact without neurons, or without sentences, has no rows;
    ``provenance`` counts both.
    """

    columns = ("kind", "draw", "fact", "sentences", "sentence", "activation", "n_neurons")

    frame: pd.DataFrame
    facts: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def summary(self, seed: int = 0) -> pd.DataFrame:
        """Mean activations, per relation and pooled: ``activation_means``."""
        return activation_means(self, seed)

    def headline(self, seed: int = 0) -> dict[str, str]:
        """Mean activation of knowledge neurons on each kind of sentences."""
        pooled = activation_means(self, seed).query("relation == 'all' and kind == 'knowledge' and sentences in @SENTENCES")
        return {f"activation on {row['sentences']}": figure(row, "activation", ".3f") for row in pooled.to_dict("records")}


@dataclass(frozen=True)
class TriggerSentences(Result):
    """Sentences by the summed activation of some neurons, largest first.

    ``frame``: text, activation, and the position and token where it was read. ``provenance["at"]`` says which position
    that is: "read", the sentence's own, or "largest", that of the largest sum.
    """

    columns = ("text", "activation", "position", "token")

    frame: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def top(self, n: int = 10) -> pd.DataFrame:
        """The sentences that activate the neurons most."""
        return self.frame.head(n)

    def bottom(self, n: int = 10) -> pd.DataFrame:
        """The sentences that activate the neurons least, the least first."""
        return self.frame.iloc[::-1].head(n)

    def summary(self, n: int = 8) -> pd.DataFrame:
        """The sentences that activate the neurons most, and half as many that do least: activation, token, text."""
        both = pd.concat([self.top(n), self.bottom(n // 2)], keys=["most", "least"], names=["activate"])
        return both.reset_index("activate")[["activate", "activation", "token", "text"]]


def sentences_of_facts(
    model: Model, facts: Sequence[ClozeFact], task: SentenceTask, *, seed: int = 0
) -> dict[int, dict[str, tuple[ReadSentence, ...]]]:
    """The task's sentences as the model reads them, by number of the fact and kind; facts without any are left out."""
    known = {(fact.subject, fact.answer): fact for fact in task.facts}
    sentences = {}
    for number, fact in enumerate(facts):
        texts = known.get((fact.subject, fact.answer))
        if texts is not None:
            sentences[number] = {
                "T1": read_sentences(model, texts.head_and_tail, subject=texts.subject, answer=texts.answer, seed=seed),
                "T2": read_sentences(model, texts.head_only, subject=texts.subject, seed=seed),
                "T3": read_sentences(model, texts.random, seed=seed),
            }
    return sentences


def activating_prompts(
    model: Model,
    sets: NeuronSets,
    sentences: Mapping[int, Mapping[str, Sequence[ReadSentence]]],
    **options: Any,
) -> NeuronActivations:
    """Mean activation of every fact's neurons where each of its sentences is read.

    Args:
        sentences: by number of the fact, and T1, T2 or T3; from ``sentences_of_facts``.
        options: fields of ``ReadOptions``.

    Raises:
        MethodError: sentences of a fact that the sets do not have, of another kind, or a number out of range.
        ModelError: as ``Model.mlp_residual``.
    """
    asked = ReadOptions.of(options)
    unknown: list[Any] = [fact for fact in sentences if fact not in set(sets.facts["fact"])]
    unknown += [kind for by_kind in sentences.values() for kind in by_kind if kind not in SENTENCES]
    if unknown:
        raise MethodError(f"sentences of {unknown[0]!r}: give them by number of the fact, and {', '.join(SENTENCES)}")
    residual = model.mlp_residual
    of_facts = sets_of_facts(sets, neurons_per_layer(residual), asked.n_random, asked.seed)
    neurons_of = dict(zip(sets.facts["fact"], of_facts, strict=True))
    to_read = [
        (fact, kind, number, sentence)
        for fact, by_kind in sentences.items()
        if neurons_of[fact]
        for kind, some in by_kind.items()
        for number, sentence in enumerate(some)
    ]
    rows: list[tuple[Any, ...]] = []
    for members, tokens, positions in batches_by_length([sentence for *_, sentence in to_read], asked.batch_size):
        distinct = sorted({n for i in members for neurons in neurons_of[to_read[i][0]].values() for n in neurons})
        place = {neuron: i for i, neuron in enumerate(distinct)}
        check_neurons(residual, distinct)
        values = neuron_values(residual, tokens, distinct)[torch.arange(len(members)), positions].cpu()
        for i, of_sentence in zip(members, values, strict=True):
            fact, kind, number, _ = to_read[i]
            for variant, neurons in neurons_of[fact].items():
                mean = float(of_sentence[[place[neuron] for neuron in neurons]].mean())
                rows.append((*variant, fact, kind, number, mean, len(neurons)))
    frame = pd.DataFrame(rows, columns=list(NeuronActivations.columns))
    frame = frame.sort_values(["fact", "sentences", "sentence", "kind", "draw"], ignore_index=True)
    provenance = {
        **{"model": model.name, **asked.determining()},
        "n_facts": len(sets.facts),
        "empty": n_empty(of_facts),
        "without_sentences": sum(not any(sentences.get(int(fact), {}).values()) for fact in sets.facts["fact"]),
    }
    return NeuronActivations(frame, sets.facts.reset_index(drop=True), provenance)


def activation_means(activations: NeuronActivations, seed: int = 0) -> pd.DataFrame:
    """Mean activation of facts' neurons on T1, T2 and T3 sentences, per relation and pooled, and the differences of these.

    Columns: relation, kind, sentences ("T1", "T2", "T3", "T1 - T2", "T1 - T3"), n (facts), activation with its interval.
    """
    by_fact = activations.frame.groupby(["kind", "fact", "sentences"])["activation"].mean().unstack("sentences")
    by_fact = by_fact.reindex(columns=list(SENTENCES))
    for name, (one, other) in CONTRASTS.items():
        by_fact[name] = by_fact[one] - by_fact[other]
    long = by_fact.reset_index().melt(["kind", "fact"], var_name="sentences", value_name="activation").dropna()
    long = long.set_index(["kind", "fact", "sentences"]).sort_index()

    def measure(group: pd.DataFrame) -> dict[str, float]:
        means = means_with_draws(group.to_numpy(), seed)[:, 0]
        return with_interval("activation", means[0], means[1:])

    levels = {"kind": KINDS, "sentences": (*SENTENCES, *CONTRASTS)}
    return by_relation(long, activations.facts, levels, measure, ends("activation"))


def trigger_sentences(
    model: Model,
    neurons: Sequence[Neuron],
    sentences: Sequence[ReadSentence],
    *,
    at: str = "read",
    batch_size: int = 32,
) -> TriggerSentences:
    """Sentences by the summed activation of some neurons.

    Args:
        at: "read" is the position where each sentence is read, as published. "largest" serves a corpus in which nothing is
            to be predicted: the largest sum over a sentence's positions, but for its first token and special tokens, whose
            activations are large whatever follows; a mask counts.

    Raises:
        MethodError: no neurons, no sentences, a neuron the model does not have, or an unknown ``at``.
        ModelError: as ``Model.mlp_residual``.
    """
    check_counts(1, batch_size=batch_size)
    if at not in PLACES:
        raise MethodError(f"at is {at!r}; it must be one of {', '.join(PLACES)}")
    if not neurons or not sentences:
        raise MethodError(f"no {'sentences' if neurons else 'neurons'} to read: the set is empty")
    residual = model.mlp_residual
    check_neurons(residual, neurons)
    tokenizer = model.tokenizer
    special = torch.tensor(sorted(set(tokenizer.all_special_ids) - {tokenizer.mask_token_id}), dtype=torch.long)
    rows: list[tuple[Any, ...]] = [()] * len(sentences)
    for members, tokens, positions in batches_by_length(sentences, batch_size):
        sums = neuron_values(residual, tokens, neurons).sum(-1).cpu()
        where = positions if at == "read" else _largest(sums, torch.isin(tokens, special))
        for i, of_sentence, position in zip(members, sums, where.tolist(), strict=True):
            token = tokenizer.decode([sentences[i].tokens[position]])
            rows[i] = (sentences[i].text, float(of_sentence[position]), position, token)
    frame = pd.DataFrame(rows, columns=list(TriggerSentences.columns))
    frame = frame.sort_values("activation", ascending=False, kind="stable", ignore_index=True)
    provenance = {"model": model.name, "at": at, "neurons": [list(neuron) for neuron in neurons]}
    return TriggerSentences(frame, provenance)


def triggers_of_fact(
    model: Model, sets: NeuronSets, fact: int, task: ClozeTask, texts: SentenceTask, **options: Any
) -> TriggerSentences:
    """The sentences of all facts and of a corpus by the largest activation of one fact's knowledge neurons.

    Args:
        texts: of the task's facts, from ``sentences_for``; those without the answer's subject (T3) are left out.
        options: fields of ``SentenceOptions``, as given to ``sentences_for``.

    Without neurons there are no rows.
    """
    asked = SentenceOptions.of(options)
    neurons = sets.of("knowledge", fact)
    if not neurons:
        nothing = pd.DataFrame(columns=list(TriggerSentences.columns))
        return TriggerSentences(nothing, {"model": model.name, "at": "largest", "neurons": []})
    of_facts = [sentence for of_fact in texts.facts for sentence in (*of_fact.head_and_tail, *of_fact.head_only)]
    pool = list(dict.fromkeys([*of_facts, *read_corpus(asked.corpus)]))
    sentences = read_sentences(model, pool, prepend_bos=task.prepend_bos, seed=asked.seed)
    return trigger_sentences(model, neurons, sentences, at="largest")


def _largest(sums: Float[Tensor, "sentence pos"], left_out: Bool[Tensor, "sentence pos"]) -> Int[Tensor, " sentence"]:
    """Position of the largest sum; the first token, and those left out, count only in a row that has no other."""
    left_out = left_out.clone()
    left_out[:, 0] = True
    left_out[left_out.all(1)] = False
    return sums.masked_fill(left_out, float("-inf")).argmax(1)
