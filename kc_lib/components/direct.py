"""Direct logit attribution: how much every component adds to the answer's logit by itself, at the answer position.

Given the final norm's scale in the run, that norm is linear, and so is what a component adds to a logit (Elhage et al. 2021,
"A Mathematical Framework for Transformer Circuits"; Wang et al. 2023, arXiv:2211.00593, section 3). Contributions of all
writers, of the attention biases and of the constant (the final norm's bias and the unembedding's) sum to the logit, before a
soft cap where the model has one. What a component does through others is not in it.

TransformerLens's ``direct_logit_attribution`` takes weights with the norm folded in, and refuses others. The suite keeps the
model's own weights, so its kernels are here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.components.options import DirectOptions
from kc_lib.errors import MethodError, checked
from kc_lib.models.model import Model
from kc_lib.residual.activations import writer_outputs
from kc_lib.residual.decoder import Decoder
from kc_lib.results import Result
from kc_lib.stats import interval, resampled_means
from kc_lib.tasks.batches import Batch, TokenPair, batches

BIASES = ("attention biases", "constant")  # the components that are no writers


@dataclass(frozen=True)
class AnswerRun:
    """A plain run read at the position that predicts the (first) answer token.

    ``outputs`` are the writers' contributions there, ``final`` the stream, ``scale`` that of the final norm.
    """

    outputs: Float[Tensor, "writer batch d_model"]
    final: Float[Tensor, "batch d_model"]
    scale: Float[Tensor, "batch 1"]


@torch.no_grad()
@checked
def answer_run(decoder: Decoder, batch: Batch) -> AnswerRun:
    """The writers' contributions to the clean prompts' final stream, at the answer position."""
    outputs = writer_outputs(decoder, batch.clean)
    rows = torch.arange(len(batch), device=outputs.device)
    at_answer = outputs[:, rows, batch.answer_positions[:, 0]]
    final = at_answer.sum(0) + decoder.bias_before[-1]
    return AnswerRun(at_answer, final, decoder.final_norm.scale(final))


@torch.no_grad()
@checked
def direct_logits(
    decoder: Decoder, vectors: Float[Tensor, "*batch d_model"], scale: Float[Tensor, "*#batch 1"]
) -> Float[Tensor, "*batch vocab"]:
    """What vectors, as parts of a final stream whose norm has this scale, add to every logit."""
    norm = decoder.final_norm
    return norm.weighted(norm.centre(vectors) * scale) @ decoder.W_U


@torch.no_grad()
@checked
def direct_contributions(
    decoder: Decoder,
    vectors: Float[Tensor, "*part batch d_model"],
    scale: Float[Tensor, "batch 1"],
    tokens: Int[Tensor, " batch"],
    against: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "*part batch"]:
    """What vectors add to one logit per example, or to its difference ``against`` another."""
    norm = decoder.final_norm
    direction = decoder.W_U[:, tokens].T if against is None else (decoder.W_U[:, tokens] - decoder.W_U[:, against]).T
    return torch.einsum("...bd,bd->...b", norm.weighted(norm.centre(vectors) * scale), direction)


@torch.no_grad()
@checked
def constant_contribution(
    decoder: Decoder, tokens: Int[Tensor, " batch"], against: Int[Tensor, " batch"] | None = None
) -> Float[Tensor, " batch"]:
    """What the final norm's bias and the unembedding's add to one logit per example, or to a difference."""
    bias = decoder.final_norm.bias
    constant = decoder.b_U[tokens] + (0.0 if bias is None else bias @ decoder.W_U[:, tokens])
    return constant if against is None else constant - constant_contribution(decoder, against)


@dataclass(frozen=True)
class DirectAttribution(Result):
    """Contributions in logits: one row per fact, one column per component (writers, then ``BIASES``)."""

    columns = BIASES

    values: Float[Tensor, "fact component"]
    components: list[str]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def totals(self) -> Float[Tensor, " fact"]:
        """The logit, or logit difference, of every fact."""
        return self.values.sum(1)

    def to_frame(self) -> pd.DataFrame:
        """One row per fact, one column per component."""
        return pd.DataFrame(self.values.numpy(), columns=self.components)

    def about(self) -> dict[str, Any]:
        return {"provenance": dict(self.provenance)}

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, about: Mapping[str, Any]) -> Self:
        return cls(torch.tensor(frame.to_numpy()), list(frame.columns), about["provenance"])

    def summary(self, seed: int = 0) -> pd.DataFrame:
        """Every component as a row: its mean contribution over facts, a 95% bootstrap interval, its share of the total."""
        places = [_kind_and_layer(name) for name in self.components]
        frame = pd.DataFrame(places, columns=["kind", "layer"])
        frame.insert(0, "component", self.components)
        frame = frame.assign(**_means(self.values, seed))
        total = frame["contribution"].sum()
        return frame.assign(share=frame["contribution"] / total if total else np.nan)

    def by_layer(self, seed: int = 0) -> pd.DataFrame:
        """Contributions of attention (all heads and its biases apart) and MLP per layer, and their running total."""
        groups: dict[tuple[str, float], list[int]] = {}
        for i, name in enumerate(self.components):
            kind, layer = _kind_and_layer(name)
            groups.setdefault(("attention" if kind == "head" else kind, layer), []).append(i)
        sums = torch.stack([self.values[:, rows].sum(1) for rows in groups.values()], 1)
        frame = pd.DataFrame(list(groups), columns=["kind", "layer"]).assign(**_means(sums, seed))
        return frame.assign(accumulated=frame["contribution"].cumsum())


def direct_attribution(
    model: Model, pairs: Sequence[TokenPair], direction: str = "answer", *, batch_size: int = 8, progress: bool = False
) -> DirectAttribution:
    """What every head, MLP, the embedding and the biases add to the answer's logit on the clean prompts.

    Args:
        direction: "answer": the answer's logit; "difference": its difference from the distractor's.

    Example:
        >>> direct = kc.direct_attribution(model, task.test, "difference")
        >>> direct.summary().nlargest(5, "contribution")

    Raises:
        MethodError: an unknown direction.
        ModelError: a model whose stream cannot be taken apart.
    """
    DirectOptions(direction=direction, batch_size=batch_size)
    decoder = model.residual
    rows = []
    with tqdm(total=len(pairs), desc="direct attribution", unit="fact", disable=not progress) as bar:
        for batch in batches(pairs, batch_size, device=decoder.device):
            run, answers = answer_run(decoder, batch), batch.answers[:, 0]
            against = batch.distractors if direction == "difference" else None
            biases = decoder.bias_before[-1].expand_as(run.final)
            values = [
                direct_contributions(decoder, run.outputs, run.scale, answers, against),
                direct_contributions(decoder, biases[None], run.scale, answers, against),
                constant_contribution(decoder, answers, against)[None],
            ]
            rows.append(torch.cat(values).T.float().cpu())
            bar.update(len(batch))
    components = [*decoder.graph().writers, *BIASES]
    provenance = {"model": model.name, "method": "direct_attribution", "direction": direction, "n_pairs": len(pairs)}
    return DirectAttribution(torch.cat(rows), components, provenance)


def promoted_tokens(
    model: Model,
    pairs: Sequence[TokenPair],
    components: Sequence[str] | None = None,
    *,
    k: int = 10,
    batch_size: int = 8,
) -> pd.DataFrame:
    """The k tokens whose logits each component raises most, and lowers most, directly and on average over the facts.

    Columns: component, end ("top" or "bottom"), place (from 1), token, id, value in logits. ``components`` are writers'
    names ("a8.h3", "m2", "input"); None takes all.

    Raises:
        MethodError: a component that is no writer of the model, or a k out of range.
    """
    decoder = model.residual
    writers = decoder.graph().writers if components is None else list(components)
    chosen = _rows_of(decoder, writers)
    if not 1 <= k <= decoder.W_U.shape[1]:
        raise MethodError(f"k is {k}; it must be between 1 and the vocabulary's {decoder.W_U.shape[1]}")
    total = torch.zeros(len(chosen), decoder.W_U.shape[0], device=decoder.device)
    for batch in batches(pairs, batch_size, device=decoder.device):
        run = answer_run(decoder, batch)
        # the readout is linear once the scale is in, so the facts' mean is taken before the vocabulary
        total += (run.outputs[chosen] * run.scale).sum(1)
    mean, one = total / len(pairs), torch.ones(1, 1, device=decoder.device)
    rows = []
    for writer, vector in zip(writers, mean, strict=True):
        logits = direct_logits(decoder, vector[None], one)[0].float()
        for end, sign in (("top", 1.0), ("bottom", -1.0)):
            values, ids = (sign * logits).topk(k)
            for place, (value, token) in enumerate(zip(values.tolist(), ids.tolist(), strict=True), start=1):
                rows.append((writer, end, place, str(model.tokenizer.decode([token])), token, sign * value))
    return pd.DataFrame(rows, columns=["component", "end", "place", "token", "id", "value"])


@torch.no_grad()
def largest_error(model: Model, pairs: Sequence[TokenPair], direct: DirectAttribution, *, batch_size: int = 8) -> float:
    """The largest distance between contributions summed over components and the model's own logits, before any soft cap."""
    cap, model_values = model.residual.logit_soft_cap, []
    for batch in batches(pairs, batch_size, device=model.device):
        rows, last = torch.arange(len(batch), device=model.device), batch.answer_positions[:, 0]
        logits = model.bridge(batch.clean)[rows, last].double()
        if cap is not None:
            logits = cap * torch.atanh(logits / cap)
        against = logits[rows, batch.distractors] if direct.provenance["direction"] == "difference" else 0.0
        model_values.append(logits[rows, batch.answers[:, 0]] - against)
    return float((torch.cat(model_values).cpu() - direct.totals).abs().max())


