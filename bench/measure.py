"""Seconds and floating-point operations of a call."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

Value = TypeVar("Value")


def timed(call: Callable[[], Value]) -> tuple[Value, float]:
    """What the call returns, and the seconds it took."""
    start = time.perf_counter()
    value = call()
    return value, time.perf_counter() - start


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of the call's matrix products, counted by torch; packed ones by us."""
    packed = {torch.ops.mkldnn._linear_pointwise: _of_packed} if hasattr(torch.ops.mkldnn, "_linear_pointwise") else {}
    with FlopCounterMode(display=False, custom_mapping=packed) as counter:
        call()
    return int(counter.get_total_flops())


def _of_packed(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """A product's operations from the shapes of its input ``[..., d_in]`` and weight ``[d_out, d_in]``."""
    return 2 * math.prod(x) * weight[0]
