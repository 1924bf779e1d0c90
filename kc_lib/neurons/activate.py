"""What makes a fact's neurons fire: sentences with its subject and answer, with its subject, with neither; and triggers.

Dai et al. (2022), section 4.4: the mean activation of a fact's neurons where the answer is to be predicted, on sentences of
three kinds (T1, T2, T3), and sentences ranked by the summed activation. Base and random neurons are read beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from kc_lib.errors import MethodError
from kc_lib.models.model import Model
from kc_lib.neurons.cloze import ClozeFact
from kc_lib.neurons.cloze_batches import batches_by_length
from kc_lib.neurons.controls import check_numbers, n_empty, sets_of_facts
from kc_lib.neurons.integrate import neuron_values
from kc_lib.neurons.of_facts import OfFacts
from kc_lib.neurons.refine import Neuron, NeuronSets
from kc_lib.neurons.sentences import ReadSentence, SentenceTask, read_sentences
from kc_lib.neurons.value_vectors import check_neurons
from kc_lib.results import load_table, save_table

SENTENCES = ("T1", "T2", "T3")  # subject and answer; subject alone; neither
COLUMNS = ("kind", "draw", "fact", "sentences", "sentence", "activation", "n_neurons")
PLACES = ("read", "largest")


@dataclass(frozen=True)
class NeuronActivations(OfFacts):
    """Mean activation of the neurons of every fact on sentences of every kind.

    ``frame`` has one row per fact, sentence, kind of neurons and draw: ``sentences`` is T1 (subject and answer), T2 (subject
    alone) or T3 (neither), ``sentence`` its number. A fact without neurons, or without sentences, has no rows;
    ``provenance`` counts both.
    """

    columns = COLUMNS
    holds = "activations of neurons; give neuron_activations.parquet"


@dataclass(frozen=True)
class TriggerSentences:
    """Sentences by the summed activation of some neurons, largest first.

    ``frame``: text, activation, and the position and token where it was read. ``provenance["at"]`` says which position
    that is: "read", the sentence's own, or "largest", that of the largest sum.
    """

    frame: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def top(self, n: int = 10) -> pd.DataFrame:
        """The sentences that activate the neurons most."""
        return self.frame.head(n)

    def bottom(self, n: int = 10) -> pd.DataFrame:
        """The sentences that activate the neurons least, the least first."""
        return self.frame.iloc[::-1].head(n)

    def to_frame(self) -> pd.DataFrame:
        return self.frame

    def save(self, path: str | Path) -> Path:
        """Write ``frame`` as parquet; the rest goes into the file's metadata."""
        return save_table(self.frame, path, {"provenance": dict(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> TriggerSentences:
        """Read what ``save`` wrote.

        Raises:
            MethodError: the file is not there, or holds no trigger sentences.
        """
        frame, about = load_table(path)
        if "provenance" not in about or not {"text", "activation", "position", "token"} <= set(frame):
            raise MethodError(f"{path}: holds no trigger sentences; give trigger_sentences.parquet of a run")
        return cls(frame, about["provenance"])


def sentences_of_facts(
    model: Model, facts: Sequence[ClozeFact], task: SentenceTask, *, seed: int = 0
) -> dict[int, dict[str, tuple[ReadSentence, ...]]]:
    """The task's sentences as the model reads them, by number of the fact and kind; facts without any are left out."""
    known = {(fact.subject, fact.answer): fact for fact in task.facts}
    found = {}
    for number, fact in enumerate(facts):
        own = known.get((fact.subject, fact.answer))
        if own is not None:
            found[number] = {
                "T1": read_sentences(model, own.head_and_tail, subject=own.subject, answer=own.answer, seed=seed),
                "T2": read_sentences(model, own.head_only, subject=own.subject, seed=seed),
                "T3": read_sentences(model, own.random, seed=seed),
            }
    return found


def activating_prompts(
    model: Model,
    sets: NeuronSets,
    sentences: Mapping[int, Mapping[str, Sequence[ReadSentence]]],
    *,
    n_random: int = 3,
    batch_size: int = 32,
    seed: int = 0,
) -> NeuronActivations:
    """Mean activation of every fact's neurons where each of its sentences is read.

    Args:
        sentences: by number of the fact, and T1, T2 or T3; from ``sentences_of_facts``.
        n_random: draws of random neurons of the same layers.
        batch_size: sentences run at once; changes no result.

    Raises:
        MethodError: sentences of a fact that the sets do not have, of another kind, or a number out of range.
        ModelError: as ``Model.mlp_residual``.
    """
    check_numbers(n_random=n_random, batch_size=batch_size)
    unknown: list[Any] = [fact for fact in sentences if fact not in set(sets.facts["fact"])]
    unknown += [kind for own in sentences.values() for kind in own if kind not in SENTENCES]
    if unknown:
        raise MethodError(f"sentences of {unknown[0]!r}: give them by number of the fact, and {', '.join(SENTENCES)}")
    residual = model.mlp_residual
    found = sets_of_facts(sets, residual.parts(0).W_out.shape[0], n_random, seed)
    chosen = dict(zip(sets.facts["fact"], found, strict=True))
    asked = [
        (fact, kind, number, sentence)
        for fact, own in sentences.items()
        if chosen[fact]
        for kind, some in own.items()
        for number, sentence in enumerate(some)
    ]
    rows: list[tuple[Any, ...]] = []
    for members, tokens, positions in batches_by_length([sentence for *_, sentence in asked], batch_size):
        distinct = sorted({n for i in members for own in chosen[asked[i][0]].values() for n in own})
        place = {neuron: i for i, neuron in enumerate(distinct)}
        check_neurons(residual, distinct)
        values = neuron_values(residual, tokens, distinct)[torch.arange(len(members)), positions].cpu()
        for i, of_sentence in zip(members, values, strict=True):
            fact, kind, number, _ = asked[i]
            for variant, neurons in chosen[fact].items():
                mean = float(of_sentence[[place[neuron] for neuron in neurons]].mean())
                rows.append((*variant, fact, kind, number, mean, len(neurons)))
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame = frame.sort_values(["fact", "sentences", "sentence", "kind", "draw"], ignore_index=True)
    provenance = {
        "model": model.name,
        "n_random": n_random,
        "seed": seed,
        "n_facts": len(sets.facts),
        "empty": n_empty(found),
        "without_sentences": sum(not any(sentences.get(int(fact), {}).values()) for fact in sets.facts["fact"]),
    }
    return NeuronActivations(frame, sets.facts.reset_index(drop=True), provenance)


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
    check_numbers(batch_size=batch_size)
    if at not in PLACES:
        raise MethodError(f"at is {at!r}; it must be one of {', '.join(PLACES)}")
    if not neurons or not sentences:
        raise MethodError(f"no {'sentences' if neurons else 'neurons'} to read: the set is empty")
    residual = model.mlp_residual
    check_neurons(residual, neurons)
    tokenizer = model.tokenizer
    special = torch.tensor(sorted(set(tokenizer.all_special_ids) - {tokenizer.mask_token_id}), dtype=torch.long)
    rows: list[dict[str, Any]] = [{} for _ in sentences]
    for members, tokens, positions in batches_by_length(sentences, batch_size):
        sums = neuron_values(residual, tokens, neurons).sum(-1).cpu()
        where = positions if at == "read" else _largest(sums, torch.isin(tokens, special))
        for i, own, position in zip(members, sums, where.tolist(), strict=True):
            token = tokenizer.decode([sentences[i].tokens[position]])
            about = {"text": sentences[i].text, "activation": float(own[position])}
            rows[i] = about | {"position": position, "token": token}
    frame = pd.DataFrame(rows).sort_values("activation", ascending=False, kind="stable", ignore_index=True)
    provenance = {"model": model.name, "at": at, "neurons": [list(neuron) for neuron in neurons]}
    return TriggerSentences(frame, provenance)


def _largest(sums: Tensor, left_out: Tensor) -> Tensor:
    """Position of the largest sum; the first token, and those left out, count only in a row that has no other."""
    left_out = left_out.clone()
    left_out[:, 0] = True
    left_out[left_out.all(1)] = False
    return sums.masked_fill(left_out, float("-inf")).argmax(1)
