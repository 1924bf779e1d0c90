"""Running text: the user's, or the one that comes with the project."""

from __future__ import annotations

from pathlib import Path

from kc_lib.errors import TaskError
from kc_lib.resources import DATA

DEFAULT_TEXT = DATA / "text" / "stories.txt"


def load_text(text: str | Path | None = None) -> str:
    """The text of a file, a text given as such, or the project's own for None.

    A ``Path`` is a file, and so is a string of one line that ends in ``.txt``.

    Raises:
        TaskError: the file cannot be read, or there is no text in it.
    """
    path = DEFAULT_TEXT if text is None else text
    if isinstance(path, str) and ("\n" in path or not path.endswith(".txt")):
        found = path
    else:
        try:
            found = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"the text {path} cannot be read ({error}): give a UTF-8 file or the text itself") from error
    if not found.strip():
        raise TaskError("the text is empty: give some running text")
    return found
