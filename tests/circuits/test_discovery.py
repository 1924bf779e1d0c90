"""Discovery methods beside EAP: integrated activations, the QK fix, information flow routes, ensembles."""

from __future__ import annotations

import pytest
import torch
from helpers import SmallFolder, SmallModel, hf_model, random_pairs, relative_gap, views
from oracles import discovery
from torch import Tensor

from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.discovery import ensemble
from kc_lib.circuits.scores import EdgeScores
from kc_lib.circuits.scoring.activation_path import activation_edge_scores
from kc_lib.circuits.scoring.edges import edge_scores
from kc_lib.circuits.scoring.exact import patch_single_edges
from kc_lib.circuits.scoring.prepared import Prepared, one_group
from kc_lib.circuits.scoring.qk_fix import qk_fix_scores
from kc_lib.errors import MethodError
from kc_lib.graph import Graph
from kc_lib.metrics import METRICS
from kc_lib.models.model import Model
from kc_lib.residual.activations import NO_PREFIX, Ablation, ablation, shared_prefix, writer_outputs
from kc_lib.residual.logits import reference_means
from kc_lib.tasks.batches import TokenPair, make_batch

NEW = ("eap_ig_activations", "qk_fix", "flow_routes")
SHAPES = ["gpt2", "neox", "qwen2", "gemma2"]  # one kind of each decoder, for tests of arithmetic


# --- against the oracles -----------------------------------------------------------------------------------------


def ablated_values(model: Model, pairs: list[TokenPair], intervention: str, folder_outputs: Tensor) -> Tensor:
    """The values an intervention gives every writer, as the oracles take them: [U, B, P, D]."""
    if intervention == "patching":
        return folder_outputs
    decoder, batch = model.residual, make_batch(pairs)
    return ablation(decoder, intervention, batch, reference_means(decoder, intervention, pairs, 3)).outputs.expand(
        folder_outputs.shape
    )


@views
def test_activation_scores_are_the_oracles(
    small_model: SmallModel, small_folder: SmallFolder, kind: str, grouped: bool
) -> None:
    model, hf, pairs = small_model(kind), hf_model(small_folder(kind)), random_pairs()
    batch = make_batch(pairs)
    corrupted = discovery.all_writer_outputs(hf, batch.corrupted)
    for rule, alphas, intervention in (("left", (0.0, 0.5), "patching"), ("midpoint", (0.5,), "mean")):
        expected = discovery.oracle_activation_scores(
            hf,
            batch.clean,
            ablated_values(model, pairs, intervention, corrupted),
            batch.answer_positions[:, 0],
            batch.answers[:, 0],
            batch.distractors,
            alphas,
            ungrouped=not grouped,
        )
        found = score_edges(
            model,
            pairs,
            "eap_ig_activations",
            steps=len(alphas),
            ig_rule=rule,
            intervention=intervention,
            grouped=grouped,
            batch_size=4,
        )
        assert relative_gap(found.scores, expected) <= 1e-4, rule
        assert found.scores[~found.graph.edges].eq(0).all()


@views
def test_qk_fix_scores_are_the_oracles(small_model: SmallModel, small_folder: SmallFolder, kind: str, grouped: bool) -> None:
    intervention = "zero" if kind in ("llama", "phi") else "patching"
    model, hf, pairs = small_model(kind), hf_model(small_folder(kind)), random_pairs()
    batch = make_batch(pairs)
    corrupted = discovery.all_writer_outputs(hf, batch.corrupted)
    expected = discovery.oracle_qk_fix(
        hf,
        batch.clean,
        ablated_values(model, pairs, intervention, corrupted),
        batch.answer_positions[:, 0],
        batch.answers[:, 0],
        batch.distractors,
        ungrouped=not grouped,
    )
    found = score_edges(model, pairs, "qk_fix", intervention=intervention, grouped=grouped, batch_size=4)
    eap = score_edges(model, pairs, "eap", intervention=intervention, grouped=grouped, batch_size=4)
    fixed = torch.tensor([reader.kind in ("q", "k") for reader in found.graph.readers])
    assert expected[:, fixed].abs().max() > 0.01
    assert relative_gap(found.scores[:, fixed], expected[:, fixed]) <= 1e-4
    assert relative_gap(found.scores[:, ~fixed], eap.scores[:, ~fixed]) <= 1e-6


