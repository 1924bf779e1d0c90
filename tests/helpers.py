"""What tests of several slices share."""

from __future__ import annotations

import csv
import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from papermill.exceptions import PapermillExecutionError
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kc_lib import cli, runs
from kc_lib.circuits.baselines import Circuits, labelled
from kc_lib.circuits.run import run_circuit
from kc_lib.errors import KnowledgeCircuitsError
from kc_lib.graph import Graph
from kc_lib.models.model import Model
from kc_lib.residual.activations import ablation
from kc_lib.stats import RESAMPLES
from kc_lib.tasks.batches import Batch, TokenPair, make_batch
from kc_lib.training.result import COLUMNS, TrainingResult

ROOT = Path(__file__).resolve().parents[1]  # of the project
VOCAB = 200
SMALL = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = SMALL | {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT2_SHAPE = {"n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
NEOX = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "gpt2": lambda: tf.GPT2Config(**SMALL, **GPT2_SHAPE),
    "neox": lambda: tf.GPTNeoXConfig(**SMALL, **NEOX, max_position_embeddings=64),
    "gptj": lambda: tf.GPTJConfig(**SMALL, **GPT2_SHAPE, rotary_dim=4),
    "llama": lambda: tf.LlamaConfig(**GROUPED),
    "qwen2": lambda: tf.Qwen2Config(**GROUPED),
    "qwen3": lambda: tf.Qwen3Config(**GROUPED),
    "gemma2": lambda: tf.Gemma2Config(**GROUPED, query_pre_attn_scalar=8, sliding_window=4),
    "gemma3": lambda: tf.Gemma3TextConfig(**GROUPED, query_pre_attn_scalar=8, sliding_window=4),
    "phi": lambda: tf.PhiConfig(**SMALL, **NEOX, max_position_embeddings=64),
    "olmo2": lambda: tf.Olmo2Config(**GROUPED),
    "bert": lambda: tf.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    ),
}
NAMED = ("gpt2", "neox", "llama", "qwen2", "gemma2")  # the kinds every gate is tested on


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer with offsets: w3 ... w199, BOS w1 as <s>."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    ).save_pretrained(folder)


# test_cli
BESIDE = Path(sys.executable).with_name("kc")


KC = [str(BESIDE)] if BESIDE.exists() else [sys.executable, "-c", "from kc_lib.cli import main; main()"]


NOTEBOOK = runs.NOTEBOOKS / "circuit_discovery.ipynb"


@dataclass
class Done:
    code: int
    out: str
    err: str


def kc(*arguments: object, cwd: Path) -> Done:
    """kc as a user calls it, wide enough that no table is cut."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "250", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([*KC, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    return Done(done.returncode, done.stdout, done.stderr)


def visible_runs(out: Path) -> list[Path]:
    return [path for path in out.glob("*/*/*/*") if not path.name.startswith(".")] if out.is_dir() else []


def assert_one_line_and_code_2(done: Done, *parts: str) -> None:
    """The error is the one line that begins with kc, comes last, and needs no traceback."""
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert done.code == 2, done.err[-2000:]
    assert "Traceback" not in done.err + done.out
    assert [line for line in lines if line.startswith("kc: ")] == lines[-1:], done.err[-2000:]
    for part in parts:
        assert part in lines[-1]


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows(n: int = 8) -> list[dict[str, str]]:
    return [
        {
            "clean": f"w3 w{20 + i} w4 w5",
            "corrupted": f"w3 w{50 + i} w4 w5",
            "answer": f"w{100 + i}",
            "distractor": f"w{120 + i}",
            "subject": f"w{20 + i}",
        }
        for i in range(n)
    ]


def run_cells(notebook: Path = NOTEBOOK, /, **parameters: Any) -> None:
    """The notebook's cells in this process with these parameters (``group.name``: an option), as papermill runs them."""
    document = nbformat.read(notebook, as_version=4)
    names: dict[str, Any] = {}
    options = {name: parameters.pop(name) for name in list(parameters) if "." in name}
    parameters |= {"options": options | parameters.get("options", {})} if options else {}
    for cell in document.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, notebook.name, "exec"), names)
            if "parameters" in cell.metadata.get("tags", []):
                assert set(parameters) <= set(names)
                names.update(parameters)


