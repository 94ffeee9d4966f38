"""From a source to balanced shards: a look at every row first, then the shards, each written once and whole.

How many rows are kept is known only when every image was looked at, and shards of equal length need that number; so images
are read twice. Both passes leave on disk what is done, and a preparation that was killed goes on from there: its result is
a function of the source and the settings alone, whatever the number of workers and of kills.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import compress, islice
from pathlib import Path
from typing import Any, NamedTuple

from pivot_megatron.data.index import INDEX_NAME, index_tar, tars_of, write_index
from pivot_megatron.data.sample import BadSample
from pivot_megatron.data.shard_writer import open_shard, partial_path, shard_path
from pivot_megatron.data_prep.parallel import in_order
from pivot_megatron.data_prep.pictures import PictureError, Reencoding, as_written, read_picture
from pivot_megatron.data_prep.progress import track
from pivot_megatron.data_prep.report import as_lines, as_record
from pivot_megatron.data_prep.rows import Check, Row, Source
from pivot_megatron.data_prep.survey import Survey, survey
from pivot_megatron.errors import RunError, UserError

REPORT_NAME = "report.json"
SAMPLES_PER_SHARD = 1000

_STATE = ".preparation"


@dataclass(frozen=True)
class Output:
    """A folder of shards, and what becomes of a row's record on its way there."""

    folder: Path
    record: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict


