"""A remote folder is read as a local one is, by the ranges of its samples; what goes wrong on the way is one clear line."""

import json
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from pivot_megatron.config.schema import ShardCache
from pivot_megatron.data import remote_files
from pivot_megatron.data.members import Span
from pivot_megatron.data.pair_set import PairSet
from pivot_megatron.data.remote import RemoteFolder
from pivot_megatron.data.shards import ShardReader, open_shards
from pivot_megatron.data.spans import joined
from pivot_megatron.errors import RunError, UserError
from tests.unit.test_shards import index, jpeg, pair_json, write, write_tar

EVERY = range(7)


class Counted(LocalFileSystem):
    """Local files behind a URL. `asked`: (what, name, bytes) of each request; `fail`: may raise in place of an answer."""

    protocol = "counted"
    asked: ClassVar[list[tuple[str, str, int]]] = []
    fail: Callable[[str, str], None] = staticmethod(lambda what, name: None)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("counted://")))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        name = Path(path).name
        self.fail("cat", name)
        data: bytes = super().cat_file(path, start, end, **options)
        self.asked.append(("cat", name, len(data)))
        return data

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        self.fail("ls", path)
        self.asked.append(("ls", "", 0))
        return super().ls(path, detail, **options)


fsspec.register_implementation("counted", Counted)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Counted.asked.clear()
    monkeypatch.setattr(remote_files, "PAUSES", (0.0, 0.0, 0.0))
    yield


def asked() -> list[tuple[str, str, int]]:
    """Requests since the last call."""
    found = list(Counted.asked)
    Counted.asked.clear()
    return found


@pytest.fixture
def local(tmp_path: Path) -> ShardReader:
    return open_shards(write(tmp_path / "pairs"))


def url(tmp_path: Path) -> str:
    return f"counted://{tmp_path}/pairs"


def cache(tmp_path: Path, gib: float = 1.0) -> ShardCache:
    return ShardCache(tmp_path / "cache", gib)


def fails(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int = 1000, what: str = "cat") -> Counter[str]:
    """The next so many requests of a kind fail; how many did."""
    seen: Counter[str] = Counter()

    def fail(kind: str, name: str) -> None:
        if kind == what and seen[what] < times:
            seen[what] += 1
            raise error

    monkeypatch.setattr(Counted, "fail", staticmethod(fail))
    return seen


@pytest.mark.parametrize("cached", [True, False])
def test_samples_are_those_of_the_local_folder(tmp_path: Path, local: ShardReader, cached: bool) -> None:
    remote = open_shards(url(tmp_path), cache(tmp_path) if cached else None)
    assert remote.keys == local.keys and remote.fingerprint == local.fingerprint and remote.where == url(tmp_path)
    for images in (False, True):
        for number in (6, 0, 5, 1, 2, 4, 3):
            assert remote.read(number, images) == local.read(number, images)
            assert remote.image_sizes(number) == local.image_sizes(number)


def test_memory_folder_and_a_slash_at_the_end(tmp_path: Path, local: ShardReader) -> None:
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "pairs").iterdir():
        memory.pipe_file(f"/test/pairs/{path.name}", path.read_bytes())
    remote = open_shards("memory://test/pairs/", cache(tmp_path))
    assert [remote.read(number) for number in EVERY] == [local.read(number) for number in EVERY]
    assert remote.where == "memory://test/pairs"
    memory.rm("/test", recursive=True)


def test_one_listing_and_one_request_a_sample(tmp_path: Path, local: ShardReader) -> None:
    remote = open_shards(url(tmp_path), cache(tmp_path))
    assert [what for what, _, _ in asked()] == ["ls", "cat", "cat"]  # the index's two files
    for images in (False, True, True):
        for number in EVERY:
            remote.read(number, images)
    requests = asked()
    assert len(requests) == len(EVERY)
    spans = sum(len(pair_json(n)) + (0 if n % 3 == 2 else len(jpeg(n)) + 1024) for n in EVERY)
    assert sum(size for _, _, size in requests) < spans + 7 * 512 < sum(shard.bytes for shard in local.shards)
    again = open_shards(url(tmp_path), cache(tmp_path))
    for number in EVERY:
        again.read(number)
    assert [what for what, _, _ in asked()] == ["ls"]


