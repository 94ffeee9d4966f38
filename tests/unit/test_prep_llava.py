"""LLaVA's rows in the layouts they are published in, and mixtures of them."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from pivot_megatron.convert.tiny_checkpoints import make_tokenizer
from pivot_megatron.data.sample import Conversation
from pivot_megatron.data.tokens import SampleTokenizer, template_by_name
from pivot_megatron.data.views import View
from pivot_megatron.data_prep.commands import select_llava
from pivot_megatron.data_prep.prepare import Output, Writing, prepare
from pivot_megatron.data_prep.sampling import cap, select, weigh
from pivot_megatron.errors import UserError
from tests.prep import llava_row, picture, report, samples, write_images, write_lines


def run(out: Path, *sources: Path, images: Path | None = None, sampling: str = "all", seed: int = 777) -> list[Any]:
    prepare(select_llava(sources, images, sampling, seed), Writing([Output(out)], samples_per_shard=10))
    return samples(out)


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def numbers(found: list[Any]) -> list[int]:
    """Which rows of `llava_row` they are."""
    return [int(sample.turns[1].text.removeprefix("It is ").removesuffix(".")) for sample in found]


def test_json_list(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", {f"00/{i}.jpg": picture(i) for i in range(25)})
    rows = [llava_row(i, f"00/{i}.jpg" if i % 5 else None) for i in range(25)]
    path = tmp_path / "blip_laion.v1.json"
    path.write_text("\ufeff " + json.dumps(rows))
    found = run(tmp_path / "out", path, images=images)
    assert numbers(found) == list(range(25))
    for i, sample in enumerate(found):
        assert isinstance(sample, Conversation)
        assert sample.key == f"blip_laion_v1-{i:08d}"
        assert sample.image == (picture(i) if i % 5 else None)
        assert sample.meta == {"id": f"id.{i}"}
    tokenizer = make_tokenizer(["what is it"], 280)
    for name in ("qwen_1_5", "plain"):
        tokenize = SampleTokenizer(tokenizer, template_by_name(name, tokenizer), View.of_patches(2, 2), 400, 1, "drop")
        assert all(tokenize(sample).branches for sample in found if sample.image is not None)


def test_json_lines_whatever_the_file_is_called(tmp_path: Path) -> None:
    write_images(tmp_path, {"a.png": picture(3, "PNG")})
    rows = [llava_row(0, "a.png"), "", llava_row(1), "{half", "7"]
    for name in ("Cambrian737k.jsonl", "Cambrian737k.json"):
        found = run(tmp_path / f"{name}-out", write_lines(tmp_path / name, rows))
        assert [sample.key for sample in found] == ["Cambrian737k-00000000", "Cambrian737k-00000001"]
        assert [sample.image for sample in found] == [picture(3, "PNG"), None]
        dropped = report(tmp_path / f"{name}-out")["dropped"]
        assert (dropped["bad_json"]["count"], dropped["bad_json"]["first"][0]) == (2, "Cambrian737k-00000002")


def test_parquet_with_images_as_structs_and_as_bytes(tmp_path: Path) -> None:
    structs = [
        llava_row(i, {"bytes": picture(i), "path": None}, data_source="clevr") if i != 2 else llava_row(i)
        for i in range(9)
    ]
    structs[2]["image"] = None
    structs[4]["image"] = {"bytes": None, "path": "below.jpg"}
    write_images(tmp_path / "OneVision" / "clevr(math)", {"below.jpg": picture(99)})
    write_parquet(tmp_path / "OneVision" / "clevr(math)" / "train-00000-of-00002.parquet", structs[:5])
    write_parquet(tmp_path / "OneVision" / "clevr(math)" / "train-00001-of-00002.parquet", structs[5:])
    plain = [llava_row(i, picture(i), data_source="bytes", extra="not read") for i in range(3)]
    write_parquet(tmp_path / "OneVision" / "ai2d" / "train.parquet", plain)
    found = run(tmp_path / "out", tmp_path / "OneVision")
    assert numbers(found) == [0, 1, 2, *range(9)]
    assert [sample.key for sample in found][::4] == ["ai2d-00000000", "clevr_math-00000001", "clevr_math-00000005"]
    assert [sample.image for sample in found[3:]] == [
        None if i == 2 else picture(99 if i == 4 else i) for i in range(9)
    ]
    assert found[0].meta == {"id": "id.0", "data_source": "bytes"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (llava_row(1, ["a.jpg", "b.jpg"]), "multi_image"),
        (llava_row(1, 5), "bad_image_field"),
        (llava_row(1, "../a.jpg"), "image_outside_root"),
        (llava_row(1, "/a.jpg"), "image_outside_root"),
        (llava_row(1, "b.jpg"), "image_not_found"),
        ({**llava_row(1), "conversations": llava_row(1)["conversations"][:1]}, "bad_turns"),
        ({**llava_row(1), "conversations": None}, "bad_turns"),
        ({"id": 1}, "missing_field"),
        ({**llava_row(1, "a.jpg"), "chosen": "x"}, "ambiguous_fields"),
        ({**llava_row(1), "conversations": llava_row(0, "a")["conversations"]}, "missing_image"),
        ({**llava_row(1, "a.jpg"), "conversations": [*llava_row(0)["conversations"], *llava_row(1, "")["conversations"]]},
         "misplaced_image_mark"),
    ],
)  # fmt: skip
def test_every_reason(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", {"a.jpg": picture()})
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([llava_row(0, ["a.jpg"]), row]))
    assert [sample.key for sample in run(tmp_path / "out", path, images=images)] == ["rows-00000000"]
    dropped = report(tmp_path / "out")["dropped"]
    assert {name: (one["count"], one["first"]) for name, one in dropped.items()} == {reason: (1, ["rows-00000001"])}


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", list(range(21))),
        ("first:4", [0, 1, 2, 3]),
        ("first:99", list(range(21))),
        ("first:10%", [0, 1, 2]),
        ("end:4", [17, 18, 19, 20]),
        ("end:10%", [18, 19, 20]),
        ("end:0.5%", [20]),
        ("random:7", 7),
        ("random:10%", 3),
    ],
)
def test_strategies(kind: str, strategy: str, expected: Any, tmp_path: Path) -> None:
    rows = [llava_row(i) for i in range(21)]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        write_parquet(path, rows)
    else:
        path.write_text(json.dumps(rows)) if kind == "json" else write_lines(path, rows)
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(f"datasets:\n  - json_path: rows.{kind}\n    sampling_strategy: {strategy}\n")
    found = numbers(run(tmp_path / "a", mixture))
    if isinstance(expected, list):
        assert found == expected
        return
    assert len(found) == expected and found == sorted(set(found))
    assert found == numbers(run(tmp_path / "b", mixture)) != numbers(run(tmp_path / "c", mixture, seed=1))
    assert numbers(run(tmp_path / "d", path, sampling=strategy)) == found


def test_mixture_of_sources_with_weights_caps_and_images(tmp_path: Path) -> None:
    write_images(tmp_path / "one", {"x.jpg": picture(1)})
    write_images(tmp_path / "two", {"x.jpg": picture(2)})
    for name, base in (("one/rows.json", 0), ("two/rows.json", 100), ("three.jsonl", 200)):
        rows = [llava_row(base + i, "x.jpg" if base < 200 else None) for i in range(10)]
        (tmp_path / name).write_text(json.dumps(rows)) if name.endswith("json") else write_lines(tmp_path / name, rows)
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(
        "datasets:\n"
        "  - {json_path: one/rows.json, weight: 2}\n"
        "  - {json_path: two/rows.json, sampling_strategy: 'first:80%', weight: 1.5, cap: 11, images: one}\n"
        "  - {json_path: three.jsonl, weight: 0.3}\n"
    )
    found = run(tmp_path / "out", mixture)
    counts = Counter(number // 100 for number in numbers(found))
    assert counts == {0: 20, 1: 11, 2: 3}
    assert Counter(number for number in numbers(found) if number < 100) == dict.fromkeys(range(10), 2)
    second = Counter(number for number in numbers(found) if 100 <= number < 200)
    assert max(second) < 108 and set(second.values()) <= {1, 2}
    assert {sample.image for sample in found if sample.key.startswith("rows-")} == {picture(1)}
    assert len({sample.key for sample in found}) == 34
    assert "rows-00000003-r1" in {sample.key for sample in found}
    assert any(sample.key.startswith("rows-2-") for sample in found)


def test_weights_and_caps_are_exact_and_change_with_the_seed() -> None:
    everything = select(1000, "all", random.Random(0), "here")
    for weight in (0, 0.25, 1, 2.75):
        times = weigh(everything, weight, random.Random(1))
        assert times.sum() == 1000 * weight
        assert set(times.tolist()) <= {math.floor(weight), math.ceil(weight)}
    halves = [weigh(everything, 0.5, random.Random(seed)).tolist() for seed in (1, 1, 2)]
    assert halves[0] == halves[1] != halves[2]
    capped = cap(everything * 2, 100, random.Random(1))
    assert capped.sum() == 100 and capped.max() <= 2
    assert (cap(everything, 1000, random.Random(1)) == everything).all()


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    def refused(match: str, *sources: Path, sampling: str = "all", images: Path | None = None) -> None:
        with pytest.raises(UserError, match=match) as caught:
            select_llava(sources, images, sampling, 777)
        assert "\n" not in str(caught.value)

    rows = write_lines(tmp_path / "rows.jsonl", [llava_row(0)])
    refused(r"expected a json, jsonl or parquet file at .*none\.json", tmp_path / "none.json")
    refused("--images: expected a folder, found a file", rows, images=rows)
    for strategy in ("some", "first", "first:0", "first:-1", "random:101%", "end:1.5", "random:x%", "last:3"):
        refused(f"--sampling: expected all, or .* found '{strategy}'", rows, sampling=strategy)
    (tmp_path / "empty").mkdir()
    refused("expected parquet files in", tmp_path / "empty")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    refused(r"expected parquet in .*bad\.parquet", tmp_path / "bad.parquet")
    refused("expected columns id, image, conversations", write_parquet(tmp_path / "other.parquet", [{"text": "x"}]))
    (tmp_path / "half.json").write_text('[{"id": 1},')
    refused(r"expected JSON in .*half\.json", tmp_path / "half.json")
    (tmp_path / "empty.json").write_text(" \n")
    refused(r"found an empty file", tmp_path / "empty.json")
    (tmp_path / "none.json").write_text("[]")
    refused("expected rows in", tmp_path / "none.json")
    mixture = tmp_path / "mix.yaml"
    refused("expected a mixture at", mixture)
    for text, match in (
        ("datasets: [", "expected YAML in"),
        ("[]", "expected 'datasets'"),
        ("datasets: []", "expected 'datasets'"),
        ("datasets: [{path: rows.jsonl}]", r"mix\.yaml: datasets\[0\]: expected json_path"),
        ("datasets: [{json_path: rows.jsonl, wieght: 2}]", r"datasets\[0\]: expected keys of .* found wieght"),
        ("datasets: [{json_path: rows.jsonl, weight: -1}]", r"datasets\[0\]\.weight: expected a number of at least 0"),
        ("datasets: [{json_path: rows.jsonl, weight: .nan}]", r"datasets\[0\]\.weight: expected a number"),
        ("datasets: [{json_path: rows.jsonl, cap: 1.5}]", r"datasets\[0\]\.cap: expected a whole number"),
        (
            "datasets: [{json_path: rows.jsonl, images: none}]",
            r"datasets\[0\]\.images: expected a folder, found nothing",
        ),
        (
            "datasets: [{json_path: rows.jsonl, sampling_strategy: half}]",
            r"datasets\[0\]\.sampling_strategy: expected all",
        ),
        ("datasets: [{json_path: gone.jsonl}]", r"gone\.jsonl, found none"),
    ):
        mixture.write_text(text)
        refused(match, mixture)
