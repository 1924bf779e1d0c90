"""What a head score returns: one number per head, what counts as high, and what chance gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kc_lib.errors import MethodError
from kc_lib.models.model import Model
from kc_lib.results import load_table, save_table

NULL_LEVEL = 0.99


@dataclass(frozen=True)
class HeadScores:
    """One score per attention head.

    Attributes:
        passes: the heads that count: above ``threshold`` and above ``null``, and what else the score asks for.
        threshold: the criterion the score was published with, or ours; ``provenance["criterion"]`` says which.
        null: what chance reaches in 1 of 100 cases; ``provenance["null"]`` says what was left to chance.
        detail: further figures per head, by name.
    """

    name: str
    scores: Float[Tensor, "layer head"]
    passes: Bool[Tensor, "layer head"]
    threshold: float
    null: float | None = None
    detail: Mapping[str, Float[Tensor, "layer head"]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def heads(self) -> list[tuple[int, int]]:
        """The heads that pass as (layer, head), highest score first."""
        order = self.scores.masked_fill(~self.passes, -torch.inf).flatten().argsort(descending=True, stable=True)
        n_heads = self.scores.shape[1]
        return [(int(i) // n_heads, int(i) % n_heads) for i in order[: int(self.passes.sum())]]

    def to_frame(self) -> pd.DataFrame:
        """Every head as a row: layer, head, score, passes, and the details."""
        n_layers, n_heads = self.scores.shape
        return pd.DataFrame(
            {
                "layer": torch.arange(n_layers).repeat_interleave(n_heads).numpy(),
                "head": torch.arange(n_heads).repeat(n_layers).numpy(),
                "score": self.scores.flatten().double().numpy(),
                "passes": self.passes.flatten().numpy(),
                **{name: values.flatten().double().numpy() for name, values in self.detail.items()},
            }
        )

    def save(self, path: str | Path) -> Path:
        """Write ``to_frame`` as parquet; everything that is not per head goes into the file's metadata."""
        about = {
            "name": self.name,
            "shape": list(self.scores.shape),
            "threshold": self.threshold,
            "null": self.null,
            "detail": list(self.detail),
            "provenance": dict(self.provenance),
        }
        return save_table(self.to_frame(), path, about)

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Read what ``save`` wrote.

        Raises:
            MethodError: a file that holds no head scores.
        """
        frame, about = load_table(path)
        if not {"name", "shape", "detail"} <= set(about):
            raise MethodError(f"{path} holds no head scores: give a file that HeadScores.save wrote")

        def column(name: str) -> Tensor:
            return torch.tensor(frame[name].to_numpy()).reshape(about["shape"])

        detail = {name: column(name).float() for name in about["detail"]}
        scores, passes = column("score").float(), column("passes")
        return cls(about["name"], scores, passes, about["threshold"], about["null"], detail, about["provenance"])


def head_scores(
    name: str,
    scores: Float[Tensor, "layer head"],
    threshold: float,
    null: float | None = None,
    also: Bool[Tensor, "layer #head"] | None = None,
    detail: Mapping[str, Tensor] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> HeadScores:
    """Scores and the heads that pass: above threshold and null and, where given, ``also``.

    Raises:
        MethodError: scores that are not numbers, as an overflow in a half-precision model leaves them.
    """
    scores = scores.detach().float().cpu()
    if not scores.isfinite().all():
        layer, head = (~scores.isfinite()).nonzero()[0].tolist()
        raise MethodError(f"the {name} score of a{layer}.h{head} is no number: load the model in float32")
    passes = scores > max(threshold, -torch.inf if null is None else null)
    if also is not None:
        passes &= also.cpu()
    plain = {key: values.detach().float().cpu() for key, values in (detail or {}).items()}
    return HeadScores(name, scores, passes, threshold, null, plain, provenance or {})


def provenance_of(model: Model, **others: Any) -> dict[str, Any]:
    """The model's name, and what else determined the scores."""
    return {"model": model.name, **others}
