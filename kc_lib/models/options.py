"""How a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from kc_lib.errors import ModelError
from kc_lib.options import Options, option

DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelOptions(Options):
    """Keywords of ``load_model``."""

    error = ModelError

    revision: str | None = option(None, "hub revision (branch, tag or commit)")
    checkpoint: int | None = option(None, "training step, for nano and families with checkpoints", least=0)
    device: str | None = option(None, "none: CUDA where there is one", determines=False)
    dtype: str = option("float32", "of the weights; scores are float32 whatever the weights are", among=DTYPES)
