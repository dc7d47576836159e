"""Dataclasses of settings to and from files, text and command lines, by jsonargparse.

Types are checked, names that do not exist are met with the closest ones, and the docstring under a
field is its help.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from fastcov_detection.files import write_text

Config = TypeVar("Config")

set_parsing_settings(docstring_parse_attribute_docstrings=True, add_print_completion_argument=True)


class ConfigError(ValueError):
    """A setting that does not exist or has an impossible value."""


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: what comes near, or what there is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(repr(candidate) for candidate in near)}?"
    return f"; known are {', '.join(sorted(known))}"


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as JSON-able values."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Builds a configuration from JSON values; what is missing keeps its default.

    Raises:
        ConfigError: If a key is unknown (with the closest name) or a value has the wrong type.
    """
    hints = dict(leaves(cls))
    for name, value in _flat(values, cls):
        _check_name(name, cls, hints)
        if value is None and type(None) not in get_args(hints[name]):
            raise ConfigError(f"{name} is None; give a value, or leave it out")
    with naming_values():
        return _built(cls, _parser(cls).parse_object(dict(values)))


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with some settings replaced.

    Args:
        config: A dataclass of settings.
        changes: Values by dotted name, for example ``{"model.norm": "group", "steps": "300"}``.
            Strings are read as the type of the setting; tuples as ``a,b,c`` or JSON.

    Raises:
        ConfigError: If a name is unknown or a value cannot be read.
    """
    cls = type(config)
    hints = dict(leaves(cls))
    words = []
    for name, value in changes.items():
        _check_name(name, cls, hints)
        words.append(f"--{name}={as_text(value, hints[name])}")
    with naming_values():
        parser = _parser(cls)
        before = parser.parse_object(to_dict(config))
        return _built(cls, parser.parse_args(words, namespace=before))


def save_config(config: Any, path: str | os.PathLike[str]) -> None:
    """Writes a configuration as JSON; the file appears whole or not at all."""
    write_text(path, json.dumps(to_dict(config), indent=2) + "\n")


def load_config(cls: type[Config], path: str | os.PathLike[str]) -> Config:
    """Reads a configuration: JSON as :func:`save_config` wrote it, or YAML.

    Raises:
        ConfigError: If the file is missing, is neither, or does not describe a ``cls``.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no configuration at {path}; check the path") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{path} is neither JSON nor YAML ({said}); save it again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not settings by name")
    return from_dict(cls, values)


def leaves(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and types of all settings of a dataclass."""
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def as_text(value: Any, hint: Any) -> str:
    """A value as a command line holds it: ``a,b`` is a list where the type is a tuple."""
    if not isinstance(value, str):
        return json.dumps(value)
    members = (hint, *get_args(hint))
    if type(None) in members and value.lower() in ("none", "null"):
        return "null"
    is_tuple = any(get_origin(member) is tuple for member in members)
    return f"[{value}]" if is_tuple and not value.startswith("[") else value


@contextmanager
def naming_values() -> Iterator[None]:
    """Turns errors of jsonargparse into one line: setting, value, and what is expected."""
    try:
        yield
    except ArgumentError as error:
        raise ConfigError(_one_line(str(error))) from None


_REFUSED = (
    r'Parser key "([^"]*)":\s+Expected an? (.*)\. Got value: (.*)',
    r'Parser key "([^"]*)":.*Subtypes: \[(.*?)\]\n.*Given value: (.*)',
)


def _one_line(message: str) -> str:
    for pattern in _REFUSED:
        found = re.search(pattern, message, re.DOTALL)
        if found:
            name, wanted, value = found.groups()
            wanted = re.sub(r"<class '(\w+)'>", r"\1", wanted).replace("NoneType", "none")
            wanted = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", wanted)
            return f"{name} is {value}; expected {wanted}"
    return " ".join(message.split())


def _flat(values: Any, cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings of nested JSON values by dotted name, unknown ones too."""
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{prefix.rstrip('.') or cls.__name__} is {values!r}; expected settings by name"
        )
    hints = get_type_hints(cls)
    for name, value in values.items():
        if dataclasses.is_dataclass(hints.get(name)):
            yield from _flat(value, hints[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_name(name: str, cls: Any, known: Mapping[str, Any]) -> None:
    if name not in known:
        raise ConfigError(f"unknown setting {name!r} of {cls.__name__}{closest(name, known)}")


@cache
def _parser(cls: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls)
    return parser


def _built(cls: Any, parsed: Any) -> Any:
    return cls(**_parser(cls).instantiate(parsed).as_dict())