def strongest_components(direct: DirectAttribution, kind: str, n: int) -> list[str]:
    """Names of the n heads ("head") or MLPs ("mlp") whose mean direct contribution is largest in size."""
    effects = direct.summary().query("kind == @kind").set_index("component")["contribution"]
    names: list[str] = effects.abs().sort_values(ascending=False, kind="stable").index[:n].tolist()
    return names


def _means(values: Float[Tensor, "fact column"], seed: int) -> dict[str, np.ndarray]:
    """Mean contributions over facts, with their 95% bootstrap intervals, as columns of a table."""
    facts = values.double().numpy()
    low, high = interval(resampled_means(facts, seed))
    return {"contribution": facts.mean(0), "contribution_low": low, "contribution_high": high}


def _rows_of(decoder: Decoder, components: Sequence[str]) -> list[int]:
    index = decoder.graph().writer_index
    unknown = [name for name in components if name not in index]
    if unknown:
        raise MethodError(
            f"the model has no component {unknown[0]!r}: name heads "
            f"a0.h0 to a{decoder.n_layers - 1}.h{decoder.n_heads - 1}, MLPs m0 to m{decoder.n_layers - 1}, or input"
        )
    return [index[name] for name in components]


def _kind_and_layer(component: str) -> tuple[str, float]:
    """What a component is, by its name in the graph, and its layer; NaN for what has none."""
    if component in BIASES or component == "input":
        return "bias" if component in BIASES else "embedding", float("nan")
    return "head" if component.startswith("a") else "mlp", float(component.split(".")[0][1:])
