"""Which benchmarks a table of visual question answering has, and where lmms-eval's results keep each score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pivot_megatron.config.load import read_tree
from pivot_megatron.config.schema import Strict
from pivot_megatron.errors import UserError


@dataclass(frozen=True)
class Benchmark(Strict):
    """`task`: lmms-eval's name. `metric`: the key of its score, `METRIC,FILTER`. `full`: the score if every answer is right."""

    task: str
    metric: str
    full: float

    @property
    def stderr(self) -> str:
        """The key of its standard error."""
        return self.metric.replace(",", "_stderr,", 1)


@dataclass(frozen=True)
class Published(Strict):
    """Averages over all benchmarks that the paper has of an encoder, in per cent."""

    base: float
    pivot: float
    sft: float | None = None


@dataclass(frozen=True)
class Suite(Strict):
    """`lmms_eval`: the release whose names these are. `groups`: benchmarks by group and name. `published`: by encoder."""

    lmms_eval: str
    groups: Mapping[str, Mapping[str, Benchmark]]
    published: Mapping[str, Published] = field(default_factory=dict)

    @property
    def benchmarks(self) -> dict[str, Benchmark]:
        """Of all groups, by name."""
        return {name: one for group in self.groups.values() for name, one in group.items()}


_ADAPTER = TypeAdapter(Suite)


def read_suite(path: Path) -> Suite:
    """A YAML file such as configs/benchmarks.yaml, or one that names it as its `base:`. Raises UserError for wrong keys and
    values, a name that is in two groups, an empty group, and a full score that is not above 0."""
    try:
        suite = _ADAPTER.validate_python(read_tree(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if not suite.groups or not all(suite.groups.values()):
        raise UserError(f"{path}: groups: expected groups with a benchmark in each, found an empty one")
    names = [name for group in suite.groups.values() for name in group]
    for name, benchmark in suite.benchmarks.items():
        if names.count(name) > 1:
            raise UserError(f"{path}: groups: expected {name} in one group, found it in {names.count(name)}")
        if benchmark.full <= 0:
            raise UserError(f"{path}: {name}: full: expected a number above 0, found {benchmark.full}")
    return suite
