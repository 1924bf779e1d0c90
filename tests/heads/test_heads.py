"""Head scores: models whose heads are known, chance, seeds, files, and input that has no score."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
from ground_truth.heads import NAMES, NUMBERS, WORDS, KnownHeads, general_heads, ioi_heads

from kc_lib.errors import KnowledgeCircuitsError, MethodError, ModelError, TaskError
from kc_lib.heads.copying import copy_scores
from kc_lib.heads.general import head_scores, repeat_scores, repeated_tokens
from kc_lib.heads.head_scores import GeneralHeadScores, HeadScores
from kc_lib.heads.inhibition import ioi_prompts, name_movers, s_inhibition_scores
from kc_lib.heads.options import SCORES
from kc_lib.heads.successor import CYCLIC, ORDINALS, successor_pairs, successor_scores
from kc_lib.heads.suppression import content_tokens, copy_suppression_scores, text_windows
from kc_lib.models.model import Model
from kc_lib.tasks.files import load_text
from kc_lib.tasks.tokens import tokenizer_of

Models = Callable[[str], Model]
KINDS = (
    "previous_token",
    "duplicate_token",
    "induction",
    "name_mover",
    "negative_name_mover",
    "copy_suppression",
    "successor",
)


@cache
def known() -> KnownHeads:
    return general_heads()


@cache
def known_ioi() -> KnownHeads:
    return ioi_heads()


def repeating_text(seed: int = 0) -> str:
    """Lines of random words twice over, which the induction head predicts."""
    draw = random.Random(seed)
    lines = []
    for _ in range(8):
        words = draw.sample([*NAMES, *NUMBERS, *WORDS], 16)
        lines.append(" ".join([*words, *words]))
    return "\n".join(lines)


@cache
def found() -> dict[str, HeadScores]:
    model = known().model
    return {
        **repeat_scores(model, n_tokens=20),
        **copy_scores(model, top=1),  # of 35 words; by chance one in seven is among five
        "copy_suppression": copy_suppression_scores(model, repeating_text(), window=32),
        "successor": successor_scores(model),
    }


# --------------------------------------------------------------------------------------------------------- known truth


@pytest.mark.parametrize("kind", KINDS)
def test_true_heads_score_one_and_others_little(kind: str) -> None:
    scores = found()[kind]
    true = torch.zeros_like(scores.passes)
    for head in known().heads[kind]:
        true[head] = True
    assert scores.scores[true].min() > 0.95
    assert scores.scores[~true].max() < (0.5 if kind == "successor" else 0.15)  # one of eleven numbers by chance
    assert set(scores.heads()) == known().heads[kind]
    assert scores.scores[true].min() > scores.null


def test_s_inhibition_head_is_found_below_the_name_mover_that_is_found() -> None:
    model, heads = known_ioi().model, known_ioi().heads
    copies = copy_scores(model, top=1)["name_mover"]
    movers = name_movers(model, copies=copies)
    assert set(movers) == heads["name_mover"]
    scores = s_inhibition_scores(model, copies=copies, n_prompts=12)
    assert set(scores.heads()) == heads["s_inhibition"]
    (head,) = heads["s_inhibition"]
    others = scores.scores.clone()
    others[head] = 0.0
    assert scores.scores[head] > 1.5  # the other name is answered: the difference is lost twice
    assert others.abs().max() < 0.01
    assert scores.detail["io_attention"][head] < -0.95
    assert scores.detail["s1_attention"][head] > 0.95
    assert scores.provenance["name_movers"] == [list(mover) for mover in movers]


def test_a_head_that_writes_nothing_copies_and_suppresses_nothing() -> None:
    pruned = (0, 1)
    assert found()["name_mover"].scores[pruned] == 0
    assert found()["negative_name_mover"].scores[pruned] == 0
    assert found()["copy_suppression"].scores[pruned] == 0


def test_ioi_prompts_exchange_the_names_and_nothing_else() -> None:
    model = known_ioi().model
    groups = ioi_prompts(model, 20, 1)
    assert sum(map(len, groups)) == 20
    assert len({group.clean.shape[1] for group in groups}) == len(groups)
    for group in groups:
        for row in range(len(group)):
            clean, exchanged = group.clean[row].tolist(), group.exchanged[row].tolist()
            io, s1, s2 = (int(places[row]) for places in (group.io, group.s1, group.s2))
            assert [i for i, (a, b) in enumerate(zip(clean, exchanged, strict=True)) if a != b] == sorted([io, s1])
            assert (exchanged[io], exchanged[s1], exchanged[s2]) == (clean[s1], clean[io], clean[s2])
            assert [clean[io], clean[s1], clean[s2]] == [*group.names[row].tolist(), int(group.names[row, 1])]
            assert s1 < s2
            assert abs(io - s1) == 2


# --------------------------------------------------------------------------------------------------- seeds and wrappers


def test_seeds_change_the_draw_and_repeat_it() -> None:
    model = known().model
    assert (repeated_tokens(model, 8, 2, 0) == repeated_tokens(model, 8, 2, 0)).all()
    assert not (repeated_tokens(model, 8, 2, 0) == repeated_tokens(model, 8, 2, 1)).all()
    first, again, other = (copy_scores(model, top=1, n_prompts=6, seed=seed)["name_mover"] for seed in (0, 0, 1))
    assert (first.scores == again.scores).all()
    assert first.null == again.null
    assert not (first.scores == other.scores).all()


def test_no_result_depends_on_the_batch_size() -> None:
    model = known().model
    one, three = (repeat_scores(model, n_tokens=8, batch_size=size)["induction"].scores for size in (1, 3))
    torch.testing.assert_close(one, three, atol=1e-6, rtol=0)
    one, three = (copy_suppression_scores(model, repeating_text(), window=30, batch_size=size).scores for size in (1, 3))
    torch.testing.assert_close(one, three, atol=1e-4, rtol=1e-3)


def test_single_scores_are_those_of_the_shared_run() -> None:
    model = known().model
    shared = copy_scores(model)
    for name in ("name_mover", "negative_name_mover"):
        one = head_scores(model, name)
        assert list(one.scores) == [name]
        assert (one[name].scores == shared[name].scores).all()


# ------------------------------------------------------------------------------------------------------- files, tables


def test_scores_survive_a_file(tmp_path: Path) -> None:
    scores = found()["copy_suppression"]
    frame = scores.to_frame()
    assert list(frame.columns[:4]) == ["layer", "head", "score", "passes"]
    assert frame.loc[(frame["layer"] == 2) & (frame["head"] == 0), "passes"].item()
    loaded = HeadScores.load(scores.save(tmp_path / "scores.parquet"))
    assert (loaded.name, loaded.threshold, loaded.null) == (scores.name, scores.threshold, scores.null)
    assert loaded.provenance == scores.provenance
    assert (loaded.scores == scores.scores).all()
    assert (loaded.passes == scores.passes).all()
    assert loaded.detail.keys() == scores.detail.keys()
    pd.testing.assert_frame_equal(loaded.to_frame(), frame)


def test_a_file_without_head_scores_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"layer": [0]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(MethodError, match="holds no HeadScores"):
        HeadScores.load(tmp_path / "other.parquet")
    with pytest.raises(MethodError, match="holds no head scores"):
        GeneralHeadScores.load(tmp_path)


def test_passing_takes_threshold_null_and_what_else_is_asked() -> None:
    values = torch.tensor([[0.2, 0.4], [0.6, 0.8]])
    assert HeadScores.of("x", values, 0.3).heads() == [(1, 1), (1, 0), (0, 1)]
    assert HeadScores.of("x", values, 0.3, null=0.5).heads() == [(1, 1), (1, 0)]
    also = torch.tensor([[True, True], [True, False]])
    assert HeadScores.of("x", values, 0.3, also=also).heads() == [(1, 0), (0, 1)]
    with pytest.raises(MethodError, match=r"a1.h0 is no number"):
        HeadScores.of("x", torch.tensor([[0.2, 0.4], [float("nan"), 0.8]]), 0.3)


def test_all_scores_make_one_table_and_say_what_is_undefined(tmp_path: Path) -> None:
    """The context of 44 is too short for 2 x 100 tokens, and no name mover attends to a name here."""
    every = head_scores(known().model, text=repeating_text() * 3)
    assert set(every.scores) | set(every.undefined) == set(SCORES)
    assert not set(every.scores) & set(every.undefined)
    assert "n_tokens=21 or less" in every.undefined["induction"]
    assert "successor" in every.scores
    frame = every.to_frame()
    assert list(frame.columns) == ["name", "layer", "head", "score", "passes", "threshold", "null"]
    assert len(frame) == 16 * len(every.scores)
    passing = every.passing()
    assert (2, 3) in set(zip(passing["layer"], passing["head"], strict=True))
    loaded = GeneralHeadScores.load(every.save(tmp_path / "heads"))
    assert loaded.undefined == every.undefined
    pd.testing.assert_frame_equal(loaded.to_frame(), frame)


def test_a_score_asked_for_by_name_is_computed_alone_or_raises() -> None:
    only = head_scores(known().model, ["successor"])
    assert list(only.scores) == ["successor"]
    assert (only["successor"].scores == found()["successor"].scores).all()
    with pytest.raises(MethodError, match="n_tokens=21 or less"):
        head_scores(known().model, ["induction"])
    with pytest.raises(MethodError, match=r"unknown name 'mover' in scores: use some of .*name_mover"):
        head_scores(known().model, ["mover"])
    with pytest.raises(MethodError, match="no head score is asked for"):
        head_scores(known().model, [])
    assert not head_scores(known().model, "none").scores


# ------------------------------------------------------------------------------------------------------------ bad input


def test_masked_language_models_have_no_head_scores(small_model: Models) -> None:
    with pytest.raises(ModelError, match="both directions"):
        head_scores(small_model("bert"))


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (successor_scores, TaskError, "has 0 such pairs"),
        (copy_scores, TaskError, "names that are single tokens; this tokenizer has 0"),
        (lambda model: s_inhibition_scores(model, name_movers=[(1, 0)]), TaskError, "names that are single tokens"),
        (lambda model: s_inhibition_scores(model, name_movers=[(1, 9)]), MethodError, r"no head \(1, 9\)"),
        (lambda model: s_inhibition_scores(model, name_movers=[(-1, 0)]), MethodError, r"no head \(-1, 0\)"),
        (lambda model: s_inhibition_scores(model, name_movers=[]), MethodError, "name_movers is empty"),
        (lambda model: s_inhibition_scores(model, name_movers=[(0, 1)]), MethodError, "first layer"),
        (lambda model: repeat_scores(model, n_tokens=1), MethodError, "too few"),
        (lambda model: repeat_scores(model, n_sequences=0), MethodError, "too few"),
        (lambda model: copy_scores(model, n_prompts=0), MethodError, "n_prompts is 0"),
        (lambda model: copy_suppression_scores(model, "w3 w4 w5"), TaskError, "too few for two windows of 60"),
        (lambda model: copy_suppression_scores(model, "w3 w4", window=64), MethodError, "does not fit: use 2 to 63"),
        (lambda model: copy_suppression_scores(model, "w3 w4", share=0.0), MethodError, "share is 0.0"),
        (lambda model: copy_suppression_scores(model, n_windows=0), MethodError, "n_windows is 0"),
        (lambda model: copy_suppression_scores(model, " \n"), TaskError, "text is empty"),
        (lambda model: copy_suppression_scores(model, Path("no/such.txt")), TaskError, "no/such.txt cannot be read"),
        (lambda model: copy_suppression_scores(model, "no/such.txt"), TaskError, "no/such.txt cannot be read"),
    ],
)
def test_what_a_model_has_no_score_for_is_said_in_one_line(
    small_model: Models, score: Callable, error: type[KnowledgeCircuitsError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        score(small_model("llama"))
    assert "\n" not in str(caught.value)


def test_no_name_mover_is_said() -> None:
    model = known_ioi().model
    none = HeadScores.of("name_mover", torch.zeros(4, 4), 0.1)
    with pytest.raises(MethodError, match="no head that copies names"):
        s_inhibition_scores(model, copies=none, n_prompts=4)


def test_a_model_that_prefers_the_subject_is_refused() -> None:
    """The same model with all logits' signs flipped."""
    model = ioi_heads().model
    with torch.no_grad():
        model.bridge.unembed.W_U.neg_()
    with pytest.raises(MethodError, match="it prefers the subject"):
        s_inhibition_scores(model, name_movers=[(2, 1)], n_prompts=4)


