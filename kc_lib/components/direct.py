"""Direct logit attribution: how much every component adds to the answer's logit by itself, at the answer position.

A contribution is linear in the component's output, given the final norm's scale in the run (Elhage et al. 2021, "A
Mathematical Framework for Transformer Circuits"; Wang et al. 2023, arXiv:2211.00593, section 3). Contributions of all
writers, of the attention biases and of the constant (the final norm's bias and the unembedding's) sum to the logit, before a
soft cap where the model has one. What a component does through others is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from kc_lib.components.contributions import answer_run, constant_contribution, direct_contributions, direct_logits
from kc_lib.errors import MethodError
from kc_lib.models.model import Model
from kc_lib.residual.decoder import Decoder
from kc_lib.results import load_table, save_table
from kc_lib.stats import interval, resampled_means
from kc_lib.tasks.batches import TokenPair, batches

DIRECTIONS = ("answer", "difference")
BIASES = ("attention biases", "constant")  # the components that are no writers


@dataclass(frozen=True)
class DirectAttribution:
    """Contributions in logits: one row per fact, one column per component (writers, then ``BIASES``)."""

    values: Float[Tensor, "fact component"]
    components: list[str]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def totals(self) -> Float[Tensor, " fact"]:
        """The logit, or logit difference, of every fact."""
        return self.values.sum(1)

    def to_frame(self, seed: int = 0) -> pd.DataFrame:
        """Every component as a row: its mean contribution over facts, a 95% bootstrap interval, its share of the total."""
        values = self.values.double().numpy()
        low, high = interval(resampled_means(values, seed))
        mean = values.mean(0)
        return pd.DataFrame(
            {
                "component": self.components,
                "kind": [_kind(name) for name in self.components],
                "layer": [_layer(name) for name in self.components],
                "contribution": mean,
                "contribution_low": low,
                "contribution_high": high,
                "share": mean / mean.sum() if mean.sum() else np.full(len(mean), np.nan),
            }
        )

    def by_layer(self, seed: int = 0) -> pd.DataFrame:
        """Contributions of attention (all heads and its biases apart) and MLP per layer, and their running total."""
        groups: dict[tuple[str, float], list[int]] = {}
        for i, name in enumerate(self.components):
            groups.setdefault(("attention" if _kind(name) == "head" else _kind(name), _layer(name)), []).append(i)
        values = np.stack([self.values[:, own].sum(1).double().numpy() for own in groups.values()], 1)
        low, high = interval(resampled_means(values, seed))
        return pd.DataFrame(
            {
                "kind": [kind for kind, _ in groups],
                "layer": [layer for _, layer in groups],
                "contribution": values.mean(0),
                "contribution_low": low,
                "contribution_high": high,
                "accumulated": values.mean(0).cumsum(),
            }
        )

    def save(self, path: str | Path) -> Path:
        """Write one row per fact and one column per component as parquet, provenance in its metadata."""
        return save_table(pd.DataFrame(self.values.numpy(), columns=self.components), path, self.provenance)

    @classmethod
    def load(cls, path: str | Path) -> DirectAttribution:
        """Read what ``save`` wrote."""
        frame, provenance = load_table(path)
        return cls(torch.tensor(frame.to_numpy()), list(frame.columns), provenance)


def direct_attribution(
    model: Model,
    pairs: Sequence[TokenPair],
    direction: str = "answer",
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> DirectAttribution:
    """What every head, MLP, the embedding and the biases add to the answer's logit ("answer"), or to its difference from the
    distractor's ("difference"), on the clean prompts.

    Raises:
        MethodError: an unknown direction.
        ModelError: a model whose stream cannot be taken apart.
    """
    if direction not in DIRECTIONS:
        raise MethodError(f"unknown direction {direction!r}: use one of {', '.join(DIRECTIONS)}")
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
    writers = decoder.graph().writers
    chosen = _rows_of(decoder, components)
    if not 1 <= k <= decoder.W_U.shape[1]:
        raise MethodError(f"k is {k}; it must be between 1 and the vocabulary's {decoder.W_U.shape[1]}")
    total = torch.zeros(len(chosen), decoder.W_U.shape[0], device=decoder.device)
    for batch in batches(pairs, batch_size, device=decoder.device):
        run = answer_run(decoder, batch)
        # the readout is linear once the scale is in, so the facts' mean is taken before the vocabulary
        total += (run.outputs[chosen] * run.scale).sum(1)
    mean, one = total / len(pairs), torch.ones(1, 1, device=decoder.device)
    rows = []
    for row, vector in zip(chosen, mean, strict=True):
        logits = direct_logits(decoder, vector[None], one)[0].float()
        for end, sign in (("top", 1.0), ("bottom", -1.0)):
            values, ids = (sign * logits).topk(k)
            for place, (value, token) in enumerate(zip(values.tolist(), ids.tolist(), strict=True), start=1):
                text = str(model.tokenizer.decode([token]))
                rows.append((writers[row], end, place, text, token, sign * value))
    return pd.DataFrame(rows, columns=["component", "end", "place", "token", "id", "value"])


def _rows_of(decoder: Decoder, components: Sequence[str] | None) -> list[int]:
    index = decoder.graph().writer_index
    unknown = [name for name in components or () if name not in index]
    if unknown:
        raise MethodError(
            f"the model has no component {unknown[0]!r}: name heads "
            f"a0.h0 to a{decoder.n_layers - 1}.h{decoder.n_heads - 1}, MLPs m0 to m{decoder.n_layers - 1}, or input"
        )
    return list(range(len(index))) if components is None else [index[name] for name in components]


def _kind(component: str) -> str:
    if component in BIASES:
        return "bias"
    return "embedding" if component == "input" else "head" if component.startswith("a") else "mlp"


def _layer(component: str) -> float:
    return float(component.split(".")[0][1:]) if _kind(component) in ("head", "mlp") else float("nan")
