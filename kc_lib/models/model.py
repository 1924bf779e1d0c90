"""One object for a model: the bridge that runs it, what it is called, and its residual stream in parts."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import transformers.utils.logging as transformers_logging
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kc_lib.errors import ModelError, first_line
from kc_lib.residual.decoder import Decoder
from kc_lib.residual.encoder import Residual
from kc_lib.residual.from_bridge import decoder_of, encoder_of, is_causal

Kept = TypeVar("Kept")


class Model:
    """A model that is in memory: ``Model(bridge)`` wraps any ``TransformerBridge``, as ``load_model`` does.

    Example:
        >>> model = Model(TransformerBridge.boot_transformers("gpt2"))
        >>> model.residual.graph().n_edges
    """

    def __init__(self, bridge: TransformerBridge, name: str | None = None, source: str = "memory") -> None:
        """Wrap a bridge, which is put into evaluation mode.

        Args:
            name: by default what TransformerLens calls it.
            source: where it comes from: "embedded", "folder", "hub" or "memory".
        """
        self.bridge = bridge.eval()
        self.name = name or str(getattr(bridge.cfg, "model_name", "model"))
        self.source = source
        self._kept: dict[str, tuple[int, Any]] = {}

    @classmethod
    def from_hf(cls, hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> Model:
        """A model of transformers that is in memory already; its weights are shared, not copied.

        Raises:
            ModelError: an architecture that TransformerLens cannot boot.
        """
        name = name or hf_model.config.name_or_path or type(hf_model).__name__
        try:
            with quiet():
                bridge = TransformerBridge.boot_transformers(
                    name, hf_model=hf_model, tokenizer=tokenizer, dtype=hf_model.dtype, device=hf_model.device
                )
        except Exception as error:  # TransformerLens and transformers raise whatever the architecture met
            raise ModelError(f"the {type(hf_model).__name__} cannot be booted: {first_line(error)}") from error
        return cls(bridge, name)

    def __repr__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"Model({self.name}, {self.n_parameters:,} parameters, {kind}, {self.device})"

    @property
    def cfg(self) -> Any:
        """TransformerLens's configuration."""
        return self.bridge.cfg

    @property
    def tokenizer(self) -> Any:
        return self.bridge.tokenizer

    @property
    def device(self) -> torch.device:
        return torch.device(str(self.bridge.cfg.device))

    @property
    def dtype(self) -> torch.dtype:
        return self.bridge.cfg.dtype

    @property
    def is_causal(self) -> bool:
        """Whether positions see only what is left of them; masked language models see both sides."""
        return is_causal(self.bridge)

    @property
    def is_masked(self) -> bool:
        """Whether the model fills in a mask (BERT's kind): it sees both sides and its tokenizer has a mask token."""
        return not self.is_causal and getattr(self.tokenizer, "mask_token_id", None) is not None

    @property
    def n_parameters(self) -> int:
        """How many parameters the architecture has; the bridge keeps fused weights a second time, in parts."""
        original: Any = self.bridge.original_model
        with torch.device("meta"), quiet():
            return sum(parameter.numel() for parameter in type(original)(original.config).parameters())

    @property
    def hash(self) -> str:
        """Hash of every parameter's name, shape, type and bytes: the same weights have the same hash wherever they lie."""
        return self._unchanged("hash", lambda: _hash(self.bridge))

    @property
    def residual(self) -> Decoder:
        """The model as a sum over its residual stream, checked against its own logits.

        Raises:
            ModelError: an architecture that is no such sum, or has a part that is not known.
        """
        return self._unchanged("residual", lambda: decoder_of(self.bridge))

    @property
    def mlp_residual(self) -> Residual:
        """The model as methods about MLP neurons take it: ``residual``, or a masked model of the BERT kind in parts.

        Raises:
            ModelError: as ``residual``; or MLPs that are no sum over neurons.
        """
        if not self.is_causal:
            return self._unchanged("mlp_residual", lambda: encoder_of(self.bridge))
        for block in self.residual.blocks:
            _ = block.mlp_parts  # seen to equal the module, or refused
        return self.residual

    def _unchanged(self, name: str, compute: Callable[[], Kept]) -> Kept:
        """What was computed before, unless weights have been written to or hooks set or removed since."""
        kept = self._kept.get(name)
        if kept is None or kept[0] != _state(self.bridge):
            value = compute()
            kept = (_state(self.bridge), value)  # after it: the first pass sets hooks of transformers' own
            self._kept[name] = kept
        return kept[1]


def _state(bridge: TransformerBridge) -> int:
    """A number that changes when weights are written to in place or replaced, and when hooks are set or removed."""
    weights = tuple((parameter.data_ptr(), parameter._version) for parameter in bridge.parameters())
    hooks = tuple(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in bridge.modules())
    return hash((weights, hooks))


def _hash(bridge: TransformerBridge) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(bridge.named_parameters(), key=lambda item: item[0]):
        digest.update(json.dumps([name, list(parameter.shape), str(parameter.dtype)]).encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers while loading; restored on exit."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    lens_level = logging.root.level
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.root.setLevel(max(lens_level, logging.ERROR))  # TransformerLens warns on the root logger
    try:
        yield
    finally:
        logging.root.setLevel(lens_level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
