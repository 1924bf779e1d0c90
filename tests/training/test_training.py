"""Measures over a training: the loop and what it keeps, each measure against plain runs, and what is said of time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from helpers import CONFIGS, frame_of, refused, values_of
from oracles.patching import oracle_circuit_logits, oracle_patch_edge

from kc_lib.circuits.attribution import score_edges
from kc_lib.circuits.baselines import random_circuit
from kc_lib.circuits.criteria import resampled_circuits
from kc_lib.circuits.smallest import smallest_faithful
from kc_lib.errors import KnowledgeCircuitsError, MethodError, ModelError, TaskError
from kc_lib.graph import Circuit, Graph
from kc_lib.heads.general import head_scores
from kc_lib.heads.head_scores import GeneralHeadScores, HeadScores
from kc_lib.models.checkpoints import Checkpoint, checkpoints_of, load_checkpoint
from kc_lib.models.load import load_model
from kc_lib.models.model import Model
from kc_lib.models.shipped import nano_steps
from kc_lib.tasks.batches import TokenPair
from kc_lib.tasks.task import load_task
from kc_lib.training.behaviour import behaviour_rows
from kc_lib.training.drawn import DrawnTask, DrawnTasks, draw_tasks
from kc_lib.training.figures import (
    behaviour_over_training,
    circuit_over_training,
    consistency_over_training,
    heads_over_training,
    similarity_over_training,
)
from kc_lib.training.ioi_algorithm import _readers, algorithm_shares, edge_effects
from kc_lib.training.measures import (
    circuit_rows,
    consistency_rows,
    direct_rows,
    head_rows,
    training_measures,
)
from kc_lib.training.over_training import over_training
from kc_lib.training.result import COLUMNS, MEASURED, TrainingResult, emergence, over_draws
from kc_lib.training.summary import algorithm_table, circuit_table, similarities, training_headline
from tools.train_nano.train import vocabulary
from tools.train_nano.vocabulary import causal_tokenizer

STEPS = (0, 2, 6)
LAST = nano_steps()[-1]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-NeoX that reads nano's words, at three steps of a training on one sentence."""
    root = tmp_path_factory.mktemp("trained")
    words = causal_tokenizer(vocabulary())
    torch.manual_seed(0)
    config = CONFIGS["neox"]()
    config.vocab_size = len(words)
    model = tf.AutoModelForCausalLM.from_config(config)
    tokens = torch.tensor([words("The capital of France is Paris").input_ids])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            model.save_pretrained(root / f"step{step}")
            words.save_pretrained(root / f"step{step}")
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    return root


@pytest.fixture(scope="session")
def nano() -> Model:
    return load_model("nano", device="cpu")


@pytest.fixture(scope="session")
def drawn(nano: Model) -> DrawnTasks:
    return draw_tasks(["ioi", "agreement"], nano, seeds=2, n_prompts=12)


# ---------------------------------------------------------------------------------------------------- prompts


def test_draws_are_of_every_task_and_seed_and_half_held_out(nano: Model, drawn: DrawnTasks) -> None:
    assert [(draw.name, draw.seed) for draw in drawn.draws] == [("ioi", 0), ("ioi", 1), ("agreement", 0), ("agreement", 1)]
    assert (drawn.names, drawn.seeds, drawn.name) == (["ioi", "agreement"], [0, 1], "ioi+agreement")
    for draw in drawn.draws:
        assert len(draw.task.discovery) == len(draw.task.test) == 6
    first, second = (draw.task.discovery + draw.task.test for draw in drawn.draws[:2])
    assert {pair.clean for pair in first} != {pair.clean for pair in second}
    assert drawn.report["used"] == 48
    again = draw_tasks(["ioi", "agreement"], nano, seeds=2, n_prompts=12)
    assert again.hash == drawn.hash
    assert draw_tasks(["ioi", "agreement"], nano, seeds=2, n_prompts=12, seed=1).hash != drawn.hash


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        ([], {}, "no tasks"),
        (["ioi", "ioi"], {}, "'ioi' is given twice"),
        (["ioi"], {"seeds": 0}, "seeds is 0"),
        (["ioi"], {"n_prompts": 3}, "n_prompts is 3"),
        (["absent"], {}, "'absent'"),
    ],
)
def test_draws_that_cannot_be(nano: Model, names: list[str], options: dict[str, int], said: str) -> None:
    assert said in refused(TaskError, draw_tasks, names, nano, **options)


def test_years_need_a_tokenizer_that_splits_them(small_model: Callable[[str], Model]) -> None:
    assert "two tokens of two digits" in refused(TaskError, draw_tasks, ["greater_than"], small_model("neox"))


# ---------------------------------------------------------------------------------------------------- the loop


