"""What a page says at its foot of how it was made, and short names for what its rows are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pivot_megatron.runtime.device import current_platform
from pivot_megatron.train.run_folder import installed_version, machine


def told(values: Mapping[str, Any]) -> dict[str, str]:
    """Settings as a person reads them, by name."""
    return {name.replace("_", " "): _told(value) for name, value in values.items()}


def _told(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_told, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def flat(environment: Mapping[str, Any]) -> dict[str, str]:
    """What a run or `machine` recorded, one fact each; what is not there is left out."""
    facts = {**environment, **environment["packages"]}
    return {name.replace("_", " "): str(value) for name, value in facts.items() if isinstance(value, str | int | float)}


def together(environments: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Of several runs: each fact once, and all that it was where it differed."""
    names = dict.fromkeys(name for one in environments for name in one)
    return {name: " / ".join(dict.fromkeys(one[name] for one in environments if name in one)) for name in names}


def versions(*packages: str) -> dict[str, str]:
    """Of this process and its device. `packages`: such as matter beside those that every run records."""
    found = machine()
    found["packages"] |= {name: installed_version(name) for name in packages}
    return flat({**found, "device": str(current_platform().device)})


def short_names(paths: Sequence[str]) -> list[str]:
    """Without the folders that all of them begin with, and the names that all end with; of one alone, its last two parts."""
    parts = [path.split("/") for path in paths]
    if len(set(paths)) == 1:
        return ["/".join(one[-2:]) for one in parts]
    most = min(map(len, parts)) - 1
    front = _shared(parts, most)
    back = _shared([one[::-1] for one in parts], most - front)
    return ["/".join(one[front : len(one) - back]) for one in parts]


def _shared(parts: Sequence[Sequence[str]], most: int) -> int:
    """How many of the first are the same in all, `most` at the most."""
    return next((n for n in range(most) if len({one[n] for one in parts}) > 1), most)
