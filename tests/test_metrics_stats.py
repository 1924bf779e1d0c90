"""Metrics and statistics against what a few lines of numpy give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kc_lib.errors import MethodError
from kc_lib.metrics import METRICS, Metric, answer_rank, get_metric
from kc_lib.stats import bootstrap_ratio, empirical_p
from kc_lib.tasks import Batch, TokenPair, make_batch

VOCAB = 12
PAIRS = [
    TokenPair((1, 3, 4), (1, 5, 4), (6, 7, 8), 9, {}, {}),
    TokenPair((1, 3, 4, 5), (1, 3, 6, 5), (10,), 11, {}, {}),
    TokenPair((1, 3), (1, 4), (4, 3), 5, {}, {}),
]


def drawn(batch: Batch, seed: int) -> torch.Tensor:
    return 3 * torch.randn(*batch.answers.shape, VOCAB, generator=torch.Generator().manual_seed(seed))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(float) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_a_full_answer_is_read_where_each_token_is_predicted() -> None:
    batch = make_batch(PAIRS, full_answer=True)
    assert batch.clean.tolist() == [[1, 3, 4, 6, 7], [1, 3, 4, 5, 0], [1, 3, 4, 0, 0]]
    assert batch.corrupted.tolist() == [[1, 5, 4, 6, 7], [1, 3, 6, 5, 0], [1, 4, 4, 0, 0]]
    assert batch.lengths.tolist() == [5, 4, 3]
    assert batch.answers[batch.answer_mask].tolist() == [6, 7, 8, 10, 4, 3]
    assert batch.answer_mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert batch.answer_positions[batch.answer_mask].tolist() == [2, 3, 4, 3, 1, 2]
    first = make_batch(PAIRS)
    assert first.clean.tolist() == [[1, 3, 4, 0], [1, 3, 4, 5], [1, 3, 0, 0]]
    assert first.answers.tolist() == [[6], [10], [4]]
    assert first.answer_positions.tolist() == [[2], [3], [1]]


@pytest.mark.parametrize("full_answer", [False, True])
def test_metrics_by_hand(full_answer: bool) -> None:
    batch = make_batch(PAIRS, full_answer)
    logits, reference = drawn(batch, 0), drawn(batch, 1)
    ours, full = softmax(logits.numpy()), softmax(reference.numpy())
    for i, pair in enumerate(PAIRS):
        answer = pair.answer if full_answer else pair.answer[:1]
        mine = np.array([ours[i, j, token] for j, token in enumerate(answer)])
        theirs = np.array([full[i, j, token] for j, token in enumerate(answer)])
        kl = np.mean([np.sum(full[i, j] * np.log(full[i, j] / ours[i, j])) for j in range(len(answer))])
        expected = {
            "logit_difference": float(logits[i, 0, pair.answer[0]] - logits[i, 0, pair.distractor]),
            "log_probability": np.log(mine).mean(),
            "probability": mine.mean(),
            "kl": kl,
            "match_nll": -np.log(mine).mean() + np.log(theirs).mean(),
        }
        assert set(expected) == set(METRICS)
        for name, value in expected.items():
            metric = METRICS[name]
            assert metric(logits, batch, reference)[i].item() == pytest.approx(value, rel=1e-4, abs=1e-5), name
            sign = -1 if name in ("logit_difference", "log_probability", "probability") else 1
            assert metric.loss(logits, batch, reference)[i].item() == pytest.approx(sign * value, rel=1e-4, abs=1e-5)


def test_what_lies_behind_an_answer_does_not_count() -> None:
    batch = make_batch(PAIRS, full_answer=True)
    logits, reference = drawn(batch, 0), drawn(batch, 1)
    other = torch.where(batch.answer_mask[..., None], logits, drawn(batch, 2))
    for metric in METRICS.values():
        assert torch.equal(metric(logits, batch, reference), metric(other, batch, reference))


def test_the_model_compared_with_itself() -> None:
    batch = make_batch(PAIRS, full_answer=True)
    logits = drawn(batch, 0)
    for name in ("kl", "match_nll"):
        assert METRICS[name](logits, batch, logits).abs().max() <= 1e-6
        assert METRICS[name].needs_reference
        with pytest.raises(MethodError, match="reference"):
            METRICS[name](logits, batch)
    assert (METRICS["kl"](logits, batch, drawn(batch, 1)) > 0).all()


def test_ranks_count_from_one_and_ties_count_against_the_answer() -> None:
    batch = make_batch(PAIRS, full_answer=True)
    logits = torch.zeros(*batch.answers.shape, VOCAB)
    assert answer_rank(logits, batch).tolist() == [VOCAB] * 3
    logits[0, 0, 6] = 1.0
    logits[1, 0, [2, 3]] = 1.0
    logits[1, 0, 10] = 0.5
    logits[2, 0, 4] = -1.0
    logits[:, 1:] = drawn(batch, 3)[:, 1:]  # only the first token counts
    assert answer_rank(logits, batch).tolist() == [1, 3, VOCAB]


def test_metrics_by_name() -> None:
    assert get_metric("kl") is METRICS["kl"]
    own = Metric("own", "logits", lambda logits, batch, reference: logits[:, 0, 0])
    assert get_metric(own) is own
    with pytest.raises(MethodError, match="unknown metric 'accuracy'"):
        get_metric("accuracy")


# --- statistics --------------------------------------------------------------------------------------------------


def test_a_ratio_of_means_by_hand() -> None:
    ratio, low, high = bootstrap_ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], seed=0)
    assert (ratio, low, high) == pytest.approx((0.5, 0.5, 0.5))
    ratio, low, high = bootstrap_ratio([1.0, 2.0, 6.0], [4.0, 4.0, 4.0], seed=0)
    assert ratio == pytest.approx(0.75)
    assert 0.25 <= low < 0.75 < high <= 1.5
    assert bootstrap_ratio([1.0, 2.0, 6.0], [4.0, 4.0, 4.0], seed=0) == (ratio, low, high)
    assert bootstrap_ratio([1.0, 5.0], [2.0, 0.0], seed=0)[0] == pytest.approx(3.0)  # not the mean of ratios


def test_ratios_that_are_not_there() -> None:
    assert np.isnan(bootstrap_ratio([1.0, 2.0], [1.0, -1.0], seed=0)).all()
    ratio, low, high = bootstrap_ratio([1.0], [2.0], seed=0)
    assert ratio == 0.5
    assert np.isnan([low, high]).all()


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered, narrow = 0, 0
    for trial in range(200):
        bottom = rng.normal(4.0, 1.0, 40)
        top = 0.6 * bottom + rng.normal(0.0, 1.0, 40)
        _, low, high = bootstrap_ratio(top, bottom, seed=trial)
        covered += low <= 0.6 <= high
        _, low, high = bootstrap_ratio(top, bottom, seed=trial, confidence=0.5)
        narrow += low <= 0.6 <= high
    assert 0.89 <= covered / 200 <= 0.99
    assert 0.38 <= narrow / 200 <= 0.62


def test_empirical_p_by_hand() -> None:
    assert empirical_p(0.9, [0.1, 0.2, 0.3]) == 0.25
    assert empirical_p(0.2, [0.1, 0.2, 0.3]) == 0.75
    assert empirical_p(0.0, [0.1, 0.2, 0.3]) == 1.0
    assert empirical_p(1.0, []) == 1.0