@views
def test_flow_scores_are_the_oracles(small_model: SmallModel, small_folder: SmallFolder, kind: str, grouped: bool) -> None:
    pairs = random_pairs((4, 7, 5))
    expected = discovery.oracle_flow_scores(
        hf_model(small_folder(kind)), [pair.clean for pair in pairs], ungrouped=not grouped
    )
    found = score_edges(small_model(kind), pairs, "flow_routes", grouped=grouped, batch_size=3)
    assert relative_gap(found.scores, expected) <= 1e-4


# --- batches and facts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("method", NEW)
def test_scores_do_not_depend_on_the_batches(small_model: SmallModel, kind: str, method: str) -> None:
    pairs = random_pairs((5, 9, 9, 7, 4), seed=5)
    options = {"steps": 2, "metric": "log_probability", "full_answer": True}
    alone = score_edges(small_model(kind), pairs, method, batch_size=1, **options).scores
    assert alone.abs().max() > 0.01
    for batch_size, order in ((3, pairs), (100, pairs[::-1])):
        found = score_edges(small_model(kind), order, method, batch_size=batch_size, **options)
        assert relative_gap(found.scores, alone) <= 1e-5
    facts = score_edges(small_model(kind), pairs, method, batch_size=4, **options, per="fact")
    assert relative_gap(facts.mean().scores, alone) <= 1e-5
    one = score_edges(small_model(kind), pairs[1:2], method, **options)
    assert relative_gap(facts.scores[1], one.scores) <= 1e-5


@pytest.mark.parametrize("kind", SHAPES)
def test_shared_positions_change_nothing(small_model: SmallModel, kind: str) -> None:
    decoder = small_model(kind).residual
    graph, metric, batch = decoder.graph(), METRICS["logit_difference"], make_batch(random_pairs())
    prefix = shared_prefix(decoder, batch, "patching")
    assert prefix.start == 2
    for fixed in (True, False):
        scores = []
        for used in (NO_PREFIX, prefix):
            prepared = Prepared(batch, metric, ablation(decoder, "patching", batch, prefix=used), prefix=used)
            if fixed:
                scores.append(qk_fix_scores(decoder, graph, prepared))
            else:
                scores.append(activation_edge_scores(decoder, graph, prepared, [0.5], one_group(batch))[0])
        assert relative_gap(scores[1], scores[0]) <= 1e-5


# --- what the scores are -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_integrating_the_input_writer_is_eap_ig(small_model: SmallModel, kind: str) -> None:
    pairs = random_pairs(seed=3)
    inputs = score_edges(small_model(kind), pairs, "eap_ig", steps=3, ig_rule="midpoint")
    activations = score_edges(small_model(kind), pairs, "eap_ig_activations", steps=3, ig_rule="midpoint")
    assert relative_gap(activations.scores[0], inputs.scores[0]) <= 1e-5
    assert relative_gap(activations.scores[1:], inputs.scores[1:]) > 0.01


@pytest.mark.parametrize("kind", SHAPES)
def test_integrals_of_the_last_writer_are_exact(small_model: SmallModel, kind: str) -> None:
    """Its only reader is the logits, so integrated gradients are complete: many steps give the edge's exact effect."""
    model, pairs = small_model(kind), random_pairs(seed=4)
    edge = "m2->logits"
    exact = patch_single_edges(model, pairs, [edge])["score"].item()
    scores = {steps: score_edges(model, pairs, "eap_ig_activations", steps=steps, ig_rule="midpoint") for steps in (2, 50)}
    position = scores[50].graph.edge_positions(edge)
    assert abs(exact) > 0.01
    assert abs(scores[50].scores[position].item() - exact) <= 0.01 * abs(exact)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_qk_fix_of_a_small_change_is_eap(small_model: SmallModel, kind: str) -> None:
    """The fix is of higher order: where patterns move little it is the linear estimate, where they move much it is not."""
    decoder = small_model(kind).residual
    graph, metric, batch = decoder.graph(), METRICS["logit_difference"], make_batch(random_pairs(seed=6))
    clean = writer_outputs(decoder, batch.clean)
    change = ablation(decoder, "patching", batch).outputs - clean
    gaps = []
    for size in (1e-2, 1.0):
        prepared = Prepared(batch, metric, Ablation("tensor", clean + size * change))
        fixed = qk_fix_scores(decoder, graph, prepared)
        (linear,) = edge_scores(decoder, graph, prepared, [1.0])
        gaps.append(relative_gap(fixed, linear))
    assert gaps[0] <= 0.05 < gaps[1]


