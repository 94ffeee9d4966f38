"""One part of the GPU check in a process of its own: `python -m tests.gpu PART FILE` writes a line of JSON a row."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.gpu.parts import part_by_name, rows_of
from tests.gpu.rows import CannotRun

CANNOT_RUN = 3  # the exit code of a part that says so, and its last words say why


def main(name: str, out: Path) -> None:
    with out.open("w") as file:
        for row in rows_of(part_by_name(name)):  # each at once: what a part found before it crashed or hung is kept
            file.write(json.dumps(row.as_dict()) + "\n")
            file.flush()


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except CannotRun as lack:
        print(lack)
        sys.exit(CANNOT_RUN)