def assert_refused(notebook: Path, parts: Sequence[str], /, **parameters: Any) -> None:
    """The notebook ends with an error of ours, in one line that says this, as kc prints it, and leaves no run in ``out``."""
    with pytest.raises(KnowledgeCircuitsError) as error:
        run_cells(notebook, **parameters)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert visible_runs(Path(parameters["out"])) == []
    told = PapermillExecutionError(1, 1, "", type(error.value).__name__, message, [])
    assert type(cli._as_ours(told)) is type(error.value)  # so kc prints this line
    assert str(cli._as_ours(told)) == message


def relation(**changes: Any) -> str:
    document = {
        "name": "numbers",
        "prompt_templates": ["w3 {} w5"],
        "samples": [{"subject": f"w{20 + i}", "object": f"w{100 + i}"} for i in range(12)],
    }
    return json.dumps(document | changes)


# test_components
def facts(lengths: tuple[int, ...] = (5, 9, 7, 6, 8), seed: int = 3) -> list[TokenPair]:
    """Random pairs that name a subject of one or two tokens and a relation."""
    pairs = []
    for i, pair in enumerate(random_pairs(lengths, seed)):
        subject = (2,) if i % 2 else (1, 2)
        relation = tuple(p for p in range(1, len(pair.clean)) if p not in subject)
        named = {"subject": f"w{pair.clean[2]}", "answer": f"w{pair.answer[0]}", "clean": str(i)}
        pairs.append(replace(pair, answer=pair.answer[:1], positions={"subject": subject, "relation": relation}, text=named))
    return pairs


# test_facts
def known(**changes: Any) -> dict[str, Any]:
    row = {"known_id": 0, "subject": "w10 w11", "attribute": "w20", "prompt": "w5 w10 w11 w6", "relation_id": "P1"}
    return row | {"template": "w5 {} w6", "prediction": " w20 and more"} | changes


