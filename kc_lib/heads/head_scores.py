"""What head scores return: one number per head, what counts as high, and what chance gives; and all scores of a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kc_lib.components.attention import Head, head_table
from kc_lib.errors import MethodError
from kc_lib.heads.options import SCORES
from kc_lib.models.model import Model
from kc_lib.results import Result

NULL_LEVEL = 0.99
SHUFFLES = 200


@dataclass(frozen=True)
class HeadScores(Result):
    """One score per attention head.

    Attributes:
        passes: the heads that count: above ``threshold`` and above ``null``, and what else the score asks for.
        threshold: the criterion the score was published with, or ours; ``provenance["criterion"]`` says which.
        null: what chance reaches in 1 of 100 cases; ``provenance["null"]`` says what was left to chance.
        detail: further figures per head, by name.
    """

    columns = ("layer", "head", "score", "passes")

    name: str
    scores: Float[Tensor, "layer head"]
    passes: Bool[Tensor, "layer head"]
    threshold: float
    null: float | None = None
    detail: Mapping[str, Float[Tensor, "layer head"]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        scores: Float[Tensor, "layer head"],
        threshold: float,
        null: float | None = None,
        *,
        also: Bool[Tensor, "layer #head"] | None = None,
        detail: Mapping[str, Tensor] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Self:
        """Scores and the heads that pass: above threshold and null and, where given, ``also``.

        Raises:
            MethodError: a score is no finite number, as an overflow in a half-precision model leaves it.
        """
        scores = scores.detach().float().cpu()
        if not scores.isfinite().all():
            layer, head = (~scores.isfinite()).nonzero()[0].tolist()
            raise MethodError(f"the {name} score of a{layer}.h{head} is no number: load the model in float32")
        passes = scores > max(threshold, -torch.inf if null is None else null)
        if also is not None:
            passes &= also.cpu()
        plain = {key: values.detach().float().cpu() for key, values in (detail or {}).items()}
        return cls(name, scores, passes, threshold, null, plain, provenance or {})

    def heads(self) -> list[Head]:
        """The heads that pass as (layer, head), highest score first."""
        order = self.scores.masked_fill(~self.passes, -torch.inf).flatten().argsort(descending=True, stable=True)
        n_heads = self.scores.shape[1]
        return [(int(i) // n_heads, int(i) % n_heads) for i in order[: int(self.passes.sum())]]

    def summary(self, n: int = 6) -> pd.DataFrame:
        """The first heads that pass, highest score first."""
        frame = self.to_frame()
        return frame[frame["passes"]].nlargest(n, "score").round(3)

    def to_frame(self) -> pd.DataFrame:
        """Every head as a row: layer, head, score, passes, and the details."""
        detail = {name: values.flatten().double().numpy() for name, values in self.detail.items()}
        scores, passes = self.scores.flatten().double().numpy(), self.passes.flatten().numpy()
        return pd.concat(
            [head_table(*self.scores.shape), pd.DataFrame({"score": scores, "passes": passes, **detail})], axis=1
        )

    def about(self) -> dict[str, Any]:
        names = {"name": self.name, "shape": list(self.scores.shape), "detail": list(self.detail)}
        return names | {"threshold": self.threshold, "null": self.null, "provenance": dict(self.provenance)}

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, about: Mapping[str, Any]) -> Self:
        def column(name: str) -> Tensor:
            return torch.tensor(frame[name].to_numpy()).reshape(about["shape"])

        detail = {name: column(name).float() for name in about["detail"]}
        scores, passes = column("score").float(), column("passes")
        return cls(about["name"], scores, passes, about["threshold"], about["null"], detail, about["provenance"])


@dataclass(frozen=True)
class GeneralHeadScores:
    """Head scores by name, and for every score that is not defined for the model, why."""

    scores: Mapping[str, HeadScores]
    undefined: Mapping[str, str]

    def __getitem__(self, name: str) -> HeadScores:
        return self.scores[name]

    def to_frame(self) -> pd.DataFrame:
        """One row per score and head: name, layer, head, score, passes, threshold, null (NaN where there is none)."""
        columns = ["name", "layer", "head", "score", "passes", "threshold", "null"]
        frames = [
            scores.to_frame().assign(name=name, threshold=scores.threshold, null=scores.null)[columns]
            for name, scores in self.scores.items()
        ]
        return pd.concat(frames, ignore_index=True).astype({"null": float}) if frames else pd.DataFrame(columns=columns)

    def passing(self) -> pd.DataFrame:
        """The rows of ``to_frame`` that pass, highest score first within each name."""
        frame = self.to_frame()
        passing = frame[frame["passes"].astype(bool)].drop(columns="passes")
        place = {name: i for i, name in enumerate(self.scores)}
        return passing.sort_values("score", ascending=False).sort_values(
            "name", key=lambda names: names.map(place), kind="stable", ignore_index=True
        )

    def summary(self, n: int = 6) -> pd.DataFrame:
        """The first heads that pass each score."""
        first = self.passing().groupby("name", sort=False).head(n)
        return first.round(3).rename(columns={"null": "random baseline"})

    def save(self, folder: str | Path) -> Path:
        """Write every score to ``<name>.parquet`` in the folder, and the undefined ones to ``undefined.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, scores in self.scores.items():
            scores.save(folder / f"{name}.parquet")
        (folder / "undefined.json").write_text(json.dumps(dict(self.undefined), indent=1))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> GeneralHeadScores:
        """Read what ``save`` wrote.

        Raises:
            MethodError: a folder that holds no head scores.
        """
        folder = Path(folder)
        if not (folder / "undefined.json").exists():
            raise MethodError(f"{folder} holds no head scores: give a folder that GeneralHeadScores.save wrote")
        paths = {name: folder / f"{name}.parquet" for name in SCORES}
        scores = {name: HeadScores.load(path) for name, path in paths.items() if path.exists()}
        return cls(scores, json.loads((folder / "undefined.json").read_text()))


def described(model: Model, seed: int, criterion: str, null: str, **figures: Any) -> dict[str, Any]:
    """A score's provenance: the model, the seed, what counts as high, what was left to chance, and further figures."""
    return {"model": model.name, "seed": seed, "criterion": criterion, "null": null, **figures}


def best_by_chance(shuffled: Callable[[torch.Generator], Tensor], seed: int) -> float:
    """The 99th percentile, over shuffles, of the best head's score ``[layer, head]``; 0 where none is defined."""
    generator = torch.Generator().manual_seed(seed)
    best = torch.stack([shuffled(generator).max() for _ in range(SHUFFLES)])
    return float(best[best.isfinite()].quantile(NULL_LEVEL)) if best.isfinite().any() else 0.0
