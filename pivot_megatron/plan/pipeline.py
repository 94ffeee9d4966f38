"""Seconds that a step's micro-batches take on a pipeline, by megatron-core's schedules. Pure: numbers, no processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import inf
from typing import NamedTuple

ROUNDS = 4
"""Of as many micro-batches as stages, that are played through: what comes later is as what came before."""


class Task(NamedTuple):
    """A micro-batch's way through one chunk of a stage, forward or back."""

    forward: bool
    chunk: int
    micro_batch: int


def even(stages: Sequence[float], micro_batches: int) -> float:
    """1F1B of stages of one chunk: every stage once to fill and drain, and the slowest for all other micro-batches (Narayanan et
    al. 2021, section 2.2). `stages`: seconds of a micro-batch through each, forward and back. Never too short."""
    return micro_batches * max(stages) + sum(stages) - max(stages)


@lru_cache(maxsize=4096)
def interleaved(
    ahead: tuple[tuple[float, ...], ...], back: tuple[tuple[float, ...], ...] | None, micro_batches: int
) -> float:
    """Of stages of several chunks, which need not be alike, every pass of every chunk played through; a message takes no time
    but what passes have in theirs. `ahead`, `back`: seconds of a micro-batch through each stage's chunks, `[stages][chunks]`;
    without `back` forward passes alone.

    Of more than `ROUNDS` rounds the others are counted at the rate of the last one played, which is never less than the slowest
    stage's.
    """
    stages = len(ahead)
    played = min(micro_batches, ROUNDS * stages)
    whole = _played(ahead, back, played)
    if played == micro_batches:
        return whole
    slowest = max(sum(one) + sum(other) for one, other in zip(ahead, back or ((),) * stages, strict=True))
    round_of = max(slowest * stages, whole - _played(ahead, back, played - stages))
    return whole + (micro_batches - played) / stages * round_of


def order(stage: int, stages: int, chunks: int, micro_batches: int) -> list[Task]:
    """What a stage does, one after another: forward passes to warm up, then one of each way, then what is left. Micro-batches go
    through a stage's chunks in rounds of as many as there are stages (Narayanan et al. 2021, section 2.2)."""
    turns = [
        (chunk, micro)
        for first in range(0, micro_batches, stages)
        for chunk in range(chunks)
        for micro in range(first, min(first + stages, micro_batches))
    ]
    ahead = [Task(True, *turn) for turn in turns]
    back = [Task(False, chunks - 1 - chunk, micro) for chunk, micro in turns]
    alone = min(len(turns), 2 * (stages - stage - 1) + (chunks - 1) * stages)
    steady = [task for pair in zip(ahead[alone:], back, strict=False) for task in pair]
    return [*ahead[:alone], *steady, *back[len(turns) - alone :]]


def _played(ahead: Sequence[Sequence[float]], back: Sequence[Sequence[float]] | None, micro_batches: int) -> float:
    """Seconds until the last stage is done. Every stage goes on with its own order as soon as what it waits for is there."""
    stages, chunks = len(ahead), len(ahead[0])
    orders = [order(stage, stages, chunks, micro_batches) for stage in range(stages)]
    if back is None:
        orders = [[task for task in tasks if task.forward] for tasks in orders]
    # By chunk in the order of the model, and micro-batch; with a row of zeros for what comes from nowhere.
    rows = stages * chunks
    done = {way: [[inf] * micro_batches for _ in range(rows)] + [[0.0] * micro_batches] for way in (True, False)}
    clocks, places = [0.0] * stages, [0] * stages
    waiting = list(range(stages))
    while waiting:
        for stage in waiting:
            tasks, place, clock = orders[stage], places[stage], clocks[stage]
            while place < len(tasks):
                forward, chunk, micro = tasks[place]
                row = chunk * stages + stage
                # The last chunk's backward pass waits for its own forward pass, which its stage's order has before it.
                before = row - 1 if forward else row + 1
                ready = done[forward][before][micro]
                if ready == inf:
                    break
                took = ahead if forward or back is None else back
                clock = max(clock, ready) + took[stage][chunk]
                done[forward][row][micro] = clock
                place += 1
            places[stage], clocks[stage] = place, clock
        waiting = [stage for stage in waiting if places[stage] < len(orders[stage])]
    return max(clocks)
