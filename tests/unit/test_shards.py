"""Shards on disk: what is written is what is read, and a folder that does not agree with its index is refused."""

import gzip
import hashlib
import io
import json
import os
import pickle
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pivot_megatron.data.index import index_tar, tars_of, write_index
from pivot_megatron.data.sample import BadSample, Pair
from pivot_megatron.data.shard_writer import ShardWriter
from pivot_megatron.data.shards import open_shards
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


def index(folder: Path) -> dict[str, str]:
    """Index `folder`; the problems found, by key."""
    found = write_index(folder, [index_tar(tar, decode=True) for tar in tars_of(folder)])
    return {found.keys[at]: f"{problem.reason}: {problem.detail}" for at, problem in found.problems.items()}


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def pair_json(number: int = 0) -> bytes:
    return json.dumps(record(number)).encode()


def test_what_is_written_is_read_in_any_order(tmp_path: Path) -> None:
    reader = open_shards(write(tmp_path))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "index.json",
        "index.parquet",
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
    about = json.loads((write(tmp_path) / "index.json").read_text())
    assert about["version"] == 2
    assert [shard["samples"] for shard in about["shards"]] == [3, 3, 1]
    tars = [(tmp_path / f"shard-00000{number}.tar").read_bytes() for number in range(3)]
    assert [shard["bytes"] for shard in about["shards"]] == list(map(len, tars))
    assert [shard["sha256"] for shard in about["shards"]] == [hashlib.sha256(tar).hexdigest() for tar in tars]
    for name in ("index.json", "index.parquet"):
        (tmp_path / name).unlink()
    assert index(tmp_path) == {}
    assert json.loads((tmp_path / "index.json").read_text()) == about


def without_names(folder: Path) -> Path:
    """`folder` with an index as it was before it said which images are one and the same."""
    about, samples = json.loads((folder / "index.json").read_text()), folder / "index.parquet"
    pq.write_table(pq.read_table(samples).drop_columns(["image_name", "rejected_name"]), samples)
    about["samples"]["sha256"] = hashlib.sha256(samples.read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(about))
    return folder


def test_the_index_says_which_images_are_one(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 2) as writer:
        for number, level in enumerate((1, 2, None, 1)):
            writer.write(f"k{number}", None if level is None else jpeg(level), "jpg", record(number))
        writer.write("two", jpeg(2), "jpg", record(9), rejected_image=jpeg(1))
    reader = open_shards(tmp_path)
    names = [reader.image_names(at) for at in range(5)]
    (first,), (second,) = names[:2]
    assert names == [[first], [second], [], [first], [second, first]] and 0 not in (first, second) and first != second
    before = open_shards(without_names(tmp_path))
    assert [before.image_names(at) for at in range(5)] == [[0], [0], [], [0], [0, 0]]
    assert [before.image_sizes(at) for at in range(5)] == [reader.image_sizes(at) for at in range(5)]


def test_the_index_says_where_bytes_lie_and_how_large_images_are(tmp_path: Path) -> None:
    write(tmp_path)
    rows = pq.read_table(tmp_path / "index.parquet").to_pylist()
    assert [row["key"] for row in rows] == [f"k{number}" for number in range(7)]
    for number, row in enumerate(rows):
        tar = (tmp_path / f"shard-{row['shard']:06d}.tar").read_bytes()
        assert json.loads(tar[row["json_offset"] :][: row["json_size"]]) == record(number)
        if number % 3 == 2:
            assert (row["image_offset"], row["image_width"]) == (-1, 0)
        else:
            assert tar[row["image_offset"] :][: row["image_size"]] == jpeg(number)
            assert (row["image_width"], row["image_height"]) == (8, 8)
        assert row["reason"] is None and row["rejected_offset"] == -1
    # A folder opens by its index alone: no header of a tar is read.
    for tar in tmp_path.glob("*.tar"):
        tar.write_bytes(b"?" * tar.stat().st_size)
    assert len(open_shards(tmp_path)) == 7


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    assert open_shards(first).fingerprint == open_shards(second).fingerprint
    assert open_shards(first).fingerprint != open_shards(write(tmp_path / "c", count=6)).fingerprint
    assert open_shards(first).fingerprint != open_shards(write(tmp_path / "d", per_shard=4)).fingerprint


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
        open_shards(tmp_path)


