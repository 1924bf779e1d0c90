"""The notebook circuits_over_training on bad input: told in one line, with what is done kept, and gone on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pandas as pd
import pytest
import torch
import transformers as tf
from helpers import CONFIGS, assert_one_line_and_code_2, assert_refused, kc, run_cells, visible_runs
from loopback_hub import REPOSITORY, Hub, serving

from kc_lib import cli, runs
from kc_lib.errors import KnowledgeCircuitsError, ModelError
from kc_lib.training.result import TrainingResult
from tools.train_nano.train import vocabulary
from tools.train_nano.vocabulary import causal_tokenizer

NOTEBOOK = runs.NOTEBOOKS / "circuits_over_training.ipynb"
OPTIONS = {
    "load.device": "cpu",
    "load.retries": 0,
    "measure.n_random": 1,
    "measure.n_resamples": 2,
    "measure.steps": 2,
}
SMALL = {
    "out": "out",
    "tasks": "ioi",
    "seeds": 1,
    "n_prompts": 4,
    "measures": "behaviour",
    "swap_heads": 1,
    "options": OPTIONS,
}
STEPS = (0, 2, 6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random GPT-NeoX that reads nano's words, at three steps that differ in their weights."""
    root, words = tmp_path_factory.mktemp("trained"), causal_tokenizer(vocabulary())
    config = CONFIGS["neox"]()
    config.vocab_size = len(words)
    for step in STEPS:
        torch.manual_seed(step)
        tf.AutoModelForCausalLM.from_config(config).save_pretrained(root / f"step{step}")
        words.save_pretrained(root / f"step{step}")
    return root


@pytest.fixture
def usual(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Parameters of a run on a folder of checkpoints, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return SMALL | {"model": str(trained)}


def changed(usual: dict[str, Any], **given: Any) -> dict[str, Any]:
    """The usual parameters with others; of ``options`` those that are given."""
    return usual | given | {"options": usual["options"] | given.get("options", {})}


BAD_VALUES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"schedule": "0 5"}, ("no checkpoint at step 5", "nearest: 2 and 6")),
    ({"schedule": "9"}, ("no checkpoint at step 9", "nearest: 6;")),
    ({"schedule": "sparse"}, ("'sparse'", "no step in common", "from 0 to 6")),
    ({"schedule": ""}, ("list of steps is empty", "0 to 6")),
    ({"schedule": "weekly"}, ("'weekly'", "exp_plus_detail")),
    ({"options": {"checkpoints.tokens_per_step": 0}}, ("tokens_per_step is 0",)),
    ({"model": "./absent"}, ("'./absent'", "folder of checkpoints")),
    ({"model": "."}, ("holds no checkpoints",)),
    ({"model": "./absent ./too"}, ("'absent'", "no folder")),
    ({"options": {"load.dtype": "float8"}}, ("float8",)),
    ({"options": {"load.device": "toaster"}}, ("toaster",)),
    ({"options": {"load.retries": -1}}, ("retries is -1",)),
    ({"tasks": ""}, ("no tasks",)),
    ({"tasks": "ioi ioi"}, ("'ioi' is given twice",)),
    ({"tasks": "no_such_task"}, ("'no_such_task'", "country_capital")),
    ({"tasks": "absent.csv"}, ("absent.csv",)),
    ({"seeds": 0}, ("seeds is 0",)),
    ({"n_prompts": 2}, ("n_prompts is 2",)),
    ({"options": {"draw.known_only": True}, "tasks": "country_capital"}, ("no known fact left",)),
    ({"measures": "behaviour circus"}, ("'circus'", "consistency")),
    ({"measures": ""}, ("nothing is no measure",)),
    ({"measures": "heads", "options": {"measure.scores": "induction inductive"}}, ("'inductive'", "previous_token")),
    ({"options": {"measure.method": "eep"}}, ("'eep'", "eap_ig")),
    ({"options": {"measure.steps": 0}}, ("steps is 0",)),
    ({"metric": "kl"}, ("'kl'", "logit_difference")),
    ({"options": {"measure.selection": "threshold"}}, ("'threshold'", "greedy")),
    ({"faithfulness": 1.5}, ("faithfulness is 1.5",)),
    ({"options": {"measure.minimal_effect": 0.0}}, ("minimal_effect is 0.0",)),
    ({"options": {"measure.n_random": 0}}, ("n_random is 0",)),
    ({"options": {"measure.n_resamples": 1}}, ("n_resamples is 1",)),
    ({"options": {"measure.batch_size": 0}}, ("batch_size is 0",)),
    ({"swap_heads": -1}, ("swap_heads is -1",)),
    ({"swap_heads": 13}, ("13 heads", "the model has 12")),
    ({"options": {"swap.components": "a2.h1 a3.h0"}}, ("'a3.h0'", "a2.h3", "m2")),
    ({"options": {"swap.components": "a2.h1 a2.h1"}}, ("a2.h1 a2.h1", "once")),
    ({"options": {"swap.components": "input"}}, ("'input'",)),
    ({"options": {"swap.components": " "}}, ("none",)),
    ({"compare": "absent.parquet also.parquet"}, ("absent.parquet",)),
    ({"compare": "other.parquet spoiled.parquet"}, ("spoiled.parquet",)),
    ({"compare": "other.parquet table.parquet"}, ("table.parquet", "no TrainingResult", "'checkpoint'")),
]


