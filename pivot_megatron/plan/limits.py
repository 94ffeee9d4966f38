"""What a layout's step is spent on, and what of it holds the run back."""

from __future__ import annotations

from pivot_megatron.plan.estimate import Estimate
from pivot_megatron.plan.hardware import GIB


def spent(found: Estimate) -> dict[str, float]:
    """Seconds of a step by what they go to, on the stage that takes longest; they come to `step_seconds`."""
    slow, machine = found.slowest, found.machine
    parts, idle = found.prediction.parts, found.prediction.idle_seconds
    replicas = slow.ends.gradients + slow.ends.gather
    stages = len(found.packs) * slow.sends
    layout = found.layout
    near = {
        machine.within_node(layout.tensor, 1, found.gpus): parts["communication"] - replicas - stages,
    }
    for seconds, within in (
        (stages, machine.within_node(layout.pipeline, layout.tensor * found.data_parallel, found.gpus)),
        (replicas, machine.within_node(found.data_parallel, layout.tensor, found.gpus)),
    ):
        near[within] = near.get(within, 0.0) + seconds
    return {
        "compute of the encoder": parts["encoder"],
        "compute of the head": parts["head"],
        "messages within a node": near.get(True, 0.0),
        "messages between nodes": near.get(False, 0.0),
        "optimizer": parts["optimizer"],
        "pipeline idle": idle,
        "waiting for data": parts["data"],
    }


def limited_by(found: Estimate) -> str:
    """In a few words: where a layout does not fit, by how much and on which stage; else loaders, if they are what devices
    wait for, or what takes most of a step."""
    if not found.fits:
        over = found.peak_bytes - found.machine.memory
        return f"memory: does not fit, {over / GIB:.1f} GiB too much on stage {found.fullest}"
    if found.loading_seconds > found.device_seconds:
        return f"data: loaders take {found.loading_seconds:.3f} s a step, devices {found.device_seconds:.3f}"
    what, seconds = max(spent(found).items(), key=lambda item: item[1])
    return f"{what}, {seconds / found.step_seconds:.0%}"
