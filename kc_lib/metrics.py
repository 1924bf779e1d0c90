"""What is measured at the answer: one number per example, from the logits at the answer positions.

A metric is a function ``(logits, batch, reference) -> value per example``: logits ``[batch, answer, vocab]`` in float32,
the batch (answer and distractor ids, sets of right and wrong ones, which answer positions are real), and the full model's
logits at the same positions for metrics that compare with it (``needs_reference``). Values over several answer tokens
(teacher forcing) are means over the answer's tokens. Any callable of that signature serves: wrap it in ``Metric``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kc_lib.errors import MethodError, checked
from kc_lib.tasks.batches import Batch

MetricFunction = Callable[[Tensor, Batch, Tensor | None], Tensor]


@dataclass(frozen=True)
class Metric:
    """A metric with its name, unit, and which direction is better.

    ``answers_only`` says that it reads the logits of answers and distractors alone, so the others need not be computed.
    ``target`` says that its loss is a cross-entropy: the mean over answer tokens of that between the distribution that this
    function gives, ``(batch, reference) -> [batch, answer, vocab]``, and the logits', up to what the logits do not change.
    """

    name: str
    unit: str
    function: MetricFunction
    higher_is_better: bool = True
    needs_reference: bool = False
    answers_only: bool = False
    target: Callable[[Batch, Tensor], Tensor] | None = None

    def __call__(
        self,
        logits: Float[Tensor, "batch answer vocab"],
        batch: Batch,
        reference: Float[Tensor, "batch answer all_tokens"] | None = None,
    ) -> Float[Tensor, " batch"]:
        if self.needs_reference and reference is None:
            raise MethodError(f"metric {self.name!r} compares with the full model: give its logits as reference")
        return self.function(logits, batch, reference)

    def loss(self, logits: Tensor, batch: Batch, reference: Tensor | None = None) -> Float[Tensor, " batch"]:
        """The metric signed so that lower is better."""
        value = self(logits, batch, reference)
        return -value if self.higher_is_better else value


def _per_answer_token(logits: Tensor, batch: Batch) -> Float[Tensor, "batch answer"]:
    """Log-probability of each answer token."""
    return logits.log_softmax(-1).gather(-1, batch.answers[..., None])[..., 0]


def _mean(per_token: Float[Tensor, "batch answer"], batch: Batch) -> Float[Tensor, " batch"]:
    real = batch.answer_mask.to(per_token.dtype)
    return (per_token * real).sum(-1) / real.sum(-1)


def _logit_difference(logits: Tensor, batch: Batch, reference: Tensor | None) -> Tensor:
    first = logits[:, 0]
    answer = first.gather(-1, batch.answers[:, :1])
    distractor = first.gather(-1, batch.distractors[:, None])
    return (answer - distractor)[:, 0]


def _log_probability(logits: Tensor, batch: Batch, reference: Tensor | None) -> Tensor:
    return _mean(_per_answer_token(logits, batch), batch)


def _probability(logits: Tensor, batch: Batch, reference: Tensor | None) -> Tensor:
    return _mean(_per_answer_token(logits, batch).exp(), batch)


def _probability_difference(logits: Tensor, batch: Batch, reference: Tensor | None) -> Tensor:
    first = logits[:, 0].softmax(-1)
    return _total(first, batch.right) - _total(first, batch.wrong)


def _total(values: Float[Tensor, "batch vocab"], tokens: Int[Tensor, "batch some"]) -> Float[Tensor, " batch"]:
    """Sum of the values of each row's tokens, of which -1 is none."""
    return values.gather(-1, tokens.clamp(min=0)).where(tokens >= 0, 0.0).sum(-1)


def _kl(logits: Tensor, batch: Batch, reference: Tensor | None) -> Tensor:
    full = torch.as_tensor(reference).log_softmax(-1)
    return _mean((full.exp() * (full - logits.log_softmax(-1))).sum(-1), batch)


def _match_nll(logits: Tensor, batch: Batch, reference: Tensor | None) -> Tensor:
    full = _log_probability(torch.as_tensor(reference), batch, None)
    return full - _log_probability(logits, batch, None)


def _is_answer(batch: Batch, reference: Tensor) -> Tensor:
    """All probability at the answer token."""
    return torch.zeros_like(reference).scatter_(-1, batch.answers[..., None], 1.0)


def _full_model(batch: Batch, reference: Tensor) -> Tensor:
    return reference.softmax(-1)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        # logit of the answer's first token minus the distractor's (Wang et al. 2023, section 2)
        Metric("logit_difference", "logits", _logit_difference, answers_only=True),
        Metric("log_probability", "nats", _log_probability, target=_is_answer),
        Metric("probability", "probability", _probability),
        # p of all right tokens minus p of all wrong ones (Hanna et al. 2023, section 2)
        Metric("probability_difference", "probability", _probability_difference),
        # KL(full model || circuit) over the vocabulary (Conmy et al. 2023, section 3)
        Metric("kl", "nats", _kl, higher_is_better=False, needs_reference=True, target=_full_model),
        # negative log-likelihood minus the full model's (Knowledge Circuits, Yao et al. 2024, section 3.1)
        Metric("match_nll", "nats", _match_nll, higher_is_better=False, needs_reference=True, target=_is_answer),
    )
}


def get_metric(metric: str | Metric) -> Metric:
    """A metric by name, or the given one.

    Raises:
        MethodError: the name is none of ``METRICS``.
    """
    if isinstance(metric, Metric):
        return metric
    if metric not in METRICS:
        raise MethodError(f"unknown metric {metric!r}: use one of {', '.join(METRICS)}")
    return METRICS[metric]


@checked
def answer_rank(logits: Float[Tensor, "batch answer vocab"], batch: Batch) -> Int[Tensor, " batch"]:
    """Rank of the answer's first token among all tokens, 1 for the most probable (ties count against it)."""
    first = logits[:, 0]
    answer = first.gather(-1, batch.answers[:, :1])
    return (first >= answer).sum(-1)


@checked
def right_rank(logits: Float[Tensor, "batch answer vocab"], batch: Batch) -> Int[Tensor, " batch"]:
    """Rank of the best right token among all that are not right, 1 for the most probable (ties count against it)."""
    best, others = _best_and_others(logits[:, 0], batch.right)
    return 1 + (others >= best[:, None]).sum(-1)


@checked
def is_right(logits: Float[Tensor, "batch answer vocab"], batch: Batch) -> Bool[Tensor, " batch"]:
    """Whether the best of the right and wrong tokens is a right one (a tie is not)."""
    best, _ = _best_and_others(logits[:, 0], batch.right)
    best_wrong, _ = _best_and_others(logits[:, 0], batch.wrong)
    return best > best_wrong


def _best_and_others(
    logits: Float[Tensor, "batch vocab"], tokens: Int[Tensor, "batch some"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch vocab"]]:
    """The highest logit among each row's tokens, of which -1 is none, and the logits with these tokens at -inf."""
    places = tokens.where(tokens >= 0, tokens[:, :1])  # the first is always a token
    return logits.gather(-1, places).amax(-1), logits.scatter(-1, places, -torch.inf)