class Counting:
    """A measure that reads one weight, counts its calls, and fails at its n-th if asked."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self.fails_at = 0, fails_at
        self.models: list[Model] = []

    def __call__(self, model: Model, tasks: DrawnTasks) -> pd.DataFrame:
        self.calls += 1
        self.models.append(model)
        if self.calls == self.fails_at:
            raise MethodError("it fails here")
        row = {"task": "", "seed": 0, "quantity": "weight", "part": "", "value": weight_of(model)}
        return pd.DataFrame([row]).reindex(columns=list(MEASURED)).fillna({"of": "", "note": ""})


def weight_of(model: Model) -> float:
    return float(model.residual.W_U.sum())


def test_every_measure_at_every_checkpoint(trained: Path, drawn: DrawnTasks, tmp_path: Path) -> None:
    checkpoints = checkpoints_of(trained, tokens_per_step=10)
    one, two = Counting(), Counting()
    result = over_training(checkpoints, drawn, {"one": one, "two": two}, device="cpu")
    assert all(a is b for a, b in zip(one.models, two.models, strict=True))  # a checkpoint is loaded once
    assert tuple(result.frame.columns) == COLUMNS
    assert result.frame["step"].tolist() == [0, 0, 2, 2, 6, 6]
    assert result.frame["tokens"].tolist() == [0, 0, 20, 20, 60, 60]
    assert result.frame["measure"].tolist() == ["one", "two"] * 3
    for checkpoint in checkpoints:
        own = result.frame.loc[result.frame["step"] == checkpoint.step, "value"]
        assert own.tolist() == [weight_of(load_checkpoint(checkpoint, device="cpu"))] * 2
    assert result.frame["value"].nunique() == 3
    loaded = TrainingResult.load(result.save(tmp_path / "result.parquet"))
    pd.testing.assert_frame_equal(loaded.frame, result.frame)
    assert dict(loaded.provenance) == dict(result.provenance)
    assert loaded.steps == list(STEPS)


def test_what_is_done_is_kept_and_not_done_again(trained: Path, drawn: DrawnTasks, tmp_path: Path) -> None:
    checkpoints, file = checkpoints_of(trained), tmp_path / "partial.parquet"
    whole = over_training(checkpoints, drawn, {"one": Counting(), "two": Counting()}, device="cpu")
    one, two = Counting(), Counting(fails_at=2)
    run = partial(over_training, tasks=drawn, device="cpu", partial_file=file)
    assert "fails here" in refused(MethodError, run, checkpoints, measures={"one": one, "two": two})
    assert (one.calls, two.calls) == (2, 2)  # both of step 0, and one of step 2
    kept = TrainingResult.load(file).frame
    assert list(zip(kept["step"], kept["measure"], strict=True)) == [(0, "one"), (0, "two"), (2, "one")]
    one, two = Counting(), Counting()
    resumed = run(checkpoints, measures={"one": one, "two": two})
    assert (one.calls, two.calls) == (1, 2)
    pd.testing.assert_frame_equal(resumed.frame, whole.frame)
    # all is done: nothing is loaded, not even looked for
    found = run(checkpoints, measures={"one": Counting(fails_at=1), "two": Counting(fails_at=1)})
    pd.testing.assert_frame_equal(found.frame, whole.frame)
    fewer = run(checkpoints[1:2], measures={"one": Counting(fails_at=1), "two": Counting(fails_at=1)})
    assert fewer.steps == [2]


def test_a_checkpoint_that_cannot_be_loaded_leaves_what_is_done(trained: Path, drawn: DrawnTasks, tmp_path: Path) -> None:
    checkpoints, file = checkpoints_of(trained), tmp_path / "partial.parquet"
    broken = (checkpoints[0], Checkpoint("gone", 2, None, str(tmp_path / "gone")), checkpoints[2])
    message = refused(ModelError, over_training, broken, drawn, {"one": Counting()}, device="cpu", partial_file=file)
    assert "step 2" in message
    one = Counting()
    result = over_training(checkpoints, drawn, {"one": one}, device="cpu", partial_file=file)
    assert one.calls == 2
    assert result.steps == list(STEPS)


def test_a_checkpoint_that_was_overwritten_is_measured_again(trained: Path, drawn: DrawnTasks, tmp_path: Path) -> None:
    copy, file = tmp_path / "copy", tmp_path / "partial.parquet"
    shutil.copytree(trained, copy)
    before = over_training(checkpoints_of(copy), drawn, {"one": Counting()}, device="cpu", partial_file=file)
    shutil.rmtree(copy / "step2")
    shutil.copytree(trained / "step6", copy / "step2")
    one = Counting()
    after = over_training(checkpoints_of(copy), drawn, {"one": one}, device="cpu", partial_file=file)
    assert one.calls == 1
    old, new = before.frame["value"], after.frame["value"]
    assert new.tolist() == [old[0], old[2], old[2]]


def test_files_of_other_runs_and_other_vocabularies_are_refused(
    trained: Path, drawn: DrawnTasks, nano: Model, small_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoints, file = checkpoints_of(trained), tmp_path / "partial.parquet"
    run = partial(over_training, device="cpu", partial_file=file)
    run(checkpoints[:1], drawn, {"one": Counting()})
    assert "other tasks" in refused(MethodError, run, checkpoints, drawn, {"three": Counting()})
    assert "other tasks" in refused(MethodError, run, checkpoints, drawn, {"one": Counting()}, dtype="float64")
    other = draw_tasks(["ioi"], nano, seeds=1, n_prompts=4)
    assert "other tasks" in refused(MethodError, run, checkpoints, other, {"one": Counting()})
    file.write_bytes(b"no parquet")
    assert "delete it" in refused(MethodError, run, checkpoints, drawn, {"one": Counting()})
    mixed = checkpoints_of([trained / "step2", small_folder("neox")])
    assert "vocabulary" in refused(MethodError, over_training, mixed, drawn, {"one": Counting()}, device="cpu")
    assert "at least one" in refused(MethodError, over_training, checkpoints, drawn, {})


# ---------------------------------------------------------------------------------------------------- measures


@pytest.fixture(scope="session")
def plain() -> tf.PreTrainedModel:
    """Nano as Hugging Face loads it."""
    (checkpoint,) = checkpoints_of("nano", [LAST])
    return tf.AutoModelForCausalLM.from_pretrained(checkpoint.source, dtype=torch.float32).eval()


def run_plain(plain: tf.PreTrainedModel, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return plain(torch.tensor([tokens])).logits[0, -1]


def only(frame: pd.DataFrame, task: str, seed: int, quantity: str) -> pd.DataFrame:
    return frame[(frame["task"] == task) & (frame["seed"] == seed) & (frame["quantity"] == quantity)]


def test_behaviour_is_that_of_all_prompts(nano: Model, drawn: DrawnTasks, plain: tf.PreTrainedModel) -> None:
    found = behaviour_rows(nano, drawn)
    for draw in drawn.draws:
        pairs = [*draw.task.discovery, *draw.task.test]
        expected = np.mean([values_of(run_plain(plain, pair.clean), pair) for pair in pairs])
        name = "probability_difference" if pairs[0].right else "logit_difference"
        (row,) = only(found, draw.name, draw.seed, name).to_dict("records")
        assert row["value"] == pytest.approx(expected, abs=1e-4)
        assert row["low"] <= row["value"] <= row["high"]


@pytest.mark.slow
def test_circuits_run_as_said(nano: Model, drawn: DrawnTasks, plain: tf.PreTrainedModel) -> None:
    found = circuit_rows(nano, drawn, steps=2, n_random=2, n_resamples=2)
    graph = nano.residual.graph()
    for draw in (drawn.draws[0], drawn.draws[-1]):
        of = {q: only(found, draw.name, draw.seed, q) for q in found["quantity"].unique()}
        mask = torch.zeros_like(graph.edges)
        for edge in of["edge"]["part"]:
            mask[graph.edge_positions(edge)] = True
        circuit = Circuit(graph, mask)
        assert set(of["node"]["part"]) == set(circuit.nodes)
        assert of["n_edges"]["value"].item() == circuit.n_edges == len(of["edge"])
        assert of["share_of_edges"]["value"].item() == pytest.approx(circuit.n_edges / graph.n_edges)
        assert of["n_nodes"]["value"].item() == len(circuit.nodes)

        def alone(kept: torch.Tensor, pair: TokenPair) -> float:
            return values_of(circuit_logits(plain, graph, kept, pair), pair)

        pairs = draw.task.test
        full = np.mean([values_of(run_plain(plain, pair.clean), pair) for pair in pairs])
        empty = np.mean([values_of(run_plain(plain, pair.corrupted), pair) for pair in pairs])
        assert of["effect"]["value"].item() == pytest.approx(full - empty, abs=1e-3)

        def share(
            kept: torch.Tensor, pairs: tuple[TokenPair, ...] = pairs, empty: float = empty, full: float = full
        ) -> float:
            return float((np.mean([alone(kept, pair) for pair in pairs]) - empty) / (full - empty))

        assert of["faithfulness"]["value"].item() == pytest.approx(share(mask), abs=1e-3)
        assert of["noising"]["value"].item() == pytest.approx(1 - share(graph.edges & ~mask), abs=1e-3)
        for name in ("faithfulness", "noising", "effect"):
            (row,) = of[name].to_dict("records")
            assert row["low"] <= row["value"] <= row["high"]
        nulls = [share(random_circuit(graph, circuit.n_edges, draw.seed + i).mask) for i in range(2)]
        (null,) = of["null_faithfulness"].to_dict("records")
        assert null["value"] == pytest.approx(np.mean(nulls), abs=1e-3)
        assert (null["low"], null["high"]) == pytest.approx((min(nulls), max(nulls)), abs=1e-3)
        log_p = [circuit_logits(plain, graph, mask, pair).log_softmax(-1) for pair in pairs]
        log_full = [run_plain(plain, pair.clean).log_softmax(-1) for pair in pairs]
        kl = np.mean([float((f.exp() * (f - p)).sum()) for f, p in zip(log_full, log_p, strict=True)])
        assert of["kl"]["value"].item() == pytest.approx(kl, abs=1e-3)
        discovery = draw.task.discovery
        kept = [
            np.mean([values_of(run_plain(plain, getattr(p, kind)), p) for p in discovery]) for kind in ("clean", "corrupted")
        ]
        assert share(mask, discovery, kept[1], kept[0]) >= 0.8 - 1e-3  # on the prompts it was found on
        overlap = of["resampled_jaccard"].to_dict("records")[0]
        metric = "probability_difference" if discovery[0].right else "logit_difference"
        scores = score_edges(nano, discovery, "eap_ig", steps=2, metric=metric, per="fact")
        again, _ = smallest_faithful(
            nano, scores.mean(), discovery, 0.8, selection="greedy", stable=True, resolution=0.1, metric=metric
        )
        assert torch.equal(again.mask, mask)
        size = int(again.provenance["size"])
        resampled = resampled_circuits(scores, 2, draw.seed, "greedy", size, fill=False).values()
        overlaps = [int((mask & other.mask).sum()) / int((mask | other.mask).sum()) for other in resampled]
        assert (overlap["value"], overlap["low"], overlap["high"]) == pytest.approx(
            (np.mean(overlaps), min(overlaps), max(overlaps))
        )


def circuit_logits(plain: tf.PreTrainedModel, graph: object, mask: torch.Tensor, pair: TokenPair) -> torch.Tensor:
    clean, corrupted = torch.tensor([pair.clean]), torch.tensor([pair.corrupted])
    return oracle_circuit_logits(plain, clean, corrupted, torch.tensor([len(pair.clean) - 1]), mask)[0]


def test_direct_effects_are_those_of_single_heads(nano: Model, drawn: DrawnTasks, plain: tf.PreTrainedModel) -> None:
    found = direct_rows(nano, drawn)
    assert len(found) == len(drawn.draws) * 16
    for draw, head in ((drawn.draws[0], "a3.h1"), (drawn.draws[3], "a2.h0")):
        losses = []
        for pair in (*draw.task.discovery, *draw.task.test):
            clean, corrupted = torch.tensor([pair.clean]), torch.tensor([pair.corrupted])
            last = torch.tensor([len(pair.clean) - 1])
            patched = oracle_patch_edge(plain, clean, corrupted, last, head, "logits")[0]
            losses.append(values_of(run_plain(plain, pair.clean), pair) - values_of(patched, pair))
        row = only(found, draw.name, draw.seed, "direct_effect").set_index("part").loc[head]
        assert row["value"] == pytest.approx(np.mean(losses), abs=1e-4)


def test_head_scores_by_seed_and_why_one_is_undefined(nano: Model, drawn: DrawnTasks) -> None:
    every = head_rows(nano, drawn, scores=("previous_token", "s_inhibition"))
    found = every[every["quantity"] == "previous_token"]
    assert len(found) == 2 * 16
    assert found["seed"].tolist() == [0] * 16 + [1] * 16
    assert found["part"][:5].tolist() == ["a0.h0", "a0.h1", "a0.h2", "a0.h3", "a1.h0"]
    for seed in (0, 1):
        scores = head_scores(nano, ("previous_token", "s_inhibition"), seed=seed, keep_undefined=True)
        own = found[found["seed"] == seed]
        expected = scores.scores["previous_token"]
        assert own["value"].tolist() == pytest.approx(expected.scores.flatten().tolist())
        assert own["passes"].tolist() == expected.passes.flatten().tolist()
        undefined = every[(every["quantity"] == "s_inhibition") & (every["seed"] == seed)]
        if "s_inhibition" in scores.undefined:
            assert undefined["note"].tolist() == [scores.undefined["s_inhibition"]]
            assert undefined["value"].isna().all()
    assert found.groupby("seed")["value"].sum().nunique() == 2


def test_a_score_that_is_named_and_undefined_says_why_and_is_no_end(drawn: DrawnTasks) -> None:
    untrained = load_model("nano", checkpoint=0, device="cpu")
    why = refused(KnowledgeCircuitsError, head_scores, untrained, ("s_inhibition",))
    row, other = head_rows(untrained, drawn, scores=("s_inhibition",)).to_dict("records")
    assert row["note"] == why
    assert (row["seed"], other["seed"], row["part"]) == (0, 1, "")
    assert np.isnan(row["value"])


def turned(pair: TokenPair) -> TokenPair:
    """Clean and corrupted prompt exchanged: an effect of the other sign."""
    return replace(pair, clean=pair.corrupted, corrupted=pair.clean)


def test_an_effect_must_be_sure_and_positive_on_both_halves(nano: Model, drawn: DrawnTasks) -> None:
    draw = drawn.draws[0]
    found, held = draw.task.discovery, draw.task.test
    same = tuple(replace(pair, corrupted=pair.clean) for pair in found)
    mixed = (*found[:4], *map(turned, found[4:]))  # more for than against: a mean above the least, an interval that is not
    halves = {
        "no effect on the discovery half": (same, held),
        "no effect on the held-out half": (found, same),
        "a negative one": (tuple(map(turned, found)), held),
        "an unsure one": (mixed, held),
    }
    for what, (discovery, test) in halves.items():
        task = replace(draw.task, discovery=discovery, test=test)
        tasks = DrawnTasks((DrawnTask("ioi", 0, task),))
        rows = circuit_rows(nano, tasks, steps=2, n_random=1, n_resamples=2)
        assert rows.loc[rows["quantity"] == "n_edges", "value"].isna().all(), what
        assert "next to no effect" in rows.loc[rows["quantity"] == "faithfulness", "note"].item()
        assert not (rows["quantity"] == "edge").any()
        shares = consistency_rows(nano, tasks, steps=2)
        assert shares["value"].isna().all(), what
        assert shares["note"].str.contains("next to no effect").all()
    differences = [values_of_both(nano, pair) for pair in mixed]
    assert np.mean(differences) > 0.05  # so it is the interval that tells


def test_a_circuit_of_no_effect_is_undefined_and_says_so(drawn: DrawnTasks) -> None:
    untrained = load_model("nano", checkpoint=0, device="cpu")
    found = circuit_rows(untrained, drawn)
    assert set(found["quantity"]) == {
        *("effect", "n_edges", "share_of_edges", "n_nodes", "faithfulness", "null_faithfulness", "noising", "kl"),
        "resampled_jaccard",
        *("model_parameters", "model_edges"),
    }
    missing = found[~found["quantity"].isin(["effect", "model_parameters", "model_edges"])]
    assert missing["value"].isna().all()
    assert missing["note"].str.contains("next to no effect").all()
    assert found.loc[found["quantity"] == "effect", "value"].max() < 0.05  # a negative effect is none


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"measures": ["circus"]}, "'circus'"),
        ({"measures": []}, "nothing"),
        ({"scores": ["inductive"]}, "'inductive'"),
        ({"method": "eep"}, "'eep'"),
        ({"metric": "kl"}, "'kl'"),
        ({"faithfulness": 1.2}, "faithfulness is 1.2"),
        ({"minimal_effect": 0.0}, "minimal_effect is 0.0"),
        ({"magic": 1}, "'magic'"),
        ({"n_random": 0}, "n_random is 0"),
        ({"n_resamples": 1}, "n_resamples is 1"),
        ({"selection": "threshold"}, "'threshold'"),
    ],
)
def test_measures_that_cannot_be(options: Mapping[str, object], said: str) -> None:
    assert said in refused(MethodError, training_measures, **options)


def values_of_both(model: Model, pair: TokenPair) -> float:
    """What the clean prompt has over the corrupted one."""
    with torch.no_grad():
        clean, corrupted = (model.bridge(torch.tensor([tokens]))[0, -1] for tokens in (pair.clean, pair.corrupted))
    return values_of(clean, pair) - values_of(corrupted, pair)


# ---------------------------------------------------------------------------------------------------- consistency


def scores_with(name: str, heads: list[tuple[int, int]]) -> HeadScores:
    """Scores of nano that pass for some heads."""
    passes = torch.zeros(4, 4, dtype=torch.bool)
    for layer, head in heads:
        passes[layer, head] = True
    return HeadScores(name, passes.float(), passes, 0.5)


def test_shares_of_the_algorithm_are_those_of_single_edges(nano: Model, plain: tf.PreTrainedModel) -> None:
    pairs = draw_tasks(["ioi_abc"], nano, seeds=1, n_prompts=4).draws[0].task.test
    candidates = [(0, 3), (1, 1), (1, 2), (2, 0), (3, 1), (3, 2)]
    scores = {
        "name_mover": scores_with("name_mover", [(3, 2), (3, 0)]),  # a3.h0 is no candidate, so no receiver
        "s_inhibition": scores_with("s_inhibition", [(2, 0)]),
        "duplicate_token": scores_with("duplicate_token", [(0, 3)]),
        "negative_name_mover": scores_with("negative_name_mover", [(0, 3)]),
        "induction": scores_with("induction", [(1, 1)]),
    }

    def effects(readers: list[str], layer: int) -> dict[tuple[int, int], float]:
        """The mean loss by every candidate below a layer, one edge at a time."""
        found = {}
        for sender in candidates:
            for reader in readers if sender[0] < layer else []:
                losses = []
                for pair in pairs:
                    clean, corrupted = torch.tensor([pair.clean]), torch.tensor([pair.corrupted])
                    last = torch.tensor([len(pair.clean) - 1])
                    name = f"a{sender[0]}.h{sender[1]}"
                    patched = oracle_patch_edge(plain, clean, corrupted, last, name, reader)[0]
                    losses.append(values_of(run_plain(plain, pair.clean), pair) - values_of(patched, pair))
                found[sender] = float(np.mean(losses))
        return found

    expected = [
        (effects(["logits"], 4), {(3, 2), (0, 3)}),
        (effects(["a3.h2<q>"], 3), {(2, 0)}),
        (effects(["a2.h0<v>"], 2), {(0, 3), (1, 1)}),
    ]
    found = algorithm_shares(nano, pairs, candidates, scores)
    for share, (by_head, kind), n in zip(found, expected, (6, 4, 3), strict=True):
        own = [by_head[head] for head in kind]
        assert share.absolute == pytest.approx(sum(map(abs, own)) / sum(map(abs, by_head.values())), abs=1e-3)
        assert share.signed == pytest.approx(sum(own) / sum(by_head.values()), rel=1e-2, abs=1e-3)
        assert (share.n_kind, share.n_candidates, share.note) == (len(kind), n, "")
    none = algorithm_shares(nano, pairs, candidates, {})
    assert none[0].absolute == 0.0
    assert np.isnan(none[1].absolute)
    assert "no name mover head" in none[1].note
    assert "no heads to share" in refused(MethodError, algorithm_shares, nano, pairs, [], {})


def test_effects_are_summed_over_receivers(nano: Model) -> None:
    pairs = draw_tasks(["ioi_abc"], nano, seeds=1, n_prompts=4).draws[0].task.test
    senders, readers = [(0, 3), (2, 0), (3, 1)], ["a2.h0<q>", "a3.h2<q>", "a3.h1<q>"]
    both = edge_effects(nano, pairs, senders, readers)
    alone = [edge_effects(nano, pairs, senders, [reader]) for reader in readers]
    assert set(both) == {(0, 3), (2, 0)}  # a3.h1 is below none of them
    for sender, effect in both.items():
        assert effect == pytest.approx(sum(own.get(sender, 0.0) for own in alone), abs=1e-4)
    assert len({round(own.get((0, 3), 0.0), 4) for own in alone}) == 3


def test_receivers_that_share_keys_and_values_have_one_reader() -> None:
    graph = Graph(n_layers=3, n_heads=4, n_kv_heads=2, d_model=32)
    assert _readers(graph, [(1, 3), (1, 2), (2, 0)], "v") == ["a1.h1<v>", "a2.h0<v>"]
    assert _readers(graph, [(1, 3), (1, 2), (2, 0)], "q") == ["a1.h2<q>", "a1.h3<q>", "a2.h0<q>"]


def test_consistency_is_of_the_circuits_heads_on_held_out_prompts(
    nano: Model, drawn: DrawnTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kinds given by hand, because no head of nano passes for any."""
    draw = drawn.draws[1]
    tasks = DrawnTasks((draw,))
    rows = circuit_rows(nano, tasks, steps=2, n_random=1, n_resamples=2)
    nodes = set(rows.loc[rows["quantity"] == "node", "part"])
    candidates = [(layer, head) for layer in range(4) for head in range(4) if f"a{layer}.h{head}" in nodes]
    assert 1 < len(candidates) < 16
    last = max(candidates)
    scores = {"name_mover": scores_with("name_mover", [last]), "s_inhibition": scores_with("s_inhibition", candidates[:2])}
    seeds = []

    def by_hand(model: Model, seed: int) -> GeneralHeadScores:
        seeds.append(seed)
        return GeneralHeadScores(scores, {})

    monkeypatch.setattr("kc_lib.training.measures.head_scores", by_hand)
    found = consistency_rows(nano, tasks, steps=2).set_index(["part", "quantity"])["value"]
    assert seeds == [draw.seed]
    pairs = load_task("ioi_abc", nano, known_only=False, max_facts=12, seed=draw.seed).test
    for share in algorithm_shares(nano, pairs, candidates, scores):
        assert found[share.step, "share_absolute"] == pytest.approx(share.absolute, nan_ok=True)
        assert found[share.step, "share_signed"] == pytest.approx(share.signed, nan_ok=True)
        assert (found[share.step, "n_kind"], found[share.step, "n_candidates"]) == (share.n_kind, share.n_candidates)
    assert 0 < found["logits", "share_absolute"] < 1


