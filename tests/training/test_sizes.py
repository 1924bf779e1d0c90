"""Circuit size over time and against model size: by hand and against scipy, and three models measured from their folders."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from helpers import frame_of, refused
from scipy import stats

from kc_lib.errors import MethodError
from kc_lib.models.checkpoints import checkpoints_of, load_checkpoint
from kc_lib.models.load import load_model
from kc_lib.training.drawn import draw_tasks
from kc_lib.training.figures import model_size_figure
from kc_lib.training.measures import training_measures
from kc_lib.training.over_training import over_training
from kc_lib.training.result import TrainingResult
from kc_lib.training.sizes import model_sizes, size_correlations, size_over_time, size_table
from tools.train_nano.train import vocabulary
from tools.train_nano.vocabulary import causal_tokenizer

NAN = float("nan")


def sized(model: str, parameters: int, sizes: Mapping[tuple[int, int], tuple[float, float]]) -> TrainingResult:
    """A result of one task with (edges, nodes) by step and seed."""
    rows: list[tuple[Any, ...]] = []
    for (step, seed), (n_edges, n_nodes) in sizes.items():
        rows += [(step, "circuit", "t", seed, "n_edges", "", n_edges), (step, "circuit", "t", seed, "n_nodes", "", n_nodes)]
        rows += [(step, "circuit", "t", seed, "model_parameters", "", parameters)]
        rows += [(step, "circuit", "t", seed, "model_edges", "", 10.0 * parameters)]
    frame = frame_of(rows).frame
    return TrainingResult(frame.assign(checkpoint=f"{model}@step" + frame["step"].astype(str)))


def families(sizes: Mapping[int, float]) -> list[TrainingResult]:
    """One result for each number of parameters, with a circuit of so many edges and a tenth of the nodes."""
    return [sized(f"m{n}", n, {(1, 0): (edges, 1 + edges / 10), (2, 0): (NAN, NAN)}) for n, edges in sizes.items()]


def test_size_over_time_is_spearmans_of_the_mean_and_of_every_draw() -> None:
    edges = {0: [5.0, 7.0, 6.0, 9.0], 1: [NAN, 3.0, 8.0, 2.0]}
    steps = [4, 1, 2, 8]  # not in order
    result = sized("m", 9, {(s, seed): (v, 2.0) for seed, own in edges.items() for s, v in zip(steps, own, strict=True)})
    found = size_over_time(result).set_index("quantity").loc["n_edges"]
    mean = np.nanmean(list(edges.values()), axis=0)
    assert found["value"] == pytest.approx(stats.spearmanr(steps, mean).statistic)
    alone = [stats.spearmanr(steps, edges[0]).statistic, stats.spearmanr(steps[1:], edges[1][1:]).statistic]
    assert (found["low"], found["high"], found["n"]) == pytest.approx((min(alone), max(alone), 4))
    assert np.isnan(size_over_time(result).set_index("quantity").loc["n_nodes", "value"])  # always 2
    short = sized("m", 9, {(1, 0): (5.0, 2.0), (2, 0): (NAN, NAN), (3, 0): (6.0, 3.0)})
    assert size_over_time(short)["value"].isna().all()
    assert size_over_time(short)["n"].tolist() == [2, 2]
    assert "no circuits" in refused(MethodError, size_over_time, frame_of([(1, "heads", "", 0, "induction", "a0.h0", 0.1)]))
    row = size_table(result).set_index("quantity").loc["n_edges"]
    assert (row["value"], row["low"], row["high"], row["n"]) == pytest.approx(
        (found["value"], found["low"], found["high"], 4)
    )
    assert (row["against"], row["statistic"]) == ("step", "spearman")
    assert size_table(frame_of([(1, "heads", "", 0, "induction", "a0.h0", 0.1)])).empty


def test_one_table_has_both_correlations() -> None:
    first, *others = families({10: 5.0, 100: 7.0, 1000: 50.0})
    table = size_table(first, others)
    assert table["against"].unique().tolist() == ["step", "model_parameters"]
    correlations = size_correlations([first, *others])
    shown = table[table["against"] == "model_parameters"].reset_index(drop=True)
    pd.testing.assert_frame_equal(shown[correlations.columns], correlations, check_dtype=False)


def test_model_sizes_are_means_over_checkpoints_with_a_circuit() -> None:
    sizes = {(1, 0): (NAN, NAN), (2, 0): (10.0, 4.0), (4, 0): (20.0, 6.0), (1, 1): (NAN, NAN), (2, 1): (NAN, NAN)}
    (row,) = model_sizes([sized("m", 77, sizes | {(4, 1): (40.0, 8.0)})]).to_dict("records")
    assert row["model"] == "m@step4"
    assert (row["model_parameters"], row["model_edges"], row["n_checkpoints"]) == (77, 770, 2)
    assert (row["n_edges"], row["n_edges_low"], row["n_edges_high"]) == (27.5, 15.0, 40.0)
    assert (row["n_nodes"], row["n_nodes_low"], row["n_nodes_high"]) == (6.5, 5.0, 8.0)


@pytest.mark.parametrize("n", [3, 4, 6])
def test_correlations_are_scipys(n: int) -> None:
    rng = np.random.default_rng(n)
    parameters = [int(10 ** (3 + i)) for i in rng.permutation(n)]
    edges = [float(p**0.1 * rng.uniform(0.1, 9)) for p in parameters]
    found = size_correlations(families(dict(zip(parameters, edges, strict=True)))).set_index(["quantity", "statistic"])
    assert (found["n"] == n).all()
    x, y = np.array(parameters, dtype=float), np.array(edges)
    for name, pair in (("pearson of logarithms", (np.log(x), np.log(y))), ("pearson", (x, y))):
        row, expected = found.loc[("n_edges", name)], stats.pearsonr(*pair)
        assert row["value"] == pytest.approx(expected.statistic)
        low, high = expected.confidence_interval()
        assert (row["low"], row["high"]) == pytest.approx((low, high))
    row, r = found.loc[("n_edges", "spearman")], stats.spearmanr(x, y).statistic
    assert row["value"] == pytest.approx(r)
    assert abs(r) < 1
    spread = 1.959964 * np.sqrt((1 + r**2 / 2) / (n - 3)) if n > 3 else np.inf  # Bonett and Wright 2000
    assert (row["low"], row["high"]) == pytest.approx((np.tanh(np.arctanh(r) - spread), np.tanh(np.arctanh(r) + spread)))
    for name, pair in (("pearson", (x, y)), ("spearman", (stats.rankdata(x), stats.rankdata(y)))):
        every = [np.corrcoef(pair[0], order)[0, 1] for order in itertools.permutations(pair[1])]
        r = found.loc[("n_edges", name), "value"]
        above, below = (np.mean(np.array(every) >= r - 1e-9), np.mean(np.array(every) <= r + 1e-9))
        assert found.loc[("n_edges", name), "p"] == pytest.approx(min(1.0, 2 * min(above, below)))


def test_models_without_a_circuit_of_a_task_are_left_out() -> None:
    found = size_correlations(families({10: 5.0, 100: NAN, 1000: 50.0}))
    assert (found["n"] == 2).all()
    assert found[["value", "low", "high", "p"]].isna().all().all()
    perfect = size_correlations(families({10: 5.0, 100: 7.0, 1000: 50.0, 10_000: 60.0})).set_index("statistic")
    assert (perfect.loc["spearman", "value"] == 1).all()
    assert perfect.loc["spearman", ["low", "high"]].isna().all().all()
    assert perfect.loc["spearman", "p"].tolist() == pytest.approx([2 / 24] * 2)


def test_results_that_cannot_be_compared() -> None:
    three = families({10: 5.0, 100: 7.0, 1000: 50.0})
    assert "2 results" in refused(MethodError, size_correlations, three[:2])
    assert "'m10@step2'" in refused(MethodError, size_correlations, [*three, three[0]])
    assert "same size (10 model_parameters)" in refused(
        MethodError, size_correlations, [sized(name, 10, {(1, 0): (5.0, 2.0)}) for name in "abc"]
    )
    assert "'model_weight'" in refused(MethodError, size_correlations, three, "model_weight")
    old = TrainingResult(three[0].frame[~three[0].frame["quantity"].str.startswith("model_")])
    assert "measure 'circuit' again" in refused(MethodError, size_correlations, [old, *three[1:]])
    heads = frame_of([(1, "heads", "", 0, "induction", "a0.h0", 0.1)])
    assert "no circuits" in refused(MethodError, size_correlations, [heads, *three[1:]])


def test_the_figure_says_r_and_n() -> None:
    three = families({1000: 50.0, 10: 5.0, 100: 7.0})
    figure = model_size_figure(three)
    edges, nodes = figure.data
    assert list(edges.x) == [10, 100, 1000]
    assert list(edges.y) == [5.0, 7.0, 50.0]
    assert list(nodes.y) == pytest.approx([1.5, 1.7, 6.0])
    r = stats.pearsonr(np.log([10, 100, 1000]), np.log([5.0, 7.0, 50.0])).statistic
    assert f"r = {r:.2f} [-1.00, 1.00], n = 3" in edges.name
    assert "3 models" in figure.layout.title.subtitle.text
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    (note,) = model_size_figure(three[:2]).layout.annotations
    assert "at least 3 models are needed, 2 given" in note.text


def test_parameters_are_those_of_the_file() -> None:
    (last,) = checkpoints_of("nano", [4000])
    plain = tf.AutoModelForCausalLM.from_pretrained(last.source)
    assert load_model("nano", device="cpu").n_parameters == sum(p.numel() for p in plain.parameters())


SHAPES = ((1, 2, 16), (2, 2, 32), (3, 4, 48))  # layers, heads, width


@pytest.mark.slow
def test_three_models_of_their_own_folders(tmp_path: Path) -> None:
    """Small models of three sizes that have read one sentence, measured from folders step0 and step1, saved and compared."""
    words = causal_tokenizer(vocabulary())
    files, expected = [], []
    for place, (n_layers, n_heads, width) in enumerate(SHAPES):
        root = tmp_path / f"size{place}"
        torch.manual_seed(place)
        config = tf.GPTNeoXConfig(
            vocab_size=len(words),
            hidden_size=width,
            num_hidden_layers=n_layers,
            num_attention_heads=n_heads,
            intermediate_size=2 * width,
            max_position_embeddings=64,
        )
        model = tf.AutoModelForCausalLM.from_config(config)
        tokens = torch.tensor([words("The capital of France is Paris").input_ids])
        tokens = torch.cat([tokens, torch.tensor([words("The capital of Italy is Rome").input_ids])])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for step in range(2):
            model.save_pretrained(root / f"step{step}")
            words.save_pretrained(root / f"step{step}")
            for _ in range(60):
                optimizer.zero_grad()
                model(tokens, labels=tokens).loss.backward()
                optimizer.step()
        checkpoints = checkpoints_of(root)
        bridge = load_checkpoint(checkpoints[-1], device="cpu")
        drawn = draw_tasks([str(pairs_file(tmp_path))], bridge, seeds=1, n_prompts=4, known_only=False)
        measures = training_measures(["circuit"], steps=2, n_random=1, n_resamples=2)
        result = over_training(checkpoints, drawn, measures, device="cpu")
        files.append(result.save(root / "training.parquet"))
        graph = bridge.residual.graph()
        expected.append((sum(p.numel() for p in model.parameters()), graph.n_edges))
    found = model_sizes([TrainingResult.load(file) for file in files])
    assert [tuple(row) for row in found[["model_parameters", "model_edges"]].to_numpy().tolist()] == expected
    assert (found["n_checkpoints"] == 1).all()  # none at step 0
    again = size_correlations([TrainingResult.load(file) for file in files]).set_index(["quantity", "statistic"])
    row = again.loc[("n_edges", "pearson of logarithms")]
    known = stats.pearsonr(np.log(found["model_parameters"]), np.log(found["n_edges"]))
    assert row["value"] == pytest.approx(known.statistic)
    assert row["n"] == 3


def pairs_file(folder: Path) -> Path:
    """Pairs whose answers the small models have read: the two capitals, either way, after words they have not."""
    rows = ["clean,corrupted,answer,distractor"]
    for first in ("", "France ", "Paris ", "Italy "):
        there, here = f"{first}The capital of France is", f"{first}The capital of Italy is"
        rows += [f"{there},{here},Paris,Rome", f"{here},{there},Rome,Paris"]
    path = folder / "capitals.csv"
    path.write_text("\n".join(rows[:9]))
    return path
