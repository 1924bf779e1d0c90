"""Edge scores against the published way of computing them, against exact patching, and against themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import (
    NAMED,
    SmallFolder,
    SmallModel,
    hf_model,
    random_edges,
    random_pairs,
    relative_gap,
    views,
)
from oracles import eap
from torch import Tensor
from transformers import PreTrainedModel

from kc_lib.circuits.attribution import path_points, score_edges
from kc_lib.circuits.evaluate import evaluate
from kc_lib.circuits.run import run_circuit
from kc_lib.circuits.scores import EdgeScores
from kc_lib.circuits.scoring.edges import edge_scores
from kc_lib.circuits.scoring.exact import patch_single_edges
from kc_lib.circuits.scoring.prepared import Prepared
from kc_lib.circuits.selection import select
from kc_lib.errors import GraphError, MethodError
from kc_lib.graph import Graph
from kc_lib.metrics import METRICS, Metric
from kc_lib.models.model import Model
from kc_lib.models.smollm2 import cached_smollm2
from kc_lib.residual.activations import Ablation, ablation, writer_outputs
from kc_lib.residual.logits import full_logits
from kc_lib.tasks.batches import TokenPair, make_batch
from kc_lib.tasks.task import load_task

METRIC_NAMES = ("logit_difference", "log_probability", "probability")


def oracle_scores(
    hf: PreTrainedModel, pairs: list[TokenPair], alphas: tuple[float, ...], metric: str, grouped: bool
) -> Tensor:
    batch = make_batch(pairs)
    return eap.oracle_edge_scores(
        hf,
        batch.clean,
        batch.corrupted,
        batch.answer_positions[:, 0],
        batch.answers[:, 0],
        batch.distractors,
        alphas,
        ungrouped=not grouped,
        metric=metric,
    )


# --- against the oracle ------------------------------------------------------------------------------------------


@views
def test_graphs_name_writers_and_readers_as_the_oracle(
    small_model: SmallModel, small_folder: SmallFolder, kind: str, grouped: bool
) -> None:
    graph, hf = small_model(kind).residual.graph(grouped), hf_model(small_folder(kind))
    assert graph.writers == eap.writer_names(hf)
    assert [reader.name for reader in graph.readers] == eap.reader_names(hf, not grouped)
    assert torch.equal(graph.edges, eap.edge_exists(hf, not grouped))


RULES = {
    "eap": ("eap", "left", (1.0,)),
    "left": ("eap_ig", "left", (0.0, 1 / 3, 2 / 3)),
    "right": ("eap_ig", "right", (1 / 3, 2 / 3, 1.0)),
    "midpoint": ("eap_ig", "midpoint", (1 / 6, 3 / 6, 5 / 6)),
    "clean_corrupted": ("clean_corrupted", "left", (0.0, 1.0)),
}


@views
@pytest.mark.parametrize("rule", RULES)
def test_scores_are_the_oracles(
    small_model: SmallModel, small_folder: SmallFolder, kind: str, grouped: bool, rule: str
) -> None:
    method, ig_rule, alphas = RULES[rule]
    pairs, hf = random_pairs(), hf_model(small_folder(kind))
    for metric in METRIC_NAMES if rule in ("eap", "midpoint") else METRIC_NAMES[:1]:
        expected = oracle_scores(hf, pairs, alphas, metric, grouped)
        found = score_edges(
            small_model(kind), pairs, method, steps=3, ig_rule=ig_rule, metric=metric, grouped=grouped, batch_size=3
        )
        assert relative_gap(found.scores, expected) <= 1e-4, metric
        assert found.scores[~found.graph.edges].eq(0).all()
        assert found.provenance["unit"] == METRICS[metric].unit


@pytest.mark.parametrize("kind", NAMED)
def test_ungrouped_copies_sum_to_the_grouped_reader(small_model: SmallModel, kind: str) -> None:
    """A shared key or value is read by all its query heads: its gradient is the sum of theirs."""
    pairs = random_pairs(seed=4)
    together = score_edges(small_model(kind), pairs, steps=2)
    apart = score_edges(small_model(kind), pairs, steps=2, grouped=False)
    group = together.graph.n_heads // together.graph.n_kv_heads
    for column, reader in enumerate(together.graph.readers):
        heads = range(reader.index * group, (reader.index + 1) * group) if reader.kind in ("k", "v") else [reader.index]
        names = [f"a{reader.layer}.h{head}<{reader.kind}>" for head in heads] if reader.kind in "qkv" else [reader.name]
        summed = sum(apart.scores[:, apart.graph.reader_index[name]] for name in names)
        assert (summed - together.scores[:, column]).abs().max() <= 1e-5 * together.scores.abs().max(), reader.name


@pytest.mark.slow
def test_smollm2_scores_are_the_oracles(smollm2: Model) -> None:
    pairs = list(load_task("country_capital", smollm2, max_facts=6).discovery[:3])
    expected = oracle_scores(hf_model(cached_smollm2()), pairs, (0.0, 0.5), "logit_difference", True)
    found = score_edges(smollm2, pairs, "eap_ig", steps=2)
    assert relative_gap(found.scores, expected) <= 1e-4


# --- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("full_answer", [False, True], ids=["first_token", "full_answer"])
@pytest.mark.parametrize("intervention", ["patching", "mean"])
def test_scores_do_not_depend_on_the_batches(
    small_model: SmallModel, kind: str, full_answer: bool, intervention: str
) -> None:
    pairs = random_pairs((5, 9, 9, 7, 4, 12), seed=5)

    def scores(batch_size: int, order: list[TokenPair]) -> Tensor:
        return score_edges(
            small_model(kind),
            order,
            steps=3,
            metric="log_probability" if full_answer else "logit_difference",
            intervention=intervention,
            full_answer=full_answer,
            batch_size=batch_size,
        ).scores

    alone = scores(1, pairs)
    assert alone.abs().max() > 0.01
    for batch_size, order in ((3, pairs), (100, pairs), (4, pairs[::-1])):
        assert relative_gap(scores(batch_size, order), alone) <= 1e-5


@pytest.mark.parametrize("kind", NAMED)
def test_evaluations_do_not_depend_on_the_batches(small_model: SmallModel, kind: str) -> None:
    model, pairs = small_model(kind), random_pairs((5, 9, 9, 7, 4, 12), seed=5)
    circuit = select(score_edges(model, pairs, "eap"), size=0.3)
    columns = ["value", "probability", "kl"]
    alone = evaluate(model, {"circuit": circuit}, {"all": pairs}, batch_size=1).examples
    alone = alone.sort_values(["circuit", "fact"])
    for batch_size in (3, 100):
        found = evaluate(model, {"circuit": circuit}, {"all": pairs}, batch_size=batch_size).examples
        found = found.sort_values(["circuit", "fact"])
        assert found["circuit"].tolist() == alone["circuit"].tolist()
        assert found["rank"].tolist() == alone["rank"].tolist()
        for column in columns:
            gap = (found[column].to_numpy() - alone[column].to_numpy()).__abs__().max()
            assert gap <= 1e-5 * alone["value"].abs().max(), column


# --- what a score is ---------------------------------------------------------------------------------------------


@views
def test_a_readers_scores_sum_to_its_linear_effect(small_model: SmallModel, kind: str, grouped: bool) -> None:
    """With a small change of every writer, removing all in-edges of a reader changes the loss by the sum of scores."""
    model = small_model(kind)
    decoder = model.residual
    graph, metric, batch = decoder.graph(grouped), METRICS["logit_difference"], make_batch(random_pairs(seed=6))
    clean = writer_outputs(decoder, batch.clean)
    small = Ablation("tensor", clean + 1e-3 * (ablation(decoder, "patching", batch).outputs - clean))
    (scores,) = edge_scores(decoder, graph, Prepared(batch, metric, small), [1.0])
    # the finite difference is taken both ways, so that second-order terms cancel
    other = Ablation("tensor", 2 * clean - small.outputs)
    largest = scores.sum(0).abs().max()
    checked = 0
    for column in dict.fromkeys(column for _, column in random_edges(graph, 6, seed=7)):
        predicted = scores[:, column].sum()
        if predicted.abs() < 0.02 * largest:  # too little for a difference of float32 losses
            continue
        mask = graph.edges.clone()
        mask[:, column] = False
        plus, minus = (
            metric.loss(run_circuit(decoder, graph, mask, batch, values), batch).double().sum() for values in (small, other)
        )
        measured = (plus - minus) / 2
        assert (measured - predicted).abs() <= 0.02 * predicted.abs() + 2e-3 * largest, graph.readers[column].name
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize(("kind", "grouped"), [("gpt2", True), ("neox", True), ("gemma2", True), ("qwen2", False)])
def test_exact_scores_are_one_removed_edge_at_a_time(small_model: SmallModel, kind: str, grouped: bool) -> None:
    model, pairs = small_model(kind), random_pairs()
    decoder = model.residual
    graph, metric, batch = decoder.graph(grouped), METRICS["logit_difference"], make_batch(pairs)
    exact = score_edges(model, pairs, "exact", grouped=grouped, batch_size=3)
    assert exact.scores[~graph.edges].eq(0).all()
    largest = exact.scores.abs().max()
    ablated = ablation(decoder, "patching", batch)
    clean = metric.loss(full_logits(decoder, batch), batch)
    edges = random_edges(graph, 8, seed=8)
    for row, column in edges:
        mask = graph.edges.clone()
        mask[row, column] = False
        measured = (metric.loss(run_circuit(decoder, graph, mask, batch, ablated), batch) - clean).mean()
        assert (measured - exact.scores[row, column]).abs() <= 1e-4 * largest
    names = [f"{graph.writers[row]}->{graph.readers[column].name}" for row, column in edges]
    frame = patch_single_edges(model, pairs, names, grouped=grouped, batch_size=2)
    assert frame["edge"].tolist() == names
    assert (frame["writer"] + "->" + frame["reader"]).tolist() == names
    expected = torch.tensor([exact.scores[edge] for edge in edges])
    assert (torch.tensor(frame["score"].to_numpy()) - expected).abs().max() <= 1e-4 * largest


def test_a_positive_score_means_that_ablating_hurts(small_model: SmallModel) -> None:
    """Scores at the last reader are exact for a metric that is linear in the final norm's output, up to the norm."""
    model, pairs = small_model("gpt2"), random_pairs(seed=9)
    approximate = score_edges(model, pairs, "eap_ig", steps=5, ig_rule="midpoint")
    exact = score_edges(model, pairs, "exact")
    edges = exact.graph.edges
    correlation = torch.corrcoef(torch.stack([approximate.scores[edges], exact.scores[edges]]))[0, 1]
    assert correlation > 0.7


