"""Attribution of an answer's probability to MLP neurons by integrated gradients (Dai et al. 2022, section 3.2).

For every paraphrase of a fact, and every layer by itself: the gold token's probability at the answering position (the
mask, or the last token of the prompt) is integrated along the straight path from zero to the neurons observed there
(``integrate.py``). The baseline method, "base", is the neuron's value itself.

Where this differs from the published code: the integral is taken to a tolerance, with as many points as that takes
(their paper sums the right end points of 20 steps, their code the left ones; on SmolLM2 both err by 1 to 12% of a layer's
largest score, in the first layer by up to half of it); prompts are not padded; one clean run serves all layers; and an
answer of several tokens is not cut to its first: each token is predicted with those before it filled in, and the
attributions of their log probabilities are summed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.errors import MethodError, TaskError
from kc_lib.models.model import Model
from kc_lib.neurons.cloze import Cloze, ClozeFact
from kc_lib.neurons.effects import OfFacts
from kc_lib.neurons.integrate import Paths, adaptive_gradients, answer_states, integrated_gradients
from kc_lib.neurons.options import ADAPTIVE, AttributeOptions
from kc_lib.neurons.sets import neurons_per_layer
from kc_lib.residual.encoder import Residual
from kc_lib.results import hash_of, save_whole

FACTS_AT_ONCE = 8  # facts whose prompts of one length share a batch; a checkpoint is written after each such group


@dataclass(frozen=True)
class NeuronAttributions(OfFacts):
    """Scores of the neurons that matter most for every paraphrase of every fact.

    ``frame`` has a row for every value of at least ``kept`` times the largest of its fact, prompt and method, over all
    layers. ``prompts`` has one row per paraphrase: fact, prompt (a number), text, p (the probability of the answer, of
    all its tokens), predicted (the token of rank 1), total (the sum of all knowledge attributions). ``facts``: fact,
    relation, subject, answer, n_prompts.
    """

    columns = ("fact", "prompt", "method", "layer", "neuron", "value")

    frame: pd.DataFrame
    prompts: pd.DataFrame
    facts: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> pd.DataFrame:
        """Every fact with the means over its paraphrases of p and of the sum of all attributions."""
        means = self.prompts.groupby("fact", as_index=False)[["p", "total"]].mean()
        return self.facts.merge(means, on="fact", how="left")

    def of_prompts(self, fact: int) -> pd.DataFrame:
        """One fact's paraphrases: text, p, predicted, total."""
        return self.prompts.loc[self.prompts["fact"] == fact, ["text", "p", "predicted", "total"]]


def knowledge_neurons(
    model: Model,
    facts: Sequence[ClozeFact],
    *,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    **options: Any,
) -> NeuronAttributions:
    """Attribute the answer of every paraphrase of every fact to the model's MLP neurons.

    Example:
        >>> from kc_lib.neurons.cloze import load_clozes
        >>> task = load_clozes("country_capital", model, n_prompts=5, max_facts=5)
        >>> attributions = kc.knowledge_neurons(model, task.facts)
        >>> attributions.of_prompts(0)

    Args:
        checkpoint: a file that keeps the facts that are done; if it is there, work goes on from it.
        options: fields of ``AttributeOptions``. ``rule`` "adaptive" is most exact, and cheapest. Answers of several tokens
            can only have the ``target`` "gold"; of them log probabilities are attributed.

    Raises:
        MethodError: a parameter out of range, or a checkpoint of another run.
        TaskError: no facts.
        ModelError: neither a decoder nor a masked language model of the BERT kind.
    """
    asked = AttributeOptions.of(options)
    if not facts:
        raise TaskError("no facts to attribute: the task gave none")
    several = [fact for fact in facts if any(len(prompt.clozes) > 1 for prompt in fact.prompts)]
    if several and asked.target != "gold":
        raise MethodError(f"the answer {several[0].answer!r} is of several tokens: its target can only be 'gold'")
    residual = model.mlp_residual
    provenance = {
        "model": model.name,
        "n_layers": residual.n_layers,
        "d_mlp": neurons_per_layer(residual),
        "n_facts": len(facts),
        **asked.determining(),
        ("steps" if asked.rule == ADAPTIVE else "tolerance"): None,  # has no part in the other rule
    }
    file = None if checkpoint is None else Path(checkpoint)
    # the identity hashes every weight
    identity = "" if file is None else hash_of([model.hash, provenance, [asdict(fact) for fact in facts]])
    done = NeuronAttributions.resumed(file, identity)
    groups = [] if done is None else [done]
    first = 0 if done is None else len(done.facts)
    bar = tqdm(total=len(facts), initial=first, desc="attribution", unit="fact", disable=not progress)
    for start in range(first, len(facts), FACTS_AT_ONCE):
        numbers = range(start, min(start + FACTS_AT_ONCE, len(facts)))
        groups.append(_attributed(residual, {number: facts[number] for number in numbers}, asked))
        bar.update(len(numbers))
        if file is not None:
            save_whole(_joined(groups, {"identity": identity}), file)
    bar.close()
    return _joined(groups, provenance)


