"""Lines of code: physical lines that are neither blank, comment nor docstring, by folder or by file.

python tools/loc.py [--files] [ROOT ...]        (default: kc_lib)
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(source: str) -> int:
    """How many lines of a file are code."""
    lines = {number for number, line in enumerate(source.splitlines(), 1) if line.strip()}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            lines.discard(token.start[0])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def main() -> None:
    """Print a line for each folder (or file), and the sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="*", type=Path, default=[Path("kc_lib")])
    parser.add_argument("--files", action="store_true", help="a line for each file")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    for root in arguments.roots:
        for path in sorted(root.rglob("*.py")):
            counts[str(path if arguments.files else path.parent)] += code_lines(path.read_text(encoding="utf-8"))
    for name, count in sorted(counts.items()):
        print(f"{count:7,}  {name}")
    print(f"{sum(counts.values()):7,}  in all")


if __name__ == "__main__":
    main()
