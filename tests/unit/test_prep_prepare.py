"""The writer that all preparation shares: balanced, the same for any number of workers, and able to go on when killed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from pivot_megatron.cli import main
from pivot_megatron.data.sample import BadSample
from pivot_megatron.data.shard_writer import ShardWriter
from pivot_megatron.data.shards import open_shards
from pivot_megatron.data_prep.parallel import in_order
from pivot_megatron.data_prep.pictures import Reencoding
from pivot_megatron.data_prep.prepare import Output, Selection, Writing, balanced, prepare
from pivot_megatron.data_prep.rows import Row
from pivot_megatron.errors import RunError, UserError
from tests.prep import content, encoded, llava_row, picture, report, samples, write_images, write_lines


class Stopped(Exception):
    """What a kill is to the code under test: nothing after it runs."""


class Rows:
    """Rows as a source gives them. `stop_at` ends the reading with an error, `passes` readings later."""

    def __init__(self, rows: Sequence[Row | BadSample], stop_at: int | None = None, passes: int = 0) -> None:
        self.rows, self.stop_at, self.passes, self.files = rows, stop_at, passes, [Path(__file__)]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row | BadSample]:
        stops = self.passes == 0
        self.passes -= 1
        for position, row in enumerate(self.rows):
            if stops and position == self.stop_at:
                raise Stopped
            yield row


@pytest.fixture
def rows(tmp_path: Path) -> list[Row | BadSample]:
    """Of every kind: files and bytes, text only, to be changed, broken, refused by the source and by their text."""
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {f"{i}.jpg": picture(i) for i in range(40)}
    images |= {"3.jpg": picture(kind="GIF"), "8.jpg": picture(exif=exif), "13.jpg": b"", "21.jpg": b"broken"}
    folder = write_images(tmp_path / "images", images)
    made: list[Row | BadSample] = [Row(f"k-{i:04d}", llava_row(i, "x"), folder / f"{i}.jpg") for i in range(40)]
    made[5] = Row("k-0005", llava_row(5), None)
    made[6] = BadSample("k-0006", "multi_image", "expected one")
    made[7] = Row("k-0007", {"conversations": []}, None)
    made[9] = Row("k-0009", llava_row(9, "x"), picture(9, "WEBP"))
    return made


def go(rows: Rows | Sequence[Row | BadSample], out: Path, **options: object) -> list[str]:
    source = rows if isinstance(rows, Rows) else Rows(rows)
    writing = Writing([Output(out)], **{"samples_per_shard": 8, **options})  # type: ignore[arg-type]
    return list(prepare(Selection(source, {"command": "test"}), writing))


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 20, 100, 1001])
@pytest.mark.parametrize("most", [1, 2, 7, 8, 1000])
def test_shards_are_as_few_and_as_equal_as_can_be(count: int, most: int) -> None:
    sizes = balanced(count, most)
    assert sum(sizes) == count and max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-count // most)


def test_report_and_lines(rows: list[Row | BadSample], tmp_path: Path) -> None:
    lines = go(rows, tmp_path / "out")
    found = report(tmp_path / "out")
    assert (found["rows"], found["read"], found["kept"], found["shards"]) == (40, 40, 36, 5)
    assert {name: (one["count"], one["first"]) for name, one in found["dropped"].items()} == {
        "multi_image": (1, ["k-0006"]),
        "bad_turns": (1, ["k-0007"]),
        "image_empty": (1, ["k-0013"]),
        "image_broken": (1, ["k-0021"]),
    }
    assert found["images_changed"] == {"exif_orientation": 1, "other_format": 1, "palette": 1}
    assert lines[0] == "read 40 of 40 rows, kept 36, shards: 5"
    assert "  dropped 1 image_empty: k-0013" in lines
    assert lines[-1] == "  images made plain: 1 exif_orientation, 1 other_format, 1 palette"
    assert [shard["samples"] for shard in json.loads((tmp_path / "out" / "index.json").read_text())["shards"]] == [
        8,
        7,
        7,
        7,
        7,
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith(".tar")) == [
        "index.json",
        "index.parquet",
        "report.json",
    ]


def test_bytes_are_those_of_the_shard_writer(rows: list[Row | BadSample], tmp_path: Path) -> None:
    sound = [row for row in rows[22:] if isinstance(row, Row)]
    go(sound, tmp_path / "out", samples_per_shard=9)
    with ShardWriter(tmp_path / "direct", 9) as writer:
        for row in sound:
            assert isinstance(row.image, Path)
            writer.write(row.key, row.image.read_bytes(), "jpg", row.record)
    written = content(tmp_path / "out")
    del written["report.json"]
    assert written == content(tmp_path / "direct")


@pytest.mark.parametrize("reencoding", [None, Reencoding(70, 10)])
def test_any_number_of_workers_gives_the_same_bytes(
    rows: list[Row | BadSample], tmp_path: Path, reencoding: Reencoding | None
) -> None:
    for workers in (0, 1, 2):
        for limit in (None, 20):
            go(rows, tmp_path / f"{workers}-{limit}", workers=workers, limit=limit, reencoding=reencoding)
            assert content(tmp_path / f"{workers}-{limit}") == content(tmp_path / f"0-{limit}")
    assert [s.key for s in samples(tmp_path / "0-20")] == [s.key for s in samples(tmp_path / "0-None")][:20]
    if reencoding is not None:
        with Image.open(io.BytesIO(samples(tmp_path / "0-20")[0].image)) as image:
            assert (image.format, image.size) == ("JPEG", (10, 6))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("passes", [0, 1])
@pytest.mark.parametrize("stop_at", [0, 1, 11, 27, 39])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    rows: list[Row | BadSample], tmp_path: Path, workers: int, passes: int, stop_at: int
) -> None:
    go(rows, tmp_path / "unbroken")
    with pytest.raises(Stopped):
        go(Rows(rows, stop_at, passes), tmp_path / "out", workers=workers)
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    if workers == 0:
        assert len(done) == (0 if passes == 0 else {0: 0, 1: 0, 11: 1, 27: 3, 39: 4}[stop_at])
    with pytest.raises(UserError, match="pivot data index"):
        open_shards(tmp_path / "out")
    go(rows, tmp_path / "out", workers=workers)
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done} == done


def test_what_was_looked_at_is_not_looked_at_again(rows: list[Row | BadSample], tmp_path: Path) -> None:
    looked: list[str] = []

    def look(stop_at: int | None) -> None:
        selection = Selection(Rows(rows, stop_at), {}, check=lambda row: looked.append(row.key))
        prepare(selection, Writing([Output(tmp_path / "out")]))

    with pytest.raises(Stopped):
        look(stop_at=30)
    assert len(looked) == 28
    # As a kill in the middle of a line leaves it.
    with (tmp_path / "out" / ".preparation" / "survey.jsonl").open("a") as file:
        file.write('{"key": "k-00')
    with pytest.raises(Stopped):
        look(stop_at=35)
    look(stop_at=None)
    assert looked == [row.key for row in rows if isinstance(row, Row) and row.key != "k-0007"]


def test_killed_for_real(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", {f"{i}.jpg": picture(i, size=(900, 700)) for i in range(120)})
    path = write_lines(tmp_path / "rows.jsonl", [llava_row(i, f"{i}.jpg") for i in range(120)])

    def command(out: str) -> list[str]:
        words = [
            "cambrian",
            path,
            "--images",
            images,
            "--out",
            tmp_path / out,
            "--samples-per-shard",
            20,
            "--workers",
            1,
        ]
        return [sys.executable, "-m", "pivot_megatron.cli", "data", *map(str, words), "--reencode", "90"]

    assert main(command("unbroken")[3:]) == 0
    process = subprocess.Popen(command("out"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "out" / "shard-000001.tar").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert (tmp_path / "out" / ".preparation").exists() and not (tmp_path / "out" / "index.json").exists()
    assert main(command("out")[3:]) == 0
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")


def test_other_settings_do_not_mix(rows: list[Row | BadSample], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        go(Rows(rows, 30), out)
    # No shard is written yet: what was looked at is forgotten, and nothing else is lost.
    go(rows, out, limit=20)
    assert len(open_shards(out)) == 20
    shutil.rmtree(out)
    with pytest.raises(Stopped):
        go(Rows(rows, 30, passes=1), out)
    with pytest.raises(UserError, match=r"found others \(samples_per_shard\): give the same again") as caught:
        go(rows, out, samples_per_shard=5)
    assert "\n" not in str(caught.value)
    go(rows, out)
    before = content(out)
    with pytest.raises(UserError, match=r"expected a folder without shards at .*out, found"):
        go(rows, out)
    assert content(out) == before


def test_twin_folder_in_use(rows: list[Row | BadSample], tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "taken", 3) as writer:
        writer.write("k", None, "", llava_row(0))
    outputs = [Output(tmp_path / "out"), Output(tmp_path / "taken")]
    with pytest.raises(UserError, match=r"without shards at .*taken, found shard-000000\.tar"):
        prepare(Selection(Rows(rows), {}), Writing(outputs))
    assert len(open_shards(tmp_path / "taken")) == 1
    with pytest.raises(UserError, match="a folder of its own"):
        Writing([Output(tmp_path / "a"), Output(tmp_path / "b" / ".." / "a")])


def test_nothing_kept_is_a_mistake(rows: list[Row | BadSample], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected rows to keep, found none: 1 image_empty \(.*zero bytes\)"):
        go([rows[13]], tmp_path / "out")
    go(rows, tmp_path / "out")


def test_an_image_that_changes_between_the_two_looks(rows: list[Row | BadSample], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        go(Rows(rows, 0, passes=1), tmp_path / "out")
    (tmp_path / "images" / "30.jpg").unlink()
    with pytest.raises(
        RunError, match="expected the image of k-0030 as it was looked at before, found image_not_found"
    ):
        go(rows, tmp_path / "out")
    (tmp_path / "images" / "30.jpg").write_bytes(picture(30))
    go(rows, tmp_path / "out")
    assert len(open_shards(tmp_path / "out")) == 36


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"limit": 0}, "--count: expected at least 1, found 0"),
        ({"samples_per_shard": 0}, "--samples-per-shard: expected at least 1, found 0"),
        ({"workers": -1}, "--workers: expected at least 0, found -1"),
        ({"reencoding": Reencoding(96)}, "--reencode: expected a JPEG quality from 1 to 95, found 96"),
        ({"reencoding": Reencoding(90, 0)}, "--longest-side: expected at least 1 pixel, found 0"),
    ],
)
def test_wrong_options(options: dict[str, object], match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match):
        Writing([Output(tmp_path)], **options)  # type: ignore[arg-type]


def die(number: int) -> int:
    if number == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_lost_worker_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(RunError, match="memory may be short"):
        list(in_order(die, range(1000), 1))


def test_items_are_read_only_a_little_ahead() -> None:
    read: list[int] = []
    results = in_order(abs, (read.append(i) or i for i in range(10000)), 1)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    results.close()
    assert len(read) < 100


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [llava_row(i, "a.tif") for i in range(5)])
    write_images(tmp_path, {"a.tif": encoded(Image.new("RGB", (4, 4)), "TIFF")})
    assert main(["data", "cambrian", str(path), "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "read 5 of 5 rows, kept 5, shards: 1",
        "  images made plain: 5 other_format",
    ]
    for command in (
        ["llava", str(tmp_path / "none.json"), "--out", str(tmp_path / "b")],
        ["onevision", str(path), "--out", str(tmp_path / "out")],
        ["cambrian", str(path), "--out", str(tmp_path / "b"), "--longest-side", "5"],
        ["mmpr", str(path), "--out", str(tmp_path / "b"), "--tokenizer", str(tmp_path)],
    ):
        assert main(["data", *command]) == 2
        error = capsys.readouterr().err
        assert error.startswith("pivot: ") and error.count("\n") == 1
    assert not (tmp_path / "b").exists()