def test_without_a_cache_text_alone_is_asked_for_alone(tmp_path: Path, local: ShardReader) -> None:
    remote = open_shards(url(tmp_path))
    asked()
    remote.read(0, images=False)
    remote.read(0)
    (_, _, text), (_, _, whole) = asked()
    assert text < 100 and text + len(jpeg(0)) < whole < text + len(jpeg(0)) + 1100
    with pytest.raises(UserError, match=r"data\.cache: needed for counted://"):
        _ = remote.beside


def test_a_large_sample_is_not_fetched_for_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pivot_megatron.data.remote.WHOLE_UP_TO", 500)
    write(tmp_path / "pairs")
    remote = open_shards(url(tmp_path), cache(tmp_path))
    asked()
    remote.read(0, images=False)
    assert [size < 100 for _, _, size in asked()] == [True]


def test_members_that_lie_apart_are_read_apart(tmp_path: Path) -> None:
    members = {
        "a.json": pair_json(1),
        "b.json": pair_json(2),
        "fill.bin": bytes(1 << 20),
        "a.png": jpeg(1),
        "b.png": jpeg(2),
    }
    (tmp_path / "pairs").mkdir()
    write_tar(tmp_path / "pairs" / "x.tar", members)
    index(tmp_path / "pairs")
    remote, local = open_shards(url(tmp_path), cache(tmp_path)), open_shards(tmp_path / "pairs")
    asked()
    assert [remote.read(0), remote.read(1)] == [local.read(0), local.read(1)]
    assert sum(size for _, _, size in asked()) < 5000


def test_joined_spans() -> None:
    assert joined([Span(50, 10), Span(0, 20), Span(25, 5)], most_gap=5) == [Span(0, 30), Span(50, 10)]
    assert joined([Span(50, 10), Span(0, 20), Span(25, 5)], most_gap=20) == [Span(0, 60)]
    assert joined([Span(0, 100), Span(10, 5)], most_gap=0) == [Span(0, 100)]
    assert joined([]) == []


def test_warming_fetches_each_once_and_reading_then_none(tmp_path: Path, local: ShardReader) -> None:
    samples = PairSet.open([url(tmp_path), tmp_path / "pairs"], cache(tmp_path))
    asked()
    samples.warm([*range(14), 3])
    assert sorted(Counter(name for _, name, _ in asked()).values()) == [1, 3, 3]
    assert [samples.read(number) for number in EVERY] == [local.read(number) for number in EVERY]
    samples.warm(range(14))
    assert asked() == []


