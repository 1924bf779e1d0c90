"""Text to tokens, once for the whole suite: BOS, answers in their context, and spans from character offsets."""

from __future__ import annotations

from dataclasses import dataclass

from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase

from kc_lib.errors import TaskError


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer with the one decision about BOS that holds for every use in a task."""

    inner: PreTrainedTokenizerBase
    prepend_bos: bool

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a prompt, BOS included where it is wanted."""
        return self._bos() + tuple(self.inner(text, add_special_tokens=False).input_ids)

    def answer(self, prompt: str, answer: str) -> tuple[int, ...]:
        """Tokens that continue the prompt with a space and the answer, as they are in that place.

        Raises:
            TaskError: prompt and answer share a token, so that the answer has no first token of its own.
        """
        before = self.encode(prompt)
        whole = self.encode(f"{prompt} {answer.strip()}")
        if whole[: len(before)] != before or len(whole) == len(before):
            raise TaskError(
                f"the answer {answer!r} does not start a new token after the prompt {prompt!r}; end the prompt with a "
                "whole word and without a space"
            )
        return whole[len(before) :]

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
        shift = len(self._bos())
        # a token's leading space is not part of what it holds
        return tuple(
            i + shift
            for i, (a, b) in enumerate(offsets)
            if a + (len(text[a:b]) - len(text[a:b].lstrip())) < end and b > start
        )

    def _bos(self) -> tuple[int, ...]:
        if not self.prepend_bos:
            return ()
        if self.inner.bos_token_id is None:
            raise TaskError("the tokenizer has no BOS token; use prepend_bos=False")
        return (int(self.inner.bos_token_id),)


def tokenizer_of(model: TransformerBridge, prepend_bos: bool | None = None) -> Tokenizer:
    """The model's tokenizer; ``prepend_bos=None`` does what TransformerLens does for the model (as a rule, prepend)."""
    if model.tokenizer is None:
        raise TaskError("the model has no tokenizer; give a folder that holds one")
    wanted = model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    return Tokenizer(model.tokenizer, bool(wanted))
