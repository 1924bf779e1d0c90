"""Metrics and statistics against what a few lines of numpy give."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from kc_lib.errors import MethodError
from kc_lib.metrics import METRICS, Metric, answer_rank, get_metric
from kc_lib.stats import RESAMPLES, empirical_p, interval, resampled_means, share_interval
from kc_lib.tasks.batches import Batch, TokenPair, make_batch

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
            "probability_difference": ours[i, 0, pair.answer[0]] - ours[i, 0, pair.distractor],
            "kl": kl,
            "match_nll": -np.log(mine).mean() + np.log(theirs).mean(),
        }
        assert set(expected) == set(METRICS)
        for name, value in expected.items():
            metric = METRICS[name]
            assert metric(logits, batch, reference)[i].item() == pytest.approx(value, rel=1e-4, abs=1e-5), name
            sign = 1 if name in ("kl", "match_nll") else -1
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


def test_resampled_means_are_means_of_one_draw_for_all_columns() -> None:
    values = np.random.default_rng(3).normal(size=(5, 2))
    means = resampled_means(np.column_stack([values, values @ [2.0, -1.0]]), seed=1)
    assert means.shape == (RESAMPLES, 3)
    assert means[:, 2] == pytest.approx(means[:, :2] @ [2.0, -1.0])
    drawn = np.random.default_rng(1).integers(0, 5, (RESAMPLES, 5))
    for i in (0, 7, RESAMPLES - 1):
        assert means[i, :2] == pytest.approx(np.mean([values[fact] for fact in drawn[i]], axis=0))
    assert np.array_equal(resampled_means(values, 4), resampled_means(values, 4))
    assert not np.array_equal(resampled_means(values, 4), resampled_means(values, 5))
    assert np.isnan(resampled_means(values[:1], 0)).all()  # one fact has no spread


def test_intervals_of_a_ratio_are_scipys_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    top, bottom = rng.normal(1.0, 1.0, 20), rng.normal(3.0, 1.0, 20)
    means = resampled_means(np.column_stack([top, bottom]), seed=3)
    for confidence in (0.5, 0.95):
        expected = scipy.stats.bootstrap(
            (top, bottom),
            lambda a, b, axis=-1: a.mean(axis=axis) / b.mean(axis=axis),
            paired=True,
            n_resamples=RESAMPLES,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(3),
        ).confidence_interval
        low, high = interval(means[:, 0] / means[:, 1], confidence)
        assert (low, high) == pytest.approx((expected.low, expected.high))


def test_intervals_by_hand() -> None:
    draws = np.stack([np.arange(101.0), -np.arange(101.0)], axis=1)
    low, high = interval(draws, confidence=0.9)
    assert low == pytest.approx([5.0, -95.0])
    assert high == pytest.approx([95.0, -5.0])
    draws[3, 0] = np.nan
    low, high = interval(draws)
    assert np.isnan([low[0], high[0]]).all()
    assert not np.isnan([low[1], high[1]]).any()


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered, narrow = 0, 0
    for trial in range(200):
        bottom = rng.normal(4.0, 1.0, 40)
        top = 0.6 * bottom + rng.normal(0.0, 1.0, 40)
        means = resampled_means(np.column_stack([top, bottom]), seed=trial)
        low, high = interval(means[:, 0] / means[:, 1])
        covered += low <= 0.6 <= high
        low, high = interval(means[:, 0] / means[:, 1], confidence=0.5)
        narrow += low <= 0.6 <= high
    assert 0.89 <= covered / 200 <= 0.99
    assert 0.38 <= narrow / 200 <= 0.62


def test_wilsons_interval_by_its_formula() -> None:
    z = scipy.stats.norm.ppf(0.975)
    for count, n in ((0, 10), (7, 10), (50, 50)):
        share = count / n
        middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        assert share_interval(count, n) == pytest.approx((middle - half, middle + half), abs=1e-9)
    assert np.isnan(share_interval(0, 0)).all()


def test_empirical_p_by_hand() -> None:
    assert empirical_p(0.9, [0.1, 0.2, 0.3]) == 0.25
    assert empirical_p(0.2, [0.1, 0.2, 0.3]) == 0.75
    assert empirical_p(0.0, [0.1, 0.2, 0.3]) == 1.0
    assert empirical_p(1.0, []) == 1.0