def test_a_copy_in_another_process_and_a_fork(tmp_path: Path, local: ShardReader) -> None:
    remote = open_shards(url(tmp_path), cache(tmp_path))
    expected = [local.read(number) for number in EVERY]
    assert [pickle.loads(pickle.dumps(remote)).read(number) for number in EVERY] == expected
    child = os.fork()
    if child == 0:
        os._exit(0 if [remote.read(number) for number in EVERY] == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_beside_is_a_folder_of_the_cache_and_of_this_url_alone(tmp_path: Path, local: ShardReader) -> None:
    first = RemoteFolder(url(tmp_path), cache(tmp_path)).beside
    write(tmp_path / "other")
    assert first.is_dir() and first.parent == tmp_path / "cache" / "beside" and "pairs" in first.name
    assert RemoteFolder(f"counted://{tmp_path}/other", cache(tmp_path)).beside != first
    assert RemoteFolder(f"counted://{tmp_path}/pairs/", cache(tmp_path)).beside == first


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError("reset"), OSError(121, "500"), EOFError("cut")])
def test_what_passes_is_tried_again(
    tmp_path: Path, local: ShardReader, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    remote = open_shards(url(tmp_path), cache(tmp_path))
    seen = fails(monkeypatch, error, times=3)
    assert remote.read(0) == local.read(0)
    assert seen["cat"] == 3
    seen = fails(monkeypatch, error)
    with pytest.raises(
        RunError, match=rf"pairs/shard-000000\.tar: bytes \d+ to \d+: .*{error.args[-1] if error.args else ''}"
    ):
        remote.read(1)
    assert seen["cat"] == 4
    seen = fails(monkeypatch, error, what="ls")
    with pytest.raises(RunError, match=r"pairs: .* \(tried 4 times\)"):
        open_shards(url(tmp_path))


def test_what_does_not_pass_is_not(tmp_path: Path, local: ShardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = open_shards(url(tmp_path), cache(tmp_path))
    seen = fails(monkeypatch, PermissionError("AccessDenied"))
    with pytest.raises(
        UserError, match=r"shard-000000\.tar.*access refused \(PermissionError: AccessDenied\).*credentials"
    ):
        remote.read(0)
    with pytest.raises(RunError, match="KeyError"):
        fails(monkeypatch, KeyError("what a driver may raise"))
        remote.read(0)
    assert seen["cat"] == 1


def test_a_short_answer_is_no_answer(tmp_path: Path, local: ShardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = open_shards(url(tmp_path), cache(tmp_path))
    whole = Counted.cat_file
    monkeypatch.setattr(Counted, "cat_file", lambda *args, **kwargs: whole(*args, **kwargs)[:-1])
    with pytest.raises(RunError, match=r"expected \d+ bytes, found \d+ \(tried 4 times\)"):
        remote.read(0)
    monkeypatch.undo()
    assert remote.read(0) == local.read(0)  # nothing of it was kept


def test_a_tar_that_has_gone(tmp_path: Path, local: ShardReader) -> None:
    remote = open_shards(url(tmp_path), cache(tmp_path))
    first = remote.read(0)
    (tmp_path / "pairs" / "shard-000000.tar").unlink()
    assert remote.read(0) == first
    with pytest.raises(RunError, match=r"shard-000000\.tar: expected it as when the run began, found no such file"):
        remote.read(1)


def test_a_tar_that_is_replaced_is_refused_and_never_read_from_the_cache(tmp_path: Path, local: ShardReader) -> None:
    remote = open_shards(url(tmp_path), cache(tmp_path))
    remote.read(0)
    tar = tmp_path / "pairs" / "shard-000000.tar"
    data = tar.read_bytes()
    other = data.replace(b'"label": "0"', b'"label": "9"').replace(b'"label": "1"', b'"label": "8"')
    assert len(other) == len(data) and other != data
    tar.write_bytes(other)
    os.utime(tar, (1, 1))
    with pytest.raises(RunError, match=r"shard-000000\.tar: changed since the run began"):
        remote.read(1)
    again = open_shards(url(tmp_path), cache(tmp_path))
    assert [again.read(number).meta["label"] for number in (0, 1)] == ["9", "8"]


def test_a_folder_without_an_index_or_tars(tmp_path: Path, local: ShardReader) -> None:
    about = json.loads((tmp_path / "pairs" / "index.json").read_text())
    (tmp_path / "pairs" / "shard-000002.tar").unlink()
    with pytest.raises(UserError, match=r"expected shard-000002\.tar in counted://"):
        open_shards(url(tmp_path))
    (tmp_path / "pairs" / "index.json").unlink()
    with pytest.raises(UserError, match=r"expected index\.json in counted://.*on a copy of it on disk"):
        open_shards(url(tmp_path))
    assert about["version"] == 2


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("counted:///no/such/folder", "expected a folder of shards, found none"),
        ("nothing://bucket/folder", "Protocol not known: nothing"),
    ],
)
def test_urls_that_lead_nowhere(tmp_path: Path, where: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        open_shards(where, cache(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_driver_that_is_not_installed(tmp_path: Path) -> None:
    fsspec.register_implementation("absent", "no_such_package.Absent", errtxt="Install no_such_package to read absent")
    with pytest.raises(UserError, match=r"Install no_such_package .*pip install 'pivot-megatron\[remote\]'"):
        open_shards("absent://bucket/folder", cache(tmp_path))


def test_a_cache_folder_that_cannot_be_written_to(tmp_path: Path, local: ShardReader) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=r"data\.cache\.folder: .*cache"):
        open_shards(url(tmp_path), cache(tmp_path))