# ------------------------------------------------------------------------------------------------------ text and words


def test_the_projects_text_is_long_enough_and_read_from_its_file() -> None:
    text = load_text()
    assert 2500 <= len(text.split()) <= 3500
    assert load_text("some words") == "some words"


def test_text_is_cut_into_windows_after_bos() -> None:
    model = known().model
    windows = text_windows(model, repeating_text(), 10)
    assert windows.shape == (25, 11)  # 256 words
    assert (windows[:, 0] == 0).all()
    words = [known().model.tokenizer.decode([token]) for token in windows[0, 1:].tolist()]
    assert words == repeating_text().split()[:10]


def test_function_words_are_no_sources(smollm2: Model) -> None:
    content = content_tokens(smollm2)
    for word, expected in ((" the", False), ("The", False), (" Mary", True), (",", False), (" 12", False), (" river", True)):
        (token,) = smollm2.tokenizer(word, add_special_tokens=False).input_ids[:1]
        assert bool(content[token]) == expected, word
    assert not content[smollm2.tokenizer.all_special_ids].any()


def test_ordinal_lists_are_whole() -> None:
    assert {name: len(words) for name, words in ORDINALS.items()} == {
        "numbers": 200, "number words": 20, "ordinals": 10, "days": 7, "short days": 7, "months": 12, "short months": 12,
        "letters": 26, "roman numerals": 20,
    }  # fmt: skip
    assert all(len(set(words)) == len(words) for words in ORDINALS.values())
    assert set(ORDINALS) > CYCLIC


def test_successor_pairs_are_single_tokens_and_follow_each_other(smollm2: Model) -> None:
    tokenizer = tokenizer_of(smollm2)
    lists = successor_pairs(tokenizer)
    text = [[tuple(tokenizer.inner.decode([token]) for token in pair) for pair in pairs] for pairs in lists.values()]
    every = {pair for pairs in text for pair in pairs}
    assert {(" Monday", " Tuesday"), (" Sunday", " Monday"), (" December", " January"), ("a", "b"), ("1", "2")} <= every
    assert {(" I", " II"), (" one", " two"), (" first", " second")} <= every
    assert not {("z", "a"), (" tenth", " first"), (" ten", " one")} & every
    assert all(len({a[:1] == " " for pair in pairs for a in pair}) == 1 for pairs in text)


# ------------------------------------------------------------------------------------------------------ the real model


@pytest.mark.slow
def test_smollm2_induction_and_previous_token_heads(smollm2: Model) -> None:
    scores = repeat_scores(smollm2, n_sequences=1)
    assert (18, 6) in scores["induction"].heads()
    assert (16, 0) in scores["previous_token"].heads()
    assert all(found.null < 0.1 for found in scores.values())
