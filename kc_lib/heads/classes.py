"""Head classes of *Knowledge Circuits*: mover, relation and mixture heads (Yao et al. 2024, arXiv:2405.17969, section 4.2).

The paper names the classes and gives no criterion. Ours, read at the answer position and averaged over a relation's facts:

- mover score of a head: attention mass on the subject x [the head's output raises the answer's logit, and the answer is
  among the k tokens it raises most];
- relation score: attention mass on the relation's tokens x share of the relation's range (the first tokens of all its
  answers) among those k tokens.

Each has a null. For movers, the answers are shuffled between the facts: a head that writes some answer whatever the subject
keeps its score. That null cannot serve the relation score, which asks for the range as a whole and is the same under any
shuffling; there, ranges of as many tokens are drawn from the answers of other relations. P-values are the shares of null
scores at least as large, corrected over all heads by Benjamini and Hochberg (1995). A head is classified where its score is
above 0, the corrected p at most ``level``, and the attention mass in question at least ``least_attention``: a score is a
product, and its null asks about the second factor only. A head in both classes is a mixture head.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import false_discovery_control
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.components.attention import SOURCES, attention_sources
from kc_lib.errors import MethodError, checked
from kc_lib.heads.promoted_tokens import head_promotion
from kc_lib.models.model import Model
from kc_lib.results import load_table, save_table
from kc_lib.tasks.batches import TokenPair, batches

CLASSES = ("mover", "relation", "mixture")
DRAWS_AT_ONCE = 1000  # null draws held in memory together


@dataclass(frozen=True)
class HeadClasses:
    """One row per head: layer, head, both scores with their null's 99th percentile and corrected p, and the class.

    The class is "" for none. Also ``subject`` and ``relation_tokens``, the attention masses, and ``contribution``, what the
    head adds to the answer's logit, all averaged over facts.
    """

    heads: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def of_class(self, name: str) -> list[tuple[int, int]]:
        """(layer, head) of the heads of a class; mixture heads are in "mover" and "relation" too.

        Raises:
            MethodError: a class that is none of ``CLASSES``.
        """
        if name not in CLASSES:
            raise MethodError(f"unknown head class {name!r}: use one of {', '.join(CLASSES)}")
        own = {name} if name == "mixture" else {name, "mixture"}
        chosen = self.heads[self.heads["class"].isin(own)]
        return list(zip(chosen["layer"].tolist(), chosen["head"].tolist(), strict=True))

    @property
    def hash(self) -> str:
        """Hash of the table: two of one hash say the same."""
        return hashlib.blake2b(self.heads.to_json().encode(), digest_size=16).hexdigest()

    def to_frame(self) -> pd.DataFrame:
        return self.heads

    def save(self, path: str | Path) -> Path:
        """Write the rows as parquet, provenance in its metadata."""
        return save_table(self.heads, path, self.provenance)

    @classmethod
    def load(cls, path: str | Path) -> HeadClasses:
        """Read what ``save`` wrote.

        Raises:
            MethodError: a file that holds no classes of heads.
        """
        heads, provenance = load_table(path)
        if not {"layer", "head", "class"} <= set(heads.columns):
            raise MethodError(f"{path} holds no classes of heads: give a classes_*.parquet of head_classification")
        return cls(heads, provenance)


def classify_heads(
    model: Model,
    pairs: Sequence[TokenPair],
    other_answers: Sequence[int],
    *,
    k: int = 10,
    level: float = 0.01,
    least_attention: float = 0.1,
    n_null: int = 30_000,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> HeadClasses:
    """Find the mover, relation and mixture heads of one relation's facts.

    Args:
        pairs: facts of one relation, with subject positions; only clean prompts and first answer tokens count.
        other_answers: first answer tokens of other relations, from which the relation score's null ranges are drawn.
        k: how many of the tokens a head raises most count as what it writes.
        level: largest corrected p of a classified head.
        least_attention: on the subject for movers, on the relation's tokens for relation heads; mean over facts.

    Raises:
        MethodError: facts too few for the null (says how many it takes), no subject, or a parameter out of range.
    """
    check_classes(k=k, level=level, least_attention=least_attention, n_null=n_null)
    decoder = model.residual
    answers = [pair.answer[0] for pair in pairs]
    check_enough(answers, decoder.n_layers * decoder.n_heads, level)
    own = sorted(set(answers))
    others = sorted(set(other_answers) - set(own))
    if len(others) < 5 * len(own):
        raise MethodError(
            f"other_answers has {len(others)} tokens that are not the relation's own; its null ranges of {len(own)} tokens "
            f"need at least {5 * len(own)} to draw from: give the answers of more relations"
        )
    tokens = torch.tensor(own + others, device=decoder.device)
    contribution, among = [], []
    with tqdm(total=len(pairs), desc="head classes", unit="fact", disable=not progress) as bar:
        for batch in batches(pairs, batch_size, device=decoder.device):
            promotion = head_promotion(decoder, batch, tokens, k)
            contribution.append(promotion.contribution[..., : len(own)])
            among.append(promotion.among_top)
            bar.update(len(batch))
    raised, within = torch.cat(contribution, 2).flatten(0, 1), torch.cat(among, 2).flatten(0, 1)
    sources = attention_sources(model, pairs, batch_size=batch_size).flatten(1, 2)
    subject, relation = sources[SOURCES.index("subject")], sources[SOURCES.index("relation")]
    answer_of = torch.tensor([own.index(answer) for answer in answers])
    written = (within[..., : len(own)] & (raised > 0))[:, :, answer_of]
    shares = within.float() / k
    weights = torch.einsum("hf,hft->ht", relation, shares) / len(pairs)
    tested = {"mover": mover_null(subject, written, n_null, seed), "relation": range_null(weights, len(own), n_null, seed)}
    facts = torch.arange(len(pairs))
    frame = pd.DataFrame(
        {
            "layer": torch.arange(decoder.n_layers).repeat_interleave(decoder.n_heads).numpy(),
            "head": torch.arange(decoder.n_heads).repeat(decoder.n_layers).numpy(),
            "subject": subject.mean(1).double().numpy(),
            "relation_tokens": relation.mean(1).double().numpy(),
            "contribution": raised[:, facts, answer_of].mean(1).double().numpy(),
        }
    )
    for name, (scores, null) in tested.items():
        frame[[f"{name}_score", f"{name}_null_99", f"{name}_p"]] = _tested(scores, null)
    mover, of_relation = (
        (frame[f"{name}_p"] <= level) & (frame[f"{name}_score"] > 0) & (frame[attention] >= least_attention)
        for name, attention in (("mover", "subject"), ("relation", "relation_tokens"))
    )
    frame["class"] = np.select([mover & of_relation, mover, of_relation], ["mixture", "mover", "relation"], "")
    provenance = {"model": model.name, "method": "head_classes", "k": k, "level": level, "n_null": n_null}
    provenance |= {"least_attention": least_attention}
    provenance |= {"n_pairs": len(pairs), "n_range": len(own), "n_others": len(others), "seed": seed}
    return HeadClasses(frame, provenance)


def check_classes(*, k: int = 10, level: float = 0.01, least_attention: float = 0.1, n_null: int = 30_000) -> None:
    """Refuse what ``classify_heads`` would refuse, before a model is loaded.

    Raises:
        MethodError: a parameter out of range.
    """
    if not 0 < level < 1:
        raise MethodError(f"level is {level}; it is the largest corrected p of a classified head, between 0 and 1")
    if k < 1 or n_null < 1:
        raise MethodError(f"k is {k} and n_null is {n_null}; both must be at least 1")
    if not 0 <= least_attention <= 1:
        raise MethodError(f"least_attention is {least_attention}; it is a share of a head's attention, between 0 and 1")


def check_enough(answers: Sequence[int], n_heads: int, level: float) -> None:
    """Refuse facts whose answers can be arranged in too few ways for any head to reach the level after correction.

    Raises:
        MethodError: says how many facts with different answers it takes.
    """
    needed = n_heads / level
    arrangements = math.lgamma(len(answers) + 1) - sum(math.lgamma(n + 1) for n in Counter(answers).values())
    if arrangements < math.log(needed):
        enough = next(n for n in range(1, 100) if math.factorial(n) >= needed)
        raise MethodError(
            f"{len(answers)} facts with {len(set(answers))} different answers are too few for the null of {n_heads} heads "
            f"at level {level:g}: it takes {enough} facts with different answers (or a higher level)"
        )


@checked
def mover_null(
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
def range_null(
    weights: Float[Tensor, "head token"], n_range: int, n_draws: int, seed: int
) -> tuple[Float[Tensor, " head"], Float[Tensor, "draw head"]]:
    """Relation scores, and those of other ranges: a head's score is the sum of its weights over the range's tokens.

    The first ``n_range`` tokens are the relation's; null ranges are as many of the others, drawn without replacement.
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
    """A score's columns: itself, its null's 99th percentile, and its corrected p."""
    rounding = 1e-6 * scores.abs().clamp_min(1e-6)  # sums in another order must not count as larger
    p = (1 + (null >= scores - rounding).sum(0)) / (1 + len(null))
    corrected = false_discovery_control(p.double().numpy(), method="bh")
    return np.stack([scores.double().numpy(), np.quantile(null.numpy(), 0.99, 0), corrected], 1)
