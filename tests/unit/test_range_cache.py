"""The cache on disk: its bound, its order, and what damage and other processes do to it."""

import contextlib
import fcntl
import multiprocessing
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pivot_megatron.data import range_cache
from pivot_megatron.data.range_cache import RangeCache
from pivot_megatron.errors import UserError

BLOCK = 4096
DATA = 4000  # with its checksum in one block of the disk


def content(key: str, size: int = DATA) -> bytes:
    return random.Random(key).randbytes(size)


class Source:
    """Counts what is fetched."""

    def __init__(self) -> None:
        self.fetched: list[str] = []

    def of(self, key: str, size: int = DATA) -> Callable[[], bytes]:
        def fetch() -> bytes:
            self.fetched.append(key)
            return content(key, size)

        return fetch

    def read(self, cache: RangeCache, *keys: str) -> list[str]:
        """The keys that had to be fetched to read `keys`."""
        self.fetched.clear()
        for key in keys:
            assert cache.get(key, self.of(key)) == content(key)
        return list(self.fetched)


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "entries").rglob("*") if path.is_file())


def taken(folder: Path) -> int:
    sizes = []
    for path in entries(folder):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return sum(-(-size // BLOCK) * BLOCK for size in sizes)


def test_fetched_once_and_found_by_another_process_of_the_run(tmp_path: Path) -> None:
    source = Source()
    cache = RangeCache(tmp_path, 100 * BLOCK)
    assert source.read(cache, "a", "b", "a", "b") == ["a", "b"]
    assert source.read(RangeCache(tmp_path, 100 * BLOCK), "b", "a") == []
    assert cache.holds("a") and not cache.holds("c")


def test_the_longest_unused_goes_first_and_the_bound_holds(tmp_path: Path) -> None:
    source, cache = Source(), RangeCache(tmp_path, 10 * BLOCK)
    keys = [str(number) for number in range(10)]
    source.read(cache, *keys)
    assert taken(tmp_path) == 10 * BLOCK
    source.read(cache, "0", "2")  # used again: 1 and 3 are now the oldest
    assert source.read(cache, "new") == ["new"]
    assert taken(tmp_path) == 9 * BLOCK  # a tenth is made free at once
    assert [key for key in keys if not cache.holds(key)] == ["1", "3"]


def test_what_is_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 2 * BLOCK)
    assert cache.get("big", lambda: content("big", 3 * BLOCK)) == content("big", 3 * BLOCK)
    assert not entries(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: d[:7], lambda d: b"", lambda d: d[:99] + b"?" + d[100:]]
)
def test_a_damaged_entry_is_fetched_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    source, cache = Source(), RangeCache(tmp_path, 100 * BLOCK)
    source.read(cache, "a")
    (entry,) = entries(tmp_path)
    entry.write_bytes(damage(entry.read_bytes()))
    assert source.read(cache, "a") == ["a"]
    assert source.read(cache, "a") == []


def test_an_entry_under_anothers_name_is_not_taken_for_it(tmp_path: Path) -> None:
    source, cache = Source(), RangeCache(tmp_path, 100 * BLOCK)
    source.read(cache, "a")
    (first,) = entries(tmp_path)
    source.read(cache, "b")
    (second,) = set(entries(tmp_path)) - {first}
    second.write_bytes(first.read_bytes())
    assert source.read(cache, "b") == ["b"]


def test_entries_and_the_count_may_vanish(tmp_path: Path) -> None:
    source, cache = Source(), RangeCache(tmp_path, 4 * BLOCK)
    source.read(cache, "a", "b")
    for path in (*entries(tmp_path), tmp_path / "total"):
        path.unlink()
    assert source.read(cache, "a", "b") == ["a", "b"]
    (tmp_path / "total").write_text("no number")
    source.read(cache, "c", "d", "e", "f")
    assert taken(tmp_path) <= 4 * BLOCK
    (tmp_path / "total").write_text("0")  # less than there is: at most until the next count, never read as data
    assert source.read(cache, "f") == []


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    source, cache = Source(), RangeCache(tmp_path, 2 * BLOCK)
    source.read(cache, "a")
    (entry,) = entries(tmp_path)
    left = entry.with_name("x.partial")
    left.write_bytes(b"half")
    source.read(cache, "b", "c")
    assert not left.exists()


def test_a_failed_fetch_leaves_nothing_and_is_told(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 9 * BLOCK)

    def fail() -> bytes:
        raise ValueError("no answer")

    with pytest.raises(ValueError, match="no answer"):
        cache.get("a", fail)
    assert Source().read(cache, "a") == ["a"]


def test_threads_that_miss_the_same_fetch_it_once(tmp_path: Path) -> None:
    cache, fetched = RangeCache(tmp_path, 9 * BLOCK), []

    def fetch() -> bytes:
        fetched.append(1)
        time.sleep(0.1)
        return content("a")

    threads = [threading.Thread(target=lambda: cache.get("a", fetch)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def test_a_stuck_neighbour_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(range_cache, "_PATIENCE", 0.05)
    cache, source = RangeCache(tmp_path, 9 * BLOCK), Source()

    def inner() -> bytes:
        return RangeCache(tmp_path, 9 * BLOCK).get("a", source.of("a"))  # misses what the outer call is fetching

    assert cache.get("a", inner) == content("a")
    assert source.fetched == ["a"]


def _reads(folder: Path, seed: int) -> None:
    """A process's job: read at random, and now and then remove what others may be reading."""
    cache, rng = RangeCache(folder, 40 * BLOCK), random.Random(seed)
    for _ in range(600):
        key = str(rng.randrange(100))
        assert cache.get(key, lambda: content(key)) == content(key)  # noqa: B023 - called at once
        if rng.random() < 0.02 and (there := entries(folder)):
            rng.choice(there).unlink(missing_ok=True)


def test_several_processes_keep_the_bound(tmp_path: Path) -> None:
    RangeCache(tmp_path, 40 * BLOCK)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_reads, args=(tmp_path, seed)) for seed in range(2)]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        with (tmp_path / "total").open() as total:
            fcntl.flock(total, fcntl.LOCK_EX)  # a look while none writes
            most = max(most, taken(tmp_path))
        time.sleep(0.005)
    assert [process.exitcode for process in processes] == [0, 0]
    assert 30 * BLOCK <= most <= 40 * BLOCK
    assert int((tmp_path / "total").read_text()) >= taken(tmp_path)


def test_a_disk_that_refuses_is_said_once_and_reading_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, cache = Source(), RangeCache(tmp_path, 100 * BLOCK)
    whole = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        whole(path, data[:10])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert source.read(cache, "a", "b", "a") == ["a", "b", "a"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"data.cache.folder: {tmp_path}: No space left on device; going on, remote samples are not kept" in said
    assert not entries(tmp_path)
    monkeypatch.undo()
    assert source.read(cache, "a", "a") == ["a"]  # there is room again
    assert int((tmp_path / "total").read_text()) == taken(tmp_path) == BLOCK


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache\.folder: expected a folder to write to, found .*file"):
        RangeCache(tmp_path / "file", BLOCK)


def test_the_whole_folder_may_vanish(tmp_path: Path) -> None:
    source, cache = Source(), RangeCache(tmp_path / "cache", 100 * BLOCK)
    source.read(cache, "a")
    (tmp_path / "cache").rename(tmp_path / "away")
    assert source.read(cache, "a", "b", "a") == ["a", "b"]
