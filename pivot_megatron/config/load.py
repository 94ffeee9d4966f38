"""A run's YAML into a `RunConfig`: `base:` files first, then the file, then `key=value` overrides, decoded strictly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from pivot_megatron.config.check import problems
from pivot_megatron.config.schema import RunConfig
from pivot_megatron.errors import UserError

_ADAPTER = TypeAdapter(RunConfig)


class ConfigErrors(UserError):
    """Every mistake found in a config, one line each: file, dotted path, what is wrong."""

    def __init__(self, source: Path, errors: Sequence[str]) -> None:
        self.errors = tuple(f"{source}: {error}" for error in errors)
        super().__init__("\n".join(self.errors))


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_maps = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_maps else value
    return merged


def read_tree(path: Path) -> dict[str, Any]:
    """The YAML mapping at `path` laid over the files its `base:` names (one or a list, relative to it; later ones win)."""
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a run's YAML") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys, found {type(tree).__name__}")
    bases = tree.pop("base", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = _merge(merged, read_tree(path.parent / base))
    return _merge(merged, tree)


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(
            f"override {text!r}: expected key=value with a dotted key, such as optimizer.learning_rate=1e-6"
        )
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    node[leaf] = yaml.safe_load(value)


def _plain(error: Mapping[str, Any]) -> str:
    # A discriminated union puts the variant's name into the path; the user wrote no such key.
    path = ".".join(str(part) for part in error["loc"] if part not in ("sft", "dpo"))
    if error["type"] == "unexpected_keyword_argument":
        return f"{path}: unknown key; see docs/configuration.md for the keys there are"
    if error["type"] in ("missing", "missing_argument"):
        return f"{path}: missing; it has no default"
    found = str(error["input"])
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{path}: {message}, found {found if len(found) < 60 else found[:57] + '...'}"


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Raises ConfigErrors with every schema error, or else every cross-field error, of the file and its overrides."""
    tree = read_tree(path)
    for override in overrides:
        _override(tree, override)
    try:
        config = _ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise ConfigErrors(path, [_plain(e) for e in error.errors()]) from None
    if found := problems(config):
        raise ConfigErrors(path, found)
    return config


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` reads back to an equal config."""
    tree: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return yaml.safe_dump(tree, sort_keys=False)


def config_dict(config: RunConfig) -> dict[str, Any]:
    return asdict(config)
