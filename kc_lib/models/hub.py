"""Training steps kept as revisions of a hub repository, and their files.

huggingface_hub itself resumes a file that breaks off (a Range request, five times without progress) and keeps files that
are complete. Ours: further attempts after it has given up, and which files are fetched at all: those of the
repository's top folder that a model and its tokenizer are loaded from, with weights in one format only.
"""

from __future__ import annotations

import errno
import logging
import re
import time
from pathlib import Path

from huggingface_hub import HfApi, constants, scan_cache_dir, snapshot_download
from huggingface_hub.errors import CacheNotFound, HfHubHTTPError, LocalEntryNotFoundError

from kc_lib.errors import ModelError, first_line
from kc_lib.models.load import hub_in_reach
from kc_lib.models.model import quiet

STEP = re.compile(
    r"(?:step|checkpoint-)(\d+)"
)  # EleutherAI's names, and stanford-crfm's (and those of transformers' Trainer)
SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja")
SAFE_WEIGHTS, OLD_WEIGHTS = "*.safetensors", "pytorch_model*.bin"
TRANSIENT = frozenset({408, 429})  # of the answers below 500, those that may change
logger = logging.getLogger(__name__)


def step_revisions(name: str) -> dict[int, str]:
    """Branches and tags of a repository that are named by a training step, by step; of a hub out of reach, those cached.

    Raises:
        ModelError: no such repository, or none cached while the hub is out of reach.
    """
    if hub_in_reach():
        try:
            refs = HfApi().list_repo_refs(name)
        except Exception as error:  # the hub's client raises its own errors and those of its transport
            raise ModelError(
                f"the checkpoints of {name!r} cannot be listed: it is no folder, and the hub says: {first_line(error)}"
            ) from error
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
    else:
        names = _cached_refs(name)
        if not names:
            raise ModelError(
                f"the checkpoints of {name!r} cannot be listed: it is no folder, the hub is out of reach and none of "
                "them is in its cache; 'nano' has checkpoints that need no network"
            )
    return {int(match[1]): ref for ref in names if (match := STEP.fullmatch(ref))}


def fetch(name: str, revision: str, *, retries: int = 3, cache: Path | None = None) -> Path:
    """The folder of a revision's files, downloaded into the hub's cache (or another) where they are not there yet.

    Raises:
        ModelError: what the hub said when it was last asked; nothing that was there before is lost.
    """
    for attempt in range(retries + 1):
        try:
            return _fetch_once(name, revision, cache)
        except Exception as error:  # the hub's client, its transport and xet each raise their own
            if attempt == retries or _is_final(error):
                raise ModelError(f"its files cannot be downloaded: {first_line(error)}") from error
            logger.warning("%s@%s: %s; trying again (%d of %d)", name, revision, first_line(error), attempt + 1, retries)
            time.sleep(2.0**attempt)
    raise ModelError(f"retries is {retries}; it must be at least 0")


def cached(name: str, revision: str) -> Path | None:
    """The folder of a revision that is in the hub's cache, and complete as far as the cache can tell."""
    for weights in (SAFE_WEIGHTS, OLD_WEIGHTS):
        try:
            folder = _snapshot(name, revision, weights, local_files_only=True)
        except LocalEntryNotFoundError:
            continue
        if any(folder.glob(weights)):
            return folder
    return None


def _fetch_once(name: str, revision: str, cache: Path | None) -> Path:
    if not hub_in_reach():
        raise ConnectionError(f"the hub {constants.ENDPOINT} is out of reach")
    files = [file.rfilename for file in HfApi().model_info(name, revision=revision).siblings or ()]
    weights = SAFE_WEIGHTS if any(Path(file).match(SAFE_WEIGHTS) and "/" not in file for file in files) else OLD_WEIGHTS
    return _snapshot(name, revision, weights, cache)


def _snapshot(name: str, revision: str, weights: str, cache: Path | None = None, local_files_only: bool = False) -> Path:
    with quiet():
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache,
            local_files_only=local_files_only,
            allow_patterns=[*SETTINGS, weights],
            ignore_patterns=["*/*"],
        )
    return Path(folder)


def _is_final(error: Exception) -> bool:
    """Whether asking again would give the same: no such revision, no right to it, a full disk."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        return status < 500 and status not in TRANSIENT
    return getattr(error, "errno", None) == errno.ENOSPC


def _cached_refs(name: str) -> list[str]:
    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    return sorted(ref for repository in repositories if repository.repo_id == name for ref in repository.refs)
