"""Every weight is the file's: what transformers reports of loading is read, and a model that it filled up is refused.

Wrappers leave prefixes in the names of weights (``torch.compile``, data parallel, adapters); these are taken off. An adapter
that lies beside the weights is applied where peft is installed, and refused where it is not.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformer_lens.model_bridge.sources.transformers.source import (
    determine_architecture_from_hf_config,
    get_hf_model_class_for_architecture,
)
from transformers import PreTrainedModel

from kc_lib.errors import ModelError

WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")  # torch.compile, (distributed) data parallel, peft
ADAPTER = "adapter_config.json"
# What published files hold beside the model: heads of other objectives, and buffers that are computed.
HARMLESS = re.compile(
    r"(^|\.)(cls\.seq_relationship|pooler|qa_outputs|classifier|score)\.|inv_freq$|\.attn\.(masked_)?bias$|position_ids$"
)
SHOWN = 4  # keys named in an error


class WholeModel:
    """Stands for a model class of transformers while a bridge boots, and reads what loading reports."""

    def __init__(self, source: str) -> None:
        self.source = source

    def from_pretrained(self, name: str, **options: Any) -> PreTrainedModel:
        """The model of a folder or hub name.

        Raises:
            ModelError: weights that are missing, of another shape, or left over; an adapter without peft.
        """
        kind: Any = get_hf_model_class_for_architecture(determine_architecture_from_hf_config(options["config"]))
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        folder = Path(self.source)
        if not (folder / ADAPTER).exists():
            model, report = kind.from_pretrained(name, **options, **_without_prefix(folder))
            _check(report, self.source)
            return model
        if find_spec("peft") is None:
            raise ModelError(
                f"{self.source} holds an adapter ({ADAPTER}) beside the weights, which needs peft: 'pip install peft', or "
                "take the adapter's files away to run the weights without it"
            )
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as bare:  # transformers would take the adapter's base model from the hub
            for path in folder.iterdir():
                if not path.name.startswith("adapter_"):
                    (Path(bare) / path.name).symlink_to(path.resolve())
            model, report = kind.from_pretrained(bare, **options, **_without_prefix(folder))
        _check(report, self.source)
        merged: PreTrainedModel = PeftModel.from_pretrained(model, self.source).merge_and_unload()
        return merged


def _without_prefix(folder: Path) -> dict[str, Any]:
    """What makes transformers take a wrapper's prefix off the names, where all weights of a folder have it."""
    names = _weight_names(folder)
    for prefix in WRAPPERS:
        if names and all(name.startswith(prefix) for name in names):
            return {"key_mapping": {f"^{re.escape(prefix)}": ""}}
    return {}


def _weight_names(folder: Path) -> list[str]:
    """Names of the weights in a folder's safetensors; none of a hub name or of other formats."""
    index = folder / "model.safetensors.index.json"
    try:
        if index.exists():
            return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        with safe_open(folder / "model.safetensors", "pt") as file:
            return list(file.keys())
    except (OSError, ValueError, KeyError, SafetensorError):
        return []  # transformers says what is wrong with the file


def _check(report: dict[str, Any], source: str) -> None:
    mismatched = [f"{key[0]} is {list(key[1])}, not {list(key[2])}" for key in report.get("mismatched_keys", ())]
    unexpected = [key for key in report["unexpected_keys"] if not HARMLESS.search(key)]
    for keys, what in (
        (report["missing_keys"], "lacks weights of the model, which would be random"),
        (mismatched, "has weights of other shapes than its config says"),
        (unexpected, "has weights that the model of its config does not have"),
    ):
        if keys:
            raise ModelError(f"{source} {what}: {_named(sorted(keys))}; give the whole model as save_pretrained writes it")


def _named(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{', '.join(keys[:SHOWN])}{more}"
