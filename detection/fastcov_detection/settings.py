"""Dataclasses of settings to and from JSON and command-line text."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastcov_detection.files import write_text

Config = TypeVar("Config")


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
    return _build(cls, values, "")


def save_config(config: Any, path: str | os.PathLike[str]) -> None:
    """Writes a configuration as JSON; the file appears whole or not at all."""
    write_text(path, json.dumps(to_dict(config), indent=2) + "\n")


def load_config(cls: type[Config], path: str | os.PathLike[str]) -> Config:
    """Reads a configuration that :func:`save_config` wrote.

    Raises:
        ConfigError: If the file is missing, is not JSON, or does not describe a ``cls``.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration at {path}; check the path") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); save it again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not settings by name")
    return from_dict(cls, values)


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with some settings replaced.

    Args:
        config: Any of the dataclasses of this module.
        changes: Values by dotted name, for example ``{"model.norm": "group", "steps": "300"}``.
            Strings are read as the type of the setting; tuples as ``a,b,c`` or JSON.

    Raises:
        ConfigError: If a name is unknown or a value cannot be read.
    """
    values = to_dict(config)
    for name, value in changes.items():
        cls: Any = type(config)
        target = values
        *parents, last = name.split(".")
        for parent in parents:
            hint = _hint(cls, parent, name)
            if not dataclasses.is_dataclass(hint):
                raise ConfigError(f"{name}: {parent} has no settings of its own")
            cls, target = hint, target[parent]
        hint = _hint(cls, last, name)
        target[last] = _parse(value, hint) if isinstance(value, str) else value
    return from_dict(type(config), values)


def _hint(cls: Any, key: str, name: str) -> Any:
    hints = get_type_hints(cls)
    if key not in hints:
        raise ConfigError(f"unknown setting {name!r} of {cls.__name__}{closest(key, hints)}")
    return hints[key]


def _build(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix or cls.__name__} is {values!r}; expected settings by name")
    built = {
        key: _convert(value, _hint(cls, key, prefix + key), prefix + key)
        for key, value in values.items()
    }
    return cls(**built)


def _parse(text: str, hint: Any) -> Any:
    """Command-line text as a JSON value where the setting is not a plain string."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in members and text.lower() in ("none", "null"):
        return None
    if str in members or any(get_origin(member) is Literal for member in members):
        return text
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        parts = [part for part in text.split(",") if part]
        return [_parse(part, hint) for part in parts] if len(parts) > 1 else text


def _convert(value: Any, hint: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, name + ".")
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), name)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{name} is {value!r}; choose from {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        if arguments[-1] is not Ellipsis and len(items) != len(arguments):
            raise ConfigError(f"{name} is {value!r}; expected {len(arguments)} values")
        return tuple(_convert(item, arguments[0], name) for item in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{name} is {value!r}; expected {hint.__name__}")
    return value
