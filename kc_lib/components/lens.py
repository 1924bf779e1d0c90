"""Layer lens: where along the model the answer becomes readable (Yao et al. 2024, arXiv:2405.17969, section 4).

The stream at every point is read through the final norm and the unembedding, as if the model stopped there (logit lens,
nostalgebraist 2020). Two readings differ, and the result says which it is: norm="own" normalises each stream by itself, as
TransformerLens's ``logit_readout`` does, which computes it here; norm="final" uses the final stream's scale at every point,
so that readings are on one scale and differences between points are direct contributions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformer_lens.tools.analysis.logit_lens import logit_readout

from kc_lib.components.contributions import residual_streams
from kc_lib.errors import MethodError
from kc_lib.models.model import Model
from kc_lib.results import load_table, save_table
from kc_lib.stats import interval, resampled_means
from kc_lib.tasks.batches import TokenPair, batches

NORMS = ("own", "final")
MEASURES = ("answer_rank", "answer_probability", "answer_rank_at_subject", "subject_probability")


@dataclass(frozen=True)
class LayerLens:
    """One row per fact and point of the stream; ranks start at 1, probabilities are shares of 1.

    Columns: fact, subject, answer, point (TransformerLens's hook name), layer, and the measures: ``answer_rank`` and
    ``answer_probability`` at the last position, ``answer_rank_at_subject`` the best rank of the answer over the subject's
    tokens, ``subject_probability`` that of the subject's last token at the last position (NaN where no subject is named).
    """

    facts: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def summary(self, seed: int = 0) -> pd.DataFrame:
        """Median rank and mean probability at every point, with 95% bootstrap intervals over facts (of the mean)."""
        rows = []
        points = self.facts.groupby("point", sort=False)
        for point, of_point in points:
            row: dict[str, Any] = {"point": point, "layer": float(of_point["layer"].iloc[0]), "n": len(of_point)}
            for measure in MEASURES:
                values = of_point[measure].dropna().to_numpy(dtype=float)
                if not len(values):
                    continue
                low, high = interval(resampled_means(values[:, None], seed))
                row |= {measure: values.mean(), f"{measure}_low": low[0], f"{measure}_high": high[0]}
                row[f"{measure}_median"] = float(pd.Series(values).median())
            rows.append(row)
        return pd.DataFrame(rows)

    def to_frame(self) -> pd.DataFrame:
        return self.facts

    def save(self, path: str | Path) -> Path:
        """Write the rows as parquet, provenance in its metadata."""
        return save_table(self.facts, path, self.provenance)

    @classmethod
    def load(cls, path: str | Path) -> LayerLens:
        """Read what ``save`` wrote."""
        return cls(*load_table(path))


def layer_lens(
    model: Model,
    pairs: Sequence[TokenPair],
    norm: str = "own",
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> LayerLens:
    """Read the clean prompts' answer at every point of the stream, at the last position and over the subject.

    Raises:
        MethodError: an unknown norm.
        ModelError: a model whose stream cannot be taken apart.
    """
    if norm not in NORMS:
        raise MethodError(f"unknown norm {norm!r}: use 'own' (each stream's own scale) or 'final' (the final stream's)")
    decoder = model.residual
    final_norm = decoder.final_norm

    def read(streams: torch.Tensor, scale: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if norm == "final":
            streams = final_norm.weighted(final_norm.centre(streams) * scale)
            streams = streams if final_norm.bias is None else streams + final_norm.bias
        readout = logit_readout(model, streams, apply_ln=norm == "own", targets=tokens, return_type="probs")
        return torch.as_tensor(readout.target_ranks)[..., 0] + 1, readout.values[..., 0]

    frames = []
    with tqdm(total=len(pairs), desc="layer lens", unit="fact", disable=not progress) as bar:
        for start in range(0, len(pairs), batch_size):
            some = pairs[start : start + batch_size]
            (batch,) = batches(some, len(some), device=decoder.device)
            points, streams = residual_streams(decoder, batch.clean)
            for i, pair in enumerate(some):
                n_points, last = len(points), len(pair.clean) - 1
                subject = list(pair.positions.get("subject", ()))
                scale = final_norm.scale(streams[-1, i])
                answer = batch.answers[i, :1]
                rank, probability = read(streams[:, i, last], scale[last], answer)
                row = {
                    "fact": start + i,
                    "subject": pair.text.get("subject", ""),
                    "answer": pair.text.get("answer", ""),
                    "point": points,
                    "layer": [_layer_of(point) for point in points],
                    "answer_rank": rank.tolist(),
                    "answer_probability": probability.tolist(),
                    "answer_rank_at_subject": [float("nan")] * n_points,
                    "subject_probability": [float("nan")] * n_points,
                }
                if subject:
                    over, _ = read(streams[:, i, subject], scale[subject], answer)
                    row["answer_rank_at_subject"] = over.amin(1).double().tolist()
                    _, of_subject = read(streams[:, i, last], scale[last], batch.clean[i, subject[-1:]])
                    row["subject_probability"] = of_subject.tolist()
                frames.append(pd.DataFrame(row))
                bar.update()
    provenance = {"model": model.name, "method": "layer_lens", "norm": norm, "n_pairs": len(pairs)}
    return LayerLens(pd.concat(frames, ignore_index=True), provenance)


def _layer_of(point: str) -> float:
    """Blocks passed at a point of the stream: 0 before the first, n + 0.5 between attention and MLP of block n."""
    _, layer, hook = point.split(".")
    return int(layer) + {"hook_resid_pre": 0.0, "hook_resid_mid": 0.5, "hook_resid_post": 1.0}[hook]
