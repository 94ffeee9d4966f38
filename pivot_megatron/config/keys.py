"""Every key a run's YAML may hold, read off the schema: for the reference page and for hints at unknown keys."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from pivot_megatron.config.schema import RunConfig

_NAMES: Mapping[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Path: "path",
    type(None): "null",
    Any: "value",
}


@dataclass(frozen=True)
class Key:
    """`path` is dotted, with `N` for a place in a list. `owner` is the schema class that the key is a field of.

    `kind` names its type for a reader. `default` is YAML, or None where the key must be given. `parts` are the schema
    classes, one of which the value of a key that holds further keys becomes.
    """

    path: str
    owner: type[Any]
    kind: str
    default: str | None
    parts: tuple[type[Any], ...]

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


@cache
def all_keys(root: type = RunConfig) -> tuple[Key, ...]:
    """In the order of the schema, each key before the keys it holds."""
    return tuple(_keys_of(root, ""))


def _keys_of(owner: type, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(owner, include_extras=True)
    for field in fields(owner):
        kind = hints[field.name]
        parts = tuple(_parts(kind))
        path = f"{prefix}{field.name}"
        yield Key(path, owner, _type_name(kind), _default(field, bool(parts)), parts)
        inner = f"{path}.N." if get_origin(kind) is tuple else f"{path}."
        for part in parts:
            yield from _keys_of(part, inner)


def _parts(kind: Any) -> Iterator[type]:
    if is_dataclass(kind):
        yield kind  # type: ignore[misc]
    elif get_origin(kind) is Annotated:
        yield from _parts(get_args(kind)[0])
    else:
        for argument in get_args(kind):
            yield from _parts(argument)


def _type_name(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_name(argument) for argument in arguments))
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin is tuple:
        if Ellipsis not in arguments:
            return f"[{', '.join(map(_type_name, arguments))}]"
        inner = _type_name(arguments[0])
        return f"list of {inner}" if inner.startswith("[") else f"list of {inner}s"
    if origin is Mapping:
        return f"mapping of {_type_name(arguments[0])} to a {_type_name(arguments[1])}"
    return "mapping" if is_dataclass(kind) else _NAMES[kind]


def _default(field: Field[Any], has_parts: bool) -> str | None:
    if field.default is MISSING:
        if field.default_factory is MISSING:
            return None
        # A mapping that may be left out is filled from its own keys' defaults.
        return "" if has_parts else yaml.safe_dump(field.default_factory(), default_flow_style=True).strip()
    if has_parts and field.default == ():
        return "[]"
    if field.default is None or isinstance(field.default, bool):
        return {None: "null", True: "true", False: "false"}[field.default]
    return str(field.default)
