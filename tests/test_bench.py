"""The benchmarks start: what they import is there."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import ROOT

BENCHES = sorted(path for path in (ROOT / "bench").glob("*.py") if path.stem != "measure")


@pytest.mark.slow
@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_a_bench_says_what_it_takes(path: object) -> None:
    shown = subprocess.run([sys.executable, str(path), "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert "Usage" in shown.stdout
