"""The one family of exceptions a user of the suite can meet.

Every message says what was given, where, and what to do about it, in one line; ``kc`` prints that line and exits with
code 2. Anything that is not a ``KnowledgeCircuitsError`` is a fault of ours.
"""

from beartype import beartype
from jaxtyping import jaxtyped

MORE_LINES = 6  # of another library's message, where its first is no sentence
checked = jaxtyped(typechecker=beartype)
"""Checks shapes and types of a public function's arguments; under test every function's shapes are checked."""


class KnowledgeCircuitsError(Exception):
    """Base of every error the suite raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ModelError(KnowledgeCircuitsError):
    """A model that cannot be found, loaded, or written as a sum over the residual stream."""


class TaskError(KnowledgeCircuitsError):
    """Task data that is missing, malformed, or leaves nothing to work on."""


class GraphError(KnowledgeCircuitsError):
    """A node, edge or circuit file that does not fit the model's graph."""


class MethodError(KnowledgeCircuitsError):
    """A method, metric or option that does not exist or does not apply here."""


class RunError(KnowledgeCircuitsError):
    """A run folder, a notebook parameter or an output path that cannot be used."""


def first_line(error: BaseException) -> str:
    """What another library says, in one line: its first line, and what follows where that ends in a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    n_lines = 1 + MORE_LINES if lines[0].endswith((":", ",")) else 1
    return " ".join(lines[:n_lines])


def check_counts(least: int, **numbers: object) -> None:
    """Raise MethodError for what is no whole number, or less than ``least``."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise MethodError(f"{name} is {number!r}; it must be a whole number, at least {least}")
