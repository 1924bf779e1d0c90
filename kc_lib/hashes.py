"""One hash of what a result depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def hash_of(value: Any) -> str:
    """Hash of a value that json can hold, whatever the order of its keys; anything else enters as its text."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
