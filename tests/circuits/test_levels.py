"""Scores below and above edges: of each fact, of groups of positions, of nodes and of neurons."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import KINDS, NAMED, SmallFolder, SmallModel, hf_model, random_pairs, relative_gap, views
from oracles import eap, levels, rules

from kc_lib.circuits.attribution import score_edges, score_neurons
from kc_lib.circuits.scores import EdgeScores, NeuronScores, PositionScores
from kc_lib.circuits.scoring.prepared import POSITION_GROUPS, by_position
from kc_lib.errors import MethodError, ModelError
from kc_lib.graph import Graph
from kc_lib.residual.activations import shared_prefix
from kc_lib.tasks.batches import TokenPair, make_batch

LENGTHS = (5, 9, 9, 7, 4)
every_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in NAMED else pytest.mark.slow) for kind in KINDS]
)

# --- facts -------------------------------------------------------------------------------------------------------


@views
def test_a_facts_scores_are_those_of_the_fact_alone(small_model: SmallModel, kind: str, grouped: bool) -> None:
    model, pairs = small_model(kind), random_pairs(LENGTHS, seed=11)
    options = {"steps": 2, "grouped": grouped, "intervention": "patching" if grouped else "zero"}
    found = score_edges(model, pairs, "eap_ig", batch_size=3, **options, per="fact")
    alone = [score_edges(model, [pair], "eap_ig", **options).scores for pair in pairs]
    assert relative_gap(found.scores, torch.stack(alone)) <= 1e-5
    edges = score_edges(model, pairs, "eap_ig", batch_size=3, **options)
    assert relative_gap(found.mean().scores, edges.scores) <= 1e-5
    assert found.mean().provenance == edges.provenance
    assert found.graph == edges.graph


@pytest.mark.parametrize("kind", NAMED)
def test_facts_with_answers_of_several_tokens(small_model: SmallModel, kind: str) -> None:
    model, pairs = small_model(kind), random_pairs(LENGTHS, seed=12)
    options = {"steps": 2, "metric": "log_probability", "full_answer": True}
    found = score_edges(model, pairs, **options, per="fact")
    alone = [score_edges(model, [pair], **options).scores for pair in pairs]
    assert relative_gap(found.scores, torch.stack(alone)) <= 1e-5


def test_facts_of_methods_without_gradients(small_model: SmallModel) -> None:
    pairs = random_pairs((4, 5), seed=13)
    found = score_edges(small_model("neox"), pairs, "exact", per="fact")
    assert relative_gap(found.mean().scores, score_edges(small_model("neox"), pairs, "exact").scores) <= 1e-5
    assert relative_gap(found.scores[0], found.scores[1]) > 0.1


def test_means_over_chosen_facts_count_repetitions(small_model: SmallModel) -> None:
    pairs = random_pairs(LENGTHS, seed=14)
    found = score_edges(small_model("gpt2"), pairs, "eap", per="fact")
    resample = [3, 0, 3, 3, 1]
    chosen = found.mean(resample)
    assert relative_gap(chosen.scores, score_edges(small_model("gpt2"), [pairs[i] for i in resample], "eap").scores) <= 1e-5
    assert chosen.provenance["facts"] == resample
    for wrong in ([], [5], [-1, 0]):
        with pytest.raises(MethodError, match="indices from 0 to 4"):
            found.mean(wrong)


# --- positions ---------------------------------------------------------------------------------------------------


def placed_pairs(seed: int) -> list[TokenPair]:
    """Pairs of unequal lengths with named positions: overlapping, at the last position, in the shared prefix, or none."""
    positions = [
        {"subject": (2, 3), "relation": (3, 4)},
        {"subject": (1, 5), "relation": (2, 3, 8)},
        {"subject": (0, 8)},
        {"relation": (1, 2, 3)},
        {},
    ]
    pairs = zip(random_pairs(LENGTHS, seed=seed), positions, strict=True)
    return [replace(pair, positions=named) for pair, named in pairs]


def groups_by_hand(pairs: list[TokenPair], n_answer: int = 1) -> list[list[str]]:
    """The group of every position of every prompt, pads "other"."""
    width = max(len(pair.clean) + min(n_answer, len(pair.answer)) - 1 for pair in pairs)
    table = []
    for pair in pairs:
        row = ["other"] * width
        for position in range(width):
            if len(pair.clean) - 1 <= position < len(pair.clean) - 1 + min(n_answer, len(pair.answer)):
                row[position] = "last"
            elif position in pair.positions.get("subject", ()):
                row[position] = "subject"
            elif position in pair.positions.get("relation", ()):
                row[position] = "relation"
        table.append(row)
    return table


@pytest.mark.parametrize("full_answer", [False, True])
def test_every_position_is_in_one_group(full_answer: bool) -> None:
    pairs = placed_pairs(seed=31)
    groups = by_position(make_batch(pairs, full_answer), pairs)
    names = [[POSITION_GROUPS[number] for number in row] for row in groups.number.tolist()]
    assert names == groups_by_hand(pairs, 99 if full_answer else 1)
    assert {name for row in names for name in row} == set(POSITION_GROUPS)


@views
@pytest.mark.parametrize("method", ["eap_ig", "gim"])
def test_scores_of_a_group_are_the_oracles_at_its_positions(
    small_model: SmallModel, small_folder: SmallFolder, kind: str, grouped: bool, method: str
) -> None:
    pairs = placed_pairs(seed=32)
    batch, hf = make_batch(pairs), hf_model(small_folder(kind))
    assert shared_prefix(small_model(kind).residual, batch, "patching").start == 2
    found = score_edges(small_model(kind), pairs, method, steps=2, grouped=grouped, per="position")
    decoder = None
    if method == "gim":
        hf = copy.deepcopy(hf).double()
        decoder = rules.with_rules(hf, "gim")
    table = groups_by_hand(pairs)
    for group, scores in zip(found.groups, found.scores, strict=True):
        expected = eap.oracle_edge_scores(
            hf,
            batch.clean,
            batch.corrupted,
            batch.answer_positions[:, 0],
            batch.answers[:, 0],
            batch.distractors,
            (1.0,) if decoder else (0.0, 0.5),
            ungrouped=not grouped,
            decoder=decoder,
            only=torch.tensor([[name == group for name in row] for row in table]),
        ).float()
        assert expected.abs().max() > 1e-3
        assert (scores - expected).abs().max() <= 1e-4 * found.scores.abs().max(), group


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("intervention", ["patching", "positional_mean"])
@pytest.mark.parametrize("full_answer", [False, True])
def test_groups_sum_to_the_edges_in_batches_of_any_size(
    small_model: SmallModel, kind: str, intervention: str, full_answer: bool
) -> None:
    pairs = placed_pairs(seed=33)
    options = {"steps": 2, "intervention": intervention, "full_answer": full_answer, "metric": "log_probability"}
    found = score_edges(small_model(kind), pairs, batch_size=2, **options, per="position")
    edges = score_edges(small_model(kind), pairs, **options)
    assert relative_gap(found.total().scores, edges.scores) <= 1e-5
    assert found.total().provenance == edges.provenance
    assert (
        relative_gap(found.scores, score_edges(small_model(kind), pairs, batch_size=1, **options, per="position").scores)
        <= 1e-5
    )


def test_methods_that_are_no_sums_over_positions_are_refused(small_model: SmallModel) -> None:
    with pytest.raises(MethodError, match="'exact' scores are no sums over positions"):
        score_edges(small_model("gpt2"), placed_pairs(seed=34), "exact", per="position")


def test_position_scores_survive_a_file(tmp_path: Path) -> None:
    graph = Graph(2, 4, 2, 16)
    scores = torch.randn(2, *graph.edges.shape, generator=torch.Generator().manual_seed(0)) * graph.edges
    given = PositionScores(graph, ("subject", "last"), scores, {"method": "eap"})
    loaded = PositionScores.load(given.save(tmp_path / "positions.parquet"))
    assert (loaded.graph, loaded.groups, loaded.provenance) == (graph, ("subject", "last"), {"method": "eap"})
    assert torch.equal(loaded.scores, scores)
    frame = loaded.to_frame()
    assert list(frame.columns) == ["group", "writer", "reader", "score"]
    assert frame["group"].value_counts().to_dict() == {"subject": graph.n_edges, "last": graph.n_edges}


# --- nodes -------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("method", ["eap_ig", "relp"])
def test_a_nodes_score_is_the_gradient_at_what_it_writes(
    small_model: SmallModel, small_folder: SmallFolder, kind: str, method: str
) -> None:
    pairs, hf = random_pairs(LENGTHS, seed=35), copy.deepcopy(hf_model(small_folder(kind))).double()
    batch = make_batch(pairs)
    expected = levels.oracle_node_scores(
        hf,
        batch.clean,
        batch.corrupted,
        batch.answer_positions[:, 0],
        batch.answers[:, 0],
        batch.distractors,
        (1.0,) if method == "relp" else (0.0, 0.5),
        rules.with_rules(hf, "relp") if method == "relp" else None,
    ).float()
    edges = score_edges(small_model(kind), pairs, method, steps=2)
    found = edges.node_scores()
    assert found["node"].tolist() == edges.graph.writers
    assert relative_gap(torch.tensor(found["score"].to_numpy()).float(), expected) <= 1e-4


def test_nodes_of_exact_effects_are_refused() -> None:
    graph = Graph(1, 2, 2, 8)
    with pytest.raises(MethodError, match="'exact' do not add up"):
        EdgeScores(graph, torch.zeros(graph.edges.shape), {"method": "exact"}).node_scores()


# --- neurons -----------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("intervention", ["patching", "zero", "mean", "positional_mean"])
def test_neuron_scores_are_the_oracles(
    small_model: SmallModel, small_folder: SmallFolder, kind: str, intervention: str
) -> None:
    pairs, hf = random_pairs(LENGTHS, seed=36), hf_model(small_folder(kind))
    batch = make_batch(pairs)
    expected = levels.oracle_neuron_scores(
        hf,
        batch.clean,
        batch.corrupted,
        batch.lengths,
        batch.answers[:, 0],
        batch.distractors,
        (0.5, 1.0),
        intervention,
    )
    options = {"steps": 2, "ig_rule": "right", "intervention": intervention}
    for batch_size in (8, 2):
        found = score_neurons(small_model(kind), pairs, batch_size=batch_size, **options)
        assert relative_gap(found.scores, expected) <= 1e-4


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("method", ["eap", "clean_corrupted", "relp", "gim"])
def test_neurons_sum_to_their_mlp(small_model: SmallModel, kind: str, method: str) -> None:
    """An MLP's output is linear in its neurons, and what it adds to the stream too unless a norm comes between."""
    pairs = random_pairs(LENGTHS, seed=37)
    neurons = score_neurons(small_model(kind), pairs, method)
    nodes = score_edges(small_model(kind), pairs, method).node_scores().set_index("node")["score"]
    expected = torch.tensor([nodes[f"m{layer}"] for layer in range(3)]).float()
    gap = relative_gap(neurons.scores.sum(1), expected)
    assert gap > 1e-3 if kind == "gemma2" else gap <= 1e-4


def test_neurons_of_other_methods_and_models_are_refused(small_model: SmallModel) -> None:
    model, pairs = small_model("gpt2"), random_pairs(LENGTHS, seed=38)
    with pytest.raises(MethodError, match="'exact' gives neurons no scores"):
        score_neurons(model, pairs, "exact")
    with pytest.raises(MethodError, match="unknown method 'atp'"):
        score_neurons(model, pairs, "atp")
    with (
        model.bridge.hooks(fwd_hooks=[("blocks.2.mlp.hook_out", lambda value, hook: 2 * value)]),
        pytest.raises(ModelError, match="MLP of layer 2"),
    ):
        score_neurons(model, pairs)


def test_neuron_scores_survive_a_file(tmp_path: Path) -> None:
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    loaded = NeuronScores.load(NeuronScores(scores, {"method": "eap"}).save(tmp_path / "neurons.parquet"))
    assert torch.equal(loaded.scores, scores)
    assert loaded.provenance == {"method": "eap"}
    frame = loaded.to_frame()
    assert list(frame.columns) == ["layer", "neuron", "score"]
    assert frame.iloc[7].tolist() == [1, 2, scores[1, 2].item()]
