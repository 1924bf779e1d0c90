"""Checkpoints: schedules as published, families on disk and on a hub on the loopback, downloads that break."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import huggingface_hub
import pandas as pd
import pytest
import torch
import transformers as tf
from helpers import CONFIGS, save_tokenizer
from loopback_hub import REPOSITORY, Asked, Hub, serving
from transformer_lens.model_bridge import TransformerBridge

from kc_lib.errors import ModelError
from kc_lib.models.checkpoints import SCHEDULES, Checkpoint, checkpoints_of, load_checkpoint, schedule_steps
from kc_lib.models.load import load_model
from kc_lib.models.shipped import nano_steps
from kc_lib.tasks.batches import TokenPair
from kc_lib.tasks.task import Task
from kc_lib.training.drawn import DrawnTask, DrawnTasks
from kc_lib.training.over_training import over_training
from kc_lib.training.result import MEASURED, TrainingResult

STEPS = (0, 1, 8, 512, 1000)
PYTHIA = [0, *(2**i for i in range(10)), *range(1000, 143001, 1000)]


def refused(call: Callable[..., object], *args: object, **options: object) -> str:
    """The message of the ModelError that a call raises: one line."""
    with pytest.raises(ModelError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------- schedules


def test_schedules_as_published() -> None:
    assert len(PYTHIA) == 154  # "154 checkpoints" (Biderman et al. 2023)
    assert schedule_steps("all", PYTHIA) == PYTHIA
    assert schedule_steps("linear", PYTHIA) == PYTHIA[11:]
    powers = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert schedule_steps("exponential", PYTHIA) == [*powers, 1000, 2000, 4000, 8000, 16000, 33000, 66000, 131000]
    assert schedule_steps("exp_plus_detail", PYTHIA) == [
        *powers,
        *(1000 * i for i in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)),
        *(1000 * i for i in (20, 25, 30, 35, 40, 45, 50, 55, 60, 65)),
        *(1000 * i for i in (70, 80, 90, 100, 110, 120, 130, 140, 143)),
    ]
    assert schedule_steps("sparse", PYTHIA) == [
        *(256, 512),
        *(1000 * i for i in (1, 2, 3, 4, 5, 6, 7, 8, 9)),
        *(1000 * i for i in (10, 15, 20, 25, 30, 35, 40, 45)),
        *(1000 * i for i in (50, 60, 70, 80, 90, 100, 120, 140, 143)),
    ]
    assert list(SCHEDULES) == ["all", "linear", "exponential", "exp_plus_detail", "sparse"]
    for steps in SCHEDULES.values():
        assert steps is None or (list(steps) == sorted(set(steps)) and set(steps) <= set(PYTHIA))


def test_a_schedule_takes_what_the_model_has() -> None:
    assert schedule_steps("exponential", [512, 3, 0, 4, 2000, 1500]) == [4, 512, 2000]
    assert schedule_steps("all", [512, 3, 0]) == [0, 3, 512]
    assert schedule_steps([8, 0, 8], [0, 4, 8]) == schedule_steps("8 0", [0, 4, 8]) == [0, 8]


@pytest.mark.parametrize(
    ("schedule", "available", "said"),
    [
        ("sometimes", [0, 1], ["'sometimes'", "exp_plus_detail"]),
        ("sparse", [0, 1, 100], ["'sparse'", "256 to 143000", "0 to 100"]),
        ([1, 700], [0, 1, 512, 1000], ["700", "512 and 1000"]),
        ([2000], [0, 1, 512, 1000], ["2000", "nearest: 1000;"]),
        ([], [0, 1], ["empty", "0 to 1"]),
        ("", [0, 1], ["empty", "0 to 1"]),
        ("1 700", [0, 1, 512, 1000], ["700", "512 and 1000"]),
        (["step8"], [0, 8], ["'step8'"]),
        ([True], [0, 1], ["True"]),
        ("all", [], ["no checkpoints"]),
    ],
)
def test_schedules_that_cannot_be(schedule: object, available: list[int], said: list[str]) -> None:
    message = refused(schedule_steps, schedule, available)
    assert all(part in message for part in said), message


# ---------------------------------------------------------------------------------------------------- local folders


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small GPT-NeoX at several steps, each with other weights, and a branch main that is no step."""
    root = tmp_path_factory.mktemp("family")
    folders = {}
    for seed, name in enumerate(["main", *(f"step{step}" for step in STEPS)]):
        torch.manual_seed(seed)
        tf.AutoModelForCausalLM.from_config(CONFIGS["neox"]()).save_pretrained(root / name)
        save_tokenizer(root / name)
        folders[name] = root / name
    return folders


