"""Areas under faithfulness and completeness, against single runs, loops over resamples and trapezoids by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import (
    FOUND,
    HELD_OUT,
    NAMED,
    SIZES,
    SPLITS,
    SmallModel,
    faithful,
    resamples,
    single_values,
)

from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.baselines import Labelled, circuits_by_size, complement, complements, labelled, random_baselines
from kc_lib.circuits.criteria import completeness
from kc_lib.circuits.evaluate import Evaluation, evaluate, faithfulness_of, metric_values
from kc_lib.circuits.scores import EdgeScores
from kc_lib.circuits.selection import select
from kc_lib.circuits.smallest import areas
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit
from kc_lib.metrics import METRICS


@pytest.fixture(scope="module")
def scores(small_model: SmallModel) -> EdgeScores:
    return score_edges(small_model("llama"), FOUND, steps=2)


@pytest.fixture(scope="module")
def circuits(scores: EdgeScores) -> dict[str, Labelled]:
    signed = circuits_by_size(scores, "signed", SIZES, n_random=1, label="ig signed")
    return circuits_by_size(scores, "absolute", SIZES, n_random=2) | signed


@pytest.fixture(scope="module")
def evaluation(small_model: SmallModel, circuits: dict[str, Labelled]) -> Evaluation:
    return evaluate(small_model("llama"), circuits, SPLITS, batch_size=3)


def test_areas_by_hand(small_model: SmallModel, circuits: dict[str, Labelled], evaluation: Evaluation) -> None:
    found = areas(evaluation)
    rankings = [
        ("top", "ranking", 0),
        ("top", "random baseline", 1),
        ("top", "random baseline", 2),
        ("ig signed", "ranking", 0),
        ("ig signed", "random baseline", 1),
    ]
    keys = ["ranking", "kind", "draw"]
    for split, pairs in SPLITS.items():
        assert found.loc[found["split"] == split, keys].to_records(index=False).tolist() == rankings
        values = single_values(small_model("llama"), circuits, pairs)
        for ranking, kind, draw in rankings:
            names = [f"{ranking} {share:g}" for share in SIZES]
            if draw:
                names[:-1] = [f"random baseline {draw} of {name}" for name in names[:-1]]
                names[-1] = "top 1"  # any set of all edges is the graph
            drawn = np.stack([faithful(values, name, resamples(len(pairs))) for name in names], axis=1)
            curves = np.concatenate([[[faithful(values, name) for name in names]], drawn])
            row = found.set_index([*keys, "split"]).loc[(ranking, kind, draw, split)]
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
    found = areas(made_up({"full": [3.0, 5.0], "empty": [1.0, 1.0]}, {share: [1.0, 1.0] for share in shares})).iloc[0]
    assert found[["cpr", "cpr_low", "cpr_high"]].tolist() == pytest.approx([0.25] * 3)
    assert found[["cmd", "cmd_low", "cmd_high"]].tolist() == pytest.approx([0.749] * 3)
    assert found["log_area"] == pytest.approx(0.5 * np.log10(2) / 3)


def made_up(ends: Mapping[str, Sequence[float]], sizes: Mapping[float, Sequence[float]]) -> Evaluation:
    """An evaluation of given values of the full and the empty circuit, and of a ranking by size."""
    values = {**ends, **{f"top {size:g}": facts for size, facts in sizes.items()}}
    examples = pd.DataFrame({name: list(facts) for name, facts in values.items()}).rename_axis("fact").reset_index()
    examples = examples.melt("fact", var_name="circuit", value_name="value").assign(split="held_out")
    table = pd.DataFrame({"circuit": list(values), "split": "held_out", "draw": 0, "of": ""})
    table["kind"] = [*ends, *["ranking"] * len(sizes)]
    table["ranking"] = [*[""] * len(ends), *["top"] * len(sizes)]
    table["size"] = [*[np.nan] * len(ends), *sizes]
    return Evaluation(table, examples, METRICS["logit_difference"])


def test_areas_need_sizes(small_model: SmallModel, circuits: dict[str, Labelled]) -> None:
    alone = evaluate(small_model("llama"), {"circuit": circuits["top 0.2"].circuit}, SPLITS)
    with pytest.raises(MethodError, match="circuits_by_size"):
        areas(alone)


def test_areas_without_an_effect_are_undefined() -> None:
    found = areas(made_up({"full": [1.0, 2.0], "empty": [1.0, 2.0]}, {0.1: [1.0, 3.0], 0.5: [1.0, 2.0]})).iloc[0]
    assert found[["cpr", "cpr_low", "cpr_high", "cmd", "log_area"]].isna().all()


def test_a_table_says_what_a_circuit_is_whatever_its_name(small_model: SmallModel, circuits: dict[str, Labelled]) -> None:
    plain = circuits["top 0.2"].circuit
    names = ("top 0.005", "random 0.1 #2", "null #1", "without null #3", "seed 7", "2nd")
    odd = Labelled(plain, "ranking", ranking="mine", size=0.2)
    given = (
        dict.fromkeys(names, plain) | {"odd": odd} | random_baselines(plain, 1, of="seed 7") | complements({"2nd": plain})
    )
    table = evaluate(small_model("llama"), given, {"held_out": HELD_OUT[:1]}).table.set_index("circuit")
    labels = table[["kind", "ranking", "size", "draw", "of"]].fillna(-1).apply(tuple, axis=1).to_dict()
    assert labels == {
        "full": ("full", "", -1, 0, ""),
        "empty": ("empty", "", -1, 0, ""),
        **dict.fromkeys(names, ("circuit", "", -1, 0, "")),
        "odd": ("ranking", "mine", 0.2, 0, ""),
        "random baseline 1 of seed 7": ("random baseline", "", -1, 1, "seed 7"),
        "without 2nd": ("complement", "", -1, 0, "2nd"),
    }


# --- completeness ------------------------------------------------------------------------------------------------


def test_completeness_by_hand(small_model: SmallModel, scores: EdgeScores) -> None:
    circuit = select(scores, size=0.2)
    judged = {"circuit": circuit} | random_baselines(circuit, 2) | random_baselines(circuit, 1, kind="layer-matched")
    evaluation = evaluate(small_model("llama"), judged | complements(judged), SPLITS, batch_size=2)
    found = completeness(evaluation).set_index(["circuit", "split"])
    assert [name for name, split in found.index if split == "discovery"] == list(judged)
    assert found["kind"].unique().tolist() == ["circuit", "random baseline", "layer-matched baseline"]
    for split, pairs in SPLITS.items():
        others = {}
        for name, one in labelled(judged).items():
            own = one.circuit
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
        evaluation = evaluate(small_model(kind), complements(judged), SPLITS, intervention=intervention)
        found = completeness(evaluation).set_index(["circuit", "split"])
        assert found.loc["whole", "completeness"].tolist() == pytest.approx([0.0, 0.0], abs=1e-3)
        assert found.loc["none", "necessity"].tolist() == pytest.approx([0.0, 0.0], abs=1e-3)


def test_a_complement_is_the_rest_of_the_graph(scores: EdgeScores) -> None:
    circuit = select(scores, size=0.3)
    rest = complement(circuit)
    assert not (rest.mask & circuit.mask).any()
    assert torch.equal(rest.mask | circuit.mask, circuit.graph.edges)
    assert torch.equal(complement(rest).mask, circuit.mask)
    without = complements({"a": circuit} | random_baselines(circuit, 3, of="a"), n_draws=1)
    assert list(without) == ["without a", "without random baseline 1 of a"]
    assert [one.of for one in without.values()] == ["a", "random baseline 1 of a"]
    assert {one.kind for one in without.values()} == {"complement"}


def test_completeness_needs_complements(evaluation: Evaluation) -> None:
    with pytest.raises(MethodError, match="complements"):
        completeness(evaluation)


# --- what they all start from ------------------------------------------------------------------------------------


def test_values_are_the_same_from_both_ways_to_run(small_model: SmallModel, circuits: dict[str, Labelled]) -> None:
    chosen = {name: circuits[name] for name in ("top 0.2", "random baseline 1 of top 0.2")}
    for metric in ("logit_difference", "kl"):
        evaluation = evaluate(small_model("llama"), chosen, SPLITS, metric=metric, batch_size=2)
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
    drawn_of = found[["b", "a", "full", "empty"]].to_numpy()
    assert drawn_of[0].tolist() == pytest.approx([0.0, 3.0 / 5.0, 1.0, 0.0])
    for drawn, facts in zip(drawn_of[1:], resamples(3, seed=5), strict=True):
        mean = values.iloc[facts].mean()
        assert drawn[1] == pytest.approx((mean["a"] - mean["empty"]) / (mean["full"] - mean["empty"]))
        assert drawn[[0, 2, 3]].tolist() == pytest.approx([0.0, 1.0, 0.0])


def test_names_of_the_two_ends_are_taken(small_model: SmallModel, circuits: dict[str, Labelled]) -> None:
    with pytest.raises(MethodError, match="named 'full'"):
        evaluate(small_model("llama"), {"full": circuits["top 0.2"]}, SPLITS)


def test_circuits_that_were_not_evaluated(evaluation: Evaluation) -> None:
    with pytest.raises(MethodError, match="'circuit' was not evaluated on split 'held_out'"):
        evaluation.row("circuit", "held_out")


def test_tables_are_the_same_from_a_file(tmp_path: Path, evaluation: Evaluation) -> None:
    loaded = Evaluation.load(evaluation.save(tmp_path / "evaluation.parquet"))
    pd.testing.assert_frame_equal(areas(loaded), areas(evaluation))
    assert loaded.splits == list(SPLITS)
