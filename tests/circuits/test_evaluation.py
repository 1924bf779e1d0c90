"""Circuits evaluated: faithfulness by hand, the file of an evaluation, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import NAMED, SmallModel, native_logits, random_pairs

from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.baselines import SHARES, circuits_by_size, layer_matched, random_baselines, random_circuit
from kc_lib.circuits.evaluate import Evaluation, evaluate
from kc_lib.circuits.run import run_circuit
from kc_lib.circuits.scores import EdgeScores
from kc_lib.circuits.selection import select
from kc_lib.circuits.verdict import headline, verdict
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit
from kc_lib.metrics import METRICS
from kc_lib.residual.activations import ablation
from kc_lib.tasks.batches import TokenPair, make_batch

FOUND, HELD_OUT = random_pairs(seed=11), random_pairs((6, 8, 7, 7, 5), seed=12)
SPLITS = {"discovery": FOUND, "held_out": HELD_OUT}


@pytest.fixture(scope="module")
def scores(small_model: SmallModel) -> EdgeScores:
    return score_edges(small_model("llama"), FOUND, steps=2)


@pytest.fixture(scope="module")
def circuit(scores: EdgeScores) -> Circuit:
    return select(scores, size=0.4)


@pytest.fixture(scope="module")
def evaluation(small_model: SmallModel, circuit: Circuit) -> Evaluation:
    circuits = {"circuit": circuit, **random_baselines(circuit, 4)}
    return evaluate(small_model("llama"), circuits, SPLITS, batch_size=2)


def test_every_circuit_has_a_row_on_every_split(evaluation: Evaluation, circuit: Circuit) -> None:
    table = evaluation.table
    names = ["full", "empty", "circuit", *(f"random baseline {i} of circuit" for i in (1, 2, 3, 4))]
    assert table["circuit"].tolist() == names * 2
    assert table["kind"].tolist() == ["full", "empty", "circuit", *["random baseline"] * 4] * 2
    assert table["draw"].tolist() == [0, 0, 0, 1, 2, 3, 4] * 2
    assert table["of"].tolist() == ["", "", "", *["circuit"] * 4] * 2
    assert (table["ranking"] == "").all()
    assert table["size"].isna().all()
    assert len(evaluation.examples) == len(names) * (len(FOUND) + len(HELD_OUT))
    row = evaluation.row("circuit", "held_out")
    assert (row["n"], row["n_edges"], row["share"]) == (len(HELD_OUT), circuit.n_edges, circuit.share)
    assert row["metric"] == "logit_difference"
    assert evaluation.row("full", "discovery")["share"] == 1.0


def test_a_summary_has_a_row_for_all_draws_of_a_baseline(evaluation: Evaluation) -> None:
    summary = evaluation.summary().set_index(["split", "circuit"])
    names = ["full", "empty", "circuit", "random baselines of circuit"]
    assert list(summary.index) == [(split, name) for split in SPLITS for name in names]
    row, drawn = evaluation.row("circuit", "held_out"), evaluation.baselines("circuit", "held_out")
    for name in ("n_edges", "n", "value", "faithfulness", "faithfulness_low", "faithfulness_high", "hit_at_10", "kl"):
        assert summary.loc[("held_out", "circuit"), name] == row[name]
    mean = summary.loc[("held_out", "random baselines of circuit")]
    assert (len(drawn), mean["draws"]) == (4, 4)
    assert mean["faithfulness"] == pytest.approx(drawn["faithfulness"].mean())
    assert mean["faithfulness_low"] == drawn["faithfulness"].min()
    assert mean["faithfulness_high"] == drawn["faithfulness"].max()
    assert mean["probability"] == pytest.approx(drawn["probability"].mean())


@pytest.mark.parametrize("split", list(SPLITS))
def test_faithfulness_by_hand(small_model: SmallModel, evaluation: Evaluation, circuit: Circuit, split: str) -> None:
    model = small_model("llama")
    decoder, batch = model.residual, make_batch(SPLITS[split])

    def value(logits: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(batch))
        return logits[rows, 0, batch.answers[:, 0]] - logits[rows, 0, batch.distractors]

    logits = run_circuit(decoder, circuit.graph, circuit.mask, batch, ablation(decoder, "patching", batch))
    full, empty, own = (
        value(logits).mean().item()
        for logits in (native_logits(model, batch.clean, batch), native_logits(model, batch.corrupted, batch), logits)
    )
    row = evaluation.row("circuit", split)
    assert row["value"] == pytest.approx(own, rel=1e-4, abs=1e-5)
    assert evaluation.row("full", split)["value"] == pytest.approx(full, rel=1e-4, abs=1e-5)
    assert evaluation.row("empty", split)["value"] == pytest.approx(empty, rel=1e-4, abs=1e-5)
    assert row["faithfulness"] == pytest.approx((own - empty) / (full - empty), rel=1e-3)
    assert row["faithfulness_low"] <= row["faithfulness"] <= row["faithfulness_high"]
    ranks = (logits[:, 0] >= logits[torch.arange(len(batch)), 0, batch.answers[:, 0]][:, None]).sum(-1).numpy()
    assert row["hit_at_10"] == np.mean(ranks <= 10)
    assert row["rank_median"] == np.median(ranks)
    examples = evaluation.examples.query("circuit == 'circuit' and split == @split")
    assert examples["fact"].tolist() == list(range(len(batch)))
    assert examples["value"].to_numpy() == pytest.approx(value(logits).numpy(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("intervention", ["patching", "zero", "mean"])
def test_the_model_is_wholly_faithful_and_no_edges_not_at_all(small_model: SmallModel, kind: str, intervention: str) -> None:
    model = small_model(kind)
    graph = model.residual.graph(grouped=False)
    whole = {"whole": Circuit(graph, graph.edges), "none": Circuit(graph, torch.zeros_like(graph.edges))}
    found = evaluate(model, whole, SPLITS, intervention=intervention, reference=FOUND)
    for split in SPLITS:
        for name, expected in {"full": 1.0, "whole": 1.0, "empty": 0.0, "none": 0.0}.items():
            row = found.row(name, split)
            assert row["faithfulness"] == pytest.approx(expected, abs=1e-3)
        assert found.row("full", split)["kl"] == pytest.approx(0, abs=1e-6)
        assert found.row("whole", split)["kl"] == pytest.approx(0, abs=1e-5)
        assert found.row("empty", split)["kl"] > 1e-3


def test_faithfulness_without_an_effect_is_undefined(small_model: SmallModel, circuit: Circuit) -> None:
    same = [TokenPair(pair.clean, pair.clean, pair.answer, pair.distractor, {}, {}) for pair in FOUND]
    found = evaluate(small_model("llama"), {"circuit": circuit}, {"held_out": same})
    row = found.row("circuit", "held_out")
    assert np.isnan([row["faithfulness"], row["faithfulness_low"], row["faithfulness_high"]]).all()
    assert "nan" in headline(found, circuit, "held_out")["faithfulness, held_out"]


def test_metrics_where_less_is_better_also_run_from_zero_to_one(small_model: SmallModel, circuit: Circuit) -> None:
    found = evaluate(small_model("llama"), {"circuit": circuit}, SPLITS, metric="kl")
    assert found.row("full", "discovery")["faithfulness"] == pytest.approx(1.0)
    assert found.row("empty", "discovery")["faithfulness"] == pytest.approx(0.0)
    assert found.row("circuit", "discovery")["value"] == pytest.approx(found.row("circuit", "discovery")["kl"])


def test_an_evaluation_survives_a_file(tmp_path: Path, evaluation: Evaluation) -> None:
    path = evaluation.save(tmp_path / "evaluation.parquet")
    loaded = Evaluation.load(path)
    pd.testing.assert_frame_equal(loaded.table, evaluation.table)
    assert loaded.hash == evaluation.hash
    pd.testing.assert_frame_equal(loaded.examples, evaluation.examples)
    assert loaded.metric is METRICS["logit_difference"]


def test_circuits_by_size(scores: EdgeScores) -> None:
    circuits = circuits_by_size(scores, shares=(0.05, 0.3, 1.0), n_random=2)
    assert list(circuits) == [
        "top 0.05",
        "top 0.3",
        "top 1",
        "random baseline 1 of top 0.05",
        "random baseline 2 of top 0.05",
        "random baseline 1 of top 0.3",
        "random baseline 2 of top 0.3",
    ]
    assert circuits["top 1"].circuit.n_edges == scores.graph.n_edges
    for share in (0.05, 0.3):
        top = circuits[f"top {share}"]
        assert (top.kind, top.ranking, top.size, top.draw, top.of) == ("ranking", "top", share, 0, "")
        assert torch.equal(top.circuit.mask, select(scores, "absolute", share, fill=False).mask)
        assert top.circuit.n_edges <= share * scores.graph.n_edges
        drawn = [circuits[f"random baseline {draw} of top {share}"] for draw in (1, 2)]
        for draw, one in enumerate(drawn, start=1):
            label = (one.kind, one.ranking, one.size, one.draw, one.of)
            assert label == ("random baseline", "top", share, draw, f"top {share}")
            assert one.circuit.n_edges == top.circuit.n_edges
        assert not torch.equal(drawn[0].circuit.mask, drawn[1].circuit.mask) or not top.circuit.n_edges
    assert SHARES == (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def test_several_rankings_in_one_evaluation(scores: EdgeScores) -> None:
    circuits = circuits_by_size(scores, shares=(0.3, 1.0), n_random=1)
    circuits |= circuits_by_size(scores, "signed", shares=(0.3, 1.0), n_random=1, label="ig signed")
    assert list(circuits) == [
        "top 0.3",
        "top 1",
        "random baseline 1 of top 0.3",
        "ig signed 0.3",
        "ig signed 1",
        "random baseline 1 of ig signed 0.3",
    ]
    signed, random = circuits["ig signed 0.3"], circuits["random baseline 1 of ig signed 0.3"]
    assert torch.equal(signed.circuit.mask, select(scores, "signed", 0.3, fill=False).mask)
    assert random.circuit.n_edges == signed.circuit.n_edges
    assert random.ranking == signed.ranking == "ig signed"


def test_baselines_of_both_kinds(circuit: Circuit) -> None:
    connected = random_baselines(circuit, 3, seed=5)
    matched = random_baselines(circuit, 2, seed=5, kind="layer-matched", of="mine")
    assert list(connected) == [f"random baseline {draw} of circuit" for draw in (1, 2, 3)]
    assert list(matched) == [f"layer-matched baseline {draw} of mine" for draw in (1, 2)]
    for draw, one in enumerate(connected.values()):
        assert (one.kind, one.draw, one.of) == ("random baseline", draw + 1, "circuit")
        assert torch.equal(one.circuit.mask, random_circuit(circuit.graph, circuit.n_edges, 5 + draw).mask)
    for draw, one in enumerate(matched.values()):
        assert (one.kind, one.draw, one.of) == ("layer-matched baseline", draw + 1, "mine")
        assert torch.equal(one.circuit.mask, layer_matched(circuit, 5 + draw).mask)
    with pytest.raises(MethodError, match="unknown kind of baseline 'easy': use one of random, layer-matched"):
        random_baselines(circuit, 1, kind="easy")


def test_both_kinds_of_baseline_are_named_apart(small_model: SmallModel, circuit: Circuit) -> None:
    baselines = random_baselines(circuit, 3) | random_baselines(circuit, 2, kind="layer-matched")
    found = evaluate(small_model("llama"), {"circuit": circuit} | baselines, {"held_out": HELD_OUT})
    faithfulness = found.row("circuit", "held_out")["faithfulness"]
    figures, verdicts = headline(found, circuit, "held_out"), verdict(found).set_index("criterion")
    for key, kind, criterion, n in (
        ("random circuits", "random", "better than random", 3),
        ("heads shuffled within layers", "layer-matched", "better than its heads shuffled", 2),
    ):
        drawn = [found.row(f"{kind} baseline {i + 1} of circuit", "held_out")["faithfulness"] for i in range(n)]
        assert found.baselines("circuit", "held_out", f"{kind} baseline")["faithfulness"].tolist() == drawn
        assert figures[f"faithfulness, {key}"].startswith(f"{np.mean(drawn) + 0.0:.3f} (")
        assert f"n = {n})" in figures[f"faithfulness, {key}"]
        p = (1 + sum(one >= faithfulness for one in drawn)) / (1 + n)
        assert verdicts.loc[criterion, "figure"] == pytest.approx(p)
        assert f"{n} draws, the best {max(drawn):.3f}" in verdicts.loc[criterion, "note"]


def test_the_headline_holds_the_numbers(evaluation: Evaluation, circuit: Circuit) -> None:
    row = evaluation.row("circuit", "held_out")
    drawn = evaluation.baselines("circuit", "held_out")["faithfulness"].tolist()
    figures = headline(evaluation, circuit, "held_out")
    assert f"{circuit.n_edges} of {circuit.graph.n_edges} edges" in figures["size"]
    assert f"{len(circuit.nodes)} nodes" in figures["size"]
    assert f"{row['faithfulness']:.3f}" in figures["faithfulness, held_out"]
    assert f"[{row['faithfulness_low']:.3f}, {row['faithfulness_high']:.3f}]" in figures["faithfulness, held_out"]
    assert f"n = {len(HELD_OUT)} facts" in figures["faithfulness, held_out"]
    expected = f"{np.mean(drawn):.3f} ({min(drawn):.3f} to {max(drawn):.3f}, n = 4)"
    assert expected in figures["faithfulness, random circuits"]


def test_without_baselines_it_says_so(small_model: SmallModel, circuit: Circuit) -> None:
    found = evaluate(small_model("llama"), {"circuit": circuit}, SPLITS)
    figures = headline(found, circuit, "held_out")
    assert figures["faithfulness, random circuits"] == "none drawn"
    assert len(figures) == 3
    assert verdict(found).set_index("criterion").loc["better than random", "note"] == "none drawn"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "accuracy"}, "unknown metric"),
        ({"intervention": "noise"}, "unknown intervention"),
        ({"intervention": "mean"}, "reference"),
    ],
)
def test_options_that_do_not_exist_are_refused(small_model: SmallModel, options: dict, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        evaluate(small_model("llama"), {}, SPLITS, **options)


def test_positional_means_must_be_long_enough(small_model: SmallModel) -> None:
    with pytest.raises(MethodError, match="positional means cover 4 positions"):
        evaluate(small_model("llama"), {}, SPLITS, intervention="positional_mean", reference=random_pairs((4, 4)))
