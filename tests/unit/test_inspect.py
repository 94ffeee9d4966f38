"""`pivot data inspect`: counts, kinds, images and lengths of what a folder of shards holds."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pivot_megatron.cli import main
from pivot_megatron.convert.tiny_checkpoints import make_tokenizer
from pivot_megatron.data import inspect
from pivot_megatron.data.commands import inspect_shards
from pivot_megatron.data.histogram import ASPECT_RATIOS, Measure, measures
from pivot_megatron.data.index import index_tar, tars_of, write_index
from pivot_megatron.data.inspect import drawn, gather, spread
from pivot_megatron.data.shard_writer import ShardWriter
from pivot_megatron.data.shards import open_shards
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


def write_raw(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    """A tar of members that no writer here would write."""
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    write_index(folder, [index_tar(tar, decode=False) for tar in tars_of(folder)])
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


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    rows = {"a.json": json.dumps(pair("q")), "b.json": "{", "c.json": json.dumps(pair("q", "same", "same"))}
    return write_raw(tmp_path, {**rows, "d.json": json.dumps(pair("q")), "d.jpg": "no image"})


def by_name(folder: Path, **options: Any) -> dict[tuple[str, str], Measure]:
    return {(found.unit, found.name): found for found in gather(open_shards(folder), **options).measures}


def test_counts_kinds_images_and_lengths(mixed: Path) -> None:
    lines = inspect_shards(mixed, 0).splitlines()
    assert lines[0].startswith(f"{mixed}: 4 samples in 2 tars, ")
    assert lines[1:4] == [
        "kinds: 3 pairs, 1 conversations",
        "with an image: 3 of 4 (75%)",
        "first 3 images: 2 JPEG 64x48, 1 PNG 30x20",
    ]
    assert {line.split()[0]: line.split()[1:] for line in lines[4 : lines.index("")]} == {
        "characters": ["min", "median", "max"],
        "question": ["10", "20", "60"],
        "chosen": ["3", "3", "9"],
        "rejected": ["2", "2", "4"],
        "user": ["13", "13", "13"],
        "assistant": ["202", "202", "202"],
        "pixels": ["min", "median", "max"],
        "width": ["30", "64", "64"],
        "height": ["20", "48", "48"],
        "ratio": ["min", "median", "max"],
        "width/height": ["1.33", "1.33", "1.50"],
    }


def test_histograms_as_text(tmp_path: Path) -> None:
    rows = [(image(40, 30, "PNG"), "png", pair("q" * n, rejected="no" * n)) for n in (1, 1, 1, 1, 2, 30)]
    lines = inspect_shards(write(tmp_path / "set", rows), 0).splitlines()
    drawn_ = lines[lines.index("") + 1 :]
    assert drawn_[0].split() == ["characters", "question", "chosen", "rejected"]
    cells = {line.split()[0]: line.split()[1:] for line in drawn_[1 : drawn_.index("")]}
    full, quarter = "\u2588" * 18, "\u2588" * 4 + "\u258c"
    assert cells == {
        "1": ["4", full, "0", "0"],
        "2": ["1", quarter, "0", "4", full],
        "3\u20134": ["0", "6", full, "1", quarter],
        "5\u20136": ["0", "0", "0"],
        "7\u20139": ["0", "0", "0"],
        "10\u201319": ["0", "0", "0"],
        "20\u201329": ["0", "0", "0"],
        "30\u201349": ["1", quarter, "0", "0"],
        "50\u201369": ["0", "0", "1", quarter],
    }
    assert max(map(len, drawn_)) <= 80
    # One column below another: a count stands right above the next.
    assert len({line.index("\u2588") for line in drawn_[1:3]}) == 1
    assert ["1.1\u20131.4", "6", "\u2588" * 24] in [line.split() for line in drawn_]


@given(st.lists(st.integers(0, 10**7), min_size=1), st.lists(st.integers(0, 300)))
def test_every_value_is_in_its_bin(first: list[int], second: list[int]) -> None:
    found = measures("characters", {"a": first, "b": second})
    assert len(found) == 1 + bool(second)
    for measure, values in zip(found, (first, second)):
        edges = measure.edges
        assert edges == found[0].edges and list(edges) == sorted(set(edges)) and len(edges) < 30
        assert measure.counts == tuple(sum(a <= value < b for value in values) for a, b in pairwise(edges))
        assert sum(measure.counts) == len(values)
        assert (measure.least, measure.most) == (min(values), max(values)) and measure.median in values
    together = first + second
    assert sum(a <= min(together) for a in found[0].edges) == 1  # no empty bin at either end
    assert sum(a > max(together) for a in found[0].edges) == 1


@pytest.mark.parametrize(
    ("low", "high", "edges"),
    [
        (64, 64, (64, 65)),
        (3, 12, tuple(range(3, 14))),
        (336, 640, (300, 350, 400, 450, 500, 550, 600, 650)),
        (60, 2000, (50, 70, 100, 200, 300, 500, 700, 1000, 2000, 3000)),
        (3, 900, (2, 5, 10, 20, 50, 100, 200, 500, 1000)),
    ],
)
def test_bins_have_round_edges(low: int, high: int, edges: tuple[int, ...]) -> None:
    assert measures("pixels", {"width": [low, high]})[0].edges == edges


def test_aspect_ratios_tell_common_shapes_apart() -> None:
    sizes = [(1, 1), (4, 3), (3, 2), (16, 9), (3, 4), (9, 16), (1, 30000), (10**8, 1)]
    found = measures("ratio", {"width/height": [width / height for width, height in sizes]}, ASPECT_RATIOS)[0]
    held = {label: count for label, count in zip(found.labels, found.counts) if count}
    assert held == {
        "0\u20130.1": 1,
        "0.5\u20130.7": 1,
        "0.7\u20130.9": 1,
        "0.9\u20131.1": 1,
        "1.1\u20131.4": 1,
        "1.4\u20132": 2,
        "100,000,000\u2013200,000,000": 1,
    }


def test_lengths_in_tokens_are_of_the_text_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer(["what is this it is a red car on the road"] * 20, 300)
    tokenizer.save_pretrained(tmp_path / "llm")
    rows = [(image(8, 8, "PNG"), "png", pair("<image>what is this", "it is a red car", "road"))]
    folder = write(tmp_path / "set", rows)
    found = by_name(folder, tokenizer=tokenizer)
    expected = {"question": "what is this", "chosen": "it is a red car", "rejected": "road"}
    for name, text in expected.items():
        assert found["tokens", name].most == len(tokenizer.encode(text, add_special_tokens=False))
    assert found["characters", "question"].most == len("<image>what is this")
    assert not any(unit == "tokens" for unit, _ in by_name(folder))
    assert main(["data", "inspect", str(folder), "--tokenizer", str(tmp_path / "llm")]) == 0
    assert "\ntokens " in capsys.readouterr().out
    assert main(["data", "inspect", str(folder), "--tokenizer", str(tmp_path / "set")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_rejected_images_are_measured_and_shown(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "two", 2) as writer:
        writer.write("k", image(64, 48, "PNG"), "png", pair("<image>q"), rejected_image=image(20, 80, "PNG"))
    assert by_name(tmp_path / "two")["pixels", "width"].counts == (1, 0, 0, 0, 1, 0, 0)
    assert "  k  PNG 64x48 and rejected PNG 20x80" in inspect_shards(tmp_path / "two")


def test_first_rows_are_shown_on_short_lines(mixed: Path) -> None:
    lines = inspect_shards(mixed).splitlines()
    shown = lines[lines.index("first 3:") + 1 :]
    assert shown[:4] == ["  k0  JPEG 64x48", f"    question: {'q' * 10}", "    chosen: yes", "    rejected: no"]
    assert shown[8:10] == ["  k2  PNG 30x20", "    user: <image>\\nWhat?"]
    assert shown[10].startswith("    assistant: A very very") and shown[10].endswith("...")
    assert max(map(len, shown)) < 130
    assert "  k3  text only" in inspect_shards(mixed, 100)


def test_a_seed_draws_the_rows(mixed: Path) -> None:
    lines = inspect_shards(mixed, 2, seed=5).splitlines()
    keys = [line.split()[0] for line in lines[lines.index("drawn 2:") + 1 :] if line.startswith("  k")]
    assert keys == [f"k{position}" for position in drawn(4, 2, 5)]


def test_positions() -> None:
    assert list(spread(10, 4)) == [0, 2, 5, 7] and list(spread(3, 4)) == [0, 1, 2] and list(spread(5, 0)) == []
    found = drawn(1000, 5, 1)
    assert list(found) == sorted(set(found)) == list(drawn(1000, 5, 1)) != list(drawn(1000, 5, 2))
    assert list(drawn(3, 9, 1)) == [0, 1, 2]


def test_a_large_set_is_judged_by_samples_spread_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "LOOKED_AT", 4)
    folder = write(tmp_path / "many", [(None, "jpg", pair("q" * (n + 1))) for n in range(12)], per_shard=5)
    lines = inspect_shards(folder, 0).splitlines()
    assert "12 samples in 3 tars" in lines[0]
    assert lines[1:4] == ["looked at 4 of them, spread evenly", "kinds: 4 pairs", "with an image: 0 of 4 (0%)"]
    assert lines[5].split() == ["question", "1", "4", "10"]


def test_broken_rows_are_counted_and_do_not_end_it(broken: Path) -> None:
    text = inspect_shards(broken, 2)
    assert "kinds: 1 pairs" in text
    assert "broken: 1 bad_json, 1 identical_answers, 1 bad_image; a run stops at the first of them" in text
    assert "sample b: bad_json" in text


def test_json_is_the_facts_alone(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(broken), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == found["looked_at"] == 4 and found["tars"] == 1
    assert found["bytes"] == (broken / "a.tar").stat().st_size
    assert found["kinds"] == {"pairs": 1} and found["with_image"] == 0
    assert set(found["broken"]) == {"bad_json", "identical_answers", "bad_image"}
    assert found["broken"]["identical_answers"]["count"] == 1 and found["broken"]["identical_answers"]["key"] == "c"
    assert found["measures"][0] == {
        "name": "question",
        "unit": "characters",
        "least": 1,
        "median": 1,
        "most": 1,
        "edges": [1, 2, 3, 4],
        "counts": [1, 0, 0],
    }


def test_what_would_steer_a_terminal_is_spelled_out(tmp_path: Path) -> None:
    hostile = "\x1b[2J\x07red\u2028\x9b31m \u4f60\u597d \u0645\u0631\u062d\u0628\u0627"
    rows = {"a\x1b[31m\udcff.json": json.dumps(pair(hostile)), "b.json": json.dumps(pair(hostile))}
    text = inspect_shards(write_raw(tmp_path, rows))
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\u2028", "\udcff"}
    assert "  sample a\\x1b[31m\\udcff: bad_name" in text
    assert "question: \\x1b[2J\\x07red\\u2028\\x9b31m \u4f60\u597d \u0645\u0631\u062d\u0628\u0627" in text


def test_an_empty_set(tmp_path: Path) -> None:
    lines = inspect_shards(write(tmp_path / "none", []), 3).splitlines()
    assert lines == [f"{tmp_path / 'none'}: 0 samples in 0 tars, 0.0 MiB", "kinds: none"]
    assert json.loads(inspect_shards(tmp_path / "none", as_json=True))["measures"] == []


def test_mistakes_are_one_line(tmp_path: Path, mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--samples: expected 0 or more, found -1"):
        inspect_shards(mixed, -1)
    with pytest.raises(UserError, match=r"expected a folder of shards at .*nowhere, found none"):
        inspect_shards(tmp_path / "nowhere")
    assert main(["data", "inspect", str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["data", "inspect", str(mixed), "--samples", "1"]) == 0
    assert "first:\n  k0" in capsys.readouterr().out