@pytest.mark.parametrize(("given", "parts"), BAD_VALUES, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_bad_values_are_ours_and_leave_no_run(given: dict[str, Any], parts: tuple[str, ...], usual: dict[str, Any]) -> None:
    columns = {"checkpoint": ["x@step1"], "step": [1], "tokens": [1], "measure": ["heads"], "task": [""], "seed": [0]}
    columns |= {"quantity": ["q"], "part": [""], "value": [1.0], "low": [1.0], "high": [1.0], "passes": [True], "note": [""]}
    TrainingResult(pd.DataFrame(columns)).save("other.parquet")
    Path("spoiled.parquet").write_bytes(b"no parquet")
    pd.DataFrame({"a": [1]}).to_parquet("table.parquet")
    assert_refused(NOTEBOOK, parts, **changed(usual, **given))


def test_results_that_cannot_be_compared_are_refused_before_the_work(usual: dict[str, Any]) -> None:
    columns = {"checkpoint": ["x@step1"], "step": [1], "tokens": [1], "measure": ["heads"], "task": [""], "seed": [0]}
    columns |= {"quantity": ["q"], "part": [""], "value": [1.0], "low": [1.0], "high": [1.0], "passes": [True], "note": [""]}
    TrainingResult(pd.DataFrame(columns)).save("other.parquet")
    assert_refused(NOTEBOOK, ("other.parquet alone",), **usual, compare="other.parquet")
    assert_refused(NOTEBOOK, ("no circuits",), **usual, compare="other.parquet other.parquet")
    frame = pd.DataFrame(columns).assign(measure="circuit")
    frame = pd.concat([frame.assign(quantity=name) for name in ("n_edges", "n_nodes", "model_parameters", "model_edges")])
    TrainingResult(frame.assign(checkpoint=f"{usual['model']}/step6")).save("itself.parquet")
    TrainingResult(frame).save("one.parquet")
    assert_refused(NOTEBOOK, ("itself", "step6"), **usual, compare="one.parquet itself.parquet")
    assert not Path("out").exists()


def test_years_that_the_tokenizer_does_not_split(
    usual: dict[str, Any], small_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(small_folder("neox"), tmp_path / "family" / "step5")
    given = {"model": str(tmp_path / "family"), "tasks": "greater_than"}
    assert_refused(NOTEBOOK, ("two tokens of two digits", "1732"), **(usual | given))


@pytest.mark.parametrize("same_number", [True, False])
def test_folders_of_other_vocabularies_and_what_is_done_stays(
    same_number: bool, trained: Path, usual: dict[str, Any], small_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The first folder is measured; the second, of other words, is refused, also when the run is taken up again."""
    other = tmp_path / "other1"
    shutil.copytree(trained / "step0" if same_number else small_folder("neox"), other)
    if same_number:
        document = json.loads((other / "tokenizer.json").read_text())
        words = document["model"]["vocab"]
        words["Paris"], words["Rome"] = words["Rome"], words["Paris"]
        (other / "tokenizer.json").write_text(json.dumps(document))
    folders = [trained / "step0", other, trained / "step2"]
    given = usual | {"model": " ".join(map(str, folders)), "swap_heads": 0}
    for _ in range(2):
        assert_refused(NOTEBOOK, ("other1", "another vocabulary"), **given)
    (partial,) = Path("out").rglob("partial.parquet")
    assert TrainingResult.load(partial).steps == [0]


def test_checkpoints_of_other_shapes_cannot_be_swapped(trained: Path, usual: dict[str, Any], tmp_path: Path) -> None:
    words = causal_tokenizer(vocabulary())
    config = CONFIGS["neox"]()
    config.vocab_size, config.intermediate_size = len(words), 64
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide1")
    words.save_pretrained(tmp_path / "wide1")
    folders = f"{tmp_path / 'wide1'} {trained / 'step2'}"
    assert_refused(NOTEBOOK, ("step2 into", "wide1", "one training"), **(usual | {"model": folders}))


@pytest.fixture
def hub(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The family on a hub on the loopback, and a cache of the test's own."""
    constants = huggingface_hub.constants
    with serving({"main": trained / "step6"} | {f"step{step}": trained / f"step{step}" for step in STEPS}) as running:
        # what HF_ENDPOINT and HF_HUB_CACHE set when huggingface_hub is imported
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "*")
        huggingface_hub.close_session()
        yield running
    huggingface_hub.close_session()


def test_a_download_that_fails_half_way_keeps_what_is_done(hub: Hub, usual: dict[str, Any]) -> None:
    given = changed(usual, model=REPOSITORY, options={"load.keep_files": False})
    hub.fault = lambda revision, asked: ("status", 500) if revision == "step2" else None
    assert_refused(NOTEBOOK, ("step 2", REPOSITORY, "500"), **given)
    (partial,) = Path("out").rglob("partial.parquet")
    before = TrainingResult.load(partial)
    assert before.steps == [0]
    hub.fault = lambda revision, asked: None
    hub.asked.clear()
    run_cells(NOTEBOOK, **given)
    assert not hub.weights_asked("step0")
    (folder,) = visible_runs(Path("out"))
    result = TrainingResult.load(folder / "training.parquet")
    assert result.steps == list(STEPS)
    first = result.frame[result.frame["step"] == 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        first, before.frame.sort_values(["measure", "task", "seed"], kind="stable", ignore_index=True)
    )
    assert not (folder / "partial.parquet").exists()


def test_a_run_without_swaps_and_one_with_named_components(usual: dict[str, Any]) -> None:
    run_cells(NOTEBOOK, **(usual | {"swap_heads": 0}))
    (folder,) = visible_runs(Path("out"))
    assert set(TrainingResult.load(folder / "training.parquet").frame["measure"]) == {"behaviour"}
    run_cells(NOTEBOOK, **changed(usual, options={"swap.components": "m1 a0.h2"}))
    (other,) = [path for path in visible_runs(Path("out")) if path != folder]
    swaps = TrainingResult.load(other / "training.parquet").of("swap")
    assert set(swaps["part"]) == {"", "m1", "a0.h2"}
    assert any(key.startswith("best swap") for key in runs.read_record(other)["headline"])


@pytest.mark.parametrize(
    "given", [{"seeds": "many"}, {"n_prompts": "few"}, {"swap_heads": "a3.h1"}, {"load.keep_files": "maybe"}], ids=str
)
def test_values_of_the_wrong_type_are_ours(given: dict[str, str]) -> None:
    with pytest.raises(KnowledgeCircuitsError) as error:
        cli.parse_parameters(NOTEBOOK, given)
    assert next(iter(given.values())) in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"schedule": "0 5"}, ("no checkpoint at step 5", "nearest: 2 and 6")),
        ({"swap.components": "a2.h1 a3.h0"}, ("'a3.h0'",)),
    ],
    ids=str,
)
def test_kc_says_so_in_one_line(
    given: dict[str, str], parts: tuple[str, ...], usual: dict[str, Any], tmp_path: Path
) -> None:
    asked = {key: value for key, value in usual.items() if key not in ("out", "options")} | usual["options"] | given
    arguments = [part for key, value in asked.items() for part in ("-p", f"{key}={value}")]
    done = kc("run", "circuits_over_training", *arguments, "--out", "out", cwd=tmp_path)
    assert_one_line_and_code_2(done, *parts)
    assert visible_runs(tmp_path / "out") == []


def test_a_checkpoint_that_cannot_be_read_names_its_step(trained: Path, usual: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "broken")
    (tmp_path / "broken" / "step2" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match="step 2"):
        run_cells(NOTEBOOK, **(usual | {"model": str(tmp_path / "broken")}))
