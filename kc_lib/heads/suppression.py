"""Copy-suppression heads by CSPA over natural text (McDougall et al. 2023, arXiv:2310.04625).

    score = 1 - mean KL(full || copy suppression preserved) / mean KL(full || mean-ablated),

over the destinations of the text; 1 where all that a head does is to write against predicted tokens that are in the
context, 0 where none of it is. Above 0.10 counts (Tigges et al. 2024, arXiv:2407.10827). ``suppression_runs.py`` has
the ablations, with the options of that paper: 5% of the source tokens, one direction per source token.

As in published code, function words are never kept: they are predicted nearly everywhere. Published is a list of GPT-2's
tokens; ours are special tokens, tokens without a letter, and English closed-class words, however they are written.
Where we depart from published code: means are over all positions of the text, not one per position, and run once for all
heads; and heads of the first two layers get a score, but do not count, as there the stream predicts nothing yet
(published code leaves these layers out).

``detail`` has the score's 95% interval over windows, as a few destinations make most of the divergence.
The null keeps as many source tokens drawn at random instead of the predicted ones, once for every head.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kc_lib.errors import MethodError, TaskError, check_counts
from kc_lib.heads.head_scores import NULL_LEVEL, HeadScores, described
from kc_lib.heads.suppression_runs import mean_head_outputs, suppression_divergences
from kc_lib.models.model import Model
from kc_lib.stats import interval, resampled_means
from kc_lib.tasks.files import load_text
from kc_lib.tasks.tokens import tokenizer_of

# fmt: off
FUNCTION_WORDS = frozenset((
    "a", "an", "the", "this", "that", "these", "those", "some", "any", "no", "each", "every", "all", "both", "either",
    "neither", "such", "i", "me", "my", "mine", "we", "us", "our", "ours", "you", "your", "yours", "he", "him", "his",
    "she", "her", "hers", "it", "its", "they", "them", "their", "theirs", "who", "whom", "whose", "which", "what",
    "myself", "himself", "herself", "itself", "themselves", "one", "ones", "and", "or", "but", "nor", "so", "yet",
    "if", "because", "although", "while", "when", "where", "as", "than", "of", "in", "on", "at", "by", "to", "from",
    "with", "without", "for", "about", "into", "onto", "over", "under", "up", "down", "out", "off", "through",
    "between", "after", "before", "until", "since", "during", "against", "among", "be", "am", "is", "are", "was",
    "were", "been", "being", "have", "has", "had", "having", "do", "does", "did", "will", "would", "shall", "should",
    "can", "could", "may", "might", "must", "not", "there", "here", "then", "now", "very", "too", "also", "just",
    "only", "how", "why",
))
# fmt: on
THRESHOLD, SHARE = 0.10, 0.05
FIRST_LAYER = 2
LEAST_DIVERGENCE = 1e-5  # nats; below it float32 cannot tell an ablation from none


def copy_suppression_scores(
    model: Model,
    text: str | Path | None = None,
    *,
    window: int = 60,
    n_windows: int = 16,
    share: float = SHARE,
    batch_size: int = 8,
    seed: int = 0,
) -> HeadScores:
    """CSPA score of every head on a text; see the head of this file.

    Args:
        text: the text itself, a file, or None for the text that comes with the project.
        window: tokens of a window, BOS not counted; the text is cut into windows without overlap.
        n_windows: windows the divergences are measured on, drawn by seed; the means are over all of them.

    A head whose mean ablation changes nothing (mean KL below 1e-5) suppresses nothing and scores 0.

    Raises:
        TaskError: a text that cannot be read, or is too short for two windows.
        MethodError: windows that do not fit into the model's context, or a share outside (0, 1].
        ModelError: a model that is no decoder.
    """
    check_counts(1, n_windows=n_windows)
    if not 0 < share <= 1:
        raise MethodError(f"share is {share}; it must be above 0 and at most 1")
    decoder = model.residual
    windows = text_windows(model, load_text(text), window)
    generator = torch.Generator().manual_seed(seed)
    scored = windows[torch.randperm(len(windows), generator=generator)[:n_windows].sort().values]
    means = mean_head_outputs(decoder, windows.split(batch_size))
    sources = content_tokens(model).to(decoder.device)
    divergences = suppression_divergences(decoder, scored, means, sources, share, generator)
    ablated, preserved, random = (part.cpu() for part in (divergences.ablated, divergences.preserved, divergences.chance))
    acts = ablated.mean(-1) > LEAST_DIVERGENCE
    scores = torch.where(acts, 1 - preserved.mean(-1) / ablated.mean(-1), 0.0)
    chance = torch.where(acts, 1 - random.mean(-1) / ablated.mean(-1), 0.0)
    low, high = _interval(ablated, preserved, seed)
    criterion, null = "above 0.10 (Tigges et al. 2024)", "99th percentile over heads with random source tokens kept"
    given = {"text": "the project's" if text is None else "given", "share": share}
    counts = {"n_tokens": windows.numel(), "n_destinations": scored[:, 1:].numel()}
    return HeadScores.of(
        "copy_suppression",
        scores,
        THRESHOLD,
        float(chance[FIRST_LAYER:].double().quantile(NULL_LEVEL)),
        also=torch.arange(decoder.n_layers)[:, None] >= FIRST_LAYER,
        detail={
            "low": torch.where(acts, low, 0.0),
            "high": torch.where(acts, high, 0.0),
            "kl_ablated": ablated.mean(-1),
            "kl_preserved": preserved.mean(-1),
            "random_tokens": chance,
        },
        provenance=described(model, seed, criterion, null, **given, **counts),
    )


def _interval(
    ablated: Float[Tensor, "layer head window"], preserved: Float[Tensor, "layer head window"], seed: int
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
    """95% bootstrap interval of every score over windows; not a number for one window."""
    both = rearrange([ablated, preserved], "kind layer head window -> window (kind layer head)")
    draws = rearrange(resampled_means(both.numpy(), seed), "draw (kind head) -> kind draw head", kind=2)
    low, high = interval(1 - draws[1] / np.maximum(draws[0], LEAST_DIVERGENCE / 10))
    return torch.from_numpy(low).view(ablated.shape[:2]), torch.from_numpy(high).view(ablated.shape[:2])


def content_tokens(model: Model) -> Bool[Tensor, " d_vocab"]:
    """Which tokens can be sources: they have a letter, and are neither special nor English function words."""
    tokenizer = tokenizer_of(model).inner
    special = set(tokenizer.all_special_ids)
    content = torch.zeros(int(model.cfg.d_vocab), dtype=torch.bool)
    for token in range(min(len(content), len(tokenizer))):
        word = str(tokenizer.decode([token])).strip().lower()
        content[token] = token not in special and word not in FUNCTION_WORDS and any(map(str.isalpha, word))
    return content


def text_windows(model: Model, text: str, window: int) -> Int[Tensor, "window pos"]:
    """The text's tokens in windows, BOS before each where the model's tokenizer puts one.

    Raises:
        TaskError, MethodError: as ``copy_suppression_scores``.
    """
    tokenizer = tokenizer_of(model)
    bos = tokenizer.encode("")
    n_context = int(model.cfg.n_ctx)
    if window < 2 or window + len(bos) > n_context:
        raise MethodError(
            f"a window of {window} tokens does not fit: use 2 to {n_context - len(bos)} (the model's context is {n_context})"
        )
    tokens = tokenizer.encode(text)[len(bos) :]
    n_windows = len(tokens) // window
    if n_windows < 2:
        raise TaskError(f"the text has {len(tokens)} tokens, too few for two windows of {window}: give a longer text")
    cut = torch.tensor(tokens[: n_windows * window]).view(n_windows, window)
    return torch.cat([torch.tensor(bos, dtype=cut.dtype).expand(n_windows, len(bos)), cut], 1)
