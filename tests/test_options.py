"""Options declare themselves once, and check what they are given: types, ranges, names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from kc_lib import metrics
from kc_lib.circuits import options as circuit_options
from kc_lib.errors import MethodError, TaskError
from kc_lib.models import load
from kc_lib.models import options as model_options
from kc_lib.options import Options, names_in, option, read_value, shown
from kc_lib.residual import activations


@dataclass(frozen=True)
class Every(Options):
    """One option of each type."""

    flag: bool = option(False, "a flag")
    count: int = option(3, "a count", least=1)
    share: float = option(0.5, "a share", above=0, most=1)
    size: int | float = option(0.005, "share or number of edges", above=0)
    rule: str = option("left", "a rule", among=("left", "right"))
    text: str | None = option(None, "a file")
    limit: int | None = option(None, "a limit", least=1)
    kinds: list[str] = option("a b", "kinds", among=("a", "b", "c"))  # type: ignore[assignment]  # a text is taken apart
    steps: list[int] | None = option(None, "steps")


REFUSED = [
    ({"flag": 1}, "flag is 1; it must be true or false"),
    ({"flag": "yes"}, "flag is 'yes'; it must be true or false"),
    ({"count": 0}, "count is 0; it must be a whole number, at least 1"),
    ({"count": True}, "count is True; it must be a whole number, at least 1"),
    ({"count": 2.0}, "count is 2.0; it must be a whole number, at least 1"),
    ({"count": None}, "count is None; it must be a whole number, at least 1"),
    ({"share": 0}, "share is 0; it must be a number, above 0, at most 1"),
    ({"share": float("nan")}, "share is nan; it must be a number, above 0, at most 1"),
    ({"share": float("inf")}, "share is inf; it must be a number, above 0, at most 1"),
    ({"share": "0.5"}, "share is '0.5'; it must be a number, above 0, at most 1"),
    ({"size": -1}, "size is -1; it must be a number, above 0"),
    ({"rule": "middle"}, "unknown rule 'middle': use one of left, right"),
    ({"rule": 5}, "rule is 5; it must be text"),
    ({"text": 5}, "text is 5; it must be text, or none"),
    ({"limit": 0}, "limit is 0; it must be a whole number, at least 1, or none"),
    ({"kinds": "a d"}, "unknown name 'd' in kinds: use some of a, b, c"),
    ({"kinds": ["a", 1]}, "kinds is ['a', 1]; it must be a list of names"),
    ({"steps": [1, True]}, "steps is [1, True]; it must be a list of names, or none"),
    ({"count": "x" * 500}, "count is 'x"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=str)
def test_a_wrong_value_is_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError) as error:
        Every.of(given)
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"share": 1}, 1),
        ({"size": 10}, 10),
        ({"text": ""}, ""),
        ({"limit": None}, None),
        ({"kinds": "c"}, ["c"]),
        ({"kinds": ("a", "c")}, ["a", "c"]),
        ({"kinds": ""}, []),
        ({"steps": [0, 512]}, [0, 512]),
    ],
    ids=str,
)
def test_a_right_value_is_taken(given: dict[str, Any], value: object) -> None:
    options = Every.of(given)
    assert options[next(iter(given))] == value


def test_unknown_names_are_refused_with_those_there_are() -> None:
    with pytest.raises(MethodError, match="unknown option 'counts': use some of flag, count, share"):
        Every.of({"counts": 1})


def test_a_class_says_which_error_it_raises() -> None:
    @dataclass(frozen=True)
    class OfTask(Options):
        error = TaskError
        n: int = option(1, "n", least=1)

    with pytest.raises(TaskError):
        OfTask(n=0)


def test_options_unpack_into_keywords() -> None:
    assert dict(**Every(count=4))["count"] == 4
    assert set(Every().determining()) == set(Every.declared())


def test_names_are_separated_by_commas_or_else_by_spaces() -> None:
    assert names_in("a b") == ["a", "b"]
    assert names_in("last subject token, last token") == ["last subject token", "last token"]
    assert names_in("my file.csv,") == ["my file.csv"]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("flag", "true", True),
        ("flag", "no", False),
        ("count", "5", 5),
        ("count", "5.0", 5.0),  # which the check then refuses
        ("count", "none", "none"),
        ("share", "1e-3", 1e-3),
        ("rule", "true", "true"),
        ("text", "none", None),
        ("text", "5", "5"),
        ("kinds", "a, b", ["a", "b"]),
        ("kinds", '["a b"]', ["a b"]),
        ("steps", "[1, 2]", [1, 2]),
        ("limit", "None", None),
        ("count", "__import__('os')", "__import__('os')"),
    ],
)
def test_texts_are_read_by_the_options_type(name: str, text: str, value: object) -> None:
    read = read_value(Every.declared()[name], text)
    assert read == value
    assert type(read) is type(value)


def test_help_says_what_an_option_may_be() -> None:
    assert shown(Every.declared()["rule"]) == "left, right"
    assert shown(Every.declared()["count"]) == "a whole number, at least 1"


def test_what_options_list_without_torch_is_what_there_is() -> None:
    """Options are read before torch is imported, so these names stand twice; they must not drift apart."""
    assert tuple(metrics.METRICS) == circuit_options.METRICS
    assert circuit_options.INTERVENTIONS == activations.INTERVENTIONS
    assert tuple(load.DTYPES) == model_options.DTYPES
