"""Word-level tokenizers for the nano models: one token a word, a punctuation mark, or two digits of a year."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
N_CONTEXT = 256


def causal_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Of the words of some texts. Like Pythia's, it puts no BOS in front unless asked; the model reads both."""
    inner = _word_level((PAD, BOS, EOS, UNK), texts, UNK)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=N_CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
    )


def masked_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Of the words of some texts, with BERT's special tokens."""
    inner = _word_level(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), texts, "[UNK]")
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, inner.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=N_CONTEXT,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _word_level(special: tuple[str, ...], texts: Iterable[str], unknown: str) -> Tokenizer:
    # years are read as in Greater-Than: the century and the year in it, each one token
    split = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex(r"\d\d"), behavior="isolated")])
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    words |= {f"{number:02}" for number in range(100)}
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *sorted(words)])}, unk_token=unknown))
    inner.pre_tokenizer = split
    return inner
