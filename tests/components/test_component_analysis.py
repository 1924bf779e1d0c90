"""The notebook component_analysis on small models, and the words it ends with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import torch
from helpers import SmallModel, random_pairs, rows, run_cells, visible_runs, write_csv

from kc_lib import runs
from kc_lib.circuits.baselines import random_circuit
from kc_lib.components.attention import heads_of
from kc_lib.components.circuit_table import CircuitTable, circuit_table, reading_headline
from kc_lib.components.direct import DirectAttribution, direct_attribution, largest_error, strongest_components
from kc_lib.components.figures import lens_figure
from kc_lib.components.lens import LogitLens
from kc_lib.components.options import AnalysisCell
from kc_lib.errors import KnowledgeCircuitsError, MethodError
from kc_lib.graph import Circuit, Graph
from kc_lib.heads.classes import HeadClasses

NOTEBOOK = runs.NOTEBOOKS / "component_analysis.ipynb"
LLAMA = Graph(n_layers=3, n_heads=4, n_kv_heads=2, d_model=32)  # the small llama's
RESULTS = {
    "lens_own.parquet",
    "lens_final.parquet",
    "direct.parquet",
    "tokens.parquet",
    "tokens_of_one.parquet",
    "neurons.parquet",
    "circuit.json",
    "circuit_table.parquet",
    "circuit_table.html",
    "run.json",
}
OF_SUBJECTS = {"sources_attention.parquet", "sources_weighted.parquet"}

SmallFolder = Callable[[str], Path]
OPTIONS = {"task.known_only": False, "model.device": "cpu"}


@pytest.fixture
def usual(small_folder: SmallFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Parameters of a short run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    write_csv(Path("named.csv"), rows())
    write_csv(Path("unnamed.csv"), [{key: row[key] for key in ("clean", "corrupted", "answer")} for row in rows()])
    usual = {"model": str(small_folder("llama")), "task": "named.csv", "options": OPTIONS, "out": "out"}
    return usual | {"n_components": 3, "n_tokens": 4, "n_neurons": 5, "size": 30}


@pytest.mark.slow
@pytest.mark.parametrize(("task", "more"), [("named.csv", OF_SUBJECTS), ("unnamed.csv", set())])
def test_the_notebook_says_less_where_no_subject_is_named_and_finds_its_run_again(
    task: str, more: set[str], usual: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cells(NOTEBOOK, **usual | {"task": task})
    (folder,) = visible_runs(tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == RESULTS | more
    assert ("No subject is named in these prompts" in capsys.readouterr().out) is not bool(more)
    record, table = runs.read_record(folder), CircuitTable.load(folder / "circuit_table.parquet").nodes
    assert record["headline"]["nodes of the circuit"].startswith(f"{len(table)}: ")
    assert ("sees_subject" in table) is bool(more)
    page = (folder / "circuit_table.html").read_text()
    assert all(f"<td>{node}</td>" in page for node in table["node"])
    kept = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix == ".parquet"}
    run_cells(NOTEBOOK, **usual | {"task": task})
    assert visible_runs(tmp_path / "out") == [folder]
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept


@pytest.mark.slow
def test_a_given_circuit_is_the_one_described(usual: dict[str, Any], tmp_path: Path) -> None:
    given = random_circuit(LLAMA, 25, seed=5)
    given.save("mine.json")
    layers, heads = [0] * 4 + [1] * 4 + [2] * 4, [*range(4)] * 3
    classes = HeadClasses(pd.DataFrame({"layer": layers, "head": heads, "class": ["mover"] * 12}))
    classes.save("classes.parquet")
    options = OPTIONS | {"task.test_fraction": 0, "lens.norm": "final"}
    given_too = {"circuit": "mine.json", "classes": "classes.parquet", "direction": "answer", "options": options}
    run_cells(NOTEBOOK, **usual | given_too)
    (folder,) = visible_runs(tmp_path / "out")
    assert torch.equal(Circuit.load(folder / "circuit.json").mask, given.mask)
    table = CircuitTable.load(folder / "circuit_table.parquet").nodes
    assert set(table["node"]) == {node for node in given.nodes if node in LLAMA.writer_index}
    assert (table.loc[table["node"].str.startswith("a"), "class"] == "mover").all()
    assert "answer's logit" in runs.read_record(folder)["headline"]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"circuit": "absent.json"}, ("absent.json",)),
        ({"circuit": "foreign.json"}, ("foreign.json", "another model")),
        ({"classes": "absent.parquet"}, ("absent.parquet", "cannot be read")),
        ({"classes": "other.parquet"}, ("other.parquet", "holds no HeadClasses")),
        ({"model": "bert"}, ("both directions",)),
        ({"options": OPTIONS | {"lens.norm": "every"}}, ("norm 'every'", "own, final")),
        ({"direction": "up"}, ("direction 'up'", "answer, difference")),
        ({"n_components": 0}, ("n_components is 0", "at least 1")),
        ({"size": 0}, ("size",)),
        ({"task": "absent.csv"}, ("absent.csv",)),
    ],
    ids=str,
)
def test_bad_input_to_the_notebook_is_one_line(
    given: dict[str, Any], parts: tuple[str, ...], usual: dict[str, Any], small_folder: SmallFolder, tmp_path: Path
) -> None:
    other = Graph(n_layers=2, n_heads=4, n_kv_heads=2, d_model=32)
    Circuit(other, other.edges).save("foreign.json")
    pd.DataFrame({"some": [1]}).to_parquet("other.parquet")
    model = {"model": str(small_folder("bert"))} if given.get("model") == "bert" else {}
    with pytest.raises(KnowledgeCircuitsError) as error:
        run_cells(NOTEBOOK, **usual | given | model)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
    assert visible_runs(tmp_path / "out") == []


def test_the_notebook_loads_the_script_of_views_once() -> None:
    source = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
    assert source.count("attention_bundle()") == 1
    assert source.index("attention_bundle()") < source.index("attention_view(")


@pytest.mark.parametrize("kind", ["gpt2", "phi", "gemma2"])  # biases of attention, of the unembedding; capped logits
@pytest.mark.parametrize("direction", ["answer", "difference"])
def test_the_largest_error_compares_with_the_models_own_logits(small_model: SmallModel, kind: str, direction: str) -> None:
    model, pairs = small_model(kind), random_pairs(seed=9)
    found = direct_attribution(model, pairs, direction)
    assert largest_error(model, pairs, found) < 1e-3
    spoiled = DirectAttribution(
        found.values + torch.tensor([[0.0], [0.5], [0.0], [0.0]]) / 10, found.components, found.provenance
    )
    assert largest_error(model, pairs, spoiled, batch_size=3) == pytest.approx(0.05 * len(found.components), abs=1e-3)


def test_an_edge_into_shared_keys_counts_for_every_head_that_reads_them(small_model: SmallModel) -> None:
    mask = torch.zeros_like(LLAMA.edges)  # key-value head 1 serves the heads 2 and 3
    for edge in ("input->a0.h1<k>", "input->a0.h3<q>", "a0.h2->m1", "a0.h3->m1", "m1->logits", "a0.h1->logits"):
        mask[LLAMA.edge_positions(edge)] = True
    pairs = random_pairs(seed=9)
    table = circuit_table(small_model("llama"), Circuit(LLAMA, mask), pairs).nodes.set_index("node")
    assert table["edges_in"].to_dict() == {"input": 0, "a0.h1": 0, "a0.h2": 1, "a0.h3": 2, "m1": 2}
    assert table["edges_out"].to_dict() == {"input": 2, "a0.h1": 1, "a0.h2": 1, "a0.h3": 1, "m1": 1}
    assert table.loc["m1", "strongest_in"] == "a0.h2, a0.h3"


COMPONENTS = ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1", "attention biases", "constant"]
VALUES = [[0.0, 1.0, -2.0, 0.5, 4.0, -0.1, 3.0, 0.0, 0.25], [0.0, 1.0, -3.0, 0.5, 6.0, 0.1, 3.0, 0.0, 0.25]]
DIRECT = DirectAttribution(torch.tensor(VALUES), COMPONENTS, {"direction": "difference"})
POINTS = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid", "blocks.0.hook_resid_post", "blocks.1.hook_resid_mid"]
POINTS += ["blocks.1.hook_resid_post"]


def lens(ranks: list[float], over_subject: float) -> LogitLens:
    at = {"point": POINTS, "layer": [0.0, 0.5, 1.0, 1.5, 2.0], "answer_rank": ranks, "answer_probability": 0.1}
    rows = {**at, "answer_rank_at_subject": [9.0, over_subject, 8.0, 9.0, 9.0], "subject_probability": over_subject * 0}
    return LogitLens(pd.concat([pd.DataFrame(rows | {"fact": fact}) for fact in (0, 1)]), {"norm": "own"})


TABLE = CircuitTable(
    pd.DataFrame(
        {
            "node": ["input", "a1.h0", "m1", "a0.h1"],
            "direct_low": [-0.1, 0.5, -0.9, -0.3],
            "direct_high": [0.1, 0.9, -0.2, 0.3],
            "total": [1.5, 0.0, 0.3, -0.05],
            "total_low": [1.0, -0.1, 0.2, -0.2],
            "total_high": [2.0, 0.1, 0.4, 0.2],
        }
    )
)


def test_components_are_ranked_by_the_size_of_what_they_add() -> None:
    assert strongest_components(DIRECT, "head", 3) == ["a1.h0", "a0.h1", "a0.h0"]
    assert strongest_components(DIRECT, "mlp", 5) == ["m1", "m0"]
    assert heads_of(["a1.h0", "a12.h3"]) == [(1, 0), (12, 3)]


def test_the_words_are_those_of_the_figures() -> None:
    found = lens([3.0, 50.0, 7.0, 2.0, 1.0], 4.0)  # near the top at the embedding, but not for good
    figures = reading_headline(found, DIRECT, TABLE)
    assert figures["answer among the first 10"] == "after layer 0"
    assert figures["answer first"] == "after layer 1"
    assert figures["logit difference"] == "7.25 logits (n = 2 facts)"
    assert figures["logit difference, attention"].startswith("3.50 [")
    assert figures["logit difference, MLPs"].startswith("3.50 [")
    assert figures["head that adds most"].startswith("a1.h0 (+5.00 [")
    assert figures["head that takes most"].startswith("a0.h1 (-2.50 [")
    assert figures["nodes of the circuit"] == "4: 2 with a direct effect, 1 through others only, 1 with none"
    assert found.summary().set_index("point").loc[POINTS[1], "answer_rank_at_subject_median"] == 4
    layers = DIRECT.by_layer()
    largest = layers.loc[layers["contribution"].idxmax()]
    assert (largest["kind"], largest["layer"], largest["contribution"]) == ("attention", 1, pytest.approx(4.95 + 0.05))
    assert TABLE.counts() == {"direct": 2, "through others": 1, "none": 1}
    assert json.dumps(figures)
    unnamed, late = lens([3.0] * 5, float("nan")), lens([30.0] * 5, 4.0)
    assert reading_headline(unnamed, DIRECT, TABLE)["answer among the first 10"] == "at the embedding"
    assert reading_headline(late, DIRECT, TABLE)["answer among the first 10"] == "never"


def test_no_word_of_a_subject_where_none_is_named() -> None:
    found = lens([3.0] * 5, 4.0)
    unnamed = {"answer_rank_at_subject": float("nan"), "subject_probability": float("nan")}
    nameless = LogitLens(found.facts.assign(**unnamed), found.provenance)
    assert "no subject is named" in lens_figure(nameless).layout.title.subtitle.text
    assert "answer_rank_at_subject_median" not in nameless.summary()


def test_the_summary_of_a_circuit_has_the_nodes_that_are_missed_most() -> None:
    columns = {"class": "", "direct": 0.0, "strongest_in": "", "raises": ""}
    table = CircuitTable(TABLE.nodes.assign(**columns))
    assert table.summary(3)["node"].tolist() == ["input", "m1", "a0.h1"]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"n_tokens": 0}, "n_tokens is 0"),
        ({"options": {"lens.norm": "no"}}, "norm 'no'"),
        ({"direction": "up"}, "direction 'up'"),
        ({"size": 5.5}, "size is 5.5"),
    ],
)
def test_options_are_checked_before_a_model_is_loaded(given: dict[str, Any], part: str) -> None:
    defaults = {name: declared.default for name, declared in AnalysisCell.declared().items()}
    with pytest.raises(MethodError, match=part):
        runs.settings("component_analysis", defaults | given)
