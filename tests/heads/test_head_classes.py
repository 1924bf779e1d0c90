"""Mover, relation and mixture heads: known ones are found, shuffled facts give none, scores are what they are said to be."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ground_truth.circuits import hand_wired
from helpers import SmallFolder, SmallModel, facts, hf_model

from kc_lib.components.attention import SOURCES, attention_sources
from kc_lib.errors import MethodError
from kc_lib.heads.ablation import recurrence
from kc_lib.heads.classes import (
    CLASSES,
    HeadClasses,
    check_enough,
    classify_heads,
    mover_baseline,
    promoted_by_heads,
    range_baseline,
)
from kc_lib.models.model import Model
from kc_lib.tasks.batches import TokenPair, make_batch
from kc_lib.tasks.known import answer_tokens
from kc_lib.tasks.tokens import tokenizer_of

LENGTHS = (5, 9, 7, 6, 8, 5, 6, 7)
OTHERS = list(range(100, 190))


def own_facts(seed: int = 3) -> list[TokenPair]:
    """Eight facts with eight answers, none of them among ``OTHERS``."""
    return [replace(pair, answer=(20 + i,)) for i, pair in enumerate(facts(LENGTHS, seed))]


# --- the scores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "neox"])
def test_scores_are_those_of_a_loop_over_heads_and_facts(small_model: SmallModel, kind: str) -> None:
    model, pairs = small_model(kind), own_facts()
    found = classify_heads(model, pairs, OTHERS, k=20, n_null=50, level=0.05, batch_size=3)
    decoder = model.residual
    sources = attention_sources(model, pairs)
    answers = [pair.answer[0] for pair in pairs]
    promotion = promoted_by_heads(decoder, make_batch(pairs), torch.arange(200), 20)
    for row in found.heads.itertuples():
        mover, relation, raised = [], [], []
        for i, pair in enumerate(pairs):
            logits = promotion.contribution[row.layer, row.head, i]
            top = set(logits.topk(20).indices.tolist())
            on_subject, on_relation = (sources[SOURCES.index(s), row.layer, row.head, i] for s in ("subject", "relation"))
            mover.append(float(on_subject) * (pair.answer[0] in top and logits[pair.answer[0]] > 0))
            relation.append(float(on_relation) * len(top & set(answers)) / 20)
            raised.append(float(logits[pair.answer[0]]))
        assert row.mover_score == pytest.approx(np.mean(mover), abs=1e-6)
        assert row.relation_score == pytest.approx(np.mean(relation), abs=1e-6)
        assert row.contribution == pytest.approx(np.mean(raised), abs=1e-4)


def test_promotion_is_the_heads_own_write(small_model: SmallModel, small_folder: SmallFolder) -> None:
    model, (pair, *_) = small_model("llama"), own_facts()
    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(torch.tensor([pair.clean]))
    z = cache["blocks.2.attn.hook_z"].reshape(1, len(pair.clean), 4, 8)[0, -1, 1]
    hf = hf_model(small_folder("llama"))
    write = z @ hf.model.layers[2].self_attn.o_proj.weight[:, 8:16].T
    with torch.no_grad():
        stream = model.residual.run(model.residual.embed(torch.tensor([pair.clean])))[0, -1]
        expected = (write * hf.model.norm(stream) / stream) @ hf.lm_head.weight.T
    found = promoted_by_heads(model.residual, make_batch([pair]), torch.arange(200), 10)
    assert (found.contribution[2, 1, 0] - expected).abs().max() <= 1e-4
    assert found.among_top[2, 1, 0].nonzero()[:, 0].tolist() == sorted(expected.topk(10).indices.tolist())


def test_the_movers_null_is_that_of_every_arrangement() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(3, 4, generator=generator)
    written = torch.rand(3, 4, 4, generator=generator) > 0.5
    scores, null = mover_baseline(attention, written, 40_000, 0)
    assert scores.tolist() == pytest.approx([(attention[h] * written[h].diagonal()).mean().item() for h in range(3)])
    every = []
    for order in torch.cartesian_prod(*[torch.arange(4)] * 4):
        if order.unique().numel() == 4:
            every.append((attention * written[:, torch.arange(4), order]).mean(1))
    every = torch.stack(every)
    assert len(every) == math.factorial(4)
    assert (null.mean(0) - every.mean(0)).abs().max() <= 0.01
    for h in range(3):
        for value in every[:, h].unique():
            share = [(x[:, h] >= value - 1e-6).float().mean().item() for x in (null, every)]
            assert share[0] == pytest.approx(share[1], abs=0.02)


def test_the_ranges_null_draws_each_token_alike() -> None:
    weights = torch.rand(5, 3 + 12, generator=torch.Generator().manual_seed(1))
    scores, null = range_baseline(weights, 3, 20_000, 0)
    assert scores.tolist() == pytest.approx(weights[:, :3].sum(1).tolist())
    assert (null.mean(0) - 3 * weights[:, 3:].mean(1)).abs().max() <= 0.02
    least, most = weights[:, 3:].sort(1).values[:, :3].sum(1), weights[:, 3:].sort(1).values[:, -3:].sum(1)
    assert ((null.min(0).values - least).abs() <= 1e-5).all()  # without replacement: every draw has three tokens
    assert ((null.max(0).values - most).abs() <= 1e-5).all()


# --- truth -------------------------------------------------------------------------------------------------------


def test_the_hand_wired_mover_is_the_only_head_found() -> None:
    wired = hand_wired("fact")
    seen: dict[tuple[int, ...], TokenPair] = {pair.clean: pair for pair in wired.pairs}
    pairs = list(seen.values())
    own = {pair.answer[0] for pair in pairs}
    others = [token for token in range(1, wired.model.residual.W_U.shape[1]) if token not in own]
    # the model has 22 words: ranges of six cannot be drawn from the rest, so facts are repeated for the null only
    with pytest.raises(MethodError, match="need at least 30"):
        classify_heads(wired.model, pairs, others, level=0.05)
    sources = attention_sources(wired.model, pairs).flatten(1, 2)[SOURCES.index("subject")]
    tokens = torch.tensor([pair.answer[0] for pair in pairs])
    promotion = promoted_by_heads(wired.model.residual, make_batch(pairs), tokens, 1)
    written = (promotion.among_top & (promotion.contribution > 0)).flatten(0, 1)
    scores, null = mover_baseline(sources, written, 5000, 0)
    names = [f"a{layer}.h{head}" for layer in range(promotion.among_top.shape[0]) for head in range(4)]
    best = dict(zip(names, scores.tolist(), strict=True))
    assert best.pop("a2.h0") > 0.8
    assert max(best.values()) < 0.2
    assert (null[:, names.index("a2.h0")] >= 0.8).float().mean() <= 0.02


@pytest.mark.slow
def test_shuffled_facts_stay_at_the_nominal_rate(small_model: SmallModel) -> None:
    """Answers exchanged between facts, and ranges that are none: any head of any class is a false positive."""
    model, level, n = small_model("gpt2"), 0.1, 120
    generator = np.random.default_rng(0)
    hits = dict.fromkeys(("mover", "relation"), 0)
    for _ in range(n):
        drawn = generator.permutation(np.arange(3, 200))
        pairs = [replace(pair, answer=(int(token),)) for pair, token in zip(own_facts(), drawn, strict=False)]
        options = {"k": 30, "level": level, "n_null": 400, "least_attention": 0.0}
        found = classify_heads(model, pairs, drawn[8:].tolist(), **options)
        for name in hits:
            hits[name] += bool(found.of_class(name))
    most = level * n + 3 * math.sqrt(n * level * (1 - level))
    assert max(hits.values()) <= most, hits


# --- the result --------------------------------------------------------------------------------------------------


def test_classes_follow_from_the_scores(small_model: SmallModel, tmp_path: Path) -> None:
    found = classify_heads(small_model("gpt2"), own_facts(), OTHERS, k=60, level=0.9, n_null=200)
    heads = found.heads
    mover = (heads["mover_p"] <= 0.9) & (heads["mover_score"] > 0) & (heads["subject"] >= 0.1)
    relation = (heads["relation_p"] <= 0.9) & (heads["relation_score"] > 0) & (heads["relation_tokens"] >= 0.1)
    assert mover.any()
    assert relation.any()
    expected = [
        "mixture" if m and r else "mover" if m else "relation" if r else "" for m, r in zip(mover, relation, strict=True)
    ]
    assert heads["class"].tolist() == expected
    assert set(found.of_class("mover")) == set(zip(heads["layer"][mover], heads["head"][mover], strict=True))
    assert set(found.of_class("mixture")) <= set(found.of_class("relation"))
    again = HeadClasses.load(found.save(tmp_path / "classes.parquet"))
    pd.testing.assert_frame_equal(again.heads, heads)
    assert again.provenance == found.provenance
    same = classify_heads(small_model("gpt2"), own_facts(), OTHERS, k=60, level=0.9, n_null=200, batch_size=3)
    pd.testing.assert_frame_equal(same.heads, heads, atol=1e-6)
    assert (found.summary()["class"] != "").all()
    assert len(found.summary()) == (mover | relation).sum()
    with pytest.raises(MethodError, match="unknown head class 'movers'"):
        found.of_class("movers")
    assert CLASSES == ("mover", "relation", "mixture")


def test_facts_too_few_for_the_null_say_how_many_it_takes(small_model: SmallModel) -> None:
    model = small_model("gpt2")
    with pytest.raises(MethodError, match="it takes 7 facts with different answers"):
        classify_heads(model, own_facts()[:6], OTHERS)
    check_enough(list(range(7)), 12, 0.01)
    check_enough(list(range(8)), 270, 0.01)
    with pytest.raises(MethodError, match="it takes 8 facts"):
        check_enough(list(range(7)), 270, 0.01)
    with pytest.raises(MethodError, match="20 facts with 1 different answers"):
        check_enough([5] * 20, 12, 0.01)
    with pytest.raises(MethodError, match="give the answers of more relations"):
        classify_heads(model, own_facts(), OTHERS[:20])
    with pytest.raises(MethodError, match=r"level is 0.*above 0"):
        classify_heads(model, own_facts(), OTHERS, level=0)
    with pytest.raises(MethodError, match=r"level is 1.*below 1"):
        classify_heads(model, own_facts(), OTHERS, level=1)
    with pytest.raises(MethodError, match="k is 0"):
        classify_heads(model, own_facts(), OTHERS, k=0)
    with pytest.raises(MethodError, match="least_attention is 2"):
        classify_heads(model, own_facts(), OTHERS, least_attention=2.0)


# --- over relations ----------------------------------------------------------------------------------------------


def test_recurrence_counts_heads_and_chance() -> None:
    classes = {"a": [(0, 1), (2, 3)], "b": [(0, 1), (1, 1)], "c": [(0, 1)], "d": []}
    found = recurrence(classes, 12).set_index("relations")
    assert found["heads"].tolist() == [3, 1, 1, 0]
    # by chance: a head is in a, b and c with 2/12, 2/12 and 1/12
    in_any = 1 - (10 / 12) * (10 / 12) * (11 / 12)
    assert found.loc[1, "expected"] == pytest.approx(12 * in_any, rel=0.02)
    assert found.loc[3, "expected"] == pytest.approx(12 * (2 / 12) ** 2 / 12, rel=0.15)
    assert found.loc[3, "p"] == pytest.approx(12 * (2 / 12) ** 2 / 12, rel=0.15)
    assert found.loc[4, "p"] == 1.0


def test_answers_of_the_other_relations(smollm2: Model) -> None:
    tokenizer = tokenizer_of(smollm2)
    every, without = answer_tokens(tokenizer), answer_tokens(tokenizer, ["country_capital"])
    paris = tokenizer.answer("The capital of France is", "Paris")[0]
    assert len(every) > 800
    assert set(without) < set(every)
    assert paris in every
