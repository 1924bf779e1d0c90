"""Results know their table and their file; what is kept is read again, and a file of another kind is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest

from kc_lib.errors import MethodError
from kc_lib.graph import Graph
from kc_lib.results import Result, hash_of, kept, load_table, save_table


@dataclass(frozen=True)
class Measured(Result):
    """A result with every kind of field."""

    columns: ClassVar[tuple[str, ...]] = ("fact", "value")

    rows: pd.DataFrame
    facts: pd.DataFrame
    graph: Graph
    groups: tuple[str, ...]
    threshold: float | None
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Other(Result):
    """A result of another kind."""

    rows: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)


def measured(value: float = 0.25) -> Measured:
    rows = pd.DataFrame({"fact": [0, 1], "value": [value, float("nan")]})
    facts = pd.DataFrame({"subject": ["Málaga", "<b>"], "known": [True, False]})
    graph = Graph(n_layers=2, n_heads=4, n_kv_heads=2, d_model=8, parallel=False, grouped=True)
    return Measured(rows, facts, graph, ("a", "b"), None, {"model": "nano", "steps": [1, 2]})


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    result = measured()
    again = Measured.load(result.save(tmp_path / "measured.parquet"))
    pd.testing.assert_frame_equal(again.rows, result.rows)
    pd.testing.assert_frame_equal(again.facts, result.facts)
    assert (again.graph, again.groups, again.threshold) == (result.graph, result.groups, result.threshold)
    assert again.provenance == result.provenance
    assert again.hash == result.hash
    assert measured(0.5).hash != result.hash


@pytest.mark.parametrize("spoil", ["another", "columns", "no parquet", "absent", "about"])
def test_a_file_of_another_kind_is_refused_in_one_line(spoil: str, tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    if spoil == "another":
        Other(measured().rows).save(path)
    elif spoil == "columns":
        save_table(pd.DataFrame({"fact": [1]}), path, measured().about())
    elif spoil == "no parquet":
        path.write_text("fact,value\n")
    elif spoil == "about":
        save_table(measured().rows, path, {"provenance": {}})
    with pytest.raises(MethodError) as error:
        Measured.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_written_before_kinds_were_named_is_read(tmp_path: Path) -> None:
    save_table(measured().rows, tmp_path / "old.parquet", {"model": "nano"})
    assert Other.load(tmp_path / "old.parquet").provenance == {"model": "nano"}


def test_a_result_that_is_there_is_kept_as_it_is(tmp_path: Path) -> None:
    given = measured(0.5)
    assert kept(tmp_path / "given.parquet", given) is given
    assert type(given).load(tmp_path / "given.parquet").hash == given.hash
    written = (tmp_path / "given.parquet").stat().st_mtime_ns
    assert kept(tmp_path / "given.parquet", given) is given
    assert (tmp_path / "given.parquet").stat().st_mtime_ns == written


def test_what_is_kept_is_computed_once(tmp_path: Path) -> None:
    calls = []

    def table(n: int) -> pd.DataFrame:
        calls.append(n)
        return pd.DataFrame({"n": [n]})

    for _ in range(2):
        assert kept(tmp_path / "table.parquet", table, 3)["n"].tolist() == [3]
        assert kept(tmp_path / "measured.parquet", measured, value=0.5).hash == measured(0.5).hash
    assert calls == [3]
    assert load_table(tmp_path / "table.parquet")[1] == {}


def test_hashes_do_not_depend_on_the_order_of_keys() -> None:
    assert hash_of({"a": 1, "b": [2]}) == hash_of({"b": [2], "a": 1}) != hash_of({"a": 1, "b": [3]})