def test_consistency_is_of_ioi_alone_and_undefined_without_an_effect(nano: Model, drawn: DrawnTasks) -> None:
    found = consistency_rows(nano, drawn, steps=2)
    assert set(found["task"]) == {"ioi"}
    first = found[found["part"] == "logits"]
    assert first.loc[first["quantity"] == "share_absolute", "value"].between(0, 1).all()
    untrained = consistency_rows(load_model("nano", checkpoint=0, device="cpu"), drawn)
    assert untrained["value"].isna().all()
    assert untrained["note"].str.contains("next to no effect").all()
    assert not len(consistency_rows(nano, draw_tasks(["agreement"], nano, seeds=1, n_prompts=4)))


# ---------------------------------------------------------------------------------------------------- over time


def circuit_of(step: int, seed: int, edges: Mapping[str, float], nodes: str) -> list[tuple[object, ...]]:
    rows = [(step, "circuit", "t", seed, "edge", edge, score) for edge, score in edges.items()]
    return [*rows, *((step, "circuit", "t", seed, "node", node, 1.0) for node in nodes)]


def test_overlaps_by_hand() -> None:
    rows = [(1, "circuit", "t", seed, "n_edges", "", np.nan) for seed in (0, 1)]  # no circuit at step 1
    rows += circuit_of(2, 0, {"a": 1.0, "b": -2.0}, "xy")
    rows += circuit_of(4, 0, {"b": 1.0, "c": 3.0}, "yz")
    rows += circuit_of(8, 0, {"b": 2.0, "c": -3.0}, "yz")
    rows += circuit_of(8, 1, {"b": 2.0, "d": 1.0}, "yz")
    rows += [(step, "circuit", "t", 1, "n_edges", "", np.nan) for step in (2, 4)]
    found = similarities(frame_of(rows)).set_index(["seed", "against", "quantity", "step"]).sort_index()

    def get(seed: int, against: str, quantity: str, column: str = "value") -> list[float]:
        return found.loc[(seed, against, quantity), column].tolist()

    nan = float("nan")
    # |scores| count: at 4 against 2: min(b) 1 over a 1 + b 2 + c 3; at 8 against 4: b 1 + c 3 over b 2 + c 3
    assert get(0, "previous", "edge_jaccard") == pytest.approx([nan, nan, 1 / 3, 1.0], nan_ok=True)
    assert get(0, "previous", "node_jaccard") == pytest.approx([nan, nan, 1 / 3, 1.0], nan_ok=True)
    assert get(0, "previous", "weighted_jaccard") == pytest.approx([nan, nan, 1 / 6, 4 / 5], nan_ok=True)
    assert get(0, "previous", "edge_jaccard", "ewma") == pytest.approx([nan, nan, 1 / 3, 2 / 3], nan_ok=True)
    assert get(0, "last", "edge_jaccard") == pytest.approx([nan, 1 / 3, 1.0, nan], nan_ok=True)
    assert get(0, "last", "edge_jaccard", "ewma") == pytest.approx([nan, 1 / 3, 2 / 3, nan], nan_ok=True)
    assert get(0, "other draws", "edge_jaccard") == pytest.approx([nan, nan, nan, 1 / 3], nan_ok=True)
    assert get(1, "previous", "edge_jaccard") == pytest.approx([nan] * 4, nan_ok=True)
    assert "alpha" in refused(MethodError, similarities, frame_of(rows), alpha=0.0)
    assert "no circuits" in refused(MethodError, similarities, frame_of([(1, "heads", "", 0, "induction", "a0.h0", 0.1)]))


