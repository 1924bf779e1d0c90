"""Areas under faithfulness and completeness, against single runs, loops over resamples and trapezoids by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import (
    HELD_OUT,
    NAMED,
    SIZES,
    SPLITS,
    SmallModel,
    faithful,
    resamples,
    single_values,
)

from kc_lib.circuits.areas import areas
from kc_lib.circuits.baselines import complement, complements, kind_of, random_nulls, ranking_of
from kc_lib.circuits.completeness import completeness
from kc_lib.circuits.evaluate import Evaluation, evaluate_circuits, metric_values
from kc_lib.circuits.faithfulness import faithfulness_of
from kc_lib.circuits.scores import EdgeScores
from kc_lib.circuits.selection import select
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit
from kc_lib.metrics import METRICS


@pytest.fixture(scope="module")
def evaluation(small_model: SmallModel, circuits: dict[str, Circuit]) -> Evaluation:
    return evaluate_circuits(small_model("llama"), circuits, SPLITS, batch_size=3)


def test_areas_by_hand(small_model: SmallModel, circuits: dict[str, Circuit], evaluation: Evaluation) -> None:
    found = areas(evaluation).set_index(["ranking", "split"])
    rankings = ["top", "random #1", "random #2", "ig signed", "ig signed random #1"]
    assert [ranking for ranking, split in found.index if split == "held_out"] == rankings
    assert found["kind"].unique().tolist() == ["top", "random", "ig signed", "ig signed random"]
    for split, pairs in SPLITS.items():
        values = single_values(small_model("llama"), circuits, pairs)
        for ranking in rankings:
            label, _, draw = ranking.partition(" #")
            names = [f"{label} {share:g}{draw and ' #'}{draw}" for share in SIZES[:-1]]
            names.append("top 1" if draw else f"{label} 1")  # any set of all edges is the graph
            drawn = np.stack([faithful(values, name, resamples(len(pairs))) for name in names], axis=1)
            curves = np.concatenate([[[faithful(values, name) for name in names]], drawn])
            row = found.loc[(ranking, split)]
            assert (row["n"], row["n_sizes"], row["smallest"]) == (len(pairs), 4, 0.05)
            for area, (heights, x) in {
                "cpr": (curves, SIZES),
                "cmd": (abs(1 - curves), SIZES),
                "log_area": (curves, [np.log10(share) / -np.log10(SIZES[0]) for share in SIZES]),
            }.items():
                drawn = sum((x[i + 1] - x[i]) * (heights[:, i] + heights[:, i + 1]) / 2 for i in range(3))
                low, high = np.percentile(drawn[1:], [2.5, 97.5])
                assert row[[area, f"{area}_low", f"{area}_high"]].tolist() == pytest.approx(
                    [drawn[0], low, high], rel=2e-3, abs=1e-3
                )


def test_circuits_that_do_nothing_have_mibs_areas() -> None:
    shares = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    values = {"full": [3.0, 5.0], "empty": [1.0, 1.0]} | {f"random {share:g} #1": [1.0, 1.0] for share in shares}
    found = areas(made_up(values)).iloc[0]
    assert found[["cpr", "cpr_low", "cpr_high"]].tolist() == pytest.approx([0.25] * 3)
    assert found[["cmd", "cmd_low", "cmd_high"]].tolist() == pytest.approx([0.749] * 3)
    assert found["log_area"] == pytest.approx(0.5 * np.log10(2) / 3)


def made_up(values: Mapping[str, Sequence[float]], split: str = "held_out") -> Evaluation:
    """An evaluation of given values; of its summary only what judges of values read."""
    examples = pd.DataFrame({name: list(facts) for name, facts in values.items()}).rename_axis("fact").reset_index()
    examples = examples.melt("fact", var_name="circuit", value_name="value").assign(split=split)
    summary = pd.DataFrame({"circuit": list(values), "split": split})
    return Evaluation(summary, examples, METRICS["logit_difference"])


def test_areas_need_sizes(small_model: SmallModel, circuits: dict[str, Circuit]) -> None:
    alone = evaluate_circuits(small_model("llama"), {"circuit": circuits["top 0.2"]}, SPLITS)
    with pytest.raises(MethodError, match="circuits_by_size"):
        areas(alone)


def test_areas_without_an_effect_are_undefined() -> None:
    found = areas(made_up({"full": [1.0, 2.0], "empty": [1.0, 2.0], "top 0.1": [1.0, 3.0], "top 0.5": [1.0, 2.0]})).iloc[0]
    assert found[["cpr", "cpr_low", "cpr_high", "cmd", "log_area"]].isna().all()


@pytest.mark.parametrize(
    ("name", "kind", "place"),
    [
        ("top 0.005", "top", ("top", 0.005)),
        ("top 1", "top", ("top", 1.0)),
        ("top 1e-05", "top", ("top", 1e-5)),
        ("random 0.1 #2", "random", ("random #2", 0.1)),
        ("eap_ig signed 0.005", "eap_ig signed", ("eap_ig signed", 0.005)),
        ("eap signed random 0.005 #1", "eap signed random", ("eap signed random #1", 0.005)),
        ("null #1", "null", None),
        ("profile null #12", "profile null", None),
        ("circuit", "circuit", None),
        ("full", "full", None),
        ("without null #3", "without null", None),
        ("seed 7", "seed", None),
        ("my own", "my own", None),
        ("2nd", "2nd", None),
    ],
)
def test_names_say_what_a_circuit_is(name: str, kind: str, place: tuple[str, float] | None) -> None:
    assert kind_of(name) == kind
    assert ranking_of(name) == place


# --- completeness ------------------------------------------------------------------------------------------------


def test_completeness_by_hand(small_model: SmallModel, scores: EdgeScores) -> None:
    circuit = select(scores, size=0.2)
    judged = {"circuit": circuit} | random_nulls(circuit, 2) | random_nulls(circuit, 1, kind="profile")
    evaluation = evaluate_circuits(small_model("llama"), judged | complements(judged), SPLITS, batch_size=2)
    found = completeness(evaluation).set_index(["circuit", "split"])
    assert [name for name, split in found.index if split == "discovery"] == list(judged)
    assert found["kind"].unique().tolist() == ["circuit", "null", "profile null"]
    for split, pairs in SPLITS.items():
        others = {}
        for name, own in judged.items():
            others[name] = Circuit(own.graph, torch.zeros_like(own.mask))
            for row, column in own.graph.edges.nonzero().tolist():
                others[name].mask[row, column] = not own.mask[row, column]
        values = single_values(small_model("llama"), others, pairs)
        for name in judged:
            low, high = np.percentile(faithful(values, name, resamples(len(pairs))), [2.5, 97.5])
            row, expected = found.loc[(name, split)], [faithful(values, name), low, high]
            columns = ["completeness", "completeness_low", "completeness_high"]
            assert row["n"] == len(pairs)
            assert row[columns].tolist() == pytest.approx(expected, rel=2e-3, abs=1e-3)
            columns, expected = ["necessity", "necessity_low", "necessity_high"], [1 - expected[0], 1 - high, 1 - low]
            assert row[columns].tolist() == pytest.approx(expected, rel=2e-3, abs=1e-3)
    assert found.loc[("circuit", "discovery"), "completeness"] != pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("kind", NAMED)
def test_nothing_is_left_without_the_whole_model_and_all_without_nothing(small_model: SmallModel, kind: str) -> None:
    graph = small_model(kind).residual.graph()
    judged = {"whole": Circuit(graph, graph.edges), "none": Circuit(graph, torch.zeros_like(graph.edges))}
    for intervention in ("patching", "zero"):
        evaluation = evaluate_circuits(small_model(kind), complements(judged), SPLITS, intervention=intervention)
        found = completeness(evaluation).set_index(["circuit", "split"])
        assert found.loc["whole", "completeness"].tolist() == pytest.approx([0.0, 0.0], abs=1e-3)
        assert found.loc["none", "necessity"].tolist() == pytest.approx([0.0, 0.0], abs=1e-3)


def test_a_complement_is_the_rest_of_the_graph(scores: EdgeScores) -> None:
    circuit = select(scores, size=0.3)
    rest = complement(circuit)
    assert not (rest.mask & circuit.mask).any()
    assert torch.equal(rest.mask | circuit.mask, circuit.graph.edges)
    assert torch.equal(complement(rest).mask, circuit.mask)
    assert list(complements({"a": circuit})) == ["without a"]


def test_completeness_needs_complements(evaluation: Evaluation) -> None:
    with pytest.raises(MethodError, match="complements"):
        completeness(evaluation)


# --- what they all start from ------------------------------------------------------------------------------------


def test_values_are_the_same_from_both_ways_to_run(small_model: SmallModel, circuits: dict[str, Circuit]) -> None:
    chosen = {name: circuits[name] for name in ("top 0.2", "random 0.2 #1")}
    for metric in ("logit_difference", "kl"):
        evaluation = evaluate_circuits(small_model("llama"), chosen, SPLITS, metric=metric, batch_size=2)
        values = metric_values(small_model("llama"), chosen, HELD_OUT, metric=metric, batch_size=4)
        assert list(values) == list(evaluation.values("held_out")) == ["full", "empty", *chosen]
        assert values.to_numpy() == pytest.approx(evaluation.values("held_out").to_numpy(), rel=1e-3, abs=1e-4)
    single = single_values(small_model("llama"), chosen, HELD_OUT)
    values = metric_values(small_model("llama"), chosen, HELD_OUT)
    for name in values:
        assert values[name].to_numpy() == pytest.approx(single[name], rel=1e-3, abs=1e-3)


def test_faithfulness_and_its_draws_by_hand() -> None:
    values = pd.DataFrame({"full": [4.0, 6.0, 5.0], "empty": [0.0, 1.0, -1.0], "a": [2.0, 6.0, 1.0], "b": [0.0, 1.0, -1.0]})
    found = faithfulness_of(values, seed=5)
    estimate, draws = found.of("b", "a", "full", "empty")
    assert estimate.tolist() == pytest.approx([0.0, 3.0 / 5.0, 1.0, 0.0])
    for drawn, facts in zip(draws, resamples(3, seed=5), strict=True):
        mean = values.iloc[facts].mean()
        assert drawn[1] == pytest.approx((mean["a"] - mean["empty"]) / (mean["full"] - mean["empty"]))
        assert drawn[[0, 2, 3]].tolist() == pytest.approx([0.0, 1.0, 0.0])


def test_names_of_the_two_ends_are_taken(small_model: SmallModel, circuits: dict[str, Circuit]) -> None:
    with pytest.raises(MethodError, match="named 'full'"):
        evaluate_circuits(small_model("llama"), {"full": circuits["top 0.2"]}, SPLITS)


def test_circuits_that_were_not_judged(evaluation: Evaluation) -> None:
    with pytest.raises(MethodError, match="'circuit' was not judged on split 'held_out'"):
        evaluation.row("circuit", "held_out")


def test_tables_are_the_same_from_a_file(tmp_path: Path, evaluation: Evaluation) -> None:
    loaded = Evaluation.load(evaluation.save(tmp_path / "evaluation.parquet"))
    pd.testing.assert_frame_equal(areas(loaded), areas(evaluation))
    assert loaded.splits == list(SPLITS)
