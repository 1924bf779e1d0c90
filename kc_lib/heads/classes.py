"""Head classes of *Knowledge Circuits*: mover, relation and mixture heads (Yao et al. 2024, arXiv:2405.17969, section 4.2).

The paper names the classes and gives no criterion. Ours, read at the answer position and averaged over a relation's facts:

- mover score of a head: attention mass on the subject x [the head's output raises the answer's logit, and the answer is
  among the k tokens it raises most];
- relation score: attention mass on the relation's tokens x share of the relation's range (the first tokens of all its
  answers) among those k tokens.

Each has a random baseline. For movers, the answers are shuffled between the facts: a head that writes some answer whatever
the subject keeps its score. That baseline cannot serve the relation score, which asks for the range as a whole and is the
same under any shuffling. There, ranges of as many tokens are drawn from the answers of other relations. P-values are the
shares of random scores at least as large, corrected over all heads by Benjamini and Hochberg (1995). A head is classified
where its score is above 0, the corrected p at most ``level``, and the attention mass in question at least
``least_attention``: a score is a product, and its baseline asks about the second factor only. A head in both classes is a
mixture head.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import false_discovery_control
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.components.attention import SOURCES, Head, attention_sources, head_table
from kc_lib.components.direct import answer_run, direct_logits
from kc_lib.errors import MethodError, checked
from kc_lib.heads.options import ClassOptions
from kc_lib.models.model import Model
from kc_lib.residual.decoder import Decoder
from kc_lib.results import Result
from kc_lib.tasks.batches import Batch, TokenPair, batches
from kc_lib.tasks.known import answer_tokens
from kc_lib.tasks.task import Task
from kc_lib.tasks.tokens import tokenizer_of

CLASSES = ("mover", "relation", "mixture")
DRAWS_AT_ONCE = 1000  # random scores held in memory together
SUMMARISED = ["class", "layer", "head", "subject", "relation_tokens", "contribution", "mover_score", "mover_p"]
SUMMARISED += ["relation_score", "relation_p"]


@dataclass(frozen=True)
class HeadClasses(Result):
    """One row per head: layer, head, both scores with their baseline's 99th percentile and corrected p, and the class.

    The class is "" for none. Also ``subject`` and ``relation_tokens``, the attention masses, and ``contribution``, what the
    head adds to the answer's logit, all averaged over facts.
    """

    columns = ("layer", "head", "class")

    heads: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def of_class(self, name: str) -> list[Head]:
        """(layer, head) of the heads of a class; mixture heads are in "mover" and "relation" too.

        Raises:
            MethodError: a class that is none of ``CLASSES``.
        """
        if name not in CLASSES:
            raise MethodError(f"unknown head class {name!r}: use one of {', '.join(CLASSES)}")
        chosen = self.heads[self.heads["class"].isin({name, "mixture"})]
        return list(zip(chosen["layer"].tolist(), chosen["head"].tolist(), strict=True))

    def summary(self) -> pd.DataFrame:
        """The classified heads, with what they are classified by."""
        return self.heads.loc[self.heads["class"] != "", SUMMARISED].round(4)


def classify_relations(
    model: Model, tasks: Mapping[str, Task], keep: Callable[..., HeadClasses], **options: Any
) -> tuple[dict[str, HeadClasses], dict[str, str]]:
    """The classes found on every relation's discovery facts, and why a relation is left out: too few facts for its baseline.

    Args:
        keep: ``run.keep``, which keeps each relation's classes in ``classes_<task>.parquet``.
        options: as ``classify_heads``.

    Raises:
        MethodError: no relation is large enough.
    """
    classes: dict[str, HeadClasses] = {}
    left_out: dict[str, str] = {}
    for name, task in tasks.items():
        others = answer_tokens(tokenizer_of(model, task.prepend_bos), [name])
        try:
            kept = f"classes_{task.name}.parquet"
            classes[name] = keep(kept, classify_heads, model, task.discovery, others, **options)
        except MethodError as error:
            left_out[name] = str(error)
    if not classes:
        raise MethodError(f"no relation is large enough: {next(iter(left_out.values()))}")
    return classes, left_out


def classify_heads(
    model: Model, pairs: Sequence[TokenPair], other_answers: Sequence[int], *, progress: bool = False, **options: Any
) -> HeadClasses:
    """Find the mover, relation and mixture heads of one relation's facts.

    Args:
        pairs: facts of one relation, with subject positions; only clean prompts and first answer tokens count.
        other_answers: first answer tokens of other relations, from which the relation score's random ranges are drawn.
        options: fields of ``ClassOptions``.

    Example:
        >>> others = answer_tokens(tokenizer_of(model), ["country_capital"])
        >>> classes = kc.classify_heads(model, task.discovery, others, level=0.05)
        >>> classes.of_class("mover")

    Raises:
        MethodError: too few facts for the baseline (says how many it takes), no subject, or an option out of range.
    """
    asked = ClassOptions.of(options)
    decoder = model.residual
    answers = [pair.answer[0] for pair in pairs]
    check_enough(answers, decoder.n_layers * decoder.n_heads, asked.level)
    answer_range = sorted(set(answers))
    others = sorted(set(other_answers) - set(answers))
    if len(others) < 5 * len(answer_range):
        raise MethodError(
            f"other_answers has {len(others)} tokens that are not the relation's own; random ranges of "
            f"{len(answer_range)} tokens need at least {5 * len(answer_range)} to draw from: give the answers of more "
            "relations"
        )
    tokens, n_range, n_null, seed = answer_range + others, len(answer_range), asked.n_null, asked.seed
    written = _promoted_by_heads(model, pairs, tokens, asked, progress)
    raised, among_top = (values.flatten(0, 1) for values in (written.contribution[..., :n_range], written.among_top))
    sources = attention_sources(model, pairs, batch_size=asked.batch_size).flatten(1, 2)
    subject, relation = sources[SOURCES.index("subject")], sources[SOURCES.index("relation")]
    facts, answer_of = torch.arange(len(pairs)), torch.tensor([answer_range.index(answer) for answer in answers])
    writes_answer = (among_top[..., :n_range] & (raised > 0))[:, :, answer_of]
    weights = torch.einsum("hf,hft->ht", relation, among_top.float() / asked.k) / len(pairs)
    means = {"subject": subject, "relation_tokens": relation, "contribution": raised[:, facts, answer_of]}
    frame = head_table(decoder.n_layers, decoder.n_heads)
    frame = frame.assign(**{name: values.mean(1).double().numpy() for name, values in means.items()})
    for name, (scores, null) in {
        "mover": mover_baseline(subject, writes_answer, n_null, seed),
        "relation": range_baseline(weights, n_range, n_null, seed),
    }.items():
        frame[[f"{name}_score", f"{name}_null_99", f"{name}_p"]] = _tested(scores, null)
    mover, of_relation = (
        (frame[f"{name}_p"] <= asked.level) & (frame[f"{name}_score"] > 0) & (frame[attention] >= asked.least_attention)
        for name, attention in (("mover", "subject"), ("relation", "relation_tokens"))
    )
    frame["class"] = np.select([mover & of_relation, mover, of_relation], ["mixture", "mover", "relation"], "")
    provenance = {"model": model.name, "method": "head_classes", **asked.determining()}
    return HeadClasses(frame, provenance | {"n_pairs": len(pairs), "n_range": n_range, "n_others": len(others)})


@dataclass(frozen=True)
class PromotedByHeads:
    """Per head, fact and chosen token: what the head adds to the token's logit, and whether it is in the head's top k."""

    contribution: Float[Tensor, "layer head batch token"]
    among_top: Bool[Tensor, "layer head batch token"]


@torch.no_grad()
@checked
def promoted_by_heads(decoder: Decoder, batch: Batch, tokens: Int[Tensor, " token"], k: int) -> PromotedByHeads:
    """What every head writes at the answer position, read at some tokens; one layer's logits exist at a time."""
    run, graph = answer_run(decoder, batch), decoder.graph()
    contributions, among = [], []
    for layer in range(decoder.n_layers):
        logits = direct_logits(decoder, run.outputs[graph.head_writers(layer)], run.scale)
        least = logits.topk(k, -1).values[..., -1:]
        chosen = logits[..., tokens]
        contributions.append(chosen.float().cpu())
        among.append((chosen >= least).cpu())
    return PromotedByHeads(torch.stack(contributions), torch.stack(among))


