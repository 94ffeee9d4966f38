"""The one entry point: `pivot VERB`. Parses, calls, prints. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pivot_megatron import __version__
from pivot_megatron.errors import RunError, UserError
from pivot_megatron.quiet import quiet


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed while running, 2 the input or config is wrong."""
    args = _parse(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # folders only: a name that is no folder must not become a download
    if not args.debug:
        quiet()
    try:
        return int(args.run(args) or 0)
    except (UserError, RunError) as error:
        if args.debug:
            raise
        for line in str(error).splitlines():
            print(f"pivot: {line}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except RuntimeError as error:
        if args.debug or not _peer_was_lost(error):
            raise
        print("pivot: another process of this run ended; its own message says why", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full or read-only disk, a file where a folder should be
        if args.debug:
            raise
        print(f"pivot: {error.filename or 'files'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pivot: interrupted; the same command goes on from what is saved", file=sys.stderr)
        return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand on either side of options, which argparse alone does not allow."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(args, "overrides") and all("=" in text and not text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(prog="pivot", description="Evolve vision encoders by preference training.")
    parser.add_argument("--version", action="version", version=f"pivot-megatron {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Any, text: str, group: Any = verbs) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = group.add_parser(name, help=text, description=text, parents=[common])
        made.set_defaults(run=run)
        return made

    p = verb("demo", _demo, "the whole recipe, small, on this machine; ends with a report")
    p.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to work in (default: runs/demo)")
    p.add_argument("--processes", type=int, default=2, help="processes to train with (default: 2)")

    p = verb("check", _check, "validate configs: every error at once")
    p.add_argument("configs", type=Path, nargs="+", metavar="CONFIG")

    p = verb("train", _train, "one run; resumes by itself if its folder holds a checkpoint")
    p.add_argument("config", type=Path, metavar="RUN.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--processes", type=int, help="processes on this machine (default: one a GPU, or the layout's own)")

    p = verb("reference", _reference, "the reference log-probs of a run, once, beside its shards")
    p.add_argument("config", type=Path, metavar="RUN.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--processes", type=int, help="processes on this machine (default: one a GPU, or the layout's own)")

    _add_convert(verb, verbs)
    _add_data(verb, verbs)
    _add_bench(verb, verbs)

    p = verb("doctor", _doctor, "what this machine has, what is missing, and what that costs")
    p.add_argument("--json", action="store_true")
    return parser


def _add_convert(verb: Any, verbs: Any) -> None:
    group = verbs.add_parser("convert", help="Hugging Face folders to checkpoints and back").add_subparsers(
        required=True, metavar="WHAT"
    )
    p = verb("import", _import, "Hugging Face folders into a checkpoint", group)
    p.add_argument(
        "--encoder", type=Path, help="folder of a SigLIP, SigLIP2, CLIP, DINOv2, ViT, MAE or (timm) MoCo-v3 encoder"
    )
    p.add_argument("--llm", type=Path, help="Qwen2 / Qwen2.5 / Qwen3 folder")
    p.add_argument("--mllm", type=Path, help="an assembled LLaVA or LLaVA-OneVision folder, in place of the two")
    p.add_argument("--out", type=Path, required=True, help="the checkpoint's folder, which must not exist yet")
    p.add_argument("--feature-layer", type=int, help="hidden_states index, from the end (default: the family's own)")
    p.add_argument(
        "--image-size", type=int, help="pixels a side, where not the encoder's own; positions are interpolated"
    )
    p.add_argument("--seed", type=int, default=777, help="of the fresh projector (default: 777)")
    p = verb("export", _export, "a checkpoint's part as a Hugging Face folder", group)
    p.add_argument("checkpoint", type=Path, metavar="CKPT", help="a run's folder (its newest) or one checkpoint")
    p.add_argument("--part", choices=("encoder", "mllm"), required=True, help="the encoder, or all of it as LLaVA")
    p.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    p.add_argument(
        "--last-layer",
        choices=("drop", "original"),
        default="drop",
        help="leave out what stands past the feature layer, or put it back from --original (default: drop)",
    )
    p.add_argument("--original", type=Path, help="the encoder folder that the run started from")
    p = verb("verify", _verify, "a checkpoint against Hugging Face folders: every tensor, and a forward pass", group)
    p.add_argument("checkpoint", type=Path, metavar="CKPT")
    p.add_argument("--encoder", type=Path, help="the encoder's folder; left out, it is not compared")
    p.add_argument("--llm", type=Path, help="the same of the language model")
    p.add_argument("--mllm", type=Path, help="an assembled LLaVA, projector and all")
    p.add_argument("--tolerance", type=float, help="of activations, relative to the largest (default: 1e-4)")


def _add_data(verb: Any, verbs: Any) -> None:
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
    p = verb("index", _index, "write index.json for a folder of tars", group)
    p.add_argument("shards", type=Path)
    p = verb("inspect", _inspect, "what a folder of shards holds", group)
    p.add_argument("shards", type=Path)
    p.add_argument("--samples", type=int, default=3, help="samples to show (default: 3)")


def _add_writing(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--out", type=Path, required=True, help="folder of shards; the same command goes on with half of one"
    )
    p.add_argument("--samples-per-shard", type=int, default=1000, help="at most; shards are balanced (default: 1000)")
    p.add_argument("--reencode", type=int, metavar="QUALITY", help="every image as JPEG of this quality, 1 to 95")
    p.add_argument("--longest-side", type=int, metavar="PIXELS", help="with --reencode, scale larger images down to it")
    p.add_argument("--workers", type=int, help="processes for images, 0 for none besides this (default: one a core)")


def _add_bench(verb: Any, verbs: Any) -> None:
    group = verbs.add_parser("bench", help="measure this machine").add_subparsers(required=True, metavar="WHAT")
    p = verb("peers", _bench_peers, "this trainer and TRL's DPOTrainer on the same model and pairs", group)
    p.add_argument("--shape", required=True, help="vocabulary, body or tiny")
    p.add_argument("--rounds", type=int, default=3, help="times that both are run (default: 3)")
    p.add_argument("--steps", type=int, default=4, help="steps of a run, the first of them not timed (default: 4)")
    p.add_argument("--epochs", type=int, default=1, help="epochs that share our one reference pass (default: 1)")
    p.add_argument("--peer-batch", type=int, help="pairs in one of the peer's forward passes (default: a step's)")
    p.add_argument("--out", type=Path, default=Path("runs/bench-peers"), help="default: runs/bench-peers")
    p.add_argument("--json", action="store_true")
    p = verb("profile", _bench_profile, "where a training step's time goes, by kind of operation", group)
    p.add_argument("--shape", required=True, help="vocabulary, body or tiny")
    p.add_argument("--out", type=Path, default=Path("runs/bench-profile"), help="default: runs/bench-profile")
    p = verb("convert", _bench_convert, "import and export of a head of true size, against a copy of its files", group)
    p.add_argument("--head", default="7b", help="7b, 0.5b or tiny (default: 7b, which needs 32 GB of disk)")
    p.add_argument("--out", type=Path, default=Path("runs/bench-convert"), help="default: runs/bench-convert")
    p.add_argument("--json", action="store_true")


def _peer_was_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because a process at its other end is gone, as gloo and NCCL word it."""
    return any(words in str(error) for words in ("gloo", "Connection closed by peer", "NCCL", "Connection reset"))


def _demo(args: argparse.Namespace) -> int:
    from pivot_megatron.recipe.demo import run_demo

    run_demo(args.out, args.processes)
    return 0


def _check(args: argparse.Namespace) -> int:
    from pivot_megatron.config.load import load_config

    wrong = 0
    for path in args.configs:
        try:
            load_config(path)
            print(f"{path}: ok")
        except UserError as error:
            wrong += 1
            for line in str(error).splitlines():
                print(line, file=sys.stderr)
    return 2 if wrong else 0


def _launched(verb: str, args: argparse.Namespace, layout: Any) -> int | None:
    """The exit code of several processes that ran `pivot VERB`; None where this process is one of them, or the only one."""
    if "RANK" not in os.environ:
        from pivot_megatron.runtime.launch import default_processes, launch

        processes = args.processes or default_processes(layout)
        if processes > 1:
            debug = ["--debug"] if args.debug else []
            return launch(processes, [verb, *debug, str(args.config), *args.overrides])
    elif args.processes:
        raise UserError(
            "--processes: this process was started by a launcher, which says how many there are; leave it out"
        )
    return None


def _reference(args: argparse.Namespace) -> int:
    from pivot_megatron.config.load import load_config

    config = load_config(args.config, args.overrides)
    if (code := _launched("reference", args, config.layout)) is not None:
        return code
    from pivot_megatron.train.trainer import make_reference

    for path in make_reference(config):
        print(path)
    return 0


def _train(args: argparse.Namespace) -> int:
    from pivot_megatron.config.load import load_config

    config = load_config(args.config, args.overrides)
    if (code := _launched("train", args, config.layout)) is not None:
        return code
    from pivot_megatron.train.progress import show_steps
    from pivot_megatron.train.trainer import train

    with show_steps(config.name) as report:
        train(config, report)
    return 0


def _import(args: argparse.Namespace) -> int:
    from pivot_megatron.convert.commands import import_assembled, import_checkpoint

    apart = (args.encoder, args.llm)
    if args.mllm is not None and apart == (None, None):
        import_assembled(args.mllm, args.out, args.feature_layer, args.image_size)
    elif args.mllm is None and None not in apart:
        import_checkpoint(args.encoder, args.llm, args.out, args.feature_layer, args.seed, args.image_size)
    else:
        raise UserError("convert import: expected --encoder and --llm, or --mllm alone")
    print(args.out)
    return 0


def _export(args: argparse.Namespace) -> int:
    from pivot_megatron.convert.commands import export_checkpoint

    export_checkpoint(args.checkpoint, args.part, args.out, args.last_layer, args.original)
    print(args.out)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from pivot_megatron.convert.verify import FORWARD_TOLERANCE, verify_checkpoint

    if args.encoder is args.llm is args.mllm is None:
        raise UserError("convert verify: expected --encoder, --llm or both, or --mllm, found none")
    tolerance = FORWARD_TOLERANCE if args.tolerance is None else args.tolerance
    report = verify_checkpoint(args.checkpoint, args.encoder, args.llm, tolerance, args.mllm)
    print(report.table())
    return 0 if report.passed else 1


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
    workers = (os.cpu_count() or 1) if args.workers is None else args.workers
    for line in prepare(selection, Writing(outputs, args.count, args.samples_per_shard, how, workers)):
        print(line)
    return 0


def _index(args: argparse.Namespace) -> int:
    from pivot_megatron.data.shards import write_index

    shards = write_index(args.shards)
    print(f"{args.shards}: {sum(s.samples for s in shards)} samples, tars: {len(shards)}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from pivot_megatron.data.inspect import describe_shards

    print(describe_shards(args.shards, args.samples))
    return 0


def _bench_peers(args: argparse.Namespace) -> int:
    from pivot_megatron.bench.peers import compare
    from pivot_megatron.bench.plot import write_plot
    from pivot_megatron.bench.report import as_json, as_text
    from pivot_megatron.bench.shapes import shape_by_name

    found = compare(
        shape_by_name(args.shape),
        args.rounds,
        args.steps,
        args.epochs,
        args.peer_batch,
        args.out,
        say=lambda text: print(f"bench: {text}", file=sys.stderr, flush=True),
    )
    (args.out / "peers.json").write_text(as_json(found) + "\n")
    write_plot(found, args.out / "peers.png")
    print(as_json(found) if args.json else as_text(found))
    return 0


def _bench_convert(args: argparse.Namespace) -> int:
    from pivot_megatron.bench.convert import as_json, as_text, measure_conversion

    found = measure_conversion(args.head, args.out, lambda text: print(f"bench: {text}", file=sys.stderr, flush=True))
    print(as_json(found) if args.json else as_text(found))
    return 0 if found.exact else 1


def _bench_profile(args: argparse.Namespace) -> int:
    from pivot_megatron.bench.profile import as_text, profile_steps
    from pivot_megatron.bench.shapes import shape_by_name

    print(as_text(profile_steps(shape_by_name(args.shape), args.out)))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from pivot_megatron.runtime.doctor import as_text, examine

    findings = examine()
    print(json.dumps([f.as_dict() for f in findings], indent=2) if args.json else as_text(findings))
    return 0


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    sys.exit(main())
