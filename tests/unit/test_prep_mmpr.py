"""PIVOT's selection of MMPR against a naive one, and every reason for which a pair is not in it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pivot_megatron.convert.tiny_checkpoints import make_tokenizer
from pivot_megatron.data.build import load_tokenizer
from pivot_megatron.data.sample import Conversation, Pair
from pivot_megatron.data.tokens import SampleTokenizer, template_by_name
from pivot_megatron.data.views import View
from pivot_megatron.data_prep.commands import select_mmpr
from pivot_megatron.data_prep.mmpr import as_conversation
from pivot_megatron.data_prep.prepare import Output, Writing, prepare
from pivot_megatron.errors import UserError
from tests.prep import picture, report, samples, write_images, write_lines

MOST = 60


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(["What is the color of this thing? It is red, blue or green."], 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mmpr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three subsets, in an order that is not the alphabet's, with a row of every kind in each."""
    folder = tmp_path_factory.mktemp("MMPR")
    meta = {}
    rng = random.Random(5)
    for name in ("m3cot_mpo.v2", "ai2d", "text_only"):
        rows = []
        for i in range(60):
            image: Any = f"sub/{i % 7}.jpg"
            mark = "<image>\n"
            if name == "text_only":
                image, mark = None, ""
            row = {"question": f"{mark}What is {i}?", "chosen": f"It is {i}.", "rejected": f"It is {i + 1}."}
            kind = rng.randrange(14)
            if kind == 0:
                image = ["sub/1.jpg", "sub/2.jpg"]
            elif kind == 1 and image:
                image = [image]
            elif kind == 2:
                row["chosen"] += " <image>"
            elif kind == 3:
                row["rejected"] = "<image> " + row["rejected"]
            elif kind == 4:
                row["chosen"] = "It is red. " * 40
            elif kind == 5:
                row["rejected"] = "It is green. " * 40
            elif kind in (6, 7):
                row["chosen" if kind == 6 else "rejected"] = "7" * rng.randrange(25, 55)
            elif kind == 8:
                row["question"] = mark + "8" * rng.randrange(25, 55)
            rows.append(row if image is None else {"image": image, **row})
        write_lines(folder / "annotations" / f"{name}.jsonl", rows)
        write_images(folder / "images" / name, {f"sub/{i}.jpg": picture(i) for i in range(7)})
        meta[name] = {
            "root": f"images/{name}",
            "annotation": f"annotations/{name}.jsonl",
            "data_augment": False,
            "repeat_time": 1,
            "length": len(rows),
        }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def run(
    mmpr: Path,
    tokenizer: Path,
    out: Path,
    count: int | None,
    sft: Path | None = None,
    images: Path | None = None,
    **options: Any,
) -> list[str]:
    selection = select_mmpr(mmpr, images, tokenizer, MOST, 777)
    outputs = [Output(out), *([] if sft is None else [Output(sft, as_conversation)])]
    return list(prepare(selection, Writing(outputs, count, **{"samples_per_shard": 10, **options})))


def naive(mmpr: Path, tokenizer: Path, count: int) -> list[tuple[str, str, str, bytes | None]]:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tokenizer)
    rows = []
    for entry in json.loads((mmpr / "meta.json").read_text()).values():
        for line in (mmpr / entry["annotation"]).read_text().splitlines():
            row = json.loads(line)
            image = row.get("image")
            if isinstance(image, list) and len(image) > 1:
                continue
            image = image[0] if isinstance(image, list) else image
            rows.append((row, mmpr / entry["root"] / image if image else None))
    random.Random(777).shuffle(rows)
    kept, longest = [], 0
    for row, image in rows:
        if "<image>" in row["chosen"] or "<image>" in row["rejected"]:
            continue
        lengths = [len(tokens(row["question"] + row[name]).input_ids) for name in ("chosen", "rejected")]
        if max(lengths) > MOST:
            continue
        longest = max(longest, *lengths)
        kept.append((row["question"], row["chosen"], row["rejected"], image.read_bytes() if image else None))
    assert longest == MOST, "no row stands at the limit, where a mistake would show"
    return kept[:count]