def test_smoothing_steps_over_what_is_undefined() -> None:
    edges: list[Mapping[str, float]] = [{"a": 1.0}, {"a": 1.0}, {}, {"b": 1.0}, {"b": 1.0, "c": 1.0}]
    rows = [row for step, own in enumerate(edges) for row in circuit_of(step, 0, own, "x" if own else "")]
    rows += [(2, "circuit", "t", 0, "n_edges", "", np.nan)]
    found = similarities(frame_of(rows), alpha=0.25)
    own = found[(found["against"] == "previous") & (found["quantity"] == "edge_jaccard")]
    nan = float("nan")
    assert own["value"].tolist() == pytest.approx([nan, 1.0, nan, nan, 0.5], nan_ok=True)
    # a quarter of the new value and three of the last mean, however long ago that was
    assert own["ewma"].tolist() == pytest.approx([nan, 1.0, nan, nan, 0.25 * 0.5 + 0.75 * 1.0], nan_ok=True)


def test_emergence_by_hand() -> None:
    rows: list[tuple[object, ...]] = []
    series = {(0, "a0.h0"): (0.0, 0.3, 0.9), (1, "a0.h0"): (0.0, 0.1, 0.9), (0, "a0.h1"): (-0.2, -0.1, 0.0)}
    for (seed, part), values in series.items():
        rows += [(step, "heads", "", seed, "induction", part, value) for step, value in zip((1, 2, 4), values, strict=True)]
    rows += [(step, "behaviour", "t", 0, "logit_difference", "", value) for step, value in ((1, 0.5), (2, 0.2), (4, 1.0))]
    rows += [(step, "behaviour", "t", 0, "accuracy", "", 1.0) for step in (1, 2, 4)]
    rows += [(1, "heads", "", 0, "s_inhibition", "", float("nan"))]
    found = emergence(frame_of(rows)).set_index(["quantity", "part"])
    assert set(found.index) == {("induction", "a0.h0"), ("induction", "a0.h1"), ("logit_difference", "")}
    head = found.loc[("induction", "a0.h0")]
    # mean 0, 0.2, 0.9: a third of 0.9 is 0.297, first reached at 4; by seed 0 at 2 and by seed 1 at 4
    assert (head["maximum"], head["step"], head["step_low"], head["step_high"]) == pytest.approx((0.9, 4, 2, 4))
    assert np.isnan(found.loc[("induction", "a0.h1"), "step"])  # never above 0
    assert found.loc[("logit_difference", ""), "step"] == 1
    assert emergence(frame_of(rows), 0.2).set_index(["quantity", "part"]).loc[("induction", "a0.h0"), "step"] == 2
    assert "share" in refused(MethodError, emergence, frame_of(rows), share=1.5)
    half = [(step, "direct", "t", 0, "direct_effect", "a0.h0", value) for step, value in ((1, 0.25), (2, 0.5), (4, 1.0))]
    assert emergence(frame_of(half), 0.5)["step"].tolist() == [2]  # at the share, not only above
    passing = frame_of(rows)
    once = (passing.frame["part"] == "a0.h0") & (passing.frame["step"] == 2) & (passing.frame["seed"] == 1)
    frame = passing.frame.assign(passes=once.astype("boolean").where(passing.frame["measure"] == "heads"))
    passes = emergence(TrainingResult(frame)).set_index(["quantity", "part"])["passes"]
    assert passes.to_dict() == {("induction", "a0.h0"): True, ("induction", "a0.h1"): False, ("logit_difference", ""): False}


