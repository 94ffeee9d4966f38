"""Shards on disk: what is written is what is read, and a folder that does not agree with its index is refused."""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from pivot_megatron.data.sample import Pair
from pivot_megatron.data.shards import ShardReader, ShardWriter, write_index
from pivot_megatron.errors import RunError, UserError


def jpeg(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def record(number: int) -> dict[str, str]:
    return {"question": f"Größe {number}?", "chosen": "yes", "rejected": "no", "label": str(number)}


def write(folder: Path, count: int = 7, per_shard: int = 3) -> Path:
    with ShardWriter(folder, per_shard) as writer:
        for number in range(count):
            # Every third row is text only.
            writer.write(f"k{number}", None if number % 3 == 2 else jpeg(number), "jpg", record(number))
    return folder


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def pair_json(number: int = 0) -> bytes:
    return json.dumps(record(number)).encode()


def test_what_is_written_is_read_in_any_order(tmp_path: Path) -> None:
    reader = ShardReader(write(tmp_path))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "index.json",
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
    ]
    assert list(reader.keys) == [f"k{number}" for number in range(7)]
    for number in (6, 0, 5, 1, 2, 4, 3):
        image = None if number % 3 == 2 else jpeg(number)
        assert reader.read(number) == Pair(f"k{number}", image, f"Größe {number}?", "yes", "no", {"label": str(number)})
    for beyond in (-1, 7):
        with pytest.raises(IndexError):
            reader.read(beyond)


def test_index_states_counts_sizes_and_checksums(tmp_path: Path) -> None:
    index = json.loads((write(tmp_path) / "index.json").read_text())
    assert index["version"] == 1
    assert [shard["samples"] for shard in index["shards"]] == [3, 3, 1]
    assert [shard["bytes"] for shard in index["shards"]] == [
        (tmp_path / f"shard-00000{number}.tar").stat().st_size for number in range(3)
    ]
    (tmp_path / "index.json").unlink()
    write_index(tmp_path)
    assert json.loads((tmp_path / "index.json").read_text()) == index


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    assert ShardReader(first).fingerprint == ShardReader(second).fingerprint
    assert ShardReader(first).fingerprint != ShardReader(write(tmp_path / "c", count=6)).fingerprint
    assert ShardReader(first).fingerprint != ShardReader(write(tmp_path / "d", per_shard=4)).fingerprint


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    import webdataset  # type: ignore[import-untyped]

    write(tmp_path)
    rows = list(webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False))
    assert [row["__key__"] for row in rows] == ["k0", "k1", "k2"]
    assert rows[1]["jpg"] == jpeg(1)
    assert "jpg" not in rows[2]


def test_crash_leaves_no_index_and_no_tars(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="crash"), ShardWriter(tmp_path, 2) as writer:
        for number in range(5):
            writer.write(f"k{number}", jpeg(number), "jpg", record(number))
        raise ValueError("crash")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="pivot data index"):
        ShardReader(tmp_path)


def test_leftovers_of_a_killed_writer_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "shard-000009.tar.partial").write_bytes(b"half")
    assert len(ShardReader(write(tmp_path))) == 7
    assert not list(tmp_path.glob("*.partial"))


