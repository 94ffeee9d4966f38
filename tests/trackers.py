"""Runs that tell trackers of their steps, a tracker that fails as asked, and what wandb and TensorBoard hold of a run."""

from __future__ import annotations

import importlib.util
import json
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pivot_megatron.config.load import decoded
from pivot_megatron.config.schema import RunConfig
from pivot_megatron.train.run_folder import RunFolder
from pivot_megatron.train.tracking import Trackers
from tests.unit.test_config import VALID

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the tracking extra: wandb")
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs the tracking extra: tensorboard"
)

LINE = {"loss": 0.1 + 0.2, "grad_norm": 1e-300, "applied": True, "pairs": 2**53 - 1, "keys": "ab12"}


class Fake:
    name = "fake"

    def __init__(self, held: int = 0, fails: int = 0, waits: threading.Event | None = None) -> None:
        self.held, self.fails, self.waits = held, fails, waits
        self.calls: list[Any] = []

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if self.waits:
            self.waits.wait()
        self.calls.append((step, dict(values)))
        if len(self.calls) <= self.fails:
            raise ConnectionError("gone\nfor good")

    def close(self, failed: bool) -> None:
        self.calls.append(("closed", failed))


def config_in(folder: Path, **asked: Any) -> RunConfig:
    return decoded({**VALID, "out": str(folder / "run"), "tracking": asked}, "test")


def begun(config: RunConfig, steps: int = 0, first: int = 1, **other: Any) -> RunFolder:
    """The folder of a run that made steps `first` to `steps`."""
    folder = RunFolder(config)
    folder.create(config, {"python": "3"})
    for step in range(first, steps + 1):
        folder.log({"step": step, **LINE, **other})
    return folder


def run_on(config: RunConfig, upto: int, **other: Any) -> None:
    """What a run does: opens trackers, then makes the steps to `upto`."""
    folder = RunFolder(config)
    with Trackers(config.name) as trackers:
        trackers.open(config)
        for step in range(folder.last_step() + 1, upto + 1):
            trackers.log(folder.log({"step": step, **LINE, **other}))


def as_given(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "step" and value is not None}


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB, each chunk with CRC, length and type) after a header
    of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield Record.FromString(parts)
            parts = b""


def wandb_history(run: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, values) of every offline session of a run that has ended, oldest first. Their last records may come to the files
    after the call that ends a session has returned."""
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    rows = []
    for file in files:
        deadline = time.monotonic() + 30
        while not any(one.WhichOneof("record_type") == "exit" for one in wandb_records(file)):
            assert time.monotonic() < deadline, f"{file}: no end"
            time.sleep(0.1)
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                rows.append(
                    (record.history.step.num, {name: v for name, v in items.items() if not name.startswith("_")})
                )
    return rows


def events(run: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[tuple[int, str]]]]:
    """(step, value) by name, of numbers and of texts, as TensorBoard reads them."""
    from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

    folder, ending = str(run / "tensorboard"), "/text_summary"
    scalars = event_accumulator.EventAccumulator(folder, size_guidance={event_accumulator.SCALARS: 0})
    tensors = plugin_event_accumulator.EventAccumulator(folder, tensor_size_guidance={"text": 0})
    scalars.Reload()
    tensors.Reload()
    numbers = {tag: [(event.step, event.value) for event in scalars.Scalars(tag)] for tag in scalars.Tags()["scalars"]}
    texts = {
        tag.removesuffix(ending): [
            (event.step, event.tensor_proto.string_val[0].decode()) for event in tensors.Tensors(tag)
        ]
        for tag in tensors.Tags()["tensors"]
        if tag.endswith(ending)
    }
    return numbers, texts


def single(value: Any) -> Any:
    """As float32 has it; a text as it is."""
    return value if isinstance(value, str) else float(np.float32(value))
