"""A folder in which the documented commands find what they name: small models, and small sets in their published layouts."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pivot_megatron.convert.commands import export_checkpoint, import_checkpoint
from pivot_megatron.convert.tiny_checkpoints import make_encoder, make_head, make_tokenizer
from pivot_megatron.data_prep.synthetic import (
    SCENE_CLASSES,
    make_question,
    scene_classes,
    write_conversations,
    write_pairs,
)
from tests import masked
from tests.docs.commands import ROOT
from tests.parity.encoders import MAKERS
from tests.prep import encoded, write_images, write_lines
from tests.unit.test_image_set import tar
from tests.unit.test_vqa import tree_of, written

SIZE = 48
HEADS = {"0.5B": 32, "1.5B": 32, "3B": 48, "7B": 64}
"""Hidden size of each. That of the 1.5B head is not that of the 7B, as with the real ones."""
QUESTIONS = [make_question(1, index, SIZE) for index in range(48)]
PHOTOS = [encoded(question.image, "JPEG") for question in QUESTIONS]


def make_world(folder: Path) -> Path:
    for name in ("configs", "launch", "tools", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    _models(folder / "checkpoints")
    _published(folder)
    _images(folder)
    write_pairs(folder / "shards" / "pairs", 32, seed=3, image_size=SIZE, progress=False)
    write_conversations(folder / "shards" / "captions", 12, seed=4, image_size=SIZE, kind="caption", progress=False)
    write_pairs(folder / "runs" / "demo" / "data" / "held_out", 6, seed=5, image_size=SIZE, progress=False)
    _checkpoints(folder)
    return folder


def _models(folder: Path) -> None:
    encoder = folder / "siglip2-so400m-patch16-384"
    make_encoder(encoder, image_size=SIZE, patch_size=12, hidden_size=32, layers=3, heads=4, ffn=48, seed=1)
    MAKERS["clip"](folder.parent / "clip-vit-large-patch14-336")
    tokenizer = make_tokenizer((f"{q.question} {q.chosen} system user assistant" for q in QUESTIONS), 400)
    for name, hidden in HEADS.items():
        head = folder / f"Qwen2.5-{name}-Instruct"
        make_head(head, tokenizer, hidden_size=hidden, layers=2, heads=4, kv_heads=2, ffn=64, tied=name != "7B", seed=2)
    (folder.parent / "Qwen2.5-0.5B-Instruct").symlink_to(folder / "Qwen2.5-0.5B-Instruct")


def _published(folder: Path) -> None:
    """LLaVA's JSON, LLaVA-OneVision's parquet, Cambrian's lines, MMPR's subsets; and a table of one's own."""
    names = [f"{n:03d}.jpg" for n in range(len(QUESTIONS))]
    write_images(folder / "images", dict(zip(names, PHOTOS)))
    write_images(folder / "MMPR-v1.2" / "images", dict(zip(names, PHOTOS)))
    write_images(folder / "photos", dict(zip(names, PHOTOS)))
    rows = [_conversation(n) for n in range(len(QUESTIONS))]
    named = [{**row, "image": name} for row, name in zip(rows, names)]
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(named))
    write_lines(folder / "Cambrian737k.jsonl", named)
    inside = [{**row, "image": {"bytes": photo, "path": None}} for row, photo in zip(rows, PHOTOS)]
    table = folder / "LLaVA-OneVision-Data" / "some" / "train-0.parquet"
    table.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(inside), table)
    pairs = [
        {"image": name, "question": f"<image>\n{q.question}", "chosen": q.chosen, "rejected": q.rejected}
        for name, q in zip(names, QUESTIONS)
    ]
    write_lines(folder / "MMPR-v1.2" / "annotations" / "some.jsonl", pairs)
    subset = {
        "root": "images",
        "annotation": "annotations/some.jsonl",
        "data_augment": False,
        "repeat_time": 1,
        "length": len(pairs),
    }
    (folder / "MMPR-v1.2" / "meta.json").write_text(json.dumps({"some": subset}))


def _conversation(number: int) -> dict[str, Any]:
    question = QUESTIONS[number]
    asked = {"from": "human", "value": f"<image>\n{question.question}"}
    return {"id": f"{number}", "conversations": [asked, {"from": "gpt", "value": question.chosen}]}


def _images(folder: Path) -> None:
    """Of classes, with masks, of preferences; and results of lmms-eval."""
    for split, seed, count in (("train", 1, 8), ("val", 2, 3)):
        images, labels = scene_classes(seed, count * len(SCENE_CLASSES), SIZE)
        for number, (image, label) in enumerate(zip(images, labels)):
            write_images(folder / "imagenet" / split / SCENE_CLASSES[label], {f"{number}.jpg": image})
        masked.write_folder(
            folder / "ADEChallengeData2016", {"train": "training", "val": "validation"}[split], masked.pairs(8, seed)
        )
    # Which `--runs` holds against the schedule's probe: of two classes, more than the 50 a class that a draw takes.
    (folder / "imagenet-1k-wds").mkdir(exist_ok=True)
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "JPEG")
    for split, count in (("train", 60), ("validation", 2)):
        members = {
            f"{split}-{label}-{n}.{kind}": small.getvalue() if kind == "jpg" else str(label).encode()
            for label in range(2)
            for n in range(count)
            for kind in ("jpg", "cls")
        }
        tar(folder / "imagenet-1k-wds" / f"imagenet1k-{split}-0.tar", members)
    question = QUESTIONS[0]
    row = {
        "image": "images/000.jpg",
        "question": question.question,
        "chosen": question.chosen,
        "rejected": question.rejected,
    }
    write_lines(folder / "samples.jsonl", [row])
    for name in ("base", "sft", "pivot"):
        written(folder / "results" / f"exports__{name}" / "0_results.json", tree_of(f"exports/{name}"))


def _checkpoints(folder: Path) -> None:
    """One imported model in the place of every run that a page takes for granted, and the same as an assembled folder."""
    encoder = folder / "checkpoints" / "siglip2-so400m-patch16-384"
    first = folder / "runs" / "2_sft"
    import_checkpoint(encoder, folder / "checkpoints" / "Qwen2.5-1.5B-Instruct", first, feature_layer=None, seed=1)
    for name in ("3b_reassemble_tune", "demo/runs/pretrain"):
        shutil.copytree(first, folder / "runs" / name)
    export_checkpoint(first, "mllm", folder / "LLAVA", "drop", None)


def put(text: str, places: Mapping[str, str]) -> str:
    """`text` with each word of `places` in the place of what stands for it, in order."""
    for old, new in places.items():
        assert old in text, f"{text!r} has no {old!r} any more"
        text = text.replace(old, new, 1)
    return text
