"""All general head scores of a model at once: one table, one folder, and why a score is not defined where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kc_lib.errors import KnowledgeCircuitsError, MethodError
from kc_lib.heads.copying import copy_scores
from kc_lib.heads.head_scores import HeadScores
from kc_lib.heads.inhibition import s_inhibition_scores
from kc_lib.heads.repeats import repeat_scores
from kc_lib.heads.successor import successor_scores
from kc_lib.heads.suppression import copy_suppression_scores
from kc_lib.models.model import Model

REPEATS = ("previous_token", "duplicate_token", "induction")
COPIES = ("name_mover", "negative_name_mover")
SCORES = (*REPEATS, *COPIES, "copy_suppression", "s_inhibition", "successor")


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
            found.to_frame().assign(name=name, threshold=found.threshold, null=found.null)[columns]
            for name, found in self.scores.items()
        ]
        return pd.concat(frames, ignore_index=True).astype({"null": float}) if frames else pd.DataFrame(columns=columns)

    def passing(self) -> pd.DataFrame:
        """The rows of ``to_frame`` that pass, highest score first within each name."""
        frame = self.to_frame()
        kept = frame[frame["passes"].astype(bool)].drop(columns="passes")
        order = {name: i for i, name in enumerate(self.scores)}
        kept = kept.sort_values("score", ascending=False).sort_values(
            "name", key=lambda names: names.map(order), kind="stable"
        )
        return kept.reset_index(drop=True)

    def save(self, folder: str | Path) -> Path:
        """Write every score to ``<name>.parquet`` in the folder, and the undefined ones to ``undefined.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, found in self.scores.items():
            found.save(folder / f"{name}.parquet")
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
        found = {
            name: HeadScores.load(folder / f"{name}.parquet") for name in SCORES if (folder / f"{name}.parquet").exists()
        }
        return cls(found, json.loads((folder / "undefined.json").read_text()))


def general_head_scores(
    model: Model,
    which: Sequence[str] | None = None,
    *,
    text: str | Path | None = None,
    seed: int = 0,
    keep_undefined: bool | None = None,
) -> GeneralHeadScores:
    """The general head scores of a model, with every score's own defaults.

    Args:
        which: some of ``SCORES``; None computes all of them.
        text: natural text, or a file of it, for copy suppression; None takes the project's.
        keep_undefined: keep the reason of a score that the model has no definition for, instead of raising; None does so
            where no scores are named. Over a training it is True: what is undefined early may be defined later.

    Raises:
        MethodError: an unknown score.
        KnowledgeCircuitsError: a score that is not defined for the model, and whose reason is not to be kept.
    """
    keep = which is None if keep_undefined is None else keep_undefined
    check_scores(which)
    wanted = SCORES if which is None else tuple(which)
    if not wanted:
        raise MethodError(f"no head score is asked for: name some of {', '.join(SCORES)}, or None for all")
    _ = model.residual  # a model that is no decoder has none of the scores
    found: dict[str, HeadScores] = {}
    undefined: dict[str, str] = {}

    def attempt(names: Sequence[str], compute: Callable[[], Mapping[str, HeadScores]]) -> None:
        asked = [name for name in names if name in wanted]
        if not asked:
            return
        try:
            found.update({name: scores for name, scores in compute().items() if name in asked})
        except KnowledgeCircuitsError as error:
            if not keep:
                raise
            undefined.update(dict.fromkeys(asked, str(error)))

    attempt(REPEATS, lambda: repeat_scores(model, seed=seed))
    attempt(COPIES, lambda: copy_scores(model, seed=seed))
    attempt(["copy_suppression"], lambda: {"copy_suppression": copy_suppression_scores(model, text, seed=seed)})
    copies = found.get("name_mover")
    attempt(["s_inhibition"], lambda: {"s_inhibition": s_inhibition_scores(model, copies=copies, seed=seed)})
    attempt(["successor"], lambda: {"successor": successor_scores(model, seed=seed)})
    return GeneralHeadScores({name: found[name] for name in SCORES if name in found}, undefined)


def check_scores(which: Sequence[str] | None) -> None:
    """Refuse what ``general_head_scores`` would refuse, before a model is loaded.

    Raises:
        MethodError: an unknown score.
    """
    unknown = [name for name in which or () if name not in SCORES]
    if unknown:
        raise MethodError(f"unknown head score {unknown[0]!r}: use some of {', '.join(SCORES)}")