def _promoted_by_heads(
    model: Model, pairs: Sequence[TokenPair], tokens: Sequence[int], asked: ClassOptions, progress: bool
) -> PromotedByHeads:
    """``promoted_by_heads`` over all facts."""
    decoder, parts = model.residual, []
    chosen = torch.tensor(tokens, device=decoder.device)
    with tqdm(total=len(pairs), desc="head classes", unit="fact", disable=not progress) as bar:
        for batch in batches(pairs, asked.batch_size, device=decoder.device):
            parts.append(promoted_by_heads(decoder, batch, chosen, asked.k))
            bar.update(len(batch))
    contribution, among_top = ([getattr(part, name) for part in parts] for name in ("contribution", "among_top"))
    return PromotedByHeads(torch.cat(contribution, 2), torch.cat(among_top, 2))


def check_enough(answers: Sequence[int], n_heads: int, level: float) -> None:
    """Raises MethodError where the answers can be arranged in too few ways for any head to reach the level after correction.

    The message says how many facts with different answers it takes.
    """
    needed = n_heads / level
    arrangements = math.lgamma(len(answers) + 1) - sum(math.lgamma(n + 1) for n in Counter(answers).values())
    if arrangements < math.log(needed):
        enough = next(n for n in range(1, 100) if math.factorial(n) >= needed)
        raise MethodError(
            f"{len(answers)} facts with {len(set(answers))} different answers are too few for the random baseline of "
            f"{n_heads} heads at level {level:g}: it takes {enough} facts with different answers (or a higher level)"
        )


