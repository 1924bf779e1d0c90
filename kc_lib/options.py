"""Options of methods: frozen dataclasses that declare each option once, with its range and meaning, and check themselves."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Self

from kc_lib.errors import KnowledgeCircuitsError, MethodError

WANTED = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "list": "a list of names"}
LONGEST_SHOWN = 60  # characters of a wrong value in an error
WORDS = {"true": True, "false": False, "yes": True, "no": False, "none": None, "null": None}


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    among: Sequence[str] = (),
    determines: bool = True,
) -> Any:
    """A field of an ``Options`` class: its default, meaning and range.

    Args:
        least, most, above: bounds of a number; ``above`` is not reached itself.
        among: the names that a text may be.
        determines: False for what changes how a result is computed, not what comes out (batch sizes, devices).
    """
    about = {"help": help, "least": least, "most": most, "above": above, "among": tuple(among), "determines": determines}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Options:
    """A method's options. Types are bool, int, float, str, ``int | float`` and ``list`` of names, each ``| None``.

    ``**options`` unpacks one into keywords, so that a method's fields can be given as one object or by name.
    A list may be given as one text: names are separated by commas, or else by spaces.

    Example:
        >>> @dataclass(frozen=True)
        ... class Sampling(Options):
        ...     n: int = option(10, "samples of a fact", least=1)
        >>> Sampling(n=0)
        MethodError: n is 0; it must be a whole number, at least 1
    """

    error: ClassVar[type[KnowledgeCircuitsError]] = MethodError

    def __post_init__(self) -> None:
        for name, declared in self.declared().items():
            value = self[name]
            if "list" in _kinds(declared) and isinstance(value, str | tuple):
                value = names_in(value) if isinstance(value, str) else list(value)
                object.__setattr__(self, name, value)
            problem = _problem(declared, value)
            if problem:
                raise self.error(problem)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The options with these values.

        Raises:
            KnowledgeCircuitsError: of the class's kind; a name that is none, or a value out of range.
        """
        unknown = [name for name in given if name not in cls.declared()]
        if unknown:
            raise cls.error(f"unknown option {unknown[0]!r}: use some of {', '.join(cls.declared())}")
        return cls(**given)

    @classmethod
    def declared(cls) -> dict[str, Field[Any]]:
        """The options by name."""
        return {one.name: one for one in fields(cls)}

    def keys(self) -> list[str]:
        return list(self.declared())

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def determining(self) -> dict[str, Any]:
        """The values that a result depends on."""
        return {name: self[name] for name, one in self.declared().items() if one.metadata["determines"]}


def names_in(text: str) -> list[str]:
    """Names in a text: separated by commas where there is one, else by spaces."""
    parts = text.split(",") if "," in text else text.split()
    return [part.strip() for part in parts if part.strip()]


def plain_value(text: str) -> Any:
    """None, a truth value, a number, a text or a list of them: what a text on the command line reads as."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_value(declared: Field[Any], text: str) -> Any:
    """The value that a text on the command line stands for, by the option's type; the check says what it must be."""
    kinds = _kinds(declared)
    is_none = "None" in kinds and text.lower() in ("none", "null")
    if "str" in kinds:
        return None if is_none else text
    if "list" in kinds and not is_none and not text.lstrip().startswith("["):
        return names_in(text)
    value = plain_value(text)
    return text if value is None and not is_none else value


def shown(declared: Field[Any]) -> str:
    """An option's range in words, for help."""
    return _wanted(declared) if not declared.metadata["among"] else ", ".join(declared.metadata["among"])


def _kinds(declared: Field[Any]) -> set[str]:
    return {kind.split("[")[0].strip() for kind in str(declared.type).split("|")}


def _wanted(declared: Field[Any]) -> str:
    about, kinds = declared.metadata, _kinds(declared)
    kind = "float" if {"int", "float"} <= kinds else next(kind for kind in WANTED if kind in kinds)
    bounds = [
        f"{word} {about[name]:g}"
        for name, word in (("least", "at least"), ("above", "above"), ("most", "at most"))
        if about[name] is not None
    ]
    wanted = ", ".join([WANTED[kind], *bounds])
    return f"{wanted}, or none" if "None" in kinds else wanted


def _problem(declared: Field[Any], value: Any) -> str:
    """What is wrong with a value, empty if nothing is."""
    about, kinds = declared.metadata, _kinds(declared)
    text = repr(value)
    short = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
    if value is None:
        fits = "None" in kinds
    elif isinstance(value, bool):
        fits = "bool" in kinds
    elif isinstance(value, int | float):
        fits = ("float" in kinds or ("int" in kinds and isinstance(value, int))) and _within(about, value)
    elif isinstance(value, str):
        if "str" in kinds and about["among"] and value not in about["among"]:
            return f"unknown {declared.name} {short}: use one of {', '.join(about['among'])}"
        fits = "str" in kinds
    elif isinstance(value, list):
        if "list" in kinds and all(isinstance(item, str) for item in value):
            unknown = [item for item in value if about["among"] and item not in about["among"]]
            names = ", ".join(about["among"])
            return f"unknown name {unknown[0]!r} in {declared.name}: use some of {names}" if unknown else ""
        fits = "list" in kinds and bool(re.search(r"list\[(int|float)\]", str(declared.type))) and bool(value)
        fits = fits and all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
    else:
        fits = type(value).__name__ in kinds  # an object that stands for a name, such as a metric of the user's own
    return "" if fits else f"{declared.name} is {short}; it must be {_wanted(declared)}"


def _within(about: Mapping[str, Any], value: float) -> bool:
    return (
        math.isfinite(value)
        and (about["least"] is None or value >= about["least"])
        and (about["most"] is None or value <= about["most"])
        and (about["above"] is None or value > about["above"])
    )


@dataclass(frozen=True)
class Notebook:
    """What a notebook asks for: the parameters of its first cell, and the groups of options behind ``options``.

    A field of a group that the first cell has too takes its value from there, unless ``options`` names it.
    """

    cell: type[Options]
    groups: Mapping[str, type[Options]]

    def option_names(self) -> dict[str, Field[Any]]:
        """Every option by its name, ``acdc.tau``; fields that the first cell has too are among them."""
        return {f"{group}.{name}": one for group, options in self.groups.items() for name, one in options.declared().items()}

    def defaults(self) -> dict[str, Field[Any]]:
        """What ``kc run --help`` lists: the parameters of the first cell, and the options that these do not give."""
        plain = self.cell.declared()
        return plain | {key: one for key, one in self.option_names().items() if one.name not in plain}
