"""Checkpoints written: whole or absent, their checksums beside them, in the foreground or while the caller goes on."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from pivot_megatron.checkpoints.folder import appear, place_beside
from pivot_megatron.checkpoints.manifest import FileSum, Manifest, sum_file
from pivot_megatron.convert.hf import cannot_write
from pivot_megatron.convert.store import Description, beginning, saved_metadata, sharded_weights
from pivot_megatron.errors import UserError
from pivot_megatron.model.compat import accepted
from pivot_megatron.model.composition import Stage
from pivot_megatron.runtime.distributed import from_main_process, gather_objects, is_main_process, on_main_process

Sums = dict[str, FileSum]
"""Of files by their names in the checkpoint's `tensors` folder."""
Note = Callable[[Path], object]
"""Writes what else belongs into a checkpoint's folder. Called on the main process."""


def save_whole(
    out: Path, description: Description, write: Callable[[Path], Sums], note: Note = lambda part: None
) -> None:
    """A checkpoint whose tensors `write` writes into the folder it is given. Collective over all ranks."""
    part = _begin(out, description, note)
    with _nothing_left(out, part):
        sums = write(part / "tensors")
    _seal(out, part, sums)


def save_state(state: dict[str, Any], out: Path, description: Description, note: Note = lambda part: None) -> None:
    """Write `state` so that `out` is whole or absent. Collective over all ranks."""
    saving = begin_saving(state, out, description, note)
    saving.write()
    saving.finish()


def save_weights(model: Stage, out: Path, description: Description) -> None:
    save_state({"model": sharded_weights(model)}, out, description)


@dataclass
class Saving:
    """A checkpoint on its way. `write` it, in this thread or by `start` in another; once all ranks have, `finish` it."""

    out: Path
    _part: Path
    _request: AsyncRequest
    _buckets: list[Any]
    _sums: Sums = field(default_factory=dict)
    _failure: str | None = None
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Write in a thread of its own, which a process waits for before it ends.

        megatron-core 0.16 would fork here, and a process with threads (gloo's, CUDA's) forks at its own risk.
        """
        held = self._request.async_fn_args[1] if self._buckets else []
        self._buckets = [_copied(*both) for both in zip(self._buckets, held, strict=True)]
        self._thread = threading.Thread(target=self.write, name=f"save {self.out.name}")
        self._thread.start()

    @property
    def written(self) -> bool:
        """By all ranks, or given up by one. Collective over all ranks."""
        return all(gather_objects(self._thread is None or not self._thread.is_alive()))

    def write(self) -> None:
        """This rank's files, and their checksums. What goes wrong is told by `finish`, on every rank."""
        try:
            results: dict[int, Any] = {}
            while self._buckets:
                number, (path, name, _) = len(results), self._buckets[0]
                results[number] = _write_bucket(self._request, number, self._buckets.pop(0))
                self._sums[name] = sum_file(Path(path))
            if results:
                self._request.async_fn_args[-1].put(results)
        except Exception as error:  # torch has many of its own
            self._failure = _reason(error)

    def finish(self) -> None:
        """Wait until it is written, and let it appear. Collective over all ranks. Raises UserError on every rank where one could
        not write."""
        if self._thread is not None:
            self._thread.join()
        with _nothing_left(self.out, self._part):
            failures = [failure for failure in gather_objects(self._failure) if failure]
            if failures:
                raise cannot_write(self.out, RuntimeError(failures[0]))
            for finalize in self._request.finalize_fns:
                finalize()
        _seal(self.out, self._part, self._sums)


def begin_saving(state: dict[str, Any], out: Path, description: Description, note: Note = lambda part: None) -> Saving:
    """Plan what each rank writes, and fetch it to the host. Collective over all ranks."""
    # Nothing here is written by another process, so the results need no queue that reaches one: megatron-core would start a
    # process for that, which takes seconds and lives on for ever where a run is killed.
    filesystem_async._results_queue = queue.Queue()
    options = accepted(dist_checkpointing.save, async_strategy="mcore")
    part = _begin(out, description, note)
    with _nothing_left(out, part):
        request = dist_checkpointing.save(
            state, str(part / "tensors"), content_metadata=saved_metadata(), async_sharded_save=True, **options
        )
        return Saving(out, part, request, request.preload_fn() if request.preload_fn else [])


def _write_bucket(request: AsyncRequest, number: int, bucket: Any) -> Any:
    """One file, by the function that megatron-core would call in another process, or thread."""
    results: queue.Queue[Any] = queue.Queue()
    counted: queue.Queue[int] = queue.Queue()
    counted.put(number)
    transforms = request.async_fn.args[0]
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms, number, bucket, results, counted, use_fsync=True
    )
    _, found = results.get()
    if isinstance(found, Exception):
        raise found
    return found


def _copied(fetched: Any, held: Any) -> Any:
    """`fetched` to the host from what is `held`: where that lies there itself, it is the model's own, which training changes."""
    path, name, (objects, tensors) = fetched
    _, _, (_, originals) = held
    ours = [(i, t.clone() if t is original else t) for (i, t), (_, original) in zip(tensors, originals, strict=True)]
    return path, name, (objects, ours)


def _begin(out: Path, description: Description, note: Note) -> Path:
    part: Path = from_main_process(place_beside(out.absolute()) if is_main_process() else None)
    on_main_process(lambda: _write_beside(out, part, description, note))
    return part


def _write_beside(out: Path, part: Path, description: Description, note: Note) -> None:
    """Everything but tensors in `part`."""
    try:
        part.mkdir(parents=True)
        description.copy_to(part)
        note(part)
        # megatron-core wants an empty folder for its own files and warns otherwise.
        (part / "tensors").mkdir()
    except (UserError, OSError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise (error if isinstance(error, UserError) else cannot_write(out, error)) from None


@contextmanager
def _nothing_left(out: Path, part: Path) -> Iterator[None]:
    """Where it fails to be written, no file of it stays, and the one line says why."""
    try:
        yield
    except BaseException as error:
        if is_main_process():
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, CheckpointException | OSError) or "PytorchStreamWriter" in str(error):
            raise cannot_write(out, beginning(error)) from None
        raise


def _seal(out: Path, part: Path, sums: Mapping[str, FileSum]) -> None:
    """Once every rank has written: the manifest, and `part` becomes `out`. Collective over all ranks."""
    shares = gather_objects(dict(sums))
    every = {f"tensors/{name}": found for share in shares for name, found in share.items()}
    on_main_process(lambda: _list_and_appear(out, part, every))


def _list_and_appear(out: Path, part: Path, sums: Sums) -> None:
    try:
        for path in sorted(part.rglob("*")):
            name = path.relative_to(part).as_posix()
            if path.is_file() and name not in sums:
                sums[name] = sum_file(path)
        Manifest(sums).write(part)
        appear(part, out)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise cannot_write(out, error) from None


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
