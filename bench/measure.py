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
    """Floating-point operations of the call's matrix products, counted by torch; packed and fused ones by us."""
    ours = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _of_attention}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        ours[torch.ops.mkldnn._linear_pointwise] = _of_packed
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        call()
    return int(counter.get_total_flops())


def _of_packed(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """A product's operations from the shapes of its input ``[..., d_in]`` and weight ``[d_out, d_in]``."""
    return 2 * math.prod(x) * weight[0]


def _of_attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """Scores and mixing, from shapes ``[batch, head, pos, d_head]``."""
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])
