"""Shapes and types of public tensor functions, checked where a caller enters (jaxtyping annotations, beartype)."""

from beartype import beartype
from jaxtyping import jaxtyped

checked = jaxtyped(typechecker=beartype)