def written(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


# test_gates
KINDS = (*NAMED, "gptj", "gemma3", "phi", "qwen3")


SHARING = ("llama", "qwen2", "gemma2", "gemma3", "qwen3")  # kinds in which query heads share keys and values


VIEWS = [(kind, True) for kind in KINDS] + [(kind, False) for kind in SHARING]


SmallFolder = Callable[[str], Path]


SmallModel = Callable[[str], Model]


views = pytest.mark.parametrize(
    ("kind", "grouped"),
    [
        pytest.param(
            kind,
            grouped,
            id=f"{kind}-{'grouped' if grouped else 'ungrouped'}",
            marks=() if kind in NAMED else pytest.mark.slow,
        )
        for kind, grouped in VIEWS
    ],
)


def random_pairs(lengths: Sequence[int] = (5, 9, 9, 7), seed: int = 0) -> list[TokenPair]:
    """Pairs of unequal lengths; BOS and one more token are shared, then one or two tokens differ."""
    rng = random.Random(seed)
    pairs = []
    for i, length in enumerate(lengths):
        clean = [1, *(rng.randrange(3, 200) for _ in range(length - 1))]
        corrupted = list(clean)
        for position in rng.sample(range(2, length), 1 + i % 2):
            corrupted[position] = rng.choice([token for token in range(3, 200) if token != clean[position]])
        answer = tuple(rng.randrange(3, 200) for _ in range(1 + i % 3))
        distractor = rng.choice([token for token in range(3, 200) if token != answer[0]])
        pairs.append(TokenPair(tuple(clean), tuple(corrupted), answer, distractor, {}, {}))
    return pairs


@functools.cache
def hf_model(folder: str | Path) -> PreTrainedModel:
    """The plain Hugging Face model the oracles take."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def relative_gap(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def native_logits(model: Model, tokens: Tensor, batch: Batch) -> Tensor:
    """The booted model's own logits at the answer positions."""
    with torch.no_grad():
        return model.bridge(tokens)[torch.arange(len(batch))[:, None], batch.answer_positions]


def random_edges(graph: Graph, per_kind: int, seed: int = 0) -> list[tuple[int, int]]:
    """Edges into random readers of each kind; the input and the last possible writer are always among the writers."""
    rng = random.Random(seed)
    edges = []
    for kind in ("q", "k", "v", "mlp", "logits"):
        columns = [i for i, reader in enumerate(graph.readers) if reader.kind == kind]
        for i in range(per_kind):
            column = rng.choice(columns)
            n = graph.readers[column].n_writers
            edges.append(({0: 0, 1: n - 1}.get(i, rng.randrange(n)), column))
    return edges


# test_judge_areas
FOUND, HELD_OUT = random_pairs((5, 7, 6, 6, 8), seed=21), random_pairs((6, 8, 7, 5), seed=22)


SPLITS = {"discovery": FOUND, "held_out": HELD_OUT}


SIZES = (0.05, 0.2, 0.5, 1.0)


def single_values(model, circuits: Circuits, pairs: Sequence[TokenPair]) -> dict[str, np.ndarray]:
    """Logit differences, one run per fact and circuit; the full and the empty circuit by the model's own logits."""
    decoder, values = model.residual, {name: [] for name in ("full", "empty", *circuits)}
    plain = {name: one.circuit for name, one in labelled(circuits).items()}
    for pair in pairs:
        batch = make_batch([pair])
        ablated = ablation(decoder, "patching", batch)
        logits = {
            "full": native_logits(model, batch.clean, batch),
            "empty": native_logits(model, batch.corrupted, batch),
        } | {name: run_circuit(decoder, circuit.graph, circuit.mask, batch, ablated) for name, circuit in plain.items()}
        for name, found in logits.items():
            values[name].append((found[0, 0, pair.answer[0]] - found[0, 0, pair.distractor]).item())
    return {name: np.array(facts) for name, facts in values.items()}


def resamples(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))


def faithful(values: Mapping[str, np.ndarray], name: str, facts: np.ndarray | None = None) -> np.ndarray:
    """Faithfulness on all facts, or for every row of ``facts`` on those."""
    chosen = slice(None) if facts is None else facts
    full, empty, own = (values[key][chosen].mean(-1) for key in ("full", "empty", name))
    return (own - empty) / (full - empty)


# test_knowledge_neurons_kernel
def inner(folder: Path, kind: str) -> torch.nn.Module:
    auto = tf.AutoModelForMaskedLM if kind == "bert" else tf.AutoModelForCausalLM
    return auto.from_pretrained(folder).eval().requires_grad_(False)


# test_training
def refused(kind: type[KnowledgeCircuitsError], call: Callable[..., object], *args: object, **options: object) -> str:
    with pytest.raises(kind) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def values_of(logits: torch.Tensor, pair: TokenPair) -> float:
    """The metric that a task has by default, of one prompt."""
    if not pair.right:
        return float(logits[pair.answer[0]] - logits[pair.distractor])
    p = logits.softmax(-1)
    return float(p[list(pair.right)].sum() - p[list(pair.wrong)].sum())


def frame_of(rows: list[tuple[object, ...]]) -> TrainingResult:
    """Rows of (step, measure, task, seed, quantity, part, value)."""
    names = ["step", "measure", "task", "seed", "quantity", "part", "value"]
    frame = pd.DataFrame(rows, columns=names).assign(tokens=pd.NA, low=np.nan, high=np.nan, passes=pd.NA, of="", note="")
    frame["checkpoint"] = "step" + frame["step"].astype(str)
    return TrainingResult(frame[list(COLUMNS)].astype({"tokens": "Int64", "passes": "boolean"}))
