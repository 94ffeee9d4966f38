"""How long this process computes before it waits for others: time on the device, where that runs behind the host."""

from __future__ import annotations

import time

import torch

from pivot_megatron.runtime.device import Platform


class Stopwatch:
    """Seconds between `start` and `stop`, added up until `reset`. On CUDA they are the device's, which neither waits for."""

    def __init__(self, platform: Platform) -> None:
        self._on_device = platform.is_cuda
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = self._started = 0.0

    def start(self) -> None:
        if self._on_device:
            self._spans.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._spans[-1][0].record()
        self._started = time.perf_counter()

    def stop(self) -> None:
        if self._on_device:
            self._spans[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def reset(self) -> float:
        """The seconds so far, of which there are none afterwards. Waits for the device to be past the last `stop`."""
        for begun, ended in self._spans:
            ended.synchronize()
            self._seconds += begun.elapsed_time(ended) / 1000
        seconds, self._seconds, self._spans = self._seconds, 0.0, []
        return seconds