def test_bands_are_the_range_over_draws() -> None:
    nan = float("nan")
    rows = [(1, "circuit", "t", seed, "n_edges", "", value) for seed, value in enumerate((3.0, nan, 5.0))]
    rows += [(2, "circuit", "t", seed, "n_edges", "", nan) for seed in range(3)]
    found = over_draws(frame_of(rows).frame).set_index("step")
    assert found.loc[1, ["value", "low", "high", "n"]].tolist() == [4.0, 3.0, 5.0, 2]
    assert found.loc[2, "n"] == 0
    assert found.loc[2, ["value", "low", "high"]].isna().all()


# ---------------------------------------------------------------------------------------------------- all of it


@pytest.fixture(scope="module")
def small_run(drawn: DrawnTasks) -> TrainingResult:
    measures = training_measures(scores=("previous_token", "successor"), steps=2, n_random=1, n_resamples=2)
    return over_training(checkpoints_of("nano", [0, 750, LAST]), drawn, measures, device="cpu")


@pytest.mark.slow
def test_figures_draw_what_was_measured(small_run: TrainingResult) -> None:
    figure = behaviour_over_training(small_run, ("logit_difference",))
    expected = over_draws(small_run.of("behaviour", "logit_difference"))
    lines = {trace.name: trace for trace in figure.data if trace.name}
    for task, own in expected.groupby("task"):
        assert list(lines[task].y) == pytest.approx(own["value"].tolist())
        assert list(lines[task].x) == [375.0, 750.0, LAST]  # step 0 stands half as far as the first
    assert "0" in figure.layout.xaxis.ticktext
    circuits = circuit_over_training(small_run)
    by_axis = {trace.yaxis: trace for trace in circuits.data if trace.name == "ioi"}
    sizes = over_draws(small_run.of("circuit", "n_edges"))
    assert list(by_axis["y"].y) == pytest.approx(sizes.loc[sizes["task"] == "ioi", "value"].tolist(), nan_ok=True)
    assert np.isnan(by_axis["y"].y[0])
    crosses = [trace for trace in circuits.data if trace.marker.symbol == "x-thin" and len(trace.x)]
    assert crosses[0].x[0] == 375.0
    assert len(similarity_over_training(small_run).data) > 12
    consistency = consistency_over_training(small_run)
    assert "1: logits" in {note.text for note in consistency.layout.annotations}
    heads = heads_over_training(small_run, strongest=2)
    assert {"previous token", "direct effect, ioi"} <= {note.text for note in heads.layout.annotations}
    assert "'loss'" in refused(MethodError, behaviour_over_training, small_run, ("loss",))


