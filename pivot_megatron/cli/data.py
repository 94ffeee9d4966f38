"""`pivot data`: shards made, indexed and looked at."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from pivot_megatron.cli.verbs import Groups, Verb
from pivot_megatron.errors import UserError


def add(verb: Verb, verbs: Groups) -> None:
    group = verbs.add_parser("data", help="make, index and look at shards").add_subparsers(
        required=True, metavar="WHAT"
    )
    p = verb("synthetic", _synthetic, "rendered visual questions: text, charts and scenes", group)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--count", type=int, required=True)
    p.add_argument("--kind", choices=("pairs", "caption", "instruct"), default="pairs")
    p.add_argument("--seed", type=int, default=777)
    p.add_argument("--image-size", type=int, default=64)
    p = verb("mmpr", _mmpr, "MMPR's preference pairs, selected as PIVOT does", group)
    p.add_argument("source", type=Path, help="MMPR's folder or its meta.json; or one annotation jsonl, with --images")
    p.add_argument("--images", type=Path, help="the folder that one annotation's image paths start from")
    p.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face folder to count tokens with")
    p.add_argument(
        "--count", type=int, default=20000, help="pairs to keep, a prefix of any larger count's (default: 20000)"
    )
    p.add_argument("--seed", type=int, default=777, help="of the shuffle (default: 777)")
    p.add_argument("--max-tokens", type=int, default=1500, help="of a question with either answer (default: 1500)")
    p.add_argument("--sft", type=Path, metavar="DIR", help="also write the chosen answers of the same rows, for SFT")
    _add_writing(p)
    for name, text in (
        ("llava", "LLaVA-558K, LLaVA-NeXT and their kin: a JSON list and a folder of images"),
        ("onevision", "LLaVA-OneVision: parquet with images inside, or a YAML mixture of files"),
        ("cambrian", "Cambrian-737K: JSON lines and a folder of images"),
    ):
        p = verb(name, _llava, f"{text}; each of the three commands takes what the others take", group)
        p.add_argument(
            "sources", type=Path, nargs="+", metavar="SOURCE", help="json, jsonl, parquet, folder of it, or YAML"
        )
        p.add_argument("--images", type=Path, help="the folder that image paths start from (default: the file's own)")
        p.add_argument("--sampling", default="all", help="all, or first|end|random:N or :x%% of each source's rows")
        p.add_argument("--seed", type=int, default=777, help="of what is taken at random (default: 777)")
        p.set_defaults(count=None)
        _add_writing(p)
    p = verb("index", _index, "look at every sample of a folder of tars, and write its index", group)
    p.add_argument("shards", type=Path)
    p.add_argument("--check", action="store_true", help="write nothing; compare with the index that is there")
    p.add_argument("--workers", type=int, help="processes, a tar each, 0 for none besides this (default: one a core)")
    p.add_argument("--json", action="store_true")
    p = verb("inspect", _inspect, "what a folder of shards holds: counts, histograms of lengths, samples", group)
    p.add_argument("shards", help="a folder, here or behind a URL")
    p.add_argument("--samples", type=int, help="samples to show (default: the first 3; on a sheet 24, spread evenly)")
    p.add_argument("--seed", type=int, help="draw those samples at random")
    p.add_argument("--sheet", type=Path, metavar="FILE.html", help="show them on a page, with their images and plots")
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="Hugging Face folder; lengths in its tokens too")
    p.add_argument("--json", action="store_true", help="print the facts for a script, and no samples")


def _add_writing(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--out", type=Path, required=True, help="folder of shards; the same command goes on with half of one"
    )
    p.add_argument("--samples-per-shard", type=int, default=1000, help="at most; shards are balanced (default: 1000)")
    p.add_argument("--reencode", type=int, metavar="QUALITY", help="every image as JPEG of this quality, 1 to 95")
    p.add_argument("--longest-side", type=int, metavar="PIXELS", help="with --reencode, scale larger images down to it")
    p.add_argument("--workers", type=int, help="processes for images, 0 for none besides this (default: one a core)")


def _synthetic(args: argparse.Namespace) -> int:
    from pivot_megatron.data_prep.synthetic import write_conversations, write_pairs

    if args.kind == "pairs":
        write_pairs(args.out, args.count, args.seed, args.image_size)
    else:
        write_conversations(args.out, args.count, args.seed, args.image_size, kind=args.kind)
    print(args.out)
    return 0


def _mmpr(args: argparse.Namespace) -> int:
    from pivot_megatron.data_prep.commands import select_mmpr
    from pivot_megatron.data_prep.mmpr import as_conversation
    from pivot_megatron.data_prep.prepare import Output

    selection = select_mmpr(args.source, args.images, args.tokenizer, args.max_tokens, args.seed)
    return _prepare(args, selection, *([] if args.sft is None else [Output(args.sft, as_conversation)]))


def _llava(args: argparse.Namespace) -> int:
    from pivot_megatron.data_prep.commands import select_llava

    return _prepare(args, select_llava(args.sources, args.images, args.sampling, args.seed))


def _prepare(args: argparse.Namespace, selection: Any, *more: Any) -> int:
    from pivot_megatron.data_prep.commands import reencoding
    from pivot_megatron.data_prep.prepare import Output, Writing, prepare

    outputs = (Output(args.out), *more)
    how = reencoding(args.reencode, args.longest_side)
    for line in prepare(selection, Writing(outputs, args.count, args.samples_per_shard, how, _workers(args.workers))):
        print(line)
    return 0


def _workers(asked: int | None) -> int:
    """Processes: one a core, unless it was said how many."""
    if asked is not None and asked < 0:
        raise UserError(f"--workers: expected 0 or more, found {asked}")
    return (os.cpu_count() or 1) if asked is None else asked


def _index(args: argparse.Namespace) -> int:
    from pivot_megatron.data_prep.indexing import index_folder

    found = index_folder(args.shards, _workers(args.workers), args.check)
    print(json.dumps(found.as_record()) if args.json else "\n".join(found.as_lines()))
    return 0 if found.sound else 1


def _inspect(args: argparse.Namespace) -> int:
    from pivot_megatron.data.commands import inspect_shards

    print(inspect_shards(args.shards, args.samples, args.seed, args.sheet, args.tokenizer, args.json))
    return 0
