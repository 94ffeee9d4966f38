"""A run's YAML into a `RunConfig`: `base:` files first, then the file, then `key=value` overrides, decoded strictly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from pivot_megatron.config.check import problems
from pivot_megatron.config.explain import explain
from pivot_megatron.config.schema import RunConfig
from pivot_megatron.errors import UserError

_ADAPTER = TypeAdapter(RunConfig)


class ConfigErrors(UserError):
    """Every mistake found in a config, one line each: file, dotted path, what is wrong."""

    def __init__(self, source: Path | str, errors: Sequence[str]) -> None:
        self.errors = tuple(f"{source}: {error}" for error in errors)
        super().__init__("\n".join(self.errors))


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Raises ConfigErrors with every schema error, or else every cross-field error, of the file and its overrides."""
    return decoded(overridden(read_tree(path), overrides), path)


def decoded(tree: Mapping[str, Any], source: Path | str) -> RunConfig:
    """Raises ConfigErrors, of `source`, as `load_config` does."""
    try:
        config = _ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise ConfigErrors(source, explain(error, tree)) from None
    if found := problems(config):
        raise ConfigErrors(source, found)
    return config


def overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tree` itself with `key=value` texts laid over it. Raises UserError for one that leads nowhere."""
    for override in overrides:
        _override(tree, override)
    return tree


def value_of(config: RunConfig, key: str) -> str:
    """One dotted key as YAML writes it, such as `layout.tensor` or `data.shards.0.folder`. Raises UserError for one that is not
    there."""
    node: Any = yaml.safe_load(dump_config(config))
    for part in key.split("."):
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            raise UserError(
                f"--key {key}: the config has no {part!r} there; `pivot show` without --key prints all of it"
            )
    text = yaml.safe_dump(node, sort_keys=False)
    return text.removesuffix("...\n").rstrip("\n")


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` reads back to an equal config."""
    tree: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return yaml.safe_dump(tree, sort_keys=False)


def read_tree(path: Path) -> dict[str, Any]:
    """The YAML mapping at `path` laid over the files its `base:` names (one or a list, relative to it; later ones win)."""
    return _read_tree(path, ())


def _read_tree(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """`readers`: the files that led here through their `base:`, outermost first."""
    if any(path.resolve() == reader.resolve() for reader in readers):
        chain = " -> ".join(map(str, (*readers, path)))
        raise UserError(f"{path}: base: expected files that do not lead back here, found {chain}; take one out")
    tree = _read_yaml(path, readers)
    return merged(based(tree, path, readers), tree)


def based(tree: dict[str, Any], path: Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What the `base:` of `tree`, which stands in the file `path`, names: later files over earlier ones. Takes it from `tree`."""
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: base: expected a file or a list of files, found {bases!r}")
    found: dict[str, Any] = {}
    for base in bases:
        found = merged(found, _read_tree(path.parent / base, (*readers, path)))
    return found


def _read_yaml(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        named = f", named by base: in {readers[-1]}" if readers else ""
        what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: {what}{named}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    tree = _unshared(tree)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys, found {'nothing' if tree is None else repr(tree)[:60]}")
    return tree


def _unshared(node: Any) -> Any:
    """A copy in which nothing stands twice: YAML's aliases are one object, of which an override would change every place."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mapping by mapping."""
    found = dict(base)
    for key, value in over.items():
        found[key] = merged(found[key], value) if _extends(value, found.get(key)) else value
    return found


def _extends(over: Any, base: Any) -> bool:
    """Whether two values are mappings of one kind. Another `kind` has other keys, so it replaces the mapping whole."""
    if not (isinstance(over, dict) and isinstance(base, dict)):
        return False
    return bool(over.get("kind", base.get("kind")) == base.get("kind", over.get("kind")))


def _override(tree: dict[str, Any], text: str) -> None:
    """Set one dotted key, such as `layout.tensor=2`, `data.shards=[a, b]`, `batch.epochs=null` or `parameters.0.rate=0.1`."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(
            f"override {text!r}: expected key=value with a dotted key, such as optimizer.learning_rate=1e-6"
        )
    try:
        decoded = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: the value is not YAML: {' '.join(str(error).split())}") from None
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        place = _place(node, parent, text)
        inner = node[place] if isinstance(node, list) else node.get(place)
        if not isinstance(inner, dict | list):
            inner = node[place] = {}
        node = inner
    node[_place(node, leaf, text)] = decoded


def _place(node: dict[str, Any] | list[Any], part: str, override: str) -> Any:
    """`part` as what `node` is indexed by."""
    if isinstance(node, dict):
        return part
    if part.isdecimal() and int(part) < len(node):
        return int(part)
    places = f"0 to {len(node) - 1}" if node else "none, for the list is empty"
    raise UserError(f"override {override!r}: expected a place in a list of {len(node)} ({places}), found {part!r}")
