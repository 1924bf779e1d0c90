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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.errors import MethodError, TaskError, check_counts
from kc_lib.models.model import Model
from kc_lib.neurons.cloze import Cloze, ClozeFact
from kc_lib.neurons.integrate import RULES, adaptive_gradients, answer_states, integrated_gradients
from kc_lib.residual.encoder import Residual
from kc_lib.results import hash_of, load_table, save_table, save_whole

METHODS = ("knowledge", "base")
ADAPTIVE = "adaptive"
COLUMNS = ("fact", "prompt", "method", "layer", "neuron", "value")
FACTS_AT_ONCE = 8  # facts whose prompts of one length share a batch; a checkpoint is written after each such group


@dataclass(frozen=True)
class NeuronAttributions:
    """Scores of the neurons that matter most for every paraphrase of every fact.

    ``frame`` has a row for every value of at least ``kept`` times the largest of its fact, prompt and method, over all
    layers. ``prompts`` has one row per paraphrase: fact, prompt (a number), text, p (the probability of the answer, of
    all its tokens), predicted (the token of rank 1), total (the sum of all knowledge attributions). ``facts``: fact,
    relation, subject, answer, n_prompts.
    """

    frame: pd.DataFrame
    prompts: pd.DataFrame
    facts: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """``frame`` with subject and answer of every fact."""
        return self.frame.merge(self.facts[["fact", "subject", "answer"]], on="fact")

    def save(self, path: str | Path) -> Path:
        """Write ``frame`` as parquet; the rest goes into the file's metadata."""
        about = {"prompts": self.prompts.to_dict("list"), "facts": self.facts.to_dict("list")}
        return save_table(self.frame, path, about | {"provenance": dict(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> NeuronAttributions:
        """Read what ``save`` wrote.

        Raises:
            MethodError: the file is not there, or holds no attributions of neurons.
        """
        frame, about = load_table(path)
        if not {"prompts", "facts", "provenance"} <= about.keys() or not set(COLUMNS) <= set(frame):
            raise MethodError(f"{path}: holds no attributions of neurons; give neuron_attributions.parquet of a run")
        return cls(frame, pd.DataFrame(about["prompts"]), pd.DataFrame(about["facts"]), about["provenance"])


def attribute_knowledge(
    model: Model,
    facts: Sequence[ClozeFact],
    *,
    rule: str = "adaptive",
    steps: int = 20,
    tolerance: float = 1e-2,
    target: str | int = "gold",
    kept: float = 0.1,
    batch_size: int = 16,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> NeuronAttributions:
    """Attribute the answer of every paraphrase of every fact to the model's MLP neurons.

    Args:
        rule: how the integral is taken: "adaptive" (the default: most exact, and cheapest) to ``tolerance``, a share of
            the answer's probability that a layer's scores may miss together; or by ``steps`` fixed points, "right" (the
            paper's), "left" (its code's) or "trapezoid".
        target: the token whose probability is attributed: the "gold" answer, the model's own "predicted" token, or the id
            of a token. Answers of several tokens can only be "gold"; of them log probabilities are attributed.
        kept: values below this share of the largest of their prompt are not stored.
        batch_size: prompts run at once; changes no result.
        checkpoint: a file that keeps the facts that are done; if it is there, work goes on from it.

    Raises:
        MethodError: a parameter out of range, or a checkpoint of another run.
        TaskError: no facts.
        ModelError: neither a decoder nor a masked language model of the BERT kind.
    """
    check_attribution(rule, steps, tolerance, target, kept, batch_size)
    if not facts:
        raise TaskError("no facts to attribute: the task gave none")
    several = [fact for fact in facts if any(len(prompt.clozes) > 1 for prompt in fact.prompts)]
    if several and target != "gold":
        raise MethodError(f"the answer {several[0].answer!r} is of several tokens: its target can only be 'gold'")
    residual = model.mlp_residual
    settings = {
        "model": model.name,
        "n_layers": residual.n_layers,
        "d_mlp": residual.parts(0).W_out.shape[0],
        "rule": rule,
        "steps": None if rule == ADAPTIVE else steps,
        "tolerance": tolerance if rule == ADAPTIVE else None,
        "target": target,
        "kept": kept,
        "n_facts": len(facts),
    }
    file = None if checkpoint is None else Path(checkpoint)
    identity = "" if file is None else _identity(model, facts, settings)  # hashes every weight
    done = _resumed(file, identity)
    frames, prompts, rows = ([done.frame], [done.prompts], [done.facts]) if done is not None else ([], [], [])
    if rule == ADAPTIVE:
        integral = partial(adaptive_gradients, tolerance=tolerance)
    else:
        integral = partial(integrated_gradients, steps=steps, rule=rule)
    bar = tqdm(total=len(facts), initial=sum(map(len, rows)), desc="attribution", unit="fact", disable=not progress)
    for start in range(int(bar.n), len(facts), FACTS_AT_ONCE):
        group = range(start, min(start + FACTS_AT_ONCE, len(facts)))
        found = _attributed(residual, [facts[i] for i in group], integral, target, kept, batch_size)
        for number, (frame, about) in zip(group, found, strict=True):
            frames.append(frame.assign(fact=number)[list(COLUMNS)])
            prompts.append(about.assign(fact=number))
            fact = facts[number]
            row = {"fact": number, "relation": fact.relation, "subject": fact.subject, "answer": fact.answer}
            rows.append(pd.DataFrame([row | {"n_prompts": len(fact.prompts)}]))
        bar.update(len(group))
        if file is not None:
            so_far = NeuronAttributions(_joined(frames), _joined(prompts), _joined(rows), {"identity": identity})
            save_whole(so_far, file)
    bar.close()
    return NeuronAttributions(_joined(frames), _joined(prompts), _joined(rows), settings)


def check_attribution(
    rule: str = "adaptive",
    steps: int = 20,
    tolerance: float = 1e-2,
    target: str | int = "gold",
    kept: float = 0.1,
    batch_size: int = 16,
) -> None:
    """Raise MethodError for a parameter that ``attribute_knowledge`` cannot use."""
    check_counts(1, steps=steps, batch_size=batch_size)
    if rule not in (ADAPTIVE, *RULES):
        raise MethodError(f"unknown rule {rule!r}: use one of {', '.join((ADAPTIVE, *RULES))}")
    if not 0.0 < tolerance < 1.0:
        raise MethodError(f"tolerance is {tolerance!r}; it must be above 0 and below 1")
    if isinstance(target, str) and target not in ("gold", "predicted"):
        raise MethodError(f"target is {target!r}; it must be 'gold', 'predicted' or the id of a token")
    if not 0.0 < kept <= 1.0:
        raise MethodError(f"kept is {kept!r}; it must be a share above 0 and at most 1")


def _attributed(
    residual: Residual,
    facts: Sequence[ClozeFact],
    integral: Callable[..., Tensor],
    target: str | int,
    kept: float,
    batch_size: int,
) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """Rows of ``frame`` and of ``prompts`` for every fact."""
    clozes = [
        (i, j, cloze, len(prompt.clozes) > 1)
        for i, fact in enumerate(facts)
        for j, prompt in enumerate(fact.prompts)
        for cloze in prompt.clozes
    ]
    by_shape: dict[tuple[int, bool], list[tuple[int, int, Cloze]]] = defaultdict(list)
    for i, j, cloze, of_several in clozes:
        by_shape[len(cloze.tokens), of_several].append((i, j, cloze))
    scores: dict[tuple[int, int], Tensor] = {}
    values: dict[tuple[int, int], Tensor] = {}
    log_p: dict[tuple[int, int], float] = defaultdict(float)
    predicted: dict[tuple[int, int], str] = defaultdict(str)
    for (_, of_several), members in by_shape.items():
        for start in range(0, len(members), batch_size):
            batch = members[start : start + batch_size]
            observed = _scores(residual, [cloze for *_, cloze in batch], integral, target, of_several)
            for (i, j, _), score, value, p, top in zip(batch, *observed, strict=True):
                share = value / len(facts[i].prompts[j].clozes)
                scores[i, j] = scores.get((i, j), 0) + score
                values[i, j] = values.get((i, j), 0) + share
                log_p[i, j] += float(p)
                predicted[i, j] += residual.bridge.tokenizer.decode([int(top)])
    result = []
    for i, fact in enumerate(facts):
        frames, rows = [], []
        for j, prompt in enumerate(fact.prompts):
            for method, table in (("knowledge", scores[i, j]), ("base", values[i, j])):
                if not table.isfinite().all():
                    raise MethodError(f"{prompt.text!r}: a {method} score is no finite number; use dtype float32")
                frames.append(_largest(table, kept).assign(prompt=j, method=method))
            p = float(torch.tensor(log_p[i, j]).exp())
            about = {"prompt": j, "text": prompt.text, "p": p, "predicted": predicted[i, j]}
            rows.append(about | {"total": float(scores[i, j].sum())})
        result.append((pd.concat(frames, ignore_index=True), pd.DataFrame(rows)))
    return result


def _scores(
    residual: Residual,
    clozes: Sequence[Cloze],
    integral: Callable[..., Tensor],
    target: str | int,
    log_probability: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per cloze of one length: attributions and values ``[layer, d_mlp]``, log p of the gold token, the token of rank 1."""
    tokens = torch.tensor([cloze.tokens for cloze in clozes])
    states = answer_states(residual, tokens, torch.tensor([cloze.position for cloze in clozes]))
    top, gold = states.logits.argmax(-1).cpu(), torch.tensor([cloze.target for cloze in clozes])
    if isinstance(target, int) and not 0 <= target < states.logits.shape[-1]:
        raise MethodError(f"target is token {target}; the model has tokens 0 to {states.logits.shape[-1] - 1}")
    chosen = gold if target == "gold" else top if target == "predicted" else torch.full_like(gold, int(target))
    scores = integral(residual, states, chosen, log_probability=log_probability).transpose(0, 1).cpu()
    log_p = states.logits.log_softmax(-1).cpu()[torch.arange(len(gold)), gold]
    return scores, states.neurons.float().transpose(0, 1).cpu(), log_p, top


def _largest(table: Float[Tensor, "layer d_mlp"], kept: float) -> pd.DataFrame:
    """Where the table has at least this share of its maximum; nothing where no value is positive."""
    most = float(table.max())
    layers, neurons = (table >= kept * most).nonzero(as_tuple=True) if most > 0 else (torch.zeros(0, dtype=torch.long),) * 2
    found = {"layer": layers.numpy(), "neuron": neurons.numpy(), "value": table[layers, neurons].double().numpy()}
    return pd.DataFrame(found).sort_values("value", ascending=False, kind="stable", ignore_index=True)


def _joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True)


def _identity(model: Model, facts: Sequence[ClozeFact], settings: Mapping[str, Any]) -> str:
    """Hash of what determines the result."""
    return hash_of([model.hash, dict(settings), [asdict(fact) for fact in facts]])


def _resumed(file: Path | None, identity: str) -> NeuronAttributions | None:
    """What an earlier run left in its checkpoint."""
    if file is None or not file.exists():
        return None
    try:
        done = NeuronAttributions.load(file)
    except MethodError as error:
        raise MethodError(f"{file}: cannot be read as a checkpoint of attribution ({error}); delete it") from error
    if done.provenance.get("identity") != identity:
        raise MethodError(
            f"{file}: is a checkpoint of another model, task or set of parameters; delete it or name another file"
        )
    return done
