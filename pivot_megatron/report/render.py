"""Templates of this package to pages that hold all they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2


def write_template(path: Path, template: str, **names: Any) -> None:
    """`template`: a file beside this one."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pivot_megatron.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(names)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    # Names of files need not have been UTF-8.
    part.write_bytes(page.encode("utf-8", errors="backslashreplace"))
    part.replace(path)
