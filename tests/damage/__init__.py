"""Every kind of damage to a data set that we know of, each in a small folder of shards: `python -m tests.damage OUT [KIND ...]`.

A folder holds sound samples around one thing that is damaged, or odd and sound. `KINDS` says what must become of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from tests.damage import folders, pictures, tars, texts
from tests.damage.kinds import Kind

_TABLES: Mapping[str, Mapping[str, Kind]] = {
    "tar": tars.ENDS | tars.WHOLE,
    "header": tars.HEADERS,
    "name": tars.NAMES,
    "member": tars.MEMBERS,
    "json": texts.JSON,
    "field": texts.FIELDS,
    "conversation": texts.CONVERSATIONS,
    "length": texts.LENGTHS,
    "jpeg": pictures.JPEG,
    "png": pictures.PNG,
    "image": pictures.OTHER,
    "pair": pictures.PAIRS,
    "folder": folders.FOLDERS,
    "index": folders.INDEX,
    "later": folders.LATER,
}

KINDS = {f"{table}-{name}": kind for table, kinds in _TABLES.items() for name, kind in kinds.items()}
