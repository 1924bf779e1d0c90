"""How well a model does a task, without any circuit: what every prompt gives, and means with intervals over prompts.

Of a pair with sets of right and wrong tokens (``TokenPair``) every measure but the logit difference is of the sets. A rank
is that of the best right token among all tokens that are not right. Ties count against the model throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from kc_lib.errors import MethodError
from kc_lib.metrics import METRICS, is_right, right_rank
from kc_lib.models.model import Model
from kc_lib.residual.logits import full_logits
from kc_lib.results import Result
from kc_lib.stats import resampled_means, with_interval
from kc_lib.tasks.batches import TokenPair, batches
from kc_lib.training.drawn import DrawnTasks
from kc_lib.training.result import measured_row, measured_rows

BEHAVIOURS = {
    "logit_difference": "logits",  # of answer and distractor
    "probability_difference": "probability",  # p(right) - p(wrong)
    "accuracy": "share of prompts",  # the first of right and wrong tokens is right
    "rank_0_rate": "share of prompts",  # the first of all tokens is right
    "mrr": "mean reciprocal rank",  # 1 / rank
}


@dataclass(frozen=True)
class Behaviour(Result):
    """One row per prompt, one column per measure (``BEHAVIOURS``, with their units)."""

    columns = ("prompt", *BEHAVIOURS)
    prompts: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def summary(self, seed: int = 0) -> pd.DataFrame:
        """One row per measure: its unit, number of prompts, and mean with a 95% bootstrap interval over prompts."""
        values = self.prompts[list(BEHAVIOURS)].to_numpy(dtype=float)
        means, draws = values.mean(0), resampled_means(values, seed)
        return pd.DataFrame(
            [
                {"measure": name, "unit": unit, "n": len(values)} | with_interval("value", means[i], draws[:, i])
                for i, (name, unit) in enumerate(BEHAVIOURS.items())
            ]
        )


@torch.no_grad()
def behaviour(model: Model, pairs: Sequence[TokenPair], *, batch_size: int = 16) -> Behaviour:
    """Every measure on the clean prompt of every pair; of answers of several tokens, on the first.

    Raises:
        MethodError: no pairs, or logits that are no finite numbers (they have no ranks).
        ModelError: a model that is no decoder.
    """
    if not pairs:
        raise MethodError("there are no prompts to measure a behaviour on: give the pairs of a split")
    decoder, parts = model.residual, []
    for batch in batches(pairs, batch_size, device=decoder.device):
        logits = full_logits(decoder, batch)
        if not logits.isfinite().all():
            raise MethodError("the model's logits are no finite numbers: use dtype float32, or another checkpoint")
        rank = right_rank(logits, batch)
        measured = {
            "logit_difference": METRICS["logit_difference"](logits, batch),
            "probability_difference": METRICS["probability_difference"](logits, batch),
            "accuracy": is_right(logits, batch),
            "rank": rank,
            "rank_0_rate": rank == 1,
            "mrr": 1 / rank.double(),
        }
        parts.append(pd.DataFrame({name: values.cpu().numpy() for name, values in measured.items()}))
    prompts = pd.concat(parts, ignore_index=True)
    prompts.insert(0, "prompt", [pair.text.get("clean", "") for pair in pairs])
    return Behaviour(prompts, {"model": model.name, "n_prompts": len(pairs)})


def behaviour_rows(model: Model, tasks: DrawnTasks) -> pd.DataFrame:
    """Every behaviour on all prompts of every draw, with its interval over prompts; quantities are ``BEHAVIOURS``."""
    rows = []
    for draw in tasks.draws:
        summary = behaviour(model, [*draw.task.discovery, *draw.task.test], batch_size=64).summary(draw.seed)
        for row in summary.to_dict("records"):
            rows.append(measured_row(draw, row["measure"], row["value"], row["value_low"], row["value_high"]))
    return measured_rows(rows)