def pairs(folder: Path) -> list[tuple[str, str, str, bytes | None]]:
    found = samples(folder)
    assert all(isinstance(sample, Pair) for sample in found)
    return [(sample.question, sample.chosen, sample.rejected, sample.image) for sample in found]


def test_the_selection_is_the_naive_one_and_smaller_ones_are_its_prefixes(
    mmpr: Path, tokenizer: Path, tmp_path: Path
) -> None:
    for count in (7, 50, 10**6):
        run(mmpr, tokenizer, tmp_path / str(count), count)
        expected = naive(mmpr, tokenizer, count)
        assert pairs(tmp_path / str(count)) == expected
        assert len(expected) == min(count, report(tmp_path / str(count))["kept"])
    assert pairs(tmp_path / "1000000")[:50] == pairs(tmp_path / "50")
    everything = report(tmp_path / "1000000")
    assert everything["read"] == everything["rows"] == 180
    assert everything["kept"] + sum(dropped["count"] for dropped in everything["dropped"].values()) == 180
    assert set(everything["dropped"]) == {"multi_image", "misplaced_image_mark", "chosen_too_long", "rejected_too_long"}
    assert report(tmp_path / "50")["read"] < 180


def test_keys_name_subset_and_line(mmpr: Path, tokenizer: Path, tmp_path: Path) -> None:
    run(mmpr, tokenizer, tmp_path, None)
    lines = (mmpr / "annotations" / "m3cot_mpo.v2.jsonl").read_text().splitlines()
    found = [sample for sample in samples(tmp_path) if sample.meta["subset"] == "m3cot_mpo.v2"]
    assert len(found) > 30
    for sample in found:
        name, _, line = sample.key.rpartition("-")
        assert name == "m3cot_mpo_v2"
        assert json.loads(lines[int(line)])["question"] == sample.question


def test_lines_for_a_person_say_whose_check_the_rejected_answer_is(mmpr: Path, tokenizer: Path, tmp_path: Path) -> None:
    lines = run(mmpr, tokenizer, tmp_path, None)
    assert lines[0].startswith("read 180 of 180 rows, kept ")
    assert any("rejected_too_long (a check of our own" in line for line in lines)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_sft_twin_holds_the_same_rows(mmpr: Path, tokenizer: Path, tmp_path: Path, workers: int) -> None:
    run(mmpr, tokenizer, tmp_path / "pairs", 33, tmp_path / "sft", workers=workers)
    both = list(zip(samples(tmp_path / "pairs"), samples(tmp_path / "sft"), strict=True))
    assert len(both) == 33
    for pair, twin in both:
        assert isinstance(twin, Conversation)
        assert (twin.key, twin.image, twin.meta) == (pair.key, pair.image, pair.meta)
        assert [turn.text for turn in twin.turns] == [pair.question, pair.chosen]
    shards = [json.loads((tmp_path / name / "index.json").read_text())["shards"] for name in ("pairs", "sft")]
    assert [[shard["samples"] for shard in one] for one in shards] == [[9, 8, 8, 8]] * 2
    assert report(tmp_path / "pairs") == report(tmp_path / "sft")
    words = load_tokenizer(tokenizer)
    for branches in (1, 2):
        tokenize = SampleTokenizer(
            words, template_by_name("qwen_1_5", words), View.of_patches(2, 2), 300, branches, "drop"
        )
        for found in both:
            assert len(tokenize(found[branches == 1]).branches) == branches


