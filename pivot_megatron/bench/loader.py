"""`pivot bench loader`: how fast samples come, by what decodes their images, and how many GPUs one core feeds."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch.multiprocessing.spawn import spawn

from pivot_megatron.bench.photos import ANSWER, SIZES, write_photos
from pivot_megatron.config.load import load_config
from pivot_megatron.convert.start import describe_start
from pivot_megatron.convert.tiny_checkpoints import make_encoder, make_head, make_tokenizer
from pivot_megatron.data.build import build_loader
from pivot_megatron.data.dali import require_dali
from pivot_megatron.data.loader import Loader
from pivot_megatron.data.sample import Pair
from pivot_megatron.errors import UserError
from pivot_megatron.families.flops import encoder_flops, head_flops, projector_flops
from pivot_megatron.families.registry import encoder_architecture, head_architecture
from pivot_megatron.model.flops import SampleWork
from pivot_megatron.runtime.device import available_cores

IMAGE_SIZE = 384
_AT_ONCE = 32
"""Images that are decoded together, as of a micro-batch."""

_SENT = 10
"""Broadcasts of so many images."""

# SigLIP2 So400m at 384 pixels with a head of Qwen2.5-1.5B.
_ENCODER = {
    **{"model_type": "siglip_vision_model", "image_size": IMAGE_SIZE, "patch_size": 14, "hidden_size": 1152},
    **{"num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304},
}
_HEAD = {
    **{"model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12},
    **{"num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768},
}
_PROMPT, _ANSWER = 60, 200  # tokens of a pair's question, and of each of its answers
_H100_FLOPS = 989e12  # a second, dense BF16, of the SXM module's data sheet
_UTILISATION = 0.4  # of those that training reaches: taken, not measured


@dataclass(frozen=True)
class Rate:
    """Samples or images a second, the median of the rounds with the lowest and the highest. `workers`: threads."""

    what: str
    workers: int
    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class LoaderRates:
    """`pairs_a_second`: what one H100 trains on at an assumed share of its peak, which `feeds` counts in."""

    images: int
    rounds: int
    cores: int
    rates: tuple[Rate, ...]
    pairs_a_second: float

    def feeds(self, rate: Rate) -> float:
        """H100s that one core keeps busy at `rate`."""
        return rate.median / max(rate.workers, 1) / self.pairs_a_second


def measure_loader(out: Path, images: int, rounds: int, say: Callable[[str], None]) -> LoaderRates:
    """In `out`, which must be new. Rounds of all ways in turn, so that a machine's slow minutes fall on each of them."""
    if images < _AT_ONCE or rounds < 1:
        raise UserError(f"--images, --rounds: expected at least {_AT_ONCE} and 1, found {images} and {rounds}")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: already has files in it; give a new folder with --out")
    say(f"{images} photographs")
    write_photos(out / "pairs", images, seed=1)
    make_encoder(
        out / "encoder", image_size=IMAGE_SIZE, patch_size=32, hidden_size=64, layers=2, heads=4, ffn=128, seed=1
    )
    tokenizer = make_tokenizer([ANSWER, "what is shown", "not"], 300)
    make_head(out / "llm", tokenizer, hidden_size=64, layers=1, heads=2, kv_heads=1, ffn=128, tied=True, seed=1)
    cores = available_cores()
    ways = list(_ways(out, cores))
    found: dict[tuple[str, int], list[float]] = {}
    with _one_thread():
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for what, workers, run in ways:
                found.setdefault((what, workers), []).append(run())
    rates = (Rate(*way, median(each), min(each), max(each)) for way, each in found.items())
    return LoaderRates(images, rounds, cores, tuple(rates), _UTILISATION * _H100_FLOPS / _pair_flops())


def _a_second(run: Callable[[], int]) -> Callable[[], float]:
    """What `run` counts, a second."""

    def rate() -> float:
        began = time.perf_counter()
        return run() / (time.perf_counter() - began)

    return rate


def _ways(out: Path, cores: int) -> Iterator[tuple[str, int, Callable[[], float]]]:
    """Name, threads, and what gives the rate over all samples."""
    reader = _loader(out, "torch", 0).samples

    def read() -> int:
        return len([reader.read(index).key for index in range(len(reader))])

    yield "reader alone", 0, _a_second(read)
    for backend in ("pil", "torch", *(["dali"] if _has_dali() else [])):
        for workers in sorted({1, cores}):
            yield f"{backend} pixels", workers, _a_second(_decoding(_loader(out, backend, workers)))
    for workers in sorted({0, cores}):
        yield "whole loader, torch", workers, _a_second(_loading(_loader(out, "torch", workers)))
    yield "pixels to a peer", 0, _sending


