"""Circuits judged: faithfulness by hand, the file of an evaluation, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import NAMED, SmallModel, native_logits, random_pairs

from kc_lib.circuits.attribution import attribute_edges
from kc_lib.circuits.baselines import SHARES, circuits_by_size, random_nulls
from kc_lib.circuits.conclusion import conclusion, headline
from kc_lib.circuits.evaluate import Evaluation, evaluate_circuits
from kc_lib.circuits.run import run_circuit
from kc_lib.circuits.scores import EdgeScores
from kc_lib.circuits.selection import profile_null, random_circuit, select
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit
from kc_lib.metrics import METRICS
from kc_lib.residual.activations import ablation
from kc_lib.tasks.batches import TokenPair, make_batch

FOUND, HELD_OUT = random_pairs(seed=11), random_pairs((6, 8, 7, 7, 5), seed=12)
SPLITS = {"discovery": FOUND, "held_out": HELD_OUT}


@pytest.fixture(scope="module")
def scores(small_model: SmallModel) -> EdgeScores:
    return attribute_edges(small_model("llama"), FOUND, steps=2)


@pytest.fixture(scope="module")
def circuit(scores: EdgeScores) -> Circuit:
    return select(scores, size=0.4)


@pytest.fixture(scope="module")
def evaluation(small_model: SmallModel, circuit: Circuit) -> Evaluation:
    circuits = {"circuit": circuit, **random_nulls(circuit, 4)}
    return evaluate_circuits(small_model("llama"), circuits, SPLITS, batch_size=2)


def test_every_circuit_has_a_row_on_every_split(evaluation: Evaluation, circuit: Circuit) -> None:
    names = ["full", "empty", "circuit", *(f"null #{i}" for i in (1, 2, 3, 4))]
    assert evaluation.summary["circuit"].tolist() == names * 2
    assert evaluation.summary["kind"].tolist() == ["full", "empty", "circuit", *["null"] * 4] * 2
    assert len(evaluation.examples) == len(names) * (len(FOUND) + len(HELD_OUT))
    own = evaluation.row("circuit", "held_out")
    assert (own["n"], own["n_edges"], own["share"]) == (len(HELD_OUT), circuit.n_edges, circuit.share)
    assert own["metric"] == "logit_difference"
    assert evaluation.row("full", "discovery")["share"] == 1.0


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
    found = evaluate_circuits(model, whole, SPLITS, intervention=intervention, reference=FOUND)
    for split in SPLITS:
        for name, expected in {"full": 1.0, "whole": 1.0, "empty": 0.0, "none": 0.0}.items():
            row = found.row(name, split)
            assert row["faithfulness"] == pytest.approx(expected, abs=1e-3)
        assert found.row("full", split)["kl"] == pytest.approx(0, abs=1e-6)
        assert found.row("whole", split)["kl"] == pytest.approx(0, abs=1e-5)
        assert found.row("empty", split)["kl"] > 1e-3


def test_faithfulness_without_an_effect_is_undefined(small_model: SmallModel, circuit: Circuit) -> None:
    same = [TokenPair(pair.clean, pair.clean, pair.answer, pair.distractor, {}, {}) for pair in FOUND]
    found = evaluate_circuits(small_model("llama"), {"circuit": circuit}, {"held_out": same})
    row = found.row("circuit", "held_out")
    assert np.isnan([row["faithfulness"], row["faithfulness_low"], row["faithfulness_high"]]).all()
    assert "undefined" in conclusion(found, circuit, "held_out")
    assert "nan" in headline(found, circuit, "held_out")["faithfulness, held_out"]


def test_metrics_where_less_is_better_also_run_from_zero_to_one(small_model: SmallModel, circuit: Circuit) -> None:
    found = evaluate_circuits(small_model("llama"), {"circuit": circuit}, SPLITS, metric="kl")
    assert found.row("full", "discovery")["faithfulness"] == pytest.approx(1.0)
    assert found.row("empty", "discovery")["faithfulness"] == pytest.approx(0.0)
    assert found.row("circuit", "discovery")["value"] == pytest.approx(found.row("circuit", "discovery")["kl"])


def test_an_evaluation_survives_a_file(tmp_path: Path, evaluation: Evaluation) -> None:
    path = evaluation.save(tmp_path / "evaluation.parquet")
    loaded = Evaluation.load(path)
    pd.testing.assert_frame_equal(loaded.summary, evaluation.summary)
    pd.testing.assert_frame_equal(loaded.examples, evaluation.examples)
    assert loaded.metric is METRICS["logit_difference"]


def test_circuits_by_size(scores: EdgeScores) -> None:
    circuits = circuits_by_size(scores, shares=(0.05, 0.3, 1.0), n_random=2)
    assert list(circuits) == [
        "top 0.05",
        "top 0.3",
        "top 1",
        "random 0.05 #1",
        "random 0.05 #2",
        "random 0.3 #1",
        "random 0.3 #2",
    ]
    assert circuits["top 1"].n_edges == scores.graph.n_edges
    for share in ("0.05", "0.3"):
        top = circuits[f"top {share}"]
        assert torch.equal(top.mask, select(scores, "absolute", float(share), fill=False).mask)
        assert top.n_edges <= float(share) * scores.graph.n_edges
        assert circuits[f"random {share} #1"].n_edges == circuits[f"random {share} #2"].n_edges == top.n_edges
        assert not torch.equal(circuits[f"random {share} #1"].mask, circuits[f"random {share} #2"].mask) or not top.n_edges
    assert SHARES == (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def test_several_rankings_in_one_evaluation(scores: EdgeScores) -> None:
    circuits = circuits_by_size(scores, shares=(0.3, 1.0), n_random=1)
    circuits |= circuits_by_size(scores, "signed", shares=(0.3, 1.0), n_random=1, label="ig signed")
    assert list(circuits) == [
        "top 0.3",
        "top 1",
        "random 0.3 #1",
        "ig signed 0.3",
        "ig signed 1",
        "ig signed random 0.3 #1",
    ]
    assert torch.equal(circuits["ig signed 0.3"].mask, select(scores, "signed", 0.3, fill=False).mask)
    assert circuits["ig signed random 0.3 #1"].n_edges == circuits["ig signed 0.3"].n_edges


def test_nulls_of_both_kinds(circuit: Circuit) -> None:
    connected, profile = random_nulls(circuit, 3, seed=5), random_nulls(circuit, 2, seed=5, kind="profile")
    assert list(connected) == ["null #1", "null #2", "null #3"]
    assert list(profile) == ["profile null #1", "profile null #2"]
    for draw, null in enumerate(connected.values()):
        assert torch.equal(null.mask, random_circuit(circuit.graph, circuit.n_edges, 5 + draw).mask)
    for draw, null in enumerate(profile.values()):
        assert torch.equal(null.mask, profile_null(circuit, 5 + draw).mask)
    with pytest.raises(MethodError, match="unknown kind of null 'easy'"):
        random_nulls(circuit, 1, kind="easy")


def test_both_kinds_of_null_are_named_apart(small_model: SmallModel, circuit: Circuit) -> None:
    nulls = random_nulls(circuit, 3) | random_nulls(circuit, 2, kind="profile")
    found = evaluate_circuits(small_model("llama"), {"circuit": circuit} | nulls, {"held_out": HELD_OUT})
    own = found.row("circuit", "held_out")["faithfulness"]
    figures, text = headline(found, circuit, "held_out"), conclusion(found, circuit, "held_out")
    for key, kind, n in (("random circuits", "null", 3), ("heads shuffled within layers", "profile null", 2)):
        drawn = [found.row(f"{kind} #{i + 1}", "held_out")["faithfulness"] for i in range(n)]
        assert figures[f"faithfulness, {key}"].startswith(f"{np.mean(drawn) + 0.0:.3f} (")
        assert f"n = {n})" in figures[f"faithfulness, {key}"]
        p = (1 + sum(null >= own for null in drawn)) / (1 + n)
        assert f"{max(drawn):.2f} at most (p = {p:.2f}, {n} draws)" in text


def test_what_is_said_holds_the_numbers(evaluation: Evaluation, circuit: Circuit) -> None:
    row = evaluation.row("circuit", "held_out")
    nulls = [evaluation.row(f"null #{i}", "held_out")["faithfulness"] for i in (1, 2, 3, 4)]
    figures = headline(evaluation, circuit, "held_out")
    assert f"{circuit.n_edges} of {circuit.graph.n_edges} edges" in figures["size"]
    assert f"{len(circuit.nodes)} nodes" in figures["size"]
    assert f"{row['faithfulness']:.3f}" in figures["faithfulness, held_out"]
    assert f"[{row['faithfulness_low']:.3f}, {row['faithfulness_high']:.3f}]" in figures["faithfulness, held_out"]
    assert f"n = {len(HELD_OUT)} facts" in figures["faithfulness, held_out"]
    assert f"{np.mean(nulls):.3f} ({min(nulls):.3f} to {max(nulls):.3f}, n = 4)" in figures["faithfulness, random circuits"]
    text = conclusion(evaluation, circuit, "held_out")
    assert f"{circuit.n_edges:,} edges" in text
    assert f"**{row['faithfulness']:.2f}**" in text
    assert f"{len(HELD_OUT)} held-out facts" in text
    p = (1 + sum(null >= row["faithfulness"] for null in nulls)) / 5
    assert f"p = {p:.2f}, 4 draws" in text
    assert f"{row['hit_at_10']:.0%}" in text
    assert "No facts were held out" not in text
    assert "No facts were held out" in conclusion(evaluation, circuit, "discovery")


def test_without_nulls_it_says_so(small_model: SmallModel, circuit: Circuit) -> None:
    found = evaluate_circuits(small_model("llama"), {"circuit": circuit}, SPLITS)
    assert "No random circuits" in conclusion(found, circuit, "held_out")
    figures = headline(found, circuit, "held_out")
    assert figures["faithfulness, random circuits"] == "none drawn"
    assert len(figures) == 3


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
        evaluate_circuits(small_model("llama"), {}, SPLITS, **options)


def test_positional_means_must_be_long_enough(small_model: SmallModel) -> None:
    with pytest.raises(MethodError, match="positional means cover 4 positions"):
        evaluate_circuits(small_model("llama"), {}, SPLITS, intervention="positional_mean", reference=random_pairs((4, 4)))
