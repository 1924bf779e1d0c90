"""A folder that exists is the model, and every weight is the file's: anything else is refused with the keys named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from helpers import SmallFolder
from safetensors.torch import load_file, save_file
from torch import Tensor

from kc_lib.errors import ModelError
from kc_lib.models import weights
from kc_lib.models.load import load_model, resolve

Weights = dict[str, Tensor]
TOKENS = torch.tensor([[1, 5, 6, 7]])


@pytest.fixture
def changed(small_folder: SmallFolder, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a small model's folder whose weights were changed."""

    def folder_of(change: Callable[[Weights], Weights], kind: str = "llama", name: str = "copy") -> Path:
        folder = tmp_path / name
        shutil.copytree(small_folder(kind), folder)
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        return folder

    return folder_of


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: value for key, value in weights.items() if part not in key}


@pytest.mark.parametrize(
    ("kind", "part", "named"),
    [
        ("llama", "layers.1.mlp", "model.layers.1.mlp.down_proj.weight"),
        ("llama", "lm_head", "lm_head.weight"),
        ("neox", "layers.2.attention.dense", "gpt_neox.layers.2.attention.dense.bias"),
        ("gpt2", "h.0.ln_1", "h.0.ln_1.bias"),
    ],
)
def test_a_missing_weight_is_named(changed: Callable[..., Path], kind: str, part: str, named: str) -> None:
    message = refusal(changed(without(part), kind))
    assert "random" in message
    assert named in message


def test_many_missing_weights_are_counted(changed: Callable[..., Path]) -> None:
    assert "more;" in refusal(changed(without("mlp")))


def test_a_weight_too_many_is_named(changed: Callable[..., Path]) -> None:
    extra = changed(lambda weights: weights | {"model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)})
    assert "model.layers.7.mlp.up_proj.weight" in refusal(extra)


def test_a_weight_of_another_shape_is_named(changed: Callable[..., Path]) -> None:
    def narrower(weights: Weights) -> Weights:
        return weights | {"model.norm.weight": weights["model.norm.weight"][:-1].clone()}

    assert "model.norm.weight is [31], not [32]" in refusal(changed(narrower))


@pytest.mark.parametrize("prefix", weights.WRAPPERS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_the_prefix_of_a_wrapper_is_taken_off(
    changed: Callable[..., Path], small_folder: SmallFolder, prefix: str, kind: str
) -> None:
    folder = changed(lambda weights: {prefix + key: value for key, value in weights.items()}, kind)
    expected = load_model(str(small_folder(kind)), device="cpu")
    assert load_model(str(folder), device="cpu").hash == expected.hash


def test_what_published_files_hold_beside_the_model_does_no_harm(changed: Callable[..., Path]) -> None:
    extra = {"cls.seq_relationship.weight": torch.zeros(2, 32), "bert.pooler.dense.bias": torch.zeros(32)}
    assert load_model(str(changed(lambda weights: weights | extra, "bert")), device="cpu").is_masked is False


def test_an_adapter_beside_the_weights_is_not_ignored(changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = changed(dict)
    (folder / weights.ADAPTER).write_text(json.dumps({"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}))
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    assert "pip install peft" in refusal(folder)


def test_an_adapter_is_applied_where_peft_is(changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    folder = changed(dict)
    plain = load_model(str(folder), device="cpu")
    inside = plain.bridge.original_model.__class__.from_pretrained(folder)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        inside, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    assert (folder / weights.ADAPTER).exists()
    model = load_model(str(folder), device="cpu")
    with torch.no_grad():
        expected = adapted.eval()(TOKENS).logits
        torch.testing.assert_close(model.bridge(TOKENS), expected, atol=1e-4, rtol=1e-4)
        assert (model.bridge(TOKENS) - plain.bridge(TOKENS)).abs().max() > 0.01
    assert model.hash != plain.hash


@pytest.mark.parametrize("name", ["pythia-70m", "./pythia-70m", "gpt2-small", "llama-7b-hf"])
def test_a_folder_that_exists_is_the_model(
    small_folder: SmallFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copytree(small_folder("llama"), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    source = resolve(name)
    assert (source.kind, source.location) == ("folder", str((tmp_path / name).resolve()))
    model = load_model(name, device="cpu")
    assert model.source == "folder"
    assert model.hash == load_model(str(small_folder("llama")), device="cpu").hash


def test_names_are_resolved_in_one_order(small_folder: SmallFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(small_folder("llama"), tmp_path / "nano")
    monkeypatch.chdir(tmp_path)
    assert resolve("nano").kind == "embedded"
    assert resolve("./nano").kind == "folder"
    assert load_model("nano", device="cpu").source == "embedded"


BAD_NAMES: Mapping[str, str] = {
    "not ascii": "ünï",
    "space": "a b",
    "backslash": "\\",
    "newline": "a\nb",
    "empty": "",
    "null": "a\0b",
    "long": "x" * 100_000,
    "dots": "a..b",
}


@pytest.mark.parametrize("name", BAD_NAMES.values(), ids=BAD_NAMES)
def test_what_is_no_name_at_all_is_one_short_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kc_lib.models.load.hub_in_reach", lambda: False)
    with pytest.raises(ModelError) as error:
        load_model(name, device="cpu")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
