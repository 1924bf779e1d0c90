"""Text to tokens, once for the whole suite: BOS, answers in their context, and spans from character offsets."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kc_lib.errors import TaskError
from kc_lib.models.model import Model


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer with the one decision about BOS that holds for every use in a task."""

    inner: PreTrainedTokenizerBase
    prepend_bos: bool
    mask: int | None = None  # the mask token of a masked LM; None for a causal model

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a prompt, BOS (of a masked LM, [CLS]) included where it is wanted."""
        return self.opening + tuple(self.inner(text, add_special_tokens=False).input_ids)

    def answer(self, prompt: str, answer: str, between: str = " ") -> tuple[int, ...]:
        """Tokens that continue the prompt with a space (or what else is ``between``) and the answer, as they are there.

        Raises:
            TaskError: prompt and answer share a token, so that the answer has no first token of its own.
        """
        before = self.encode(prompt)
        whole = self.encode(f"{prompt}{between}{answer.strip()}")
        if whole[: len(before)] != before or len(whole) == len(before):
            raise TaskError(
                f"the answer {answer!r} does not start a new token after the prompt {prompt!r}; end the prompt with a "
                "whole word and without a space"
            )
        return whole[len(before) :]

    def single(self, word: str, before: str = "and") -> int | None:
        """The one token of a word that follows another; None where it has several, or is unknown to the tokenizer."""
        tokens = self.answer(before, word)
        # a word-level tokenizer has one token for every word it does not know
        return tokens[0] if len(tokens) == 1 and tokens[0] != self.inner.unk_token_id else None

    def span(self, text: str, part: str, what: str = "subject") -> tuple[int, ...]:
        """Token indices that hold the last occurrence of ``part`` in ``text``, from the tokenizer's character offsets.

        Raises:
            TaskError: the part is not in the text, or the tokenizer gives no offsets.
        """
        start = text.rfind(part)
        if not part or start < 0:
            raise TaskError(f"the {what} {part!r} is not in the prompt {text!r}")
        return self.overlapping(text, start, start + len(part))

    def overlapping(self, text: str, start: int, end: int) -> tuple[int, ...]:
        """Token indices that overlap the characters ``start`` to ``end``."""
        if not self.inner.is_fast:
            raise TaskError(f"the tokenizer {type(self.inner).__name__} gives no character offsets; use a fast tokenizer")
        offsets = self.inner(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        shift = len(self.opening)
        # a token's leading space is not part of what it holds
        return tuple(
            i + shift
            for i, (a, b) in enumerate(offsets)
            if a + (len(text[a:b]) - len(text[a:b].lstrip())) < end and b > start
        )

    def around(self, text: str, start: int, end: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Tokens of a whole sentence left of, at, and right of the characters ``start`` to ``end``, special tokens included.

        A masked LM reads ``[CLS] sentence [SEP]``, a causal model BOS where it is wanted and the sentence.

        Raises:
            TaskError: the characters share a token with what is around them, or the tokenizer gives no offsets.
        """
        inside = self.overlapping(text, start, end)
        encoded = self.inner(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = [encoded.offset_mapping[i - len(self.opening)] for i in inside]
        if not inside or text[offsets[0][0] : start].strip() or text[end : offsets[-1][1]].strip():
            raise TaskError(f"{text[start:end]!r} has no tokens of its own in {text!r}; use another sentence")
        tokens = self.opening + tuple(encoded.input_ids) + self.closing
        return tokens[: inside[0]], tokens[inside[0] : inside[-1] + 1], tokens[inside[-1] + 1 :]

    @property
    def opening(self) -> tuple[int, ...]:
        """What a text starts with: BOS where it is wanted, of a masked LM [CLS]."""
        # Not left to the tokenizer's own template: booting with add_bos_token replaces that of a plain fast tokenizer.
        if self.mask is not None:
            return () if self.inner.cls_token_id is None else (int(self.inner.cls_token_id),)
        if not self.prepend_bos:
            return ()
        if self.inner.bos_token_id is None:
            raise TaskError("the tokenizer has no BOS token; use prepend_bos=False")
        return (int(self.inner.bos_token_id),)

    @property
    def closing(self) -> tuple[int, ...]:
        """What a whole sentence ends with: of a masked LM [SEP]."""
        return () if self.mask is None or self.inner.sep_token_id is None else (int(self.inner.sep_token_id),)


def tokenizer_of(model: Model, prepend_bos: bool | None = None) -> Tokenizer:
    """The model's tokenizer; ``prepend_bos=None`` does what TransformerLens does for the model (as a rule, prepend)."""
    if model.tokenizer is None:
        raise TaskError("the model has no tokenizer; give a folder that holds one")
    wanted = model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    return Tokenizer(model.tokenizer, bool(wanted), int(model.tokenizer.mask_token_id) if model.is_masked else None)
