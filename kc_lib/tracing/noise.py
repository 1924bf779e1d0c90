"""Corrupted subjects: what enters block 0 where a prompt's subject is drowned in noise or is another subject.

Noise is added to the stream before block 0 at the subject's tokens. Where the model adds learned positions or scales its
embeddings, that stream is the sum and has that scale; the size of the noise is measured on the tokens' own part of it, as
scaled. Adding to the embedding layer's output, as the authors' code does, is the same wherever embeddings are not scaled.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kc_lib.errors import checked
from kc_lib.residual.decoder import Decoder
from kc_lib.tasks.facts import FactPrompt

ROWS_AT_ONCE = 4096  # of the vocabulary, for its covariance


@torch.no_grad()
def noise_scale(
    decoder: Decoder, facts: Sequence[FactPrompt], noise: str, level: float = 3.0, sigma: float | None = None
) -> Float[Tensor, ""] | Float[Tensor, "d_model d_model"] | None:
    """What standard draws are multiplied with: one number, a matrix for ``covariance``, None for ``replacement``.

    Arguments are those of ``TraceOptions``, which checks them.

    - ``gaussian``: ``sigma``, or ``level`` times the standard deviation of the embeddings of the subjects' tokens, over all
      tokens of all the given facts' subjects (as often as they occur) and all coordinates (Meng et al. 2022, section 2.1:
      3 times). The authors tokenise subjects alone, we as they stand in their prompts.
    - ``uniform``: the same, as half the width of an interval around 0.
    - ``covariance``: ``level`` times the root of the covariance of the embeddings of the whole vocabulary, each token
      counted once. The authors count tokens as Wikipedia does, add the mean, and use level 1.
    """
    if noise == "replacement":
        return None
    if noise == "covariance":
        return level * _covariance_root(decoder)
    if sigma is not None:
        return torch.tensor(float(sigma))
    tokens = torch.tensor([fact.tokens[i] for fact in facts for i in fact.subject])
    return level * decoder.token_part(tokens[:, None]).double().std().float().cpu()


def _covariance_root(decoder: Decoder) -> Float[Tensor, "d_model d_model"]:
    parts = torch.arange(decoder.W_U.shape[1]).split(ROWS_AT_ONCE)
    vectors = torch.cat([decoder.token_part(part[:, None])[:, 0].float() for part in parts])
    values, axes = torch.linalg.eigh(vectors.T.cov().double())
    return ((axes * values.clamp(min=0).sqrt()) @ axes.T).float().cpu()


@torch.no_grad()
@checked
def noised(
    decoder: Decoder,
    fact: FactPrompt,
    noise: str,
    scale: Float[Tensor, ""] | Float[Tensor, "d_model d_model"],
    n_samples: int,
    seed: int,
) -> Float[Tensor, "sample pos d_model"]:
    """The stream before block 0 with noise on the subject's tokens, from its first token on.

    The draws depend on seed, prompt and subject alone: every run of a fact sees the same noise, whatever else is run.
    """
    embedded = decoder.embed(torch.tensor([fact.tokens]))[:, fact.subject[0] :]
    generator = torch.Generator().manual_seed(fact_seed(fact, seed))
    shape = (n_samples, len(fact.subject), embedded.shape[-1])
    if noise == "uniform":
        draws = scale * (2 * torch.rand(shape, generator=generator) - 1)
    else:
        draws = torch.randn(shape, generator=generator)
        draws = draws * scale if scale.ndim == 0 else draws @ scale
    corrupted = embedded.repeat(n_samples, 1, 1)
    corrupted[:, : len(fact.subject)] += draws.to(corrupted)
    return corrupted


def replaced(
    fact: FactPrompt, others: Sequence[FactPrompt], n_samples: int, seed: int
) -> Int[Tensor, "sample all_pos"] | None:
    """Prompts with the subject's tokens exchanged for those of other facts' subjects; None if there is none.

    Drawn without repetition, at most ``n_samples``, from subjects of equal token length with another answer that stand
    where this one does (at the start of the prompt or within, where a tokenizer puts a space before them).
    """
    tokens = {
        tuple(other.tokens[i] for i in other.subject)
        for other in others
        if len(other.subject) == len(fact.subject) and other.answer != fact.answer and _at_start(other) == _at_start(fact)
    }
    chosen = sorted(tokens - {tuple(fact.tokens[i] for i in fact.subject)})
    if not chosen:
        return None
    chosen = random.Random(fact_seed(fact, seed)).sample(chosen, min(n_samples, len(chosen)))
    before, after = fact.tokens[: fact.subject[0]], fact.tokens[fact.subject[-1] + 1 :]
    return torch.tensor([(*before, *subject, *after) for subject in chosen])


def _at_start(fact: FactPrompt) -> bool:
    return fact.text.get("prompt", "").startswith(fact.text.get("subject", ""))


def fact_seed(fact: FactPrompt, seed: int) -> int:
    """A seed from the run's seed, the prompt and its subject."""
    described = json.dumps([seed, fact.tokens, fact.subject])
    return int.from_bytes(hashlib.blake2b(described.encode(), digest_size=6).digest(), "big")
