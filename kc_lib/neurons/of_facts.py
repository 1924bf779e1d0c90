"""What results about the neurons of facts have in common: a table, the facts it speaks of, and one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import pandas as pd

from kc_lib.errors import MethodError
from kc_lib.results import load_table, save_table


@dataclass(frozen=True)
class OfFacts:
    """Rows about facts by their number, and the facts; what the rows are, a subclass says."""

    columns: ClassVar[tuple[str, ...]]
    holds: ClassVar[str]  # for the error of ``load``: what a file holds, and the name it has in a run

    frame: pd.DataFrame
    facts: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """``frame`` with relation, subject and answer of every fact."""
        return self.frame.merge(self.facts[["fact", "relation", "subject", "answer"]], on="fact")

    def save(self, path: str | Path) -> Path:
        """Write ``frame`` as parquet; the rest goes into the file's metadata."""
        return save_table(self.frame, path, {"facts": self.facts.to_dict("list"), "provenance": dict(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            MethodError: the file is not there, or holds something else.
        """
        frame, about = load_table(path)
        if not {"facts", "provenance"} <= about.keys() or not set(cls.columns) <= set(frame):
            raise MethodError(f"{path}: holds no {cls.holds} of a run")
        return cls(frame, pd.DataFrame(about["facts"]), about["provenance"])
