"""Processes on gloo for tests: started once, given one job after another, each job with process groups of its own."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import pivot_megatron.runtime  # noqa: F401  (prepares megatron-core before any job imports it)
from pivot_megatron.config.schema import Layout

Job = Callable[..., Any]

# Destroyed gloo groups leave their polling threads behind, some fifty a training job: soon they would take all the time, and a
# new process costs a fork.
JOBS_A_PROCESS = 4


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _serve(rank: int, pipe: Connection) -> None:
    while (message := pipe.recv()) is not None:
        world, port, job, layout, args = message
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            from pivot_megatron.runtime.distributed import process_groups

            if layout is None:
                pipe.send((True, job(*args)))
            else:
                with process_groups(layout, seed=1):
                    pipe.send((True, job(layout, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Workers:
    """Processes, as many as a job needs. `run` calls `job(layout, *args)` on each of `world` and returns their results by rank;
    without a layout, `job(*args)`, which makes its process groups itself."""

    def __init__(self) -> None:
        # Forked of a process that has imported what jobs need, which takes longer than most jobs.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            [
                "pivot_megatron.train.trainer",
                "tests.parity.training_jobs",
                "tests.parity.checkpoint_jobs",
                "tests.dist.runs",
            ]
        )
        self._workers: list[tuple[Any, Connection]] = []
        self._jobs = 0

    def _start(self, rank: int) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(rank, theirs))
        process.start()
        return process, ours

    def run(self, job: Job, layout: Layout | None, world: int, *args: Any, timeout: float = 300) -> list[Any]:
        self._jobs += 1
        if self._jobs % JOBS_A_PROCESS == 0:
            self.close()
        while len(self._workers) < world:
            self._workers.append(self._start(len(self._workers)))
        port = _free_port()
        pipes = [pipe for _, pipe in self._workers[:world]]
        for pipe in pipes:
            pipe.send((world, port, job, layout, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < world:
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise TimeoutError(
                    f"{job.__name__} at {layout}: {len(waiting)} of {world} ranks silent for {timeout} s"
                )
            for pipe in ready:
                rank = pipes.index(pipe)
                done, results[rank] = pipe.recv()
                if not done:
                    self.close()  # the other ranks wait in a collective that this one left
                    raise AssertionError(f"rank {rank} of {job.__name__} at {layout}:\n{results[rank]}")
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        for process, _ in self._workers:
            process.terminate()
            process.join()
        self._workers.clear()