def _decoding(loader: Loader) -> Callable[[], int]:
    samples = [loader.samples.read(index) for index in range(len(loader.samples))]
    encoded = [sample.image for sample in samples if isinstance(sample, Pair) and sample.image]

    def run() -> int:
        with loader.decoder() as decode:
            return sum(len(decode(encoded[at : at + _AT_ONCE])) for at in range(0, len(encoded), _AT_ONCE))

    return run


def _loading(loader: Loader) -> Callable[[], int]:
    return lambda: sum(data.samples for data in loader.steps(0, len(loader.samples) // _AT_ONCE))


def _loader(out: Path, backend: str, workers: int) -> Loader:
    tree: dict[str, Any] = {
        "name": "loader",
        "out": str(out / "run"),
        "model": {"encoder": {"hf": str(out / "encoder")}, "llm": {"hf": str(out / "llm")}},
        "objective": {"kind": "dpo"},
        "data": {"shards": [str(out / "pairs")], "image_backend": backend, "workers": workers},
        "optimizer": {"learning_rate": 1e-6},
        "batch": {"global_size": _AT_ONCE, "micro_tokens": 4096, "steps": 1},
    }
    path = out / "loader.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = load_config(path)
    start = describe_start(config.model)
    arch = start.architecture()
    return build_loader(config, out / "llm", start.image_views(), SampleWork(arch), 2, 0, 1, with_images=True)


def _sending() -> float:
    """What a tensor-parallel peer could wait for instead of decoding the same images: their pixels from another process."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_peer, (folder,), nprocs=2)
        return float(Path(folder, "rate").read_text())


def _peer(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    pixels = torch.zeros(_AT_ONCE, 3, IMAGE_SIZE, IMAGE_SIZE)
    dist.broadcast(pixels, src=0)
    began = time.perf_counter()
    for _ in range(_SENT):
        dist.broadcast(pixels, src=0)
    if rank:
        Path(folder, "rate").write_text(str(_SENT * _AT_ONCE / (time.perf_counter() - began)))
    dist.destroy_process_group()


def _has_dali() -> bool:
    try:
        require_dali()
    except UserError:
        return False
    return True


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch's own threads would be counted to none."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pair_flops() -> float:
    """Of one training step on a pair with one image, its reference known: the backward pass costs twice the forward pass."""
    encoder = encoder_architecture(_ENCODER, "the bench")
    head = head_architecture(_HEAD, "the bench")
    prefix = encoder.tokens + _PROMPT
    segments: Sequence[tuple[int, int]] = ((prefix + _ANSWER, prefix + _ANSWER), (_ANSWER, prefix + _ANSWER))
    seen = encoder_flops(encoder, encoder.layers - 1) + projector_flops(encoder, head)
    return 3 * (seen + head_flops(head, segments, 2 * _ANSWER))


def as_text(found: LoaderRates) -> str:
    sizes = ", ".join(f"{width}x{height}" for width, height in SIZES)
    rows = [
        f"{found.images} JPEG photographs ({sizes}) to {IMAGE_SIZE}x{IMAGE_SIZE}, {found.cores} cores, "
        f"median of {found.rounds} rounds",
        f"{'':<22}{'threads':>8}{'a second':>10}{'lowest':>9}{'highest':>9}{'H100s a core':>14}",
    ]
    rows += [
        f"{rate.what:<22}{rate.workers:>8}{rate.median:>10.0f}{rate.lowest:>9.0f}{rate.highest:>9.0f}{found.feeds(rate):>14.1f}"
        for rate in found.rates
    ]
    rows.append(
        f"H100s a core: of So400m + 1.5B by count, {found.pairs_a_second:.0f} pairs a second each at {_UTILISATION:.0%} of peak"
    )
    if not any(rate.what.startswith("dali") for rate in found.rates):
        rows.append("DALI is not installed: pip install 'pivot-megatron[dali]'")
    return "\n".join(rows)


def as_json(found: LoaderRates) -> str:
    record: Mapping[str, Any] = asdict(found)
    return json.dumps(record, indent=2)