def _attributed(residual: Residual, facts: Mapping[int, ClozeFact], asked: AttributeOptions) -> NeuronAttributions:
    """Some facts by their numbers; all their clozes of one length share batches."""
    by_shape: dict[tuple[int, bool], list[tuple[int, int, Cloze]]] = defaultdict(list)
    for number, fact in facts.items():
        for i, prompt in enumerate(fact.prompts):
            for cloze in prompt.clozes:
                by_shape[len(cloze.tokens), len(prompt.clozes) > 1].append((number, i, cloze))
    scores: dict[tuple[int, int], Tensor | float] = defaultdict(float)
    values: dict[tuple[int, int], Tensor | float] = defaultdict(float)
    log_p: dict[tuple[int, int], float] = defaultdict(float)
    predicted: dict[tuple[int, int], str] = defaultdict(str)
    for (_, of_several), members in by_shape.items():
        for start in range(0, len(members), asked.batch_size):
            batch = members[start : start + asked.batch_size]
            of_batch = _scores(residual, [cloze for *_, cloze in batch], of_several, asked)
            for (number, i, _), score, value, gold_log_p, top in zip(batch, *of_batch, strict=True):
                scores[number, i] += score
                values[number, i] += value / len(facts[number].prompts[i].clozes)
                log_p[number, i] += float(gold_log_p)
                predicted[number, i] += residual.bridge.tokenizer.decode([int(top)])
    frames, of_prompts, of_facts = [], [], []
    for number, fact in facts.items():
        for i, prompt in enumerate(fact.prompts):
            tables = {"knowledge": torch.as_tensor(scores[number, i]), "base": torch.as_tensor(values[number, i])}
            for method, table in tables.items():
                if not table.isfinite().all():
                    raise MethodError(f"{prompt.text!r}: a {method} score is no finite number; use dtype float32")
                frames.append(_largest(table, asked.kept).assign(fact=number, prompt=i, method=method))
            p = float(torch.tensor(log_p[number, i]).exp())
            row = {"prompt": i, "text": prompt.text, "p": p, "predicted": predicted[number, i]}
            of_prompts.append(row | {"total": float(tables["knowledge"].sum()), "fact": number})
        named = {"fact": number, "relation": fact.relation, "subject": fact.subject, "answer": fact.answer}
        of_facts.append(named | {"n_prompts": len(fact.prompts)})
    frame = pd.concat(frames, ignore_index=True)[list(NeuronAttributions.columns)]
    return NeuronAttributions(frame, pd.DataFrame(of_prompts), pd.DataFrame(of_facts))


def _scores(
    residual: Residual, clozes: Sequence[Cloze], of_several: bool, asked: AttributeOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per cloze of one length: attributions and values ``[layer, d_mlp]``, log p of the gold token, the token of rank 1."""
    tokens = torch.tensor([cloze.tokens for cloze in clozes])
    states = answer_states(residual, tokens, torch.tensor([cloze.position for cloze in clozes]))
    top, gold = states.logits.argmax(-1).cpu(), torch.tensor([cloze.target for cloze in clozes])
    if isinstance(asked.target, int):
        if not 0 <= asked.target < states.logits.shape[-1]:
            raise MethodError(f"target is token {asked.target}; the model has tokens 0 to {states.logits.shape[-1] - 1}")
        targets = torch.full_like(gold, asked.target)
    else:
        targets = gold if asked.target == "gold" else top
    paths = Paths(residual, states, targets, log_probability=of_several)
    if asked.rule == ADAPTIVE:
        scores = adaptive_gradients(paths, asked.tolerance)
    else:
        scores = integrated_gradients(paths, asked.steps, asked.rule)
    log_p = states.logits.log_softmax(-1).cpu()[torch.arange(len(gold)), gold]
    return scores.transpose(0, 1).cpu(), states.neurons.float().transpose(0, 1).cpu(), log_p, top


def _largest(table: Float[Tensor, "layer d_mlp"], kept: float) -> pd.DataFrame:
    """Where the table has at least this share of its maximum; nothing where no value is positive."""
    most = float(table.max())
    layers, neurons = (table >= kept * most).nonzero(as_tuple=True) if most > 0 else (torch.zeros(0, dtype=torch.long),) * 2
    largest = {"layer": layers.numpy(), "neuron": neurons.numpy(), "value": table[layers, neurons].double().numpy()}
    return pd.DataFrame(largest).sort_values("value", ascending=False, kind="stable", ignore_index=True)


def _joined(groups: Sequence[NeuronAttributions], provenance: Mapping[str, Any]) -> NeuronAttributions:
    frame, prompts, facts = (
        pd.concat([getattr(group, name) for group in groups], ignore_index=True) for name in ("frame", "prompts", "facts")
    )
    return NeuronAttributions(frame, prompts, facts, provenance)
