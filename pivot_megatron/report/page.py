"""A page: a title, a lead sentence, sections of tables, charts and pictures, and at its foot the settings and versions."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pivot_megatron.report.intervals import IntervalTable
from pivot_megatron.report.panels import Panel
from pivot_megatron.report.render import write_template


@dataclass(frozen=True)
class Table:
    """`rows`: the heads first. `left`: columns of words, which stand to the left; the others, of numbers, to the right."""

    rows: Sequence[Sequence[str]]
    left: Collection[int]
    kind: ClassVar = "table"


@dataclass(frozen=True)
class Forest:
    """Intervals on one scale. `unit` heads the values, `group` the rows' groups, a column that is left out where it is empty.
    `signed`: differences, whose zero is shown and whose last cell is a verdict."""

    table: IntervalTable
    label: str
    unit: str
    group: str = ""
    signed: bool = False
    kind: ClassVar = "forest"


@dataclass(frozen=True)
class Charts:
    """`wide`: one below another, each as wide as the text."""

    panels: Sequence[Panel]
    wide: bool = False
    kind: ClassVar = "charts"


@dataclass(frozen=True)
class Picture:
    """`png`: the file's bytes. `told`: what stands below it, by name; `table`: below that. `right`: of what is told, by name,
    what is marked as right or as wrong."""

    name: str
    png: bytes
    told: Mapping[str, str]
    table: Table | None = None
    right: Mapping[str, bool] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Pictures:
    """`small`: each beside what is told of it, several in a row; else one below another, as wide as the text at most."""

    pictures: Sequence[Picture]
    small: bool = False
    kind: ClassVar = "pictures"


@dataclass(frozen=True)
class Fold:
    """Parts that a reader opens by `title`."""

    title: str
    parts: Sequence[Table | Forest | Charts | Pictures]
    kind: ClassVar = "fold"


Part = Table | Forest | Charts | Pictures | Fold


@dataclass(frozen=True)
class Section:
    """`lead` stands above its parts, `note`, small, below."""

    title: str
    parts: Sequence[Part]
    lead: str = ""
    note: str = ""


@dataclass(frozen=True)
class Page:
    """`settings`, `versions`: what made it, by name."""

    title: str
    lead: str
    sections: Sequence[Section]
    settings: Mapping[str, str]
    versions: Mapping[str, str]


def write_page(page: Page, path: Path) -> None:
    """As one self-contained file: no scripts, no other files, nothing fetched. All text is escaped."""
    write_template(path, "page.html.j2", page=page)
