"""Copy-suppression-preserving ablation of every head (CSPA; McDougall et al. 2023, arXiv:2310.04625, section 3.3).

A head's output at destination d is a sum over sources s, ``pattern[d, s] v_s W_O``. Mean ablation replaces it by the head's
mean output. CSPA keeps, of each source whose token the stream before the layer already predicts at d, what the head writes
*against* that token: the component of ``pattern[d, s] (v_s W_O - mean)`` along the token's unembedding, if it is negative.

Both ablations are direct: the final stream changes by the difference and the final norm keeps its scale, as published. What
they do to the logits is then linear in the difference, so a head's ablations cost products with ``W_O W_U`` (d_head rows)
and with the kept tokens' unembeddings times ``W_U``, which all heads share, and not with ``W_U`` itself.

The unembedding direction of a token is the one its logit is read along: with the final norm's weight, centred where that
norm centres. Under norms on outputs (Gemma) a head's output is its contribution: scaled by that norm as in the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kc_lib.components.head_runs import LayerRun, run_layers
from kc_lib.errors import checked
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.parts import Attention


@torch.no_grad()
def mean_head_outputs(decoder: Decoder, batches: Iterable[Int[Tensor, "_ pos"]]) -> Float[Tensor, "layer head d_model"]:
    """Every head's mean contribution to the stream, over all positions of the text but the first of each window."""
    total = decoder.W_U.new_zeros(decoder.n_layers, decoder.n_heads, decoder.W_U.shape[0], dtype=torch.float32)
    count = 0
    for tokens in batches:
        for run in run_layers(decoder, tokens):
            attention = decoder.blocks[run.layer].attention
            outputs = attention.contributions(attention.head_outputs(run.z))
            total[run.layer] += outputs[:, :, 1:].float().sum((1, 2))
        count += tokens[:, 1:].numel()
    return total / count


@dataclass(frozen=True)
class Divergences:
    """KL(full || ablated) in nats, mean over a window's destinations; ``chance`` keeps random source tokens instead."""

    ablated: Float[Tensor, "layer head window"]
    preserved: Float[Tensor, "layer head window"]
    chance: Float[Tensor, "layer head window"]


@torch.no_grad()
@checked
def suppression_divergences(
    decoder: Decoder,
    tokens: Int[Tensor, "window pos"],
    means: Float[Tensor, "layer head d_model"],
    sources: Bool[Tensor, " d_vocab"],
    share: float,
    generator: torch.Generator,
) -> Divergences:
    """Divergences of mean ablation and of CSPA for every head, over all positions of the windows but the first.

    ``sources`` says which tokens may be kept at all. At position d (from 1), the ceil(share d) best predicted of those up
    to there are kept; a token counts once, and is kept wherever it stands. ``chance`` draws as many. Holds two rows of
    logits per destination and one per distinct token in memory.
    """
    tokens = tokens.to(decoder.device)
    readout = _Readout.of(decoder, tokens)
    seen = (readout.source.cumsum(1) > 0) & sources[readout.vocabulary]
    n_heads = decoder.n_heads
    totals = torch.zeros(3, decoder.n_layers, n_heads, len(tokens), dtype=torch.float64, device=tokens.device)
    for run in run_layers(decoder, tokens):
        attention = decoder.blocks[run.layer].attention
        predicted = decoder.unembed(run.resid_pre, tokens=readout.vocabulary).float()
        random = torch.rand(predicted.shape, generator=generator).to(predicted)
        coefficients = _components(attention, run, means[run.layer], readout)
        kept = [coefficients * _top(scores, seen, share)[:, None] for scores in (predicted, random)]
        for head in range(n_heads):
            removed = _removal(attention, run, means[run.layer, head], head, readout)
            totals[:, run.layer, head] = readout.divergences(removed, [part[:, head] for part in kept])
    return Divergences(*(totals / (tokens.shape[1] - 1)).float())