def test_leftovers_of_a_killed_writer_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "shard-000009.tar.partial").write_bytes(b"half")
    assert len(open_shards(write(tmp_path))) == 7
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
    assert list(open_shards(tmp_path / "out").keys) == ["k"]
    with pytest.raises(UserError, match=r"shard-000000\.tar"), ShardWriter(tmp_path / "out", 2):
        pass


def test_reader_can_be_pickled(tmp_path: Path) -> None:
    reader = open_shards(write(tmp_path))
    expected = [reader.read(number) for number in range(7)]
    pickled = pickle.dumps(reader)
    # The first reader's files are closed: the copy must open its own.
    del reader
    copy = pickle.loads(pickled)
    assert [copy.read(number) for number in range(7)] == expected


def test_forked_readers_do_not_disturb_each_other(tmp_path: Path) -> None:
    reader = open_shards(write(tmp_path))
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
    reader = open_shards(write(tmp_path, count=100, per_shard=1))
    assert [reader.read(number).meta["label"] for number in range(100)] == [str(number) for number in range(100)]
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 64


def test_foreign_tar_with_folders_and_scattered_members(tmp_path: Path) -> None:
    members = {"./a/1.JPG": jpeg(1), "./a/2.png": jpeg(2), "./a/2.json": pair_json(2), "./a/1.json": pair_json(1)}
    write_tar(tmp_path / "x.tar", members)
    index(tmp_path)
    reader = open_shards(tmp_path)
    assert list(reader.keys) == ["a/1", "a/2"]
    assert [reader.read(0).image, reader.read(1).image] == [jpeg(1), jpeg(2)]
    assert reader.read(0).meta["label"] == "1"


@pytest.mark.parametrize(
    ("members", "problems"),
    [
        ({"a.json": pair_json(), "b.jpg": jpeg(0)}, {"b": "missing_json: expected b.json"}),
        ({"a.json": pair_json(), "./a.json": pair_json()}, {"a": "duplicate_member: the member ./a.json"}),
        ({"a.json": pair_json(), "a.jpg": jpeg(0), "a.png": jpeg(0)}, {"a": "duplicate_member: the member a.png"}),
        ({"../a.json": pair_json()}, {"../a": "unsafe_name"}),
        ({"/etc/a.json": pair_json()}, {"/etc/a": "unsafe_name"}),
        ({"a\n.json": pair_json()}, {"a\\n": "bad_name"}),
        ({"a.json": b"{"}, {"a": "bad_json"}),
        ({"a.json": pair_json(), "a.jpg": b""}, {"a": "bad_image"}),
        ({"a.json": pair_json(), "a.jpg": jpeg(0)[:-20]}, {"a": "bad_image"}),
    ],
)
def test_what_is_broken_is_a_sample_with_a_problem(
    tmp_path: Path, members: Mapping[str, bytes], problems: Mapping[str, str]
) -> None:
    write_tar(tmp_path / "x.tar", {"first.json": pair_json(), **members, "last.json": pair_json()})
    found = index(tmp_path)
    assert found.keys() == problems.keys() and all(found[key].startswith(said) for key, said in problems.items())
    reader = open_shards(tmp_path)
    assert [bad.key for bad in reader.known_bad] == list(problems)
    for position, key in enumerate(reader.keys):
        if key in problems:
            for use in (reader.read, reader.image_sizes):
                with pytest.raises(BadSample, match=re.escape(problems[key])):
                    use(position)
        else:
            reader.read(position)