def hash_of(folder: Path) -> str:
    return load_model(str(folder), device="cpu").hash


def test_a_list_of_folders_keeps_its_order(family: dict[str, Path], tmp_path: Path) -> None:
    given = [family["step512"], str(family["step8"]), family["step1000"]]
    found = checkpoints_of(given, tokens_per_step=10)
    assert [(c.step, c.tokens, c.source, c.revision) for c in found] == [
        (512, 5120, str(family["step512"]), None),
        (8, 80, str(family["step8"]), None),
        (1000, 10000, str(family["step1000"]), None),
    ]
    assert [c.step for c in checkpoints_of(given, [8, 512])] == [512, 8]
    assert [c.tokens for c in checkpoints_of(given)] == [None] * 3
    unnumbered = [family["main"], family["step8"]]
    assert [c.step for c in checkpoints_of(unnumbered)] == [0, 1]


def test_a_folder_of_checkpoints(family: dict[str, Path], tmp_path: Path) -> None:
    assert [c.step for c in checkpoints_of(str(family["main"].parent))] == list(STEPS)
    for step in (20, 100, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert [c.step for c in checkpoints_of(tmp_path)] == [3, 20, 100]


def test_a_local_checkpoint_is_loaded_under_its_name(family: dict[str, Path]) -> None:
    (checkpoint,) = checkpoints_of(family["main"].parent, [8])
    model = load_checkpoint(checkpoint, device="cpu")
    assert model.hash == hash_of(family["step8"])
    assert model.hash != hash_of(family["step512"])
    assert model.name == str(family["step8"])
    assert next(load_checkpoint(checkpoint, device="cpu", dtype="bfloat16").bridge.parameters()).dtype == torch.bfloat16


def test_families_that_cannot_be(family: dict[str, Path], tmp_path: Path) -> None:
    assert str(tmp_path) in refused(checkpoints_of, str(tmp_path))
    assert "'./absent'" in refused(checkpoints_of, "./absent")
    assert "absent" in refused(checkpoints_of, [family["step8"], tmp_path / "absent"])
    twin = tmp_path / "twin" / "step8"
    twin.mkdir(parents=True)
    message = refused(checkpoints_of, [family["step8"], twin])
    assert str(twin) in message
    assert "step 8" in message
    assert "tokens_per_step" in refused(checkpoints_of, [family["step8"]], tokens_per_step=0)
    assert "retries" in refused(load_checkpoint, checkpoints_of([family["step8"]])[0], retries=-1)


def test_a_local_checkpoint_that_is_broken_is_named_by_its_step(family: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "step77"
    shutil.copytree(family["step8"], broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    message = refused(load_checkpoint, checkpoints_of([broken])[0], device="cpu")
    assert "step 77" in message
    assert str(broken) in message


def test_nano_has_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    if not nano_steps():
        assert "make nano" in refused(checkpoints_of, "nano")
        return
    found = checkpoints_of("nano", tokens_per_step=100)
    assert tuple(c.step for c in found) == nano_steps()
    assert [c.tokens for c in found] == [100 * c.step for c in found]
    last = load_checkpoint(found[-1], device="cpu")
    assert last.name == f"nano@step{found[-1].step}"
    assert last.hash == load_model("nano", device="cpu").hash


# ---------------------------------------------------------------------------------------------------- a hub


@pytest.fixture
def hub(family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The family on a hub of its own, with an empty cache in tmp_path/cache."""
    constants = huggingface_hub.constants
    with serving(family) as running:
        # what HF_ENDPOINT and HF_HUB_CACHE set when huggingface_hub is imported
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is kept of a broken file comes in such pieces
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr("kc_lib.models.hub.time.sleep", lambda seconds: None)
        huggingface_hub.close_session()
        yield running
    huggingface_hub.close_session()


def at(step: int) -> Checkpoint:
    (checkpoint,) = checkpoints_of(REPOSITORY, [step])
    return checkpoint


def files_on_disk(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_steps_of_a_repository_are_its_revisions(hub: Hub) -> None:
    found = checkpoints_of(REPOSITORY, tokens_per_step=2)
    assert [(c.name, c.step, c.tokens, c.source, c.revision) for c in found] == [
        (f"{REPOSITORY}@step{step}", step, 2 * step, REPOSITORY, f"step{step}") for step in STEPS
    ]
    assert [c.step for c in checkpoints_of(REPOSITORY, "sparse")] == [512, 1000]
    message = refused(checkpoints_of, REPOSITORY, [600])
    assert "512 and 1000" in message
    assert "'tiny/absent'" in refused(checkpoints_of, "tiny/absent")
    hub.folders = {"main": hub.folders["main"]}
    assert "none of its revisions" in refused(checkpoints_of, REPOSITORY)


def test_pythias_tokens_and_stanfords_names(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {f"checkpoint-{step}": hub.folders["main"] for step in (100, 20)}
    hub.folders = {**steps, "main": hub.folders["main"], "step7-old": hub.folders["main"]}
    assert [(c.step, c.revision) for c in checkpoints_of(REPOSITORY)] == [(20, "checkpoint-20"), (100, "checkpoint-100")]
    monkeypatch.setattr("kc_lib.models.checkpoints.step_revisions", lambda name: {1000: "step1000"})
    assert checkpoints_of("EleutherAI/pythia-14m")[0].tokens == 2_097_152_000


def test_a_revision_gives_its_own_weights_and_comes_from_the_cache_again(
    hub: Hub, family: dict[str, Path], tmp_path: Path
) -> None:
    model = load_checkpoint(at(8), device="cpu")
    assert model.hash == hash_of(family["step8"])
    assert model.name == f"{REPOSITORY}@step8"
    assert [asked.first_byte for asked in hub.weights_asked("step8")] == [None]
    assert not hub.weights_asked("step512")
    checkpoint, before = at(8), files_on_disk(tmp_path / "cache")
    hub.asked.clear()
    # what is in the cache is neither asked for nor taken away
    assert load_checkpoint(checkpoint, device="cpu", keep_files=False).hash == model.hash
    assert hub.asked == []
    assert files_on_disk(tmp_path / "cache") == before


def test_a_file_that_breaks_off_is_resumed(hub: Hub, family: dict[str, Path]) -> None:
    """The client's own resuming: the rest is asked for from where the connection broke, and what arrives is the file."""
    breaks = iter([3000, 2000])
    hub.fault = lambda revision, asked: ("break", n) if (n := next(breaks, None)) else None
    model = load_checkpoint(at(8), device="cpu")
    assert model.hash == hash_of(family["step8"])
    assert [asked.first_byte for asked in hub.weights_asked("step8")] == [None, 3000, 5000]


def test_a_hub_that_fails_for_a_while_is_asked_again(hub: Hub, family: dict[str, Path]) -> None:
    """Ours: the client gives up at a status such as 503; what it has is not asked for again."""
    faults = iter([("status", 503), ("status", 500)])
    hub.fault = lambda revision, asked: next(faults, None)
    assert load_checkpoint(at(8), device="cpu").hash == hash_of(family["step8"])
    assert len(hub.weights_asked("step8")) == 3
    assert len([asked for asked in hub.asked if asked.method == "GET" and asked.path.endswith("/tokenizer.json")]) == 1


def test_a_checkpoint_that_fails_for_good_is_one_line_and_the_others_stay(
    hub: Hub, family: dict[str, Path], tmp_path: Path
) -> None:
    first = load_checkpoint(at(1), device="cpu")
    before = files_on_disk(tmp_path / "cache")

    def fault(revision: str, asked: Asked) -> tuple[str, int] | None:
        return ("status", 500) if revision == "step8" else None

    hub.fault = fault
    checkpoints = checkpoints_of(REPOSITORY, [1, 8, 512])
    message = refused(load_checkpoint, checkpoints[1], device="cpu", retries=2)
    assert "step 8" in message
    assert "500" in message
    assert len(hub.weights_asked("step8")) == 3
    assert set(before) <= set(files_on_disk(tmp_path / "cache"))
    assert load_checkpoint(checkpoints[0], device="cpu").hash == first.hash
    assert load_checkpoint(checkpoints[2], device="cpu").hash == hash_of(family["step512"])
    hub.fault = lambda revision, asked: None  # and once the hub is well, it goes on
    assert load_checkpoint(checkpoints[1], device="cpu").hash == hash_of(family["step8"])


def test_what_a_hub_does_not_have_is_not_asked_for_again(hub: Hub) -> None:
    message = refused(load_checkpoint, Checkpoint("gone", 9, None, REPOSITORY, "step9"), device="cpu")
    assert "step 9" in message
    assert len([asked for asked in hub.asked if asked.path.endswith("/revision/step9")]) == 1


def test_one_checkpoint_at_a_time_is_on_disk(hub: Hub, family: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    load_checkpoint(at(1), device="cpu")
    before = {path: path.read_bytes() for path in files_on_disk(cache)}
    seen = []

    def fault(revision: str, asked: Asked) -> None:
        seen.append(len(list(cache.rglob("model.safetensors"))))

    hub.fault = fault
    for step in (8, 512):
        model = load_checkpoint(at(step), device="cpu", keep_files=False)
        assert model.hash == hash_of(family[f"step{step}"])
        assert {path: path.read_bytes() for path in files_on_disk(cache)} == before
    assert seen == [1, 1]  # step 1's, kept before
    hub.fault = lambda revision, asked: ("status", 500)
    refused(load_checkpoint, at(1000), device="cpu", keep_files=False, retries=1)
    assert {path: path.read_bytes() for path in files_on_disk(cache)} == before
    assert [path.name for path in cache.iterdir() if path.name.startswith("kc-")] == []


def weights_sum(model: TransformerBridge, tasks: DrawnTasks) -> pd.DataFrame:
    """A measure over training that reads the weights."""
    total = sum(float(parameter.double().sum()) for parameter in model.bridge.parameters())
    row = {"task": "", "seed": 0, "quantity": "weights", "part": "", "value": total, "note": ""}
    return pd.DataFrame([row]).reindex(columns=list(MEASURED))


def test_a_training_goes_on_where_a_download_failed(hub: Hub, family: dict[str, Path], tmp_path: Path) -> None:
    pair = TokenPair((1, 5, 6), (1, 7, 6), (8,), 9, {}, {})
    drawn = DrawnTasks((DrawnTask("own", 0, Task("own", (pair,), (), (), {}, True)),))
    checkpoints, file = checkpoints_of(REPOSITORY, [1, 8, 512]), tmp_path / "partial.parquet"
    run = partial(over_training, checkpoints, drawn, {"weights": weights_sum}, device="cpu", partial_file=file)
    hub.fault = lambda revision, asked: ("status", 500) if revision == "step512" else None
    message = refused(run, retries=1, keep_files=False)
    assert "step 512" in message
    assert TrainingResult.load(file).steps == [1, 8]
    hub.fault = lambda revision, asked: None
    hub.asked.clear()
    result = run(keep_files=False)
    assert result.steps == [1, 8, 512]
    assert not hub.weights_asked("step1")
    assert not hub.weights_asked("step8")
    assert len(hub.weights_asked("step512")) == 1
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    for step, value in result.frame[["step", "value"]].itertuples(index=False):
        plain = load_model(str(family[f"step{step}"]), device="cpu")
        assert value == weights_sum(plain, drawn)["value"].item()


ELSEWHERE = """
import sys
from kc_lib.models.checkpoints import checkpoints_of, load_checkpoint

for checkpoint in checkpoints_of(sys.argv[1], [8, 512]):
    print(checkpoint.name, load_checkpoint(checkpoint, device="cpu", keep_files=False).hash)
"""


@pytest.mark.slow
def test_a_hub_given_by_its_environment_variable(family: dict[str, Path], tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS"))}
    environment |= {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "NO_PROXY": "*", "no_proxy": "*"}
    with serving(family) as running:
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, REPOSITORY],
            env=environment | {"HF_ENDPOINT": running.url},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [
        word for step in (8, 512) for word in (f"{REPOSITORY}@step{step}", hash_of(family[f"step{step}"]))
    ]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_hub_out_of_reach_leaves_what_is_cached(
    hub: Hub, family: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_checkpoint(at(8), device="cpu")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    found = checkpoints_of(REPOSITORY)
    assert [c.step for c in found] == [8]
    assert load_checkpoint(found[0], device="cpu").hash == hash_of(family["step8"])
    message = refused(load_checkpoint, Checkpoint("other", 512, None, REPOSITORY, "step512"), device="cpu", retries=1)
    assert "step 512" in message
    assert "out of reach" in message
    assert "out of reach" in refused(checkpoints_of, "tiny/absent")


def test_weights_in_one_format_are_fetched(hub: Hub, family: dict[str, Path], tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(family["step8"], both)
    (both / "pytorch_model.bin").write_bytes(b"not to be fetched")
    (both / "modeling_own.py").write_text("raise SystemExit\n")
    hub.folders = {"step8": both}
    assert load_checkpoint(at(8), device="cpu").hash == hash_of(family["step8"])
    fetched = {asked.path.rpartition("/")[2] for asked in hub.asked if "/resolve/" in asked.path}
    assert "model.safetensors" in fetched
    assert not fetched & {"pytorch_model.bin", "modeling_own.py"}
