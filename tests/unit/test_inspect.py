"""`pivot data inspect`: counts, kinds, images and lengths of what a folder of shards holds."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pivot_megatron.cli import main
from pivot_megatron.data import inspect
from pivot_megatron.data.inspect import describe_shards
from pivot_megatron.data.shards import ShardWriter, write_index
from pivot_megatron.errors import UserError


def image(width: int, height: int, kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, kind)
    return file.getvalue()


def pair(question: str, chosen: str = "yes", rejected: str = "no") -> dict[str, str]:
    return {"question": question, "chosen": chosen, "rejected": rejected}


def write(folder: Path, rows: list[tuple[bytes | None, str, dict[str, Any]]], per_shard: int = 2) -> Path:
    with ShardWriter(folder, per_shard) as writer:
        for number, (encoded, extension, record) in enumerate(rows):
            writer.write(f"k{number}", encoded, extension, record)
    return folder


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    talk = {
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A " + "very " * 40}]
    }
    return write(
        tmp_path / "mixed",
        [
            (image(64, 48, "JPEG"), "jpg", pair("q" * 10)),
            (image(64, 48, "JPEG"), "jpg", pair("q" * 20, rejected="nope")),
            (image(30, 20, "PNG"), "png", talk),
            (None, "jpg", pair("q" * 60, chosen="of course")),
        ],
    )


def test_counts_kinds_images_and_lengths(mixed: Path) -> None:
    lines = describe_shards(mixed, 0).splitlines()
    assert lines[0].startswith(f"{mixed}: 4 samples in 2 tars, ")
    assert lines[1:4] == [
        "kinds: 3 pairs, 1 conversations",
        "with an image: 3 of 4 (75%)",
        "first 3 images: 2 JPEG 64x48, 1 PNG 30x20",
    ]
    assert {line.split()[0]: line.split()[1:] for line in lines[4:]} == {
        "characters": ["min", "median", "max"],
        "question": ["10", "20", "60"],
        "chosen": ["3", "3", "9"],
        "rejected": ["2", "2", "4"],
        "user": ["13", "13", "13"],
        "assistant": ["202", "202", "202"],
    }


def test_first_rows_are_shown_on_short_lines(mixed: Path) -> None:
    lines = describe_shards(mixed, 3).splitlines()
    shown = lines[lines.index("first 3:") + 1 :]
    assert shown[:4] == ["  k0  JPEG 64x48", f"    question: {'q' * 10}", "    chosen: yes", "    rejected: no"]
    assert shown[8:10] == ["  k2  PNG 30x20", "    user: <image>\\nWhat?"]
    assert shown[10].startswith("    assistant: A very very") and shown[10].endswith("...")
    assert max(map(len, shown)) < 130
    assert "  k3  text only" in describe_shards(mixed, 100)


def test_a_large_set_is_judged_by_samples_spread_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "LOOKED_AT", 4)
    folder = write(tmp_path / "many", [(None, "jpg", pair("q" * (n + 1))) for n in range(12)], per_shard=5)
    lines = describe_shards(folder, 0).splitlines()
    assert "12 samples in 3 tars" in lines[0]
    assert lines[1:4] == ["looked at 4 of them, spread evenly", "kinds: 4 pairs", "with an image: 0 of 4 (0%)"]
    assert lines[5].split() == ["question", "1", "4", "10"]


def test_broken_rows_are_counted_and_do_not_end_it(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        rows = {"a.json": json.dumps(pair("q")), "b.json": "{", "c.json": json.dumps(pair("q", "same", "same"))}
        for name, text in {**rows, "d.json": json.dumps(pair("q")), "d.jpg": "no image"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    write_index(tmp_path)
    text = describe_shards(tmp_path, 2)
    assert "kinds: 2 pairs" in text
    assert "broken: 1 bad_json, 1 identical_answers; a run stops at the first of them" in text
    assert "first 1 image: 1 unreadable" in text
    assert "sample b: bad_json" in text


def test_an_empty_set(tmp_path: Path) -> None:
    lines = describe_shards(write(tmp_path / "none", []), 3).splitlines()
    assert lines == [f"{tmp_path / 'none'}: 0 samples in 0 tars, 0.0 MiB", "kinds: none"]


def test_mistakes_are_one_line(tmp_path: Path, mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--samples: expected 0 or more, found -1"):
        describe_shards(mixed, -1)
    assert main(["data", "inspect", str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["data", "inspect", str(mixed), "--samples", "1"]) == 0
    assert "first:\n  k0" in capsys.readouterr().out
