"""The type checker of jaxtyping's pytest hook: shapes and dtypes of every function's tensors, and nothing else.

What a user may give wrongly (a name for a number) is refused by the library in one line, and tests ask for that line, so
plain types are left to mypy.
"""

from __future__ import annotations

from typing import Any, TypeVar

from beartype import beartype

SHAPED = ("Float[", "Int[", "Bool[")
Checked = TypeVar("Checked")


def shapes(function: Checked) -> Checked:
    """``beartype`` for the annotations that state a shape."""
    annotations: dict[str, Any] = getattr(function, "__annotations__", {})
    stated = {name: kind for name, kind in annotations.items() if any(word in str(kind) for word in SHAPED)}
    if not stated:
        return function
    function.__annotations__ = stated  # type: ignore[attr-defined]  # functions have it
    return beartype(function)  # type: ignore[no-any-return, call-overload]  # a function for a function
