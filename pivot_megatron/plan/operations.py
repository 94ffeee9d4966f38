"""A stage's operations on the mean micro-batch, those of one name together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pivot_megatron.plan.estimate import Estimate
from pivot_megatron.plan.step_time import seconds


@dataclass(frozen=True)
class Spent:
    """On one way through a stage. `times`: kernels, messages or segments; `traffic`: bytes read and written, or sent."""

    part: str
    way: str
    name: str
    kind: str
    times: float
    flops: float
    traffic: float
    seconds: float

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.part,
            self.way,
            self.name,
            self.kind,
            self.times + other.times,
            self.flops + other.flops,
            self.traffic + other.traffic,
            self.seconds + other.seconds,
        )


def operations(found: Estimate, stage: int) -> list[Spent]:
    """In the order in which they first come. Their seconds come to the stage's passage, less what it sends to other stages."""
    rates, links = found.machine.rates_of(found.gpus), found.machine.links(found.layout.tensor, 1, found.gpus)
    count, model = len(found.packs), found.model
    together: dict[tuple[str, str, str], Spent] = {}
    for pack, packs in Counter(found.packs).items():
        share = packs / count
        for chunk, weights in zip(found.chunks_of(stage), found.stages[stage].weights, strict=True):
            work = model.work(chunk, pack, weights)
            for way, parts in (("forward", work.forward), ("backward", work.backward)):
                for part, ops in parts.items():
                    for op in ops:
                        took = share * seconds(op, rates, links, way == "backward")
                        sizes = (share * op.launches, share * op.flops, share * op.traffic, took)
                        one = Spent(part, way, op.name, op.kind, *sizes)
                        key = (part, way, op.name)
                        together[key] = together[key] + one if key in together else one
    return list(together.values())
