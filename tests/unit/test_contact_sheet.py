"""The contact sheet: samples as cards, differences marked, whatever the texts hold."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pivot_megatron.cli import main
from pivot_megatron.data.commands import inspect_shards
from pivot_megatron.data.contact_sheet import Card, plot_of, read_card, write_sheet
from pivot_megatron.data.differences import Piece, clipped, compared
from pivot_megatron.data.histogram import measures
from pivot_megatron.data.inspect import drawn, gather
from pivot_megatron.data.inspect_text import facts_text
from pivot_megatron.data.shard_writer import ShardWriter
from pivot_megatron.data.shards import open_shards
from pivot_megatron.errors import UserError
from tests.unit.test_inspect import image, pair, write, write_raw

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would show, fetch and obey."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.classes: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.classes += [value or "" for name, value in attrs if name == "class"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    @property
    def images(self) -> list[str]:
        return [value for name, value in self.attributes if name == "src"]


def sheet(folder: Path, **options: Any) -> Page:
    path = folder / "sheet.html"
    inspect_shards(folder, sheet=path, **options)
    return Page(path)


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def card(folder: Path, record: dict[str, Any], encoded: bytes | None = None, rejected: bytes | None = None) -> Card:
    with ShardWriter(folder, 1) as writer:
        writer.write("k", encoded, "png", record, rejected_image=rejected)
    return read_card(open_shards(folder), 0)


def test_the_page_holds_samples_facts_and_plots(tmp_path: Path) -> None:
    rows = [
        (image(640, 480, "JPEG"), "jpg", pair("<image>\nWhat animal?", "a black cat sits", "a black dog sits")),
        (None, "jpg", pair("Capital of France?", "Paris", "Lyon")),
    ]
    page = sheet(write(tmp_path / "set", rows))
    assert "k0" in page.text and "JPEG 640x480" in page.text and "text only" in page.text
    assert "<image>\nWhat animal?" in page.text and "23" not in page.classes
    assert "<mark>cat</mark>" in page.source and "<mark>dog</mark>" in page.source
    assert "a black <mark>cat</mark> sits" in page.source
    assert page.classes.count("card") == 2 and page.tags.count("figure") == 6
    assert [decoded(uri).size for uri in page.images] == [(480, 360)]
    assert [value for name, value in page.attributes if name == "title" and "18" in value] == [
        "18\u201319: 1",
        "18\u201319: 0",
        "18\u201319: 0",
    ]


def test_nothing_is_fetched_or_run(tmp_path: Path) -> None:
    page = sheet(write(tmp_path / "set", [(image(9, 9, "PNG"), "png", pair("<image>q"))]))
    assert not set(page.tags) & {"script", "link", "iframe", "object", "base", "form"}
    assert all(uri.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for uri in page.images)
    assert not re.search(r"https?:|//\w|url\(|@import", page.source)
    assert "default-src 'none'" in page.source


HOSTILE = (
    "</p></article><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    '"><svg onload=alert(3)>',
    "' onmouseover='alert(4)",
    "<!-- <style>*{display:none}</style>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &amp;",
)


def test_hostile_texts_and_keys_stay_text(tmp_path: Path) -> None:
    files = {}
    for number, text in enumerate(HOSTILE):
        # A key with a slash is a path, whose last part alone is cut at its first dot.
        key = f'{number}"><script>alert(5)<\\script><img src=x onerror=alert(6)>'
        files[f"{key}.json"] = json.dumps(pair(f"<image>{text}", f"{text} right", f"wrong {text}"))
        files[f"{key}.png"] = image(8, 8, "PNG")
    files["<b>broken.json"] = '{"<u>": '
    files["<b>odd.json"] = json.dumps({"conversations": [{"from": "<script>alert(7)</script>", "value": "v"}, {}]})
    folder = tmp_path / "<i>set"
    folder.mkdir()
    page = sheet(write_raw(folder, files))
    for number, text in enumerate(HOSTILE):
        assert text in page.text and f'{number}"><script>alert(5)<\\script><img src=x' in page.text
    assert not set(page.tags) & {"script", "svg", "b ", "u", "iframe", "object"}
    assert page.tags.count("style") == 1 and page.tags.count("img") == len(HOSTILE)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.images and all(uri.startswith("data:image/") for uri in page.images)
    assert "<i>set" in page.text and "found '<script>alert(7)</script>'" in page.text


def test_keys_that_are_no_text_are_still_written(tmp_path: Path) -> None:
    page = sheet(
        write_raw(
            tmp_path,
            {"a\udcff.json": "{}", "b.json": json.dumps(pair("q \u4f60\u597d \U0001f389 \u05e9\u05dc\u05d5\u05dd"))},
        )
    )
    assert "a\\udcff" in page.text and "q \u4f60\u597d \U0001f389 \u05e9\u05dc\u05d5\u05dd" in page.text


def test_a_folder_whose_name_is_no_text_is_still_shown(tmp_path: Path) -> None:
    reader = open_shards(write(tmp_path / "set", [(None, "jpg", pair("q"))]))
    facts = replace(gather(reader), folder="set\udcff\x1b[2J")
    write_sheet(tmp_path / "sheet.html", facts, reader, [0])
    assert "set\\udcff" in Page(tmp_path / "sheet.html").text
    assert facts_text(facts).startswith("set\\udcff\\x1b[2J: 1 sample")


def test_two_images_stand_side_by_side(tmp_path: Path) -> None:
    found = card(tmp_path, pair("<image>q", "same", "same"), image(30, 20, "PNG"), image(20, 30, "PNG"))
    assert [(picture.caption, picture.head) for picture in found.pictures] == [
        ("chosen", "PNG 30x20"),
        ("rejected", "PNG 20x30"),
    ]
    assert [decoded(picture.uri).size for picture in found.pictures] == [(30, 20), (20, 30)]
    assert [piece.differs for text in found.texts for piece in text.pieces] == [False] * 3


def test_broken_samples_say_why(tmp_path: Path) -> None:
    whole = image(300, 200, "JPEG")
    files: dict[str, str | bytes] = {"bad.json": "{", "same.json": json.dumps(pair("q", "a", "a"))}
    for name, data in (("cut", whole[: len(whole) // 2]), ("none", b"no image")):
        files |= {f"{name}.json": json.dumps(pair("<image>q")), f"{name}.jpg": data}
    page = sheet(write_raw(tmp_path, files))
    assert page.classes.count("card broken") == 3 and page.classes.count("lost") == 1
    # Once in the table of reasons, and once on the sample.
    assert page.text.count("identical_answers") == page.text.count("nothing to prefer") == 2
    assert page.text.count("bad_image") == 3
    assert "JPEG 300x200" in page.text and page.images == []


def test_turns_beyond_the_first_six_are_counted(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 5
    found = card(tmp_path, {"conversations": turns})
    assert [text.name for text in found.texts] == ["user", "assistant"] * 3 and found.left_out == 4


def test_samples_are_spread_or_drawn(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", [(None, "jpg", pair("q")) for _ in range(40)], per_shard=40)

    def keys(**options: Any) -> list[str]:
        return re.findall(r"\bk\d+", sheet(folder, **options).text)

    assert keys(samples=4) == ["k0", "k10", "k20", "k30"]
    assert keys(samples=4, seed=2) == [f"k{position}" for position in drawn(40, 4, 2)]
    assert len(keys()) == 24 and keys(samples=0) == []


def test_an_empty_set_is_a_page(tmp_path: Path) -> None:
    page = sheet(write(tmp_path / "none", []))
    assert "figure" not in page.tags and "article" not in page.tags


def test_bars_are_as_high_as_their_share() -> None:
    plot = plot_of(measures("characters", {"chosen": [3, 3, 3, 3, 5]})[0])
    assert plot.bars == [(100.0, "3: 4"), (0.0, "4: 0"), (25.0, "5: 1")]
    assert plot.ticks[0] == (0.0, "3") and plot.summary == "3 to 5, median 3"


def words(pieces: tuple[Piece, ...]) -> str:
    return "".join(f"[{piece.text}]" if piece.differs else piece.text for piece in pieces)


@pytest.mark.parametrize(
    ("first", "second", "marked", "others"),
    [
        ("a red car.", "a blue car.", "a [red] car.", "a [blue] car."),
        ("a red car", "two blue cars", "[a red car]", "[two blue cars]"),
        ("it is here", "it is", "it is [here]", "it is"),
        ("area 3.14 m", "area 3.15 m", "area [3.14] m", "area [3.15] m"),
        (
            "\u7ea2\u8272\u7684\u8f66",
            "\u84dd\u8272\u7684\u8f66",
            "[\u7ea2]\u8272\u7684\u8f66",
            "[\u84dd]\u8272\u7684\u8f66",
        ),
        ("same  words\n", "same words", "same  words\n", "same words"),
    ],
)
def test_differing_words_are_marked(first: str, second: str, marked: str, others: str) -> None:
    found = compared(first, second, 100)
    assert (words(found[0]), words(found[1])) == (marked, others)


@given(st.text(min_size=1), st.text(min_size=1))
def test_pieces_are_the_text(first: str, second: str) -> None:
    ours, theirs = compared(first, second, 10_000)
    assert "".join(piece.text for piece in ours) == first
    assert "".join(piece.text for piece in theirs) == second
    unmarked = ["".join("".join(p.text for p in pieces if not p.differs).split()) for pieces in (ours, theirs)]
    assert unmarked[0] == unmarked[1]


@given(st.text(), st.text(), st.text(), st.integers(1, 400))
def test_a_cut_text_is_short(shared: str, first: str, second: str, limit: int) -> None:
    for pieces in compared(shared * 50 + first, shared * 50 + second, limit):
        assert sum(len(piece.text) for piece in pieces) <= limit + 2
    assert len(clipped(first, limit)) <= limit + 1


def test_a_late_difference_is_shown() -> None:
    shared = "one two three " * 200
    ours, theirs = compared(shared + "right", shared + "wrong", 300)
    assert words(ours).endswith("three [right]") and words(theirs).endswith("three [wrong]")
    assert words(ours).startswith("one two three") and "\u2026" in words(ours) and len(words(ours)) < 300


def test_a_clipped_character_keeps_its_accents() -> None:
    assert clipped("abc", 3) == "abc" and clipped("abcd", 3) == "abc\u2026"
    assert clipped("abe\u0301x", 3) == "ab\u2026"
    assert clipped("a\U0001f469\u200d\U0001f466x", 3) == "a\u2026"


def test_mistakes_are_one_line_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "set", [(None, "jpg", pair("q"))])
    (tmp_path / "folder.html").mkdir()
    for name, said in (
        ("sheet.pdf", "ends in .html"),
        ("sheet", "ends in .html"),
        ("none/sheet.html", "expected a folder at"),
        ("folder.html", "found a folder"),
    ):
        with pytest.raises(UserError, match=f"--sheet: .*{said}"):
            inspect_shards(tmp_path / "nowhere", sheet=tmp_path / name)
    assert main(["data", "inspect", str(folder), "--sheet", str(tmp_path / "sheet.pdf")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_sheet_is_written_over_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "set", [(None, "jpg", pair("q"))])
    path = tmp_path / "sheet.html"
    path.write_text("old")
    assert main(["data", "inspect", str(folder), "--sheet", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"1 of them on {path}"
    assert "old" not in Page(path).text
    path.unlink()
    assert main(["data", "inspect", str(folder), "--sheet", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 1 and path.is_file()
