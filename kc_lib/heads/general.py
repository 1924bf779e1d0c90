"""All general head scores of a model; and previous-token, duplicate-token and induction heads, by attention.

The other scores have files of their own: ``copying.py``, ``suppression.py``, ``inhibition.py``, ``successor.py``.

The three of this file come from sequences of n random tokens and the same n again. In the second half, a previous-token head
attends one position back, a duplicate-token head to the token's first occurrence (n back) and an induction head to the token
after it (n - 1 back): the score is the mean attention there (Olsson et al. 2022, arXiv:2209.11895; Tigges et al. 2024,
arXiv:2407.10827).

Published code takes whole diagonals. Ours are those of the second half, so that the query of an induction score has been
seen before, and the three scores are means over the same queries. Tokens are drawn from the whole vocabulary but for the
special tokens, without repetition inside a half; published code draws ids 100 to 20,000. TransformerLens's ``detect_head``
cannot serve: it takes text, which random tokens do not survive, and divides by all attention of the sequence.

None of the three was published with a criterion. Ours: more than half of the attention. Beside it stands what heads give
to arbitrary offsets: the 99th percentile over all heads and all other offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from kc_lib.components.head_runs import mean_pattern_by_offset
from kc_lib.errors import KnowledgeCircuitsError, MethodError
from kc_lib.heads.copying import copy_scores
from kc_lib.heads.head_scores import NULL_LEVEL, GeneralHeadScores, HeadScores, described
from kc_lib.heads.inhibition import s_inhibition_scores
from kc_lib.heads.options import COPIES, REPEATS, SCORES, HeadScoreOptions
from kc_lib.heads.successor import successor_scores
from kc_lib.heads.suppression import copy_suppression_scores
from kc_lib.models.model import Model
from kc_lib.tasks.tokens import tokenizer_of

THRESHOLD = 0.5


def head_scores(
    model: Model,
    scores: str | Sequence[str] = "all",
    *,
    text: str | Path | None = None,
    seed: int = 0,
    keep_undefined: bool | None = None,
) -> GeneralHeadScores:
    """The general head scores of a model, with every score's own defaults.

    Args:
        scores: names of ``SCORES``, "all" or "none".
        text: natural text, or a file of it, for copy suppression; None takes the project's.
        keep_undefined: keep the reason of a score that the model has no definition for, instead of raising. None does so
            where all scores are asked for. Over a training it is True: what is undefined early may be defined later.

    Example:
        >>> found = kc.head_scores(model, "induction name_mover")
        >>> found["induction"].heads()

    Raises:
        MethodError: an unknown score.
        KnowledgeCircuitsError: a score that is not defined for the model, and whose reason is not to be kept.
    """
    asked = HeadScoreOptions(scores=scores, seed=seed).scores  # type: ignore[arg-type]  # a text or any sequence is taken
    keep = "all" in asked if keep_undefined is None else keep_undefined
    wanted = [name for name in SCORES if name in asked or "all" in asked]
    _ = model.residual  # a model that is no decoder has none of the scores
    found: dict[str, HeadScores] = {}
    undefined: dict[str, str] = {}
    families: dict[tuple[str, ...], Callable[[], Iterable[HeadScores]]] = {
        REPEATS: lambda: repeat_scores(model, seed=seed).values(),
        COPIES: lambda: copy_scores(model, seed=seed).values(),
        ("copy_suppression",): lambda: [copy_suppression_scores(model, text, seed=seed)],
        ("s_inhibition",): lambda: [s_inhibition_scores(model, copies=found.get("name_mover"), seed=seed)],
        ("successor",): lambda: [successor_scores(model, seed=seed)],
    }
    for family, compute in families.items():
        names = [name for name in family if name in wanted]
        try:
            found |= {one.name: one for one in compute() if one.name in names} if names else {}
        except KnowledgeCircuitsError as error:
            if not keep:
                raise
            undefined |= dict.fromkeys(names, str(error))
    return GeneralHeadScores(found, undefined)


def repeat_scores(
    model: Model, *, n_tokens: int = 100, n_sequences: int = 4, batch_size: int = 4, seed: int = 0
) -> dict[str, HeadScores]:
    """Previous-token, duplicate-token and induction scores by name, from one run; see the head of this file.

    Args:
        n_tokens: length of a half; a sequence has twice as many, and BOS where the model wants it.

    Raises:
        MethodError: the model's context or vocabulary is too small for that many tokens.
        ModelError: a model that is no decoder.
    """
    decoder = model.residual
    tokens = repeated_tokens(model, n_tokens, n_sequences, seed).to(decoder.device)
    first_query = tokens.shape[1] - n_tokens
    parts = [
        mean_pattern_by_offset(decoder, batch, first_query) * len(batch) / len(tokens) for batch in tokens.split(batch_size)
    ]
    by_offset = torch.stack(parts).sum(0)
    offsets = dict(zip(REPEATS, (1, n_tokens, n_tokens - 1), strict=True))
    others = [offset for offset in range(1, first_query) if offset not in offsets.values()]
    null = float(by_offset[:, :, others].double().quantile(NULL_LEVEL)) if others else None
    criterion, chance = "more than half of the attention (ours)", "99th percentile over heads and offsets that mean nothing"
    provenance = described(model, seed, criterion, chance, n_tokens=n_tokens, n_sequences=n_sequences)
    return {
        name: HeadScores.of(name, by_offset[:, :, offset], THRESHOLD, null, provenance=provenance)
        for name, offset in offsets.items()
    }


def repeated_tokens(model: Model, n_tokens: int, n_sequences: int, seed: int) -> Int[Tensor, "sequence pos"]:
    """Random tokens twice over, after BOS where the model's tokenizer puts one."""
    tokenizer = tokenizer_of(model)
    bos = tokenizer.encode("")
    n_context = int(model.cfg.n_ctx)
    if n_tokens < 2 or n_sequences < 1:
        raise MethodError(f"{n_tokens} tokens in {n_sequences} sequences are too few: use at least 2 tokens, 1 sequence")
    if 2 * n_tokens + len(bos) > n_context:
        raise MethodError(
            f"a sequence of 2 x {n_tokens} random tokens does not fit into the model's context of {n_context}: use "
            f"n_tokens={(n_context - len(bos)) // 2} or less"
        )
    n_words = min(int(model.cfg.d_vocab), len(tokenizer.inner))
    special = set(tokenizer.inner.all_special_ids)
    body = torch.tensor([token for token in range(n_words) if token not in special])
    if len(body) < n_tokens:
        raise MethodError(f"the vocabulary has {len(body)} tokens that are not special, fewer than n_tokens={n_tokens}")
    generator = torch.Generator().manual_seed(seed)
    rows = [body[torch.randperm(len(body), generator=generator)[:n_tokens]] for _ in range(n_sequences)]
    half = torch.stack(rows)
    start = torch.tensor(bos, dtype=half.dtype).expand(n_sequences, len(bos))
    return torch.cat([start, half, half], 1)
