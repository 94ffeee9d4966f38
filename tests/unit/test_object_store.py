"""Shards in an S3 bucket, through s3fs: a server on loopback says what was asked of it."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from pivot_megatron.config.schema import ShardCache
from pivot_megatron.data import remote_files
from pivot_megatron.data.shards import ShardReader, open_shards
from pivot_megatron.errors import RunError, UserError
from tests.object_store import BUCKET, ObjectStore, object_store
from tests.unit.test_shards import jpeg, pair_json, write

EVERY = range(7)


@pytest.fixture(scope="module")
def running() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def store(running: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setattr(remote_files, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    running.refuse = lambda method, path: None
    running.gets()
    return running


@pytest.fixture
def local(tmp_path: Path) -> ShardReader:
    return open_shards(write(tmp_path / "pairs"))


def opened(store: ObjectStore, tmp_path: Path) -> ShardReader:
    """The pairs, put into the store below the test's own name."""
    url = store.upload(tmp_path / "pairs", f"data/{tmp_path.name}")
    return open_shards(url, ShardCache(tmp_path / "cache", 1.0))


def test_ranges_alone_are_fetched_each_once(store: ObjectStore, tmp_path: Path, local: ShardReader) -> None:
    remote = opened(store, tmp_path)
    assert [(one.method, one.path.rpartition("/")[2]) for one in store.requests] == [
        ("GET", BUCKET),  # the listing
        ("GET", "index.json"),
        ("GET", "index.parquet"),
    ]
    store.gets()
    for images in (False, True):
        for number in EVERY:
            assert remote.read(number, images) == local.read(number, images)
    requests = [*store.requests]
    assert [(one.method, one.status) for one in requests] == [("GET", 206)] * len(EVERY)
    sent = sum(one.sent for one in requests)
    members = sum(len(pair_json(n)) + (0 if n % 3 == 2 else len(jpeg(n))) for n in EVERY)
    assert members <= sent < members + 5 * 1024 + 7 * 100  # and a header between json and image
    store.gets()
    again = open_shards(remote.where, ShardCache(tmp_path / "cache", 1.0))
    assert [again.read(number) for number in EVERY] == [local.read(number) for number in EVERY]
    assert store.gets() == []


def test_many_at_once(store: ObjectStore, tmp_path: Path, local: ShardReader) -> None:
    write(tmp_path / "many" / "pairs", count=48, per_shard=48)
    many = opened(store, tmp_path / "many")
    together = threading.Barrier(16)  # broken, and so an answer of 500, where fewer come at once

    def wait(method: str, path: str) -> tuple[int, str] | None:
        if path.endswith(".tar"):
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(timeout=30)
                return None
            return 500, "InternalError"
        return None

    store.refuse = wait
    many.warm(range(48))
    store.refuse = lambda method, path: None
    remote = opened(store, tmp_path)
    store.gets()
    remote.warm(EVERY)
    assert len(store.gets()) == len(EVERY)
    assert [remote.read(number) for number in EVERY] == [local.read(number) for number in EVERY]
    assert store.gets() == []


def test_a_tar_replaced_by_one_of_the_same_size(store: ObjectStore, tmp_path: Path, local: ShardReader) -> None:
    remote = opened(store, tmp_path)
    first = remote.read(0)
    tar = tmp_path / "pairs" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"label": "1"', b'"label": "8"'))
    url = store.upload(tmp_path / "pairs", f"data/{tmp_path.name}")
    with pytest.raises(RunError, match=r"s3://bucket/data/.*shard-000000\.tar: changed since the run began") as raised:
        remote.read(1)
    assert "\n" not in str(raised.value)
    assert remote.read(0) == first
    again = open_shards(url, ShardCache(tmp_path / "cache", 1.0))
    store.gets()
    assert again.read(1).meta["label"] == "8"
    assert again.read(0) == first and len(store.gets()) == 2  # of another version: not taken from the cache


def test_a_copy_in_another_process_reads_what_was_opened(
    store: ObjectStore, tmp_path: Path, local: ShardReader
) -> None:
    remote = pickle.loads(pickle.dumps(opened(store, tmp_path)))
    store.requests.clear()
    assert remote.read(0) == local.read(0)
    assert [one.method for one in store.requests] == ["GET"]
    tar = tmp_path / "pairs" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"label": "1"', b'"label": "8"'))
    store.upload(tmp_path / "pairs", f"data/{tmp_path.name}")
    with pytest.raises(RunError, match="changed since the run began"):
        pickle.loads(pickle.dumps(remote)).read(1)


def test_a_fork(store: ObjectStore, tmp_path: Path, local: ShardReader) -> None:
    remote = opened(store, tmp_path)
    expected = [local.read(number) for number in EVERY]
    assert remote.read(0) == expected[0]
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        right = False
        with contextlib.suppress(BaseException):
            right = [remote.read(number) for number in EVERY] == expected
        os._exit(0 if right else 1)
    assert [remote.read(number) for number in EVERY] == expected
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_tar_and_a_bucket_that_go(store: ObjectStore, tmp_path: Path, local: ShardReader) -> None:
    remote = opened(store, tmp_path)
    store.refuse = lambda method, path: (404, "NoSuchKey") if path.endswith(".tar") else None
    with pytest.raises(RunError, match=r"shard-000000\.tar: expected it as when the run began, found no such file"):
        remote.read(0)
    store.refuse = lambda method, path: (404, "NoSuchBucket")
    with pytest.raises(RunError, match="found no such file"):
        remote.read(1)
    with pytest.raises(UserError, match=r"^s3://bucket/data/.*: expected a folder of shards, found none"):
        open_shards(remote.where)


@pytest.mark.parametrize("url", ["s3://no-such-bucket/data", f"s3://{BUCKET}/no/such/folder"])
def test_no_such_bucket_or_folder(store: ObjectStore, url: str) -> None:
    with pytest.raises(UserError, match=rf"^{url}: expected a folder of shards, found none") as raised:
        open_shards(url)
    assert "\n" not in str(raised.value)


def test_trouble_that_passes(store: ObjectStore, tmp_path: Path, local: ShardReader) -> None:
    remote = opened(store, tmp_path)
    codes = iter([(500, "InternalError"), (503, "SlowDown"), (500, "InternalError")])
    store.refuse = lambda method, path: next(codes, None) if method == "GET" else None
    store.gets()
    assert remote.read(0) == local.read(0)
    assert [one.status for one in store.gets()] == [500, 503, 500, 206]


def test_trouble_that_does_not(store: ObjectStore, tmp_path: Path, local: ShardReader) -> None:
    remote = opened(store, tmp_path)
    store.refuse = lambda method, path: (500, "InternalError")
    with pytest.raises(
        RunError, match=r"shard-000000\.tar: bytes 512 to \d+: .*as the test wants it.*\(tried 4 times\)"
    ):
        remote.read(0)
    store.refuse = lambda method, path: (403, "AccessDenied")
    with pytest.raises(UserError, match=r"shard-000000\.tar.*access refused.*credentials"):
        remote.read(0)
    with pytest.raises(UserError, match=r"^s3://bucket/data/.*access refused.*credentials") as raised:
        open_shards(remote.where)
    assert "\n" not in str(raised.value)


def test_no_credentials(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=f"^s3://{BUCKET}/data: .*[Cc]redentials") as raised:
        open_shards(f"s3://{BUCKET}/data")
    assert "\n" not in str(raised.value)


def test_no_server(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=rf"^s3://{BUCKET}/data: .*127\.0\.0\.1:9.* \(tried 4 times\)"):
        open_shards(f"s3://{BUCKET}/data")