@dataclass(frozen=True)
class Writing:
    """What is asked of the writer. `limit`: rows to keep, None for all; `workers`: processes, 0 for this one alone."""

    outputs: Sequence[Output]
    limit: int | None = None
    samples_per_shard: int = SAMPLES_PER_SHARD
    reencoding: Reencoding | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        """Raises UserError."""
        folders = [output.folder.resolve() for output in self.outputs]
        if len(set(folders)) < len(folders):
            raise UserError(f"expected a folder of its own for each output, found {folders[0]} twice")
        for option, value, least in (
            ("--count", self.limit, 1),
            ("--samples-per-shard", self.samples_per_shard, 1),
            ("--workers", self.workers, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"{option}: expected at least {least}, found {value}")
        if self.reencoding is not None:
            side = self.reencoding.longest_side
            if not 1 <= self.reencoding.quality <= 95:
                raise UserError(f"--reencode: expected a JPEG quality from 1 to 95, found {self.reencoding.quality}")
            if side is not None and side < 1:
                raise UserError(f"--longest-side: expected at least 1 pixel, found {side}")


@dataclass(frozen=True)
class Selection:
    """Rows and what is asked of them. `settings` names in JSON all that the choice depends on; `notes`: see `as_lines`."""

    source: Source
    settings: Mapping[str, Any]
    check: Check = field(default=lambda row: None)
    notes: Mapping[str, str] = field(default_factory=dict)


class _Finished(NamedTuple):
    """A row with its image as the shard gets it."""

    key: str
    record: Mapping[str, Any]
    image: bytes | None
    extension: str


def prepare(selection: Selection, writing: Writing) -> Sequence[str]:
    """Write the shards, `report.json` and, last, `index.json` of every output. Returns lines for a person.

    Raises UserError where the outputs hold something else, or no row is kept; RunError where files change meanwhile.
    """
    settings = _settings(selection, writing)
    state = _open_state(settings, writing.outputs)
    found = survey(selection.source, selection.check, writing.limit, writing.workers, state / "survey.jsonl")
    if not found.count:
        shutil.rmtree(state)
        reasons = "; ".join(
            f"{dropped.count} {reason} ({dropped.example})" for reason, dropped in found.dropped.items()
        )
        raise UserError(f"expected rows to keep, found none: {reasons}")
    sizes = balanced(found.count, writing.samples_per_shard)
    _write_shards(selection.source, found, sizes, writing)
    record = as_record(found, len(selection.source), len(sizes), settings)
    for output in reversed(writing.outputs):
        (output.folder / REPORT_NAME).write_text(
            json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        write_index(
            output.folder, in_order(partial(index_tar, decode=False), tars_of(output.folder), writing.workers, chunk=1)
        )
    shutil.rmtree(state)
    return as_lines(record, selection.notes)


def balanced(count: int, most: int) -> Sequence[int]:
    """Sizes of the fewest shards of at most `most` samples, no two further apart than one."""
    shards = -(-count // most)
    return [count // shards + (i < count % shards) for i in range(shards)]


def _settings(selection: Selection, writing: Writing) -> Mapping[str, Any]:
    files = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in selection.source.files}
    return {
        **selection.settings,
        "count": writing.limit,
        "samples_per_shard": writing.samples_per_shard,
        "reencode": writing.reencoding and vars(writing.reencoding),
        "files": files,
    }


def _open_state(settings: Mapping[str, Any], outputs: Sequence[Output]) -> Path:
    """The folder of what is done so far, in the first output. Raises UserError where the outputs hold something else."""
    state = outputs[0].folder / _STATE
    path = state / "settings.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    shards = [tar for output in outputs for tar in sorted(output.folder.glob("*.tar"))]
    if found is None or (outputs[0].folder / INDEX_NAME).exists():
        taken = [*shards, *(o.folder / INDEX_NAME for o in outputs if (o.folder / INDEX_NAME).exists())]
        if taken:
            raise UserError(
                f"expected a folder without shards at {taken[0].parent}, found {taken[0].name}: choose another folder, "
                "or remove what is there"
            )
    if found is not None and found != json.loads(json.dumps(settings)):
        if shards:
            names = ", ".join(name for name in settings if found.get(name) != json.loads(json.dumps(settings[name])))
            raise UserError(
                f"expected the settings that the shards in {outputs[0].folder} were begun with, found others ({names}): "
                "give the same again, or remove the folder"
            )
        shutil.rmtree(state)
    for output in outputs:
        output.folder.mkdir(parents=True, exist_ok=True)
    state.mkdir(exist_ok=True)
    partial_path(path).write_text(json.dumps(settings), encoding="utf-8")
    partial_path(path).replace(path)
    return state


def _write_shards(source: Source, found: Survey, sizes: Sequence[int], writing: Writing) -> None:
    done = 0
    while done < len(sizes) and all(shard_path(output.folder, done).exists() for output in writing.outputs):
        done += 1
    rows = islice(compress(source, found.kept), sum(sizes[:done]), None)
    with closing(in_order(partial(_finished, reencoding=writing.reencoding), rows, writing.workers)) as finished:
        samples = track(finished, sum(sizes[done:]), "rows written")
        for number in range(done, len(sizes)):
            _write_shard(number, islice(samples, sizes[number]), writing.outputs)
        next(samples, None)  # past the last, where progress has its last word


def _write_shard(number: int, samples: Iterable[_Finished], outputs: Sequence[Output]) -> None:
    paths = [shard_path(output.folder, number) for output in outputs]
    with ExitStack() as stack:
        writes = [stack.enter_context(open_shard(partial_path(path))) for path in paths]
        for sample in samples:
            for write, output in zip(writes, outputs, strict=True):
                write(sample.key, sample.image, sample.extension, output.record(sample.record))
    for path in paths:
        partial_path(path).replace(path)


def _finished(row: Row | BadSample, reencoding: Reencoding | None) -> _Finished:
    try:
        if isinstance(row, BadSample):
            raise RunError(
                f"expected the rows that were looked at before, found {row}: remove the output and run again"
            )
        if row.image is None:
            return _Finished(row.key, row.record, None, "")
        return _Finished(row.key, row.record, *as_written(read_picture(row.image), reencoding))
    except PictureError as error:
        raise RunError(
            f"expected the image of {row.key} as it was looked at before, found {error.reason} ({error.detail}): "
            "remove the output and run again"
        ) from error