def test_any_callable_metric_serves(small_model: SmallModel) -> None:
    pairs = random_pairs()
    ours = score_edges(small_model("llama"), pairs, "eap", metric="logit_difference")
    twice = Metric("twice", "logits", lambda *given: 2 * METRICS["logit_difference"].function(*given))
    worse = Metric("worse", "logits", METRICS["logit_difference"].function, higher_is_better=False)
    assert relative_gap(score_edges(small_model("llama"), pairs, "eap", metric=twice).scores, 2 * ours.scores) <= 1e-5
    assert relative_gap(score_edges(small_model("llama"), pairs, "eap", metric=worse).scores, -ours.scores) <= 1e-5


def test_scores_of_metrics_with_a_reference_vanish_at_the_clean_input(small_model: SmallModel) -> None:
    """KL to the model itself has its minimum there, so EAP sees nothing and integrated gradients see something."""
    pairs = random_pairs()
    at_clean = score_edges(small_model("gpt2"), pairs, "eap", metric="kl").scores.abs().max()
    on_the_way = score_edges(small_model("gpt2"), pairs, "eap_ig", metric="kl").scores.abs().max()
    assert at_clean <= 1e-4 * on_the_way


# --- options and files -------------------------------------------------------------------------------------------


def test_path_points() -> None:
    assert path_points("eap") == [1.0]
    assert path_points("clean_corrupted") == [0.0, 1.0]
    assert path_points("eap_ig", 4) == [0.0, 0.25, 0.5, 0.75]
    assert path_points("eap_ig", 4, "right") == [0.25, 0.5, 0.75, 1.0]
    assert path_points("eap_ig", 2, "midpoint") == [0.25, 0.75]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "acdc"}, "unknown method 'acdc'"),
        ({"method": "eap_ig", "ig_rule": "middle"}, "unknown ig_rule 'middle'"),
        ({"method": "eap_ig", "steps": 0}, "steps is 0"),
        ({"metric": "accuracy"}, "unknown metric 'accuracy'"),
        ({"intervention": "noise"}, "unknown intervention 'noise'"),
        ({"method": "clean_corrupted", "intervention": "zero"}, "needs intervention='patching'"),
    ],
)
def test_options_that_do_not_exist_are_refused(small_model: SmallModel, options: dict, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        score_edges(small_model("gpt2"), random_pairs(), **options)


def test_unknown_edges_are_refused(small_model: SmallModel) -> None:
    with pytest.raises(GraphError, match=r"a9\.h0"):
        patch_single_edges(small_model("gpt2"), random_pairs(), ["a9.h0->logits"])


@pytest.mark.parametrize("grouped", [True, False])
def test_scores_survive_a_file(tmp_path: Path, grouped: bool) -> None:
    graph = Graph(2, 4, 2, 16, parallel=True, grouped=grouped)
    scores = torch.randn(graph.edges.shape, generator=torch.Generator().manual_seed(0)) * graph.edges
    path = EdgeScores(graph, scores, {"method": "eap", "n_pairs": 3}).save(tmp_path / "scores.parquet")
    loaded = EdgeScores.load(path)
    assert loaded.graph == graph
    assert torch.equal(loaded.scores, scores)
    assert loaded.provenance == {"method": "eap", "n_pairs": 3}
    frame = loaded.to_frame()
    assert len(frame) == graph.n_edges
    assert list(frame.columns) == ["writer", "reader", "score"]