@dataclass(frozen=True)
class _Readout:
    """The final stream's logits, and how a change of that stream changes them."""

    vocabulary: Int[Tensor, " token"]  # the windows' distinct tokens
    source: Float[Tensor, "window pos token"]  # which of them is where
    direction: Float[Tensor, "token d_model"]  # unit unembedding directions of the vocabulary
    unembedding: Float[Tensor, "d_model d_vocab"]  # with the final norm's weight, and centred where it centres
    between: Float[Tensor, "token d_vocab"]  # direction @ unembedding
    scale: Float[Tensor, "window pos 1"]
    logits: Float[Tensor, "window pos d_vocab"]  # before the soft cap
    probabilities: Float[Tensor, "window pos d_vocab"]
    entropy: Float[Tensor, "window pos"]
    soft_cap: float | None

    @classmethod
    def of(cls, decoder: Decoder, tokens: Int[Tensor, "window pos"]) -> _Readout:
        norm, cap = decoder.final_norm, decoder.logit_soft_cap
        vocabulary, index = tokens.unique(return_inverse=True)
        source = F.one_hot(index, len(vocabulary))
        unembedding = norm.centre(norm.weighted(decoder.W_U.T.float())).T.contiguous()
        direction = F.normalize(unembedding[:, vocabulary].T, dim=-1)
        final = decoder.run(decoder.embed(tokens))
        logits = (norm(final) @ decoder.W_U + decoder.b_U).float()
        capped = _capped(logits, cap)
        probabilities = capped.softmax(-1)
        return cls(
            vocabulary,
            source.to(direction),
            direction,
            unembedding,
            direction @ unembedding,
            norm.scale(final).float(),
            logits,
            probabilities,
            -(probabilities * capped.log_softmax(-1)).sum(-1),
            cap,
        )

    def divergences(
        self,
        removed: tuple[Float[Tensor, "window pos rank"], Float[Tensor, "rank d_vocab"]],
        kept: list[Float[Tensor, "window pos token"]],
    ) -> Float[Tensor, "ablation window"]:
        """Each window's summed KL(full || changed): a removal alone, and with each of the kept components put back."""
        coefficients, rows = removed
        sums = torch.zeros(1 + len(kept), len(coefficients), dtype=torch.float64, device=rows.device)
        for window in range(len(coefficients)):
            full, entropy = self.probabilities[window, 1:], self.entropy[window, 1:]
            ablated = torch.addmm(self.logits[window, 1:], coefficients[window, 1:], rows)
            alone = self._divergence(full, entropy, ablated)
            sums[0, window] = alone.sum()
            for row, components in enumerate(kept):
                back = self.scale[window, 1:] * components[window, 1:]
                places, tokens = back.any(1), back.any(0)  # elsewhere nothing is kept, and the removal acts alone
                changed = torch.addmm(ablated[places], back[places][:, tokens], self.between[tokens])
                after = self._divergence(full[places], entropy[places], changed)
                sums[1 + row, window] = alone[~places].sum() + after.sum()
        return sums

    def _divergence(
        self,
        full: Float[Tensor, "row d_vocab"],
        entropy: Float[Tensor, " row"],
        logits: Float[Tensor, "row d_vocab"],
    ) -> Float[Tensor, " row"]:
        return F.cross_entropy(_capped(logits, self.soft_cap), full, reduction="none").double() - entropy


def _removal(
    attention: Attention, run: LayerRun, mean: Float[Tensor, " d_model"], head: int, readout: _Readout
) -> tuple[Float[Tensor, "window pos rank"], Float[Tensor, "rank d_vocab"]]:
    """What replacing a head's output by its mean does to the logits, as coefficients times rows."""
    written = _output_weight(attention)[head] @ readout.unembedding
    rows = torch.cat([written, (mean @ readout.unembedding)[None]])
    z = run.z[:, :, head].float() * _output_scale(attention, run)
    coefficients = torch.cat([-z, torch.ones_like(z[..., :1])], -1) * readout.scale
    return coefficients, rows


def _components(
    attention: Attention, run: LayerRun, means: Float[Tensor, "head d_model"], readout: _Readout
) -> Float[Tensor, "window head pos token"]:
    """Negative components of (result - mean) along the source tokens' unembeddings, summed over a token's places."""
    of_group = torch.einsum("hde,te->htd", _output_weight(attention), readout.direction)
    values = run.values.float().repeat_interleave(attention.group_size, dim=2)
    along = torch.einsum("wshd,htd,wst->whs", values, of_group, readout.source)
    of_mean = torch.einsum("he,te,wst->whs", means, readout.direction, readout.source)
    scale = _output_scale(attention, run)[:, None]
    components = run.pattern.float() * (scale * along[:, :, None] - of_mean[:, :, None])
    return torch.einsum("whds,wst->whdt", components.clamp(max=0), readout.source)


def _output_weight(attention: Attention) -> Float[Tensor, "head d_head d_model"]:
    """W_O, with the weight of the norm on outputs where there is one."""
    return (attention.W_O if attention.post_norm is None else attention.post_norm.weighted(attention.W_O)).float()


def _output_scale(attention: Attention, run: LayerRun) -> Float[Tensor, "window pos 1"]:
    """The scale of the norm on outputs in this run; 1 where there is none."""
    if attention.post_norm is None:
        return torch.ones_like(run.z[:, :, 0, :1], dtype=torch.float32)
    return attention.post_norm.scale(attention.head_outputs(run.z).sum(0)).float()


def _top(
    scores: Float[Tensor, "window pos token"], seen: Bool[Tensor, "window pos token"], share: float
) -> Bool[Tensor, "window pos token"]:
    """The tokens seen so far whose scores are among the first ``share`` of the positions so far, rounded up."""
    ordered = scores.masked_fill(~seen, -torch.inf).sort(-1, descending=True).values
    n_pos = scores.shape[1]
    counts = torch.tensor([math.ceil(share * (place + 1)) for place in range(n_pos)], device=scores.device)
    last = counts.clamp(max=scores.shape[-1]) - 1
    bar = ordered.gather(-1, last[None, :, None].expand(len(scores), n_pos, 1))
    return (scores >= bar) & seen


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)