def test_other_members_are_left_alone_and_counted(tmp_path: Path) -> None:
    members = {
        "a.json": pair_json(),
        "a.txt": b"",
        "a.seg.png": b"",
        "._a.jpg": b"",
        "b.json": pair_json(),
        "b.TXT": b"",
    }
    write_tar(tmp_path / "x.tar", members)
    assert index(tmp_path) == {}
    assert json.loads((tmp_path / "index.json").read_text())["ignored"] == {".seg.png": 1, ".txt": 2, "hidden": 1}


def test_one_key_in_two_tars(tmp_path: Path) -> None:
    for name in ("x.tar", "y.tar"):
        write_tar(tmp_path / name, {"a.json": pair_json()})
    assert index(tmp_path) == {"a@y.tar": "duplicate_key: the key a is in x.tar and again in y.tar"}
    assert open_shards(tmp_path).keys == ("a", "a@y.tar")


def test_tars_that_do_not_end_as_they_should(tmp_path: Path) -> None:
    """What can be read is, and the rest is named."""
    tar = tmp_path / "x.tar"
    write_tar(tar, {"a.json": pair_json(), "b.json": b"0" * 5000})
    whole = tar.read_bytes()
    second = 512 + -(-len(pair_json()) // 512) * 512
    said = {
        "cut in data": (whole[: second + 2000], ["a"], "truncated_tar: b.json has 5000 bytes"),
        "cut in a header": (whole[: second + 100], ["a"], "truncated_tar: it ends at byte"),
        "cut before the end mark": (whole[: second + 512 + 5120], ["a", "b"], "truncated_tar: it ends at byte"),
        "damaged header": (whole[:second] + b"\xff" + whole[second + 1 :], ["a"], "bad_tar: the header at byte"),
        "two tars joined": (whole + whole, ["a", "b"], "bad_tar: data follow the end mark"),
        "compressed": (gzip.compress(whole), [], "bad_tar: expected an uncompressed tar"),
        "empty file": (b"", [], "bad_tar: expected an uncompressed tar"),
    }
    for name, (data, keys, detail) in said.items():
        tar.write_bytes(data)
        problems = index(tmp_path)
        assert list(open_shards(tmp_path).keys) == [*keys, "x.tar"], name
        assert problems["x.tar"].startswith(detail), name


def test_folder_that_disagrees_with_its_index(tmp_path: Path) -> None:
    write(tmp_path)
    about = json.loads((tmp_path / "index.json").read_text())

    def refused(change: Mapping[str, object], match: str) -> None:
        shards = [{**about["shards"][0], **change}, *about["shards"][1:]]
        (tmp_path / "index.json").write_text(json.dumps({**about, "shards": shards}))
        with pytest.raises(UserError, match=match):
            open_shards(tmp_path)

    refused({"bytes": 1}, "expected 1 bytes")
    refused({"name": "gone.tar"}, r"found shard-000000\.tar missing")
    (tmp_path / "shard-000000.tar").rename(tmp_path / "away")
    refused({}, r"expected shard-000000\.tar in .* found none")
    for text, match in (("{", "something else"), ('{"version": 1, "shards": []}', "version 2 .* found 1")):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(UserError, match=match):
            open_shards(tmp_path)


def test_an_index_of_two_halves_that_are_not_of_one_make(tmp_path: Path) -> None:
    write(tmp_path / "a"), write(tmp_path / "b", count=6)
    (tmp_path / "b" / "index.parquet").replace(tmp_path / "a" / "index.parquet")
    with pytest.raises(UserError, match=r"index\.parquet as index\.json says, found another: run: pivot data index"):
        open_shards(tmp_path / "a")
    with pytest.raises(UserError, match=r"expected index\.parquet in .* found none: run: pivot data index"):
        open_shards(tmp_path / "b")


def test_tar_cut_after_opening(tmp_path: Path) -> None:
    reader = open_shards(write(tmp_path))
    os.truncate(tmp_path / "shard-000001.tar", 512)
    with pytest.raises(RunError, match=r"shard-000001\.tar"):
        reader.read(3)


def test_no_tars(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected tar files"):
        index(tmp_path)
