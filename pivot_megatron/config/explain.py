"""pydantic's errors as lines for the person who wrote the YAML: one a dotted path, in the words of the file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from pivot_megatron.config.keys import all_keys
from pivot_megatron.config.schema import RunConfig

_EXPECTED: Mapping[str, str] = {
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "dataclass_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "invalid_key": "a key that is text",
}
_MISSING = ("missing", "missing_argument")
_UNKNOWN = "unexpected_keyword_argument"


def explain(error: ValidationError, tree: Mapping[str, Any], root: type = RunConfig) -> list[str]:
    """`dotted.path: what is wrong`, in the order of the schema `root`. A value that fits no type of a union is one line."""
    lines: dict[str, str] = {}
    alternatives: dict[str, tuple[list[str], Any]] = {}
    for e in error.errors():
        path = _path(e["loc"], tree, missing=e["type"] in _MISSING)
        if e["type"] in _MISSING:
            lines[path] = "missing; it has no default"
        elif e["type"] == _UNKNOWN:
            lines[path] = f"unknown key; {_hint(path, tree, root)}"
        elif e["type"].startswith("union_tag"):
            path = f"{path}.kind"
            lines[path] = _wrong_kind(path, e, root)
        else:
            expected, found = alternatives.setdefault(path, ([], e["input"]))
            expected.append(_expected(e))
            lines[path] = f"expected {' or '.join(dict.fromkeys(expected))}, found {shown(found)}"
    return [f"{path}: {line}" for path, line in lines.items()]


def shown(value: Any) -> str:
    """`value` as YAML would hold it, cut short."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _path(location: Sequence[int | str], tree: Any, missing: bool) -> str:
    """The parts of `location` that the user wrote. pydantic adds the names of union members, which lead to nothing."""
    parts = []
    node = tree
    for part in location[:-1] if missing else location:
        # A place in a list comes from pydantic's own walk along it, so it is there.
        if part in node if isinstance(node, dict) else isinstance(node, list) and isinstance(part, int):
            node = node[part]
            parts.append(str(part))
    return ".".join([*parts, str(location[-1])] if missing else parts)


def _expected(error: Mapping[str, Any]) -> str:
    if error["type"] == "literal_error":
        return str(error["ctx"]["expected"]).replace("'", '"')
    message: str = error["msg"]
    return _EXPECTED.get(error["type"]) or f"a value for which this does not hold: {message[0].lower() + message[1:]}"


def _wrong_kind(path: str, error: Mapping[str, Any], root: type) -> str:
    expected = " or ".join(shown(kind) for key in all_keys(root) if key.path == path and (kind := _kind(key.owner)))
    if error["type"] == "union_tag_not_found":
        return f"missing; expected {expected}"
    return f"expected {expected}, found {shown(error['input']['kind'])}"


def _hint(path: str, tree: Mapping[str, Any], root: type) -> str:
    """Where an unknown key may have been meant to go: a key of like name beside it, the same name elsewhere, or all."""
    parent, _, name = path.rpartition(".")
    beside = [field.name for owner in _owners(parent, tree, root) for field in fields(owner)]
    if close := difflib.get_close_matches(name, beside, n=1):
        return f"did you mean {parent + '.' if parent else ''}{close[0]}?"
    elsewhere = [key.path for key in all_keys(root) if key.name == name and key.path != path]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"the keys here are {', '.join(beside)}"


def _owners(parent: str, tree: Mapping[str, Any], root: type) -> list[type]:
    """The schema classes whose fields may stand under `parent`; of a union's members, that of the kind the file names."""
    if not parent:
        return [root]
    general = ".".join("N" if part.isdecimal() else part for part in parent.split("."))
    owners = [part for key in all_keys(root) if key.path == general.removesuffix(".N") for part in key.parts]
    node: Any = tree
    for part in parent.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return [owner for owner in owners if _kind(owner) == node.get("kind")] or owners


def _kind(owner: type) -> str | None:
    """What a member of a union has as `kind`."""
    return getattr(owner, "kind", None)
