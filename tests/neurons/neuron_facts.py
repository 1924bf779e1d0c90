"""Facts and sets of neurons made by hand, for the small random models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from kc_lib.neurons.cloze import Cloze, ClozeFact, ClozePrompt
from kc_lib.neurons.integrate import answer_states
from kc_lib.neurons.sets import NeuronSets
from kc_lib.residual.encoder import Residual

MASK = 3  # any token serves a random model
ANSWERS = {"capital": (50, 51, 52), "colour": (60, 61, (62, 63))}  # the last of two tokens
Neuron = tuple[int, int]


def prompt(kind: str, words: Sequence[int], answer: Sequence[int]) -> ClozePrompt:
    clozes = []
    for i, target in enumerate(answer):
        known = [1, *words, *answer[:i]]
        if kind == "bert":
            clozes.append(Cloze((*known, *[MASK] * (len(answer) - i), 7, 2), len(known), target))
        else:
            clozes.append(Cloze(tuple(known), len(known) - 1, target))
    return ClozePrompt(" ".join(f"w{word}" for word in words), tuple(clozes))


def made_facts(kind: str) -> list[ClozeFact]:
    """Two relations of three facts, with three prompts of several lengths and a held-out one."""
    facts = []
    for r, (relation, answers) in enumerate(ANSWERS.items()):
        for i, answer in enumerate(answers):
            tokens = answer if isinstance(answer, tuple) else (answer,)
            subject = 100 + 10 * r + i
            wordings = [(10 + r, subject, 20), (subject, 11 + r), (30, subject, 31 + r, 32), (subject, 90, 91 + r)]
            prompts = tuple(prompt(kind, words, tokens) for words in wordings)
            facts.append(ClozeFact(relation, f"w{subject}", str(answer), prompts[:3], prompts[3:]))
    return facts


def made_sets(
    facts: Sequence[ClozeFact],
    knowledge: Mapping[int, Sequence[Neuron]],
    base: Mapping[int, Sequence[Neuron]] | None = None,
    relations: Mapping[str, Sequence[Neuron]] | None = None,
    shape: tuple[int, int] | None = None,
) -> NeuronSets:
    """Sets of knowledge and base neurons by fact; a relation's are the same for both methods."""
    rows = [
        (method, fact, layer, neuron, 3)
        for method, sets in (("knowledge", knowledge), ("base", base or {}))
        for fact, neurons in sets.items()
        for layer, neuron in neurons
    ]
    common = [
        (method, relation, layer, neuron, len(neurons) - i)
        for method in ("knowledge", "base")
        for relation, neurons in (relations or {}).items()
        for i, (layer, neuron) in enumerate(neurons)
    ]
    about = [(i, fact.relation, fact.subject, fact.answer, len(fact.prompts)) for i, fact in enumerate(facts)]
    return NeuronSets(
        pd.DataFrame(rows, columns=["method", "fact", "layer", "neuron", "prompts"]),
        pd.DataFrame(common, columns=["method", "relation", "layer", "neuron", "facts"]),
        pd.DataFrame(about, columns=["fact", "relation", "subject", "answer", "n_prompts"]),
        {"model": "small"} | ({} if shape is None else dict(zip(("n_layers", "d_mlp"), shape, strict=True))),
    )


def stored_fact(residual: Residual, fact: ClozeFact, size: float) -> tuple[Neuron, dict[Neuron, Tensor]]:
    """The last layer's neuron that fires most on all prompts of a fact, and a value vector that makes it say the answer.

    Of a pre-norm decoder that is a multiple of the answer's unembedding. What BERT's head makes of a vector is not linear:
    there it is found by ascending the answer's probability.
    """
    layer, token = residual.n_layers - 1, fact.prompts[0].clozes[0].target
    clozes = [cloze for prompt in (*fact.prompts, *fact.held_out) for cloze in prompt.clozes]
    fired = [
        answer_states(residual, torch.tensor([cloze.tokens]), torch.tensor([cloze.position])).neurons[layer]
        for cloze in clozes
    ]
    neuron = (layer, int(torch.cat(fired).amin(0).argmax()))
    vector = residual.W_U[:, token].clone()
    if not residual.causal:
        vector.requires_grad_(True)
        ascent = torch.optim.Adam([vector], lr=0.1)
        with torch.enable_grad():
            for _ in range(100):
                ascent.zero_grad()
                logits = residual.unembed(residual.after_mlp(layer, torch.zeros(1, 1, len(vector)), vector[None, None]))
                (-logits.log_softmax(-1)[0, 0, token]).backward()
                ascent.step()
        vector = vector.detach()
    return neuron, {neuron: size * vector / vector.norm()}
