"""Behaviour on a task, against the Hugging Face model and a few lines of numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from oracles import eap

from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.evaluate import evaluate
from kc_lib.errors import MethodError
from kc_lib.metrics import METRICS, is_right, right_rank
from kc_lib.models.load import load_model
from kc_lib.models.model import Model
from kc_lib.stats import RESAMPLES
from kc_lib.tasks.batches import TokenPair, make_batch
from kc_lib.training.behaviour import BEHAVIOURS, Behaviour, behaviour


def drawn_pairs(n: int = 9, seed: int = 0) -> list[TokenPair]:
    """Pairs of several lengths, a third of them with sets of answers."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        length = 4 + i % 3
        clean, corrupted = rng.integers(3, 200, (2, length)).tolist()
        tokens = rng.choice(np.arange(3, 200), 9, replace=False).tolist()
        sets = {"right": tuple(tokens[: 2 + i % 2]), "wrong": tuple(tokens[4:9])} if i % 3 == 0 else {}
        distractor = tokens[4]
        pairs.append(
            TokenPair((1, *clean), (1, *corrupted), (tokens[0], 7), distractor, {}, {"clean": f"prompt {i}"}, **sets)
        )
    return pairs


def by_hand(logits: np.ndarray, pair: TokenPair) -> dict[str, float]:
    """All measures of one prompt from its last logits."""
    right, wrong = list(pair.right or pair.answer[:1]), list(pair.wrong or (pair.distractor,))
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = sorted(right + wrong, key=lambda token: -logits[token])
    all_tokens = np.argsort(-logits).tolist()
    first = next(place for place, token in enumerate(all_tokens) if token in right)
    return {
        "logit_difference": logits[pair.answer[0]] - logits[pair.distractor],
        "probability_difference": p[right].sum() - p[wrong].sum(),
        "accuracy": float(order[0] in right),
        "rank": first + 1,
        "rank_0_rate": float(all_tokens[0] in right),
        "mrr": 1 / (first + 1),
    }


@pytest.mark.parametrize("kind", ["neox", "llama"])
def test_every_measure_by_hand(kind: str, small_folder: Callable[[str], Path], small_model: Callable[[str], Model]) -> None:
    reference = tf.AutoModelForCausalLM.from_pretrained(small_folder(kind), dtype=torch.float32).eval()
    pairs = drawn_pairs(30)
    # some are got right: a set holds the model's own first token
    with torch.no_grad():
        logits = [reference(torch.tensor([pair.clean])).logits[0, -1].double().numpy() for pair in pairs]
    for i in (1, 3, 4):
        top, other = int(logits[i].argmax()), int(logits[i].argmin())
        sets = {"right": (other - 1 if other > 3 else other + 1, top), "wrong": (other,)} if i == 3 else {}
        pairs[i] = TokenPair(pairs[i].clean, pairs[i].corrupted, (top,), other, {}, pairs[i].text, **sets)
    expected = [by_hand(row, pair) for row, pair in zip(logits, pairs, strict=True)]
    found = behaviour(small_model(kind), pairs, batch_size=7)
    assert found.prompts["prompt"].tolist() == [f"prompt {i}" for i in range(30)]
    for name in (*BEHAVIOURS, "rank"):
        assert found.prompts[name].astype(float).to_numpy() == pytest.approx([row[name] for row in expected], abs=2e-4), name
    assert 3 <= found.prompts["rank_0_rate"].sum() < 30
    assert 0 < found.prompts["accuracy"].sum() < 30
    alone = behaviour(small_model(kind), pairs, batch_size=1)
    assert alone.prompts["rank"].tolist() == found.prompts["rank"].tolist()
    name = "probability_difference"
    assert alone.prompts[name].to_numpy() == pytest.approx(found.prompts[name].to_numpy(), abs=1e-5)


def test_means_and_their_intervals(small_model: Callable[[str], Model], tmp_path: Path) -> None:
    found = behaviour(small_model("neox"), drawn_pairs(12))
    frame = found.summary(seed=5)
    assert frame["measure"].tolist() == list(BEHAVIOURS)
    assert (frame["n"] == 12).all()
    drawn = np.random.default_rng(5).integers(0, 12, (RESAMPLES, 12))
    for row in frame.to_dict("records"):
        values = found.prompts[row["measure"]].to_numpy(dtype=float)
        low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
        assert (row["value"], row["value_low"], row["value_high"]) == pytest.approx((values.mean(), low, high))
        assert row["value_low"] <= row["value"] <= row["value_high"]
    again = Behaviour.load(found.save(tmp_path / "behaviour.parquet"))
    assert again.prompts.equals(found.prompts)
    assert again.provenance == found.provenance
    with pytest.raises(MethodError, match="no prompts"):
        behaviour(small_model("neox"), [])