def test_the_qk_fix_runs_any_number_of_writers_at_once(small_model: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs()
    together = score_edges(small_model("qwen2"), pairs, "qk_fix").scores
    monkeypatch.setattr("kc_lib.circuits.scoring.qk_fix.WRITERS_AT_ONCE", 2)
    assert relative_gap(score_edges(small_model("qwen2"), pairs, "qk_fix").scores, together) <= 1e-6


@pytest.mark.parametrize("kind", SHAPES)
def test_flow_shares_sum_to_one_and_need_no_corrupted_prompt(small_model: SmallModel, kind: str) -> None:
    pairs = random_pairs()
    shares = score_edges(small_model(kind), pairs, "flow_routes")
    assert shares.scores.min() >= 0
    assert (shares.scores.sum(0) - 1).abs().max() <= 1e-5
    same = [TokenPair(p.clean, p.clean, p.answer, p.distractor, p.positions, p.text) for p in pairs]
    other = score_edges(small_model(kind), same, "flow_routes", metric="kl", intervention="mean")
    assert torch.equal(other.scores, shares.scores)
    assert other.provenance["metric"] is None
    assert other.provenance["unit"] == "share of the reader's input"


# --- ensembles ---------------------------------------------------------------------------------------------------


def random_scores(seed: int, graph: Graph | None = None, **provenance: str) -> EdgeScores:
    graph = graph or Graph(2, 4, 2, 16)
    generator = torch.Generator().manual_seed(seed)
    return EdgeScores(graph, torch.randn(graph.edges.shape, generator=generator) * graph.edges, provenance)


@pytest.mark.parametrize("how", ["mean", "min", "max"])
@pytest.mark.parametrize("absolute", [False, True])
def test_an_ensemble_is_the_combination_of_z_scores(how: str, absolute: bool) -> None:
    members = [random_scores(0, method="eap"), random_scores(1, method="qk_fix"), random_scores(2)]
    members[1] = EdgeScores(members[1].graph, 1000 * members[1].scores, members[1].provenance)
    found = ensemble(members, how, absolute)
    edges = members[0].graph.edges
    standardised = []
    for member in members:
        values = [abs(value) if absolute else value for value in member.scores[edges].tolist()]
        mean = sum(values) / len(values)
        spread = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
        standardised.append([(value - mean) / spread for value in values])
    combine = {"mean": lambda column: sum(column) / len(column), "min": min, "max": max}[how]
    expected = torch.tensor([combine(column) for column in zip(*standardised, strict=True)])
    assert (found.scores[edges] - expected).abs().max() <= 1e-5
    assert found.scores[~edges].eq(0).all()
    assert found.provenance["method"] == f"ensemble_{how}"
    assert [member.get("method") for member in found.provenance["members"]] == ["eap", "qk_fix", None]


def test_an_ensemble_survives_a_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = ensemble([random_scores(0, model="m", method="eap"), random_scores(1, model="m")], "mean")
    loaded = EdgeScores.load(found.save(tmp_path_factory.mktemp("ensemble") / "scores.parquet"))
    assert torch.equal(loaded.scores, found.scores)
    assert loaded.provenance == found.provenance


def test_ensembles_that_make_no_sense_are_refused() -> None:
    one = random_scores(0, model="gpt2")
    constant = EdgeScores(one.graph, one.graph.edges.float(), {"method": "eap"})
    broken = EdgeScores(one.graph, one.scores / 0, {"method": "eap"})
    for members, how, message in (
        ([one], "median", "unknown combination 'median'"),
        ([], "mean", "at least one"),
        ([one, random_scores(1, Graph(3, 4, 2, 16))], "mean", "different graphs"),
        ([one, random_scores(1, Graph(2, 4, 2, 16, grouped=False))], "mean", "different graphs"),
        ([one, random_scores(1, model="gpt3")], "mean", "different models"),
        ([one, constant], "mean", "eap are all equal"),
        ([one, broken], "mean", "eap are not finite"),
    ):
        with pytest.raises(MethodError, match=message):
            ensemble(members, how)


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("eap_ig_activations", {"steps": 0}, "steps is 0"),
        ("eap_ig_activations", {"ig_rule": "middle"}, "unknown ig_rule 'middle'"),
        ("qk_fix", {"intervention": "noise"}, "unknown intervention 'noise'"),
        ("flow_routes", {"metric": "accuracy"}, "unknown metric 'accuracy'"),
    ],
)
def test_options_that_do_not_exist_are_refused(small_model: SmallModel, method: str, options: dict, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        score_edges(small_model("gpt2"), random_pairs(), method, **options)