def test_repeats(mmpr: Path, tokenizer: Path, tmp_path: Path) -> None:
    meta = json.loads((mmpr / "meta.json").read_text())
    rows = [{"question": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(5)]
    write_lines(mmpr / "five.jsonl", rows)
    line = {**meta["ai2d"], "annotation": "five.jsonl"}
    path = mmpr / "repeated.json"
    for repeat, times in ((0, []), (0.5, [2, 0]), (1, [5, 0]), (1.5, [5, 2]), (2, [5, 5])):
        path.write_text(json.dumps({"five": {**line, "repeat_time": repeat}}))
        out = tmp_path / str(repeat)
        if not times:
            with pytest.raises(UserError, match="rows to keep"):
                run(path, tokenizer, out, None)
            continue
        run(path, tokenizer, out, None)
        found = sorted(sample.key for sample in samples(out))
        first = [f"five-{i:08d}" for i in range(times[0])]
        assert found == sorted([*first, *(f"five-{i:08d}-r1" for i in range(times[1]))])
    path.write_text(json.dumps({"five": {**line, "repeat_time": "twice"}}))
    with pytest.raises(UserError, match=r"five\.repeat_time: expected a number .* found 'twice'"):
        run(path, tokenizer, tmp_path / "bad", None)


ONE = {"question": "<image>\nWhat?", "chosen": "red", "rejected": "blue", "image": "a.jpg"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**ONE, "image": ["a.jpg", "b.jpg"]}, "multi_image"),
        ({**ONE, "image": 3}, "bad_image_field"),
        ({**ONE, "image": "../images/a.jpg"}, "image_outside_root"),
        ({**ONE, "image": "x/../../images/a.jpg"}, "image_outside_root"),
        ({**ONE, "image": "/etc/passwd"}, "image_outside_root"),
        ({**ONE, "image": "gone.jpg"}, "image_not_found"),
        ({**ONE, "image": "zero.jpg"}, "image_empty"),
        ({**ONE, "image": "cut.jpg"}, "image_broken"),
        ({**ONE, "image": "."}, "image_unreadable"),
        ({**ONE, "image": None}, "missing_image"),
        ({**ONE, "chosen": "red <image>"}, "misplaced_image_mark"),
        ({**ONE, "chosen": "red " * 300}, "chosen_too_long"),
        ({**ONE, "rejected": "red " * 300}, "rejected_too_long"),
        ({**ONE, "chosen": " "}, "empty_answer"),
        ({**ONE, "rejected": "red "}, "identical_answers"),
        ({**ONE, "question": "<image>\n"}, "empty_question"),
        ({**ONE, "question": "<image><image>\nWhat?"}, "misplaced_image_mark"),
        ({**ONE, "rejected": None}, "missing_field"),
        ({k: v for k, v in ONE.items() if k != "chosen"}, "missing_field"),
        ({**ONE, "question": "\ud800?"}, "bad_json"),
        ("{not json", "bad_json"),
        ("[1, 2]", "bad_json"),
    ],
)
def test_every_reason(row: Any, reason: str, tokenizer: Path, tmp_path: Path) -> None:
    images = {"a.jpg": picture(), "zero.jpg": b"", "cut.jpg": picture(size=(64, 64))[:600]}
    write_images(tmp_path / "images", images)
    annotation = write_lines(tmp_path / "one.jsonl", [ONE, "", row])
    run(annotation, tokenizer, tmp_path / "out", None, images=tmp_path / "images")
    found = report(tmp_path / "out")
    assert {name: (dropped["count"], dropped["first"]) for name, dropped in found["dropped"].items()} == {
        reason: (1, ["one-00000001"])
    }
    assert [sample.key for sample in samples(tmp_path / "out")] == ["one-00000000"]


def test_mistakes_are_one_line(mmpr: Path, tokenizer: Path, tmp_path: Path) -> None:
    def refused(source: Path, match: str, images: Path | None = None, tokens: Path = tokenizer) -> None:
        with pytest.raises(UserError, match=match) as caught:
            select_mmpr(source, images, tokens, MOST, 777)
        assert "\n" not in str(caught.value)

    refused(tmp_path, r"expected MMPR's meta\.json or an annotation's jsonl at .*meta\.json, found none")
    refused(mmpr / "annotations" / "ai2d.jsonl", "expected --images")
    refused(mmpr / "annotations" / "ai2d.jsonl", "--images: expected a folder, found nothing", tmp_path / "none")
    refused(mmpr, "leave it out", tmp_path)
    refused(mmpr, "expected a tokenizer", tokens=tmp_path)
    meta = tmp_path / "meta.json"
    for text, match in (
        ("{", "expected JSON in"),
        ("[]", "expected subsets by name"),
        ('{"a": {"root": "x"}}', "meta.json: a: expected the paths root and annotation"),
        ('{"a": {"root": "x", "annotation": "gone.jsonl"}}', r"a\.annotation: expected a jsonl at .*gone\.jsonl"),
    ):
        meta.write_text(text)
        refused(meta, match)