def test_writer_refuses_what_would_not_read_back(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out", 2) as writer:
        writer.write("k", jpeg(0), "jpg", record(0))
        with pytest.raises(UserError, match="'k' twice"):
            writer.write("k", jpeg(1), "jpg", record(1))
        with pytest.raises(UserError, match="without dots"):
            writer.write("a.b", jpeg(1), "jpg", record(1))
        with pytest.raises(UserError, match="gif"):
            writer.write("b", jpeg(1), "gif", record(1))
    assert list(ShardReader(tmp_path / "out").keys) == ["k"]
    with pytest.raises(UserError, match=r"shard-000000\.tar"), ShardWriter(tmp_path / "out", 2):
        pass


def test_reader_can_be_pickled(tmp_path: Path) -> None:
    reader = ShardReader(write(tmp_path))
    expected = [reader.read(number) for number in range(7)]
    pickled = pickle.dumps(reader)
    # The first reader's files are closed: the copy must open its own.
    del reader
    copy = pickle.loads(pickled)
    assert [copy.read(number) for number in range(7)] == expected


def test_forked_readers_do_not_disturb_each_other(tmp_path: Path) -> None:
    reader = ShardReader(write(tmp_path))
    expected = [reader.read(number) for number in range(7)]

    def reads_right() -> bool:
        return all([reader.read(number) for number in range(7)] == expected for _ in range(300))

    child = os.fork()
    if child == 0:
        try:
            right = reads_right()
        except BaseException:
            right = False
        os._exit(0 if right else 1)
    assert reads_right()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_more_tars_than_may_stay_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    reader = ShardReader(write(tmp_path, count=100, per_shard=1))
    assert [reader.read(number).meta["label"] for number in range(100)] == [str(number) for number in range(100)]
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 64


def test_foreign_tar_with_folders_and_scattered_members(tmp_path: Path) -> None:
    members = {"./a/1.JPG": jpeg(1), "./a/2.png": jpeg(2), "./a/2.json": pair_json(2), "./a/1.json": pair_json(1)}
    write_tar(tmp_path / "x.tar", members)
    write_index(tmp_path)
    reader = ShardReader(tmp_path)
    assert list(reader.keys) == ["a/1", "a/2"]
    assert [reader.read(0).image, reader.read(1).image] == [jpeg(1), jpeg(2)]
    assert reader.read(0).meta["label"] == "1"


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ({"a.json": pair_json(), "b.jpg": jpeg(0)}, "b.json"),
        ({"a.json": pair_json(), "./a.json": pair_json()}, "two for a"),
        ({"a.json": pair_json(), "a.jpg": jpeg(0), "a.png": jpeg(0)}, "two for a"),
        ({"a.json": pair_json(), "a.gif": jpeg(0)}, "a.gif"),
    ],
)
def test_bad_members_are_named_with_their_tar(tmp_path: Path, members: Mapping[str, bytes], found: str) -> None:
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=found) as caught:
        write_index(tmp_path)
    assert "x.tar" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "index.json").exists()


def test_one_key_in_two_tars(tmp_path: Path) -> None:
    for name in ("x.tar", "y.tar"):
        write_tar(tmp_path / name, {"a.json": pair_json()})
    with pytest.raises(UserError, match=r"found a in .*y\.tar"):
        write_index(tmp_path)


def test_compressed_and_cut_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.json": pair_json()}, "w:gz")
    with pytest.raises(UserError, match=r"uncompressed tar at .*x\.tar"):
        write_index(tmp_path)
    write_tar(tmp_path / "x.tar", {"a.json": b"0" * 5000})
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:2000])
    with pytest.raises(UserError, match="unexpected end"):
        write_index(tmp_path)


def test_folder_that_disagrees_with_its_index(tmp_path: Path) -> None:
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())

    def refused(change: Mapping[str, object], match: str) -> None:
        shards = [{**index["shards"][0], **change}, *index["shards"][1:]]
        (tmp_path / "index.json").write_text(json.dumps({"version": 1, "shards": shards}))
        with pytest.raises(UserError, match=match):
            ShardReader(tmp_path)

    refused({"samples": 2}, "expected 2 samples .* found 3")
    refused({"bytes": 1}, "expected 1 bytes")
    refused({"name": "gone.tar"}, r"found shard-000000\.tar missing")
    (tmp_path / "shard-000000.tar").rename(tmp_path / "away")
    refused({}, r"expected shard-000000\.tar in .* found none")
    for text, match in (("{", "something else"), ('{"version": 2, "shards": []}', "version 1 .* found 2")):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(UserError, match=match):
            ShardReader(tmp_path)


def test_tar_cut_after_opening(tmp_path: Path) -> None:
    reader = ShardReader(write(tmp_path))
    os.truncate(tmp_path / "shard-000001.tar", 512)
    with pytest.raises(RunError, match=r"shard-000001\.tar"):
        reader.read(3)


def test_no_tars(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected tar files"):
        write_index(tmp_path)