@checked
def mover_baseline(
    attention: Float[Tensor, "head fact"], written: Bool[Tensor, "head fact other"], n_draws: int, seed: int
) -> tuple[Float[Tensor, " head"], Float[Tensor, "draw head"]]:
    """Mover scores, and those with answers shuffled between facts; ``written[h, i, j]``: does h write j's answer on i?"""
    products = (attention[..., None] * written).flatten(1)  # head, fact x other
    n = written.shape[1]
    generator = np.random.default_rng(seed)
    shuffled = torch.from_numpy(generator.permuted(np.tile(np.arange(n), (n_draws, 1)), axis=1)) + n * torch.arange(n)
    draws = [products[:, some].mean(-1).T for some in shuffled.split(DRAWS_AT_ONCE)]
    return products[:, torch.arange(n) * (n + 1)].mean(-1), torch.cat(draws)


@checked
def range_baseline(
    weights: Float[Tensor, "head token"], n_range: int, n_draws: int, seed: int
) -> tuple[Float[Tensor, " head"], Float[Tensor, "draw head"]]:
    """Relation scores, and those of other ranges: a head's score is the sum of its weights over the range's tokens.

    The first ``n_range`` tokens are the relation's; random ranges are as many of the others, drawn without replacement.
    """
    others = weights[:, n_range:].T
    generator = np.random.default_rng(seed)
    draws = []
    for start in range(0, n_draws, DRAWS_AT_ONCE):
        n = min(DRAWS_AT_ONCE, n_draws - start)
        drawn = generator.random((n, len(others))).argpartition(n_range - 1, 1)[:, :n_range]
        chosen = torch.zeros(n, len(others)).scatter_(1, torch.from_numpy(drawn), 1.0)
        draws.append(chosen @ others)
    return weights[:, :n_range].sum(1), torch.cat(draws)


def _tested(scores: Float[Tensor, " head"], null: Float[Tensor, "draw head"]) -> np.ndarray:
    """A score's columns: itself, its random baseline's 99th percentile, and its corrected p."""
    rounding = 1e-6 * scores.abs().clamp_min(1e-6)  # sums in another order must not count as larger
    p = (1 + (null >= scores - rounding).sum(0)) / (1 + len(null))
    corrected = false_discovery_control(p.double().numpy(), method="bh")
    return np.stack([scores.double().numpy(), np.quantile(null.numpy(), 0.99, 0), corrected], 1)