def test_logits_that_are_no_numbers_have_no_ranks(small_folder: Callable[[str], Path]) -> None:
    model = load_model(str(small_folder("neox")), device="cpu")
    pair = drawn_pairs(1)[0]
    with torch.no_grad():
        model.bridge.embed.W_E[pair.clean[1]] = torch.nan
    with pytest.raises(MethodError, match="no finite numbers"):
        behaviour(model, [pair])


def test_ties_count_against_the_model() -> None:
    pairs = [
        TokenPair((1, 3), (1, 4), (5,), 6, {}, {}, right=(5, 7), wrong=(6,)),
        TokenPair((1, 3), (1, 4), (5,), 6, {}, {}, right=(5, 7), wrong=(6, 8, 9)),
    ]
    batch = make_batch(pairs)
    logits = torch.zeros(2, 1, 12)
    assert right_rank(logits, batch).tolist() == [11, 11]  # of twelve tokens the ten that are not right come first
    assert is_right(logits, batch).tolist() == [False, False]
    logits[:, 0, 7] = 1.0
    assert right_rank(logits, batch).tolist() == [1, 1]
    assert is_right(logits, batch).tolist() == [True, True]
    logits[1, 0, [2, 9]] = 2.0
    assert right_rank(logits, batch).tolist() == [1, 3]
    assert is_right(logits, batch).tolist() == [True, False]


def test_probability_difference_of_sets_of_several_sizes() -> None:
    pairs = [
        TokenPair((1, 3), (1, 4), (5,), 6, {}, {}, right=(5, 7, 0), wrong=(6,)),
        TokenPair((1, 3), (1, 4), (5,), 6, {}, {}, right=(5,), wrong=(6, 8)),
        TokenPair((1, 3), (1, 4), (5,), 6, {}, {}),
    ]
    batch = make_batch(pairs)
    logits = torch.randn(3, 1, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    p = logits.detach().double().softmax(-1)[:, 0].numpy()
    expected = [
        p[0, 5] + p[0, 7] + p[0, 0] - p[0, 6],
        p[1, 5] - p[1, 6] - p[1, 8],
        p[2, 5] - p[2, 6],
    ]
    metric = METRICS["probability_difference"]
    assert metric(logits, batch).tolist() == pytest.approx(expected, abs=1e-6)
    metric.loss(logits, batch).sum().backward()
    # d loss / d logit_j = -p_j (s_j - value), with s = 1 at right tokens, -1 at wrong ones, 0 elsewhere
    for row, pair in enumerate(pairs):
        signs = np.zeros(12)
        signs[list(pair.right or pair.answer)] = 1
        signs[list(pair.wrong or (pair.distractor,))] = -1
        assert logits.grad[row, 0].numpy() == pytest.approx(-p[row] * (signs - expected[row]), abs=1e-6)


def test_circuits_are_judged_by_the_same_measure(small_model: Callable[[str], Model]) -> None:
    model, pairs = small_model("neox"), drawn_pairs(6)
    judged = evaluate(model, {}, {"test": pairs}, metric="probability_difference")
    values = judged.values("test")["full"].to_numpy()
    assert values == pytest.approx(behaviour(model, pairs).prompts["probability_difference"].to_numpy(), abs=1e-6)


@pytest.mark.parametrize("kind", ["neox", "llama"])
def test_edges_are_scored_by_sets_of_answers(
    kind: str, small_folder: Callable[[str], Path], small_model: Callable[[str], Model]
) -> None:
    """EAP-IG of the difference of probabilities, against the slow oracle that runs on the Hugging Face model's weights."""
    pairs = []
    for pair in drawn_pairs(5, seed=2):
        rest = [token for token in range(3, 200) if token not in (*pair.clean, pair.distractor, pair.answer[0])]
        sets = {"right": (pair.answer[0], *rest[:3]), "wrong": (pair.distractor, rest[4])}
        pairs.append(replace(pair, clean=pair.clean[:5], corrupted=pair.corrupted[:5], **sets))
    batch, alphas = make_batch(pairs), (1 / 6, 3 / 6, 5 / 6)
    reference = tf.AutoModelForCausalLM.from_pretrained(small_folder(kind), dtype=torch.float32).eval()
    expected = eap.oracle_edge_scores(
        reference,
        batch.clean,
        batch.corrupted,
        batch.answer_positions[:, 0],
        batch.right,
        batch.wrong,
        alphas,
        metric="probability_difference",
    )
    found = score_edges(
        small_model(kind), pairs, "eap_ig", steps=3, ig_rule="midpoint", metric="probability_difference", batch_size=2
    )
    assert expected.abs().max() > 1e-4
    assert (found.scores - expected).abs().max() <= 1e-4 * expected.abs().max()
