"""Edges taken out one at a time, against a run of its own for each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import FOUND, HELD_OUT, SPLITS, SmallModel, faithful, resamples, single_values

from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.criteria import Minimality, edges_between_nodes, minimality
from kc_lib.circuits.selection import select
from kc_lib.errors import MethodError
from kc_lib.graph import Circuit, Graph
from kc_lib.stats import share_interval

N = 12


@pytest.fixture(scope="module")
def circuit(small_model: SmallModel) -> Circuit:
    return select(score_edges(small_model("llama"), FOUND, steps=2), size=60)


@pytest.fixture(scope="module")
def found(small_model: SmallModel, circuit: Circuit) -> Minimality:
    return minimality(small_model("llama"), circuit, SPLITS, n=N, batch_size=3)


def changed(circuit: Circuit, edge: str, kept: bool) -> Circuit:
    mask = circuit.mask.clone()
    assert mask[circuit.graph.edge_positions(edge)] != kept
    mask[circuit.graph.edge_positions(edge)] = kept
    return Circuit(circuit.graph, mask)


@pytest.mark.parametrize("split", list(SPLITS))
def test_drops_by_single_runs(small_model: SmallModel, circuit: Circuit, found: Minimality, split: str) -> None:
    edges = found.edges[found.edges["split"] == split]
    assert edges["kind"].tolist() == ["circuit"] * N + ["random"] * N
    assert edges["edge"].is_unique
    variants = {row.edge: changed(circuit, row.edge, row.kind == "random") for row in edges.itertuples()}
    values = single_values(small_model("llama"), {"circuit": circuit} | variants, SPLITS[split])
    draws = resamples(len(SPLITS[split]))
    drops: dict[str, list[np.ndarray]] = {"circuit": [], "random": []}
    for row in edges.itertuples():
        sign = 1 if row.kind == "circuit" else -1
        drop = sign * (faithful(values, "circuit") - faithful(values, row.edge))
        drawn = sign * (faithful(values, "circuit", draws) - faithful(values, row.edge, draws))
        low, high = np.percentile(drawn, [2.5, 97.5])
        assert [row.drop, row.drop_low, row.drop_high] == pytest.approx([drop, low, high], rel=2e-3, abs=1e-3)
        assert row.relative == pytest.approx(drop / faithful(values, "circuit"), rel=2e-3, abs=1e-3)
        assert f"{row.writer}->{row.reader}" == row.edge
        drops[row.kind].append(np.concatenate([[drop], drawn]))
    assert edges["drop"].abs().max() > 0.02
    summary = found.totals[found.totals["split"] == split].set_index("kind")
    assert summary["n_edges"].tolist() == [circuit.n_edges, int(edges_between_nodes(circuit).sum())]
    for kind, drawn in drops.items():
        row, own = summary.loc[kind], edges[edges["kind"] == kind]
        assert (row["n_sampled"], row["n"]) == (N, len(SPLITS[split]))
        assert row["faithfulness"] == pytest.approx(faithful(values, "circuit"), rel=1e-3)
        for name, total in {"mean_drop": np.mean(drawn, axis=0), "sum_drop": np.sum(drawn, axis=0)}.items():
            low, high = np.percentile(total[1:], [2.5, 97.5])
            columns = [name, f"{name}_low", f"{name}_high"]
            assert row[columns].tolist() == pytest.approx([total[0], low, high], rel=2e-3, abs=2e-3)
        lowers = sum(low > 0 for low in own["drop_low"])
        raises = sum(high < 0 for high in own["drop_high"])
        assert (row["share_lowers"], row["share_raises"]) == (lowers / N, raises / N)
        assert row["share"] == pytest.approx((lowers + raises) / N)
        assert (row["share_low"], row["share_high"]) == pytest.approx(share_interval(lowers + raises, N))


def test_edges_are_sampled_by_seed_or_taken_whole(small_model: SmallModel, circuit: Circuit, found: Minimality) -> None:
    model, splits = small_model("llama"), {"held_out": HELD_OUT[:2]}

    def edges(n: int, seed: int) -> dict[str, set[str]]:
        drawn = minimality(model, circuit, splits, n=n, seed=seed).edges
        return {kind: set(rows["edge"]) for kind, rows in drawn.groupby("kind")}

    first = {kind: set(rows["edge"]) for kind, rows in found.edges.groupby("kind")}
    assert edges(N, 0) == first != edges(N, 1)
    frame = circuit.to_frame()
    whole = edges(10**6, 0)
    assert whole["circuit"] == set(frame["writer"] + "->" + frame["reader"])
    assert len(whole["random"]) == int(edges_between_nodes(circuit).sum())


def test_random_edges_run_between_the_circuits_nodes() -> None:
    graph = Graph(2, 2, 1, 8)
    mask = torch.zeros_like(graph.edges)
    for edge in ("input->a0.h1<q>", "a0.h1->m1", "m1->logits"):
        mask[graph.edge_positions(edge)] = True
    outside = edges_between_nodes(Circuit(graph, mask))
    names = {f"{graph.writers[row]}->{graph.readers[column].name}" for row, column in outside.nonzero().tolist()}
    assert names == {"input->a0.h0<k>", "input->a0.h0<v>", "input->m1", "input->logits", "a0.h1->logits"}


def test_a_whole_model_has_no_edge_to_add(small_model: SmallModel) -> None:
    graph = Graph(3, 4, 2, 32)
    found = minimality(small_model("llama"), Circuit(graph, graph.edges), {"held_out": HELD_OUT}, n=3)
    assert found.edges["kind"].tolist() == ["circuit"] * 3
    random = found.totals.set_index("kind").loc["random"]
    assert (random["n_edges"], random["n_sampled"]) == (0, 0)
    assert random[["mean_drop", "share", "share_low"]].isna().all()


def test_one_fact_has_drops_without_intervals(small_model: SmallModel, circuit: Circuit) -> None:
    found = minimality(small_model("llama"), circuit, {"held_out": HELD_OUT[:1]}, n=3)
    assert found.edges["drop"].notna().all()
    assert found.edges["drop_low"].isna().all()
    row = found.totals.iloc[0]
    assert row["mean_drop"] == pytest.approx(found.edges["drop"][:3].mean())
    assert np.isnan([row["share"], row["mean_drop_low"]]).all()


def test_it_survives_a_file(tmp_path: Path, found: Minimality) -> None:
    loaded = Minimality.load(found.save(tmp_path / ".minimality.parquet"))
    pd.testing.assert_frame_equal(loaded.edges, found.edges)
    pd.testing.assert_frame_equal(loaded.totals, found.totals)
    undefined = Minimality(found.edges, found.totals.assign(share=float("nan")))
    assert Minimality.load(undefined.save(tmp_path / "undefined.parquet")).totals["share"].isna().all()


@pytest.mark.parametrize("options", [{"n": 0}, {"metric": "accuracy"}, {"intervention": "noise"}])
def test_options_that_do_not_exist_are_refused(small_model: SmallModel, circuit: Circuit, options: dict) -> None:
    with pytest.raises(MethodError):
        minimality(small_model("llama"), circuit, SPLITS, **options)


def test_a_circuit_without_edges_has_none_to_take_out(small_model: SmallModel, circuit: Circuit) -> None:
    empty = Circuit(circuit.graph, torch.zeros_like(circuit.mask))
    with pytest.raises(MethodError, match="0 edges"):
        minimality(small_model("llama"), empty, SPLITS)
