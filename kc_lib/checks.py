"""What is checked where a caller enters: shapes and types of tensors (jaxtyping annotations, beartype), and counts."""

from beartype import beartype
from jaxtyping import jaxtyped

from kc_lib.errors import MethodError

checked = jaxtyped(typechecker=beartype)


def check_counts(least: int, **numbers: object) -> None:
    """Raise MethodError for what is no whole number, or less than ``least``."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise MethodError(f"{name} is {number!r}; it must be a whole number, at least {least}")
