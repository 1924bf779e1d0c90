"""The public surface: a list that is held, imported lazily, every name with an example."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kc_lib as kc

NAMES = sorted(kc.__all__)


def test_the_list_is_short() -> None:
    assert 20 <= len(NAMES) <= 32


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_explains_itself(name: str) -> None:
    value = getattr(kc, name)
    assert callable(value)
    assert "Example:" in (value.__doc__ or ""), f"kc.{name} has no example"
    assert name in dir(kc)


def test_the_package_alone_imports_nothing_heavy() -> None:
    code = "import sys, kc_lib; print(sorted({'torch', 'transformers', 'pandas', 'numpy', 'plotly'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="absent"):
        _ = kc.absent