@pytest.mark.slow
def test_what_is_said_of_it(small_run: TrainingResult) -> None:
    figures = training_headline(small_run)
    for task in ("agreement", "ioi"):
        assert figures[f"{task} appears"].startswith(f"step {LAST}")
    assert figures["successor heads"] == "none passes"
    assert figures["circuits of ioi"] == "defined at 1 of 3 checkpoints"
    summary = small_run.summary()
    assert (summary.groupby(["measure", "task", "quantity"]).size() <= 2).all()
    highest = emergence(small_run).groupby(["measure", "task", "quantity"])["maximum"].max()
    assert summary.groupby(["measure", "task", "quantity"])["maximum"].max().to_dict() == highest.to_dict()
    table = circuit_table(small_run)
    sizes = over_draws(small_run.of("circuit", "n_edges"))
    assert table["n_edges"].to_numpy() == pytest.approx(sizes["value"].to_numpy(), nan_ok=True)
    assert set(algorithm_table(small_run).index) == {"logits", "name movers' queries", "S-inhibition values"}


def test_figures_of_what_was_not_measured_say_so() -> None:
    heads = frame_of([(1, "heads", "", 0, "induction", "a0.h0", 0.1)])
    draws = {"behaviour": behaviour_over_training, "circuit": circuit_over_training}
    draws |= {"circuit ": similarity_over_training, "consistency": consistency_over_training}
    for measure, draw in draws.items():
        (note,) = draw(heads).layout.annotations
        assert note.text.startswith(f"nothing to show: measure {measure.strip()} as well")
    (note,) = heads_over_training(frame_of([(1, "behaviour", "t", 0, "accuracy", "", 0.1)])).layout.annotations
    assert "measure heads or direct as well" in note.text


def test_tables_of_what_was_not_measured_are_empty() -> None:
    heads = frame_of([(1, "heads", "", 0, "induction", "a0.h0", 0.1)])
    assert circuit_table(heads).empty
    assert algorithm_table(heads).empty
    assert training_headline(heads) == {"induction heads": "none passes"}
