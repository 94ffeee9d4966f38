"""`pivot convert`: Hugging Face folders to checkpoints and back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pivot_megatron.cli.verbs import Groups, Verb
from pivot_megatron.errors import UserError


def add(verb: Verb, verbs: Groups) -> None:
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
    p.add_argument(
        "--dtype",
        choices=("bf16",),
        help="round to it (default: none; of what was trained in bf16 the float32 numbers behind it are written)",
    )
    p = verb("verify", _verify, "a checkpoint against Hugging Face folders: every tensor, and a forward pass", group)
    p.add_argument("checkpoint", type=Path, metavar="CKPT")
    p.add_argument("--encoder", type=Path, help="the encoder's folder; left out, it is not compared")
    p.add_argument("--llm", type=Path, help="the same of the language model")
    p.add_argument("--mllm", type=Path, help="an assembled LLaVA, projector and all")
    p.add_argument("--tolerance", type=float, help="of activations, relative to the largest (default: 1e-4)")


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
    import torch

    from pivot_megatron.convert.commands import export_checkpoint

    dtype = None if args.dtype is None else torch.bfloat16
    lacks = export_checkpoint(args.checkpoint, args.part, args.out, args.last_layer, args.original, dtype)
    if lacks:
        print(
            f"convert: {args.out} has no {', '.join(lacks)}: the library draws them at random; features do not pass through them",
            file=sys.stderr,
        )
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
