"""A machine as a plan sees it: what its devices compute, hold and send in a second. Pure numbers, from the data sheets in
`hardware.yaml` or measured by `pivot bench calibrate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml
from pydantic import TypeAdapter, ValidationError

from pivot_megatron.config.schema import Precision, Strict
from pivot_megatron.errors import UserError


@dataclass(frozen=True)
class Roofline(Strict):
    """What one kernel takes: `seconds` to start, then the longer of its operations at `flops` a second and its memory traffic at
    `bandwidth` bytes a second (Williams et al. 2009)."""

    flops: float
    bandwidth: float
    seconds: float

    def time(self, flops: float, traffic: float) -> float:
        """Seconds. `traffic` in bytes."""
        return self.seconds + max(flops / self.flops, traffic / self.bandwidth)


@dataclass(frozen=True)
class Attention(Strict):
    """FLOP/s of the attention kernel, forward and backward, counting a causal segment's visible half alone; `seconds` to start
    the kernel for one segment, 0 where one call takes all of them."""

    forward: float
    backward: float
    seconds: float


@dataclass(frozen=True)
class Link(Strict):
    """One device's messages of one kind. `points`: (bytes that it sends, seconds that takes), the smallest first, straight
    between them and on past the last: a large message may come at another rate than a small one."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, seconds: float, bandwidth: float) -> Link:
        """One that takes `seconds` to begin with, and then so many bytes a second."""
        return cls(((0.0, seconds), (1e9, seconds + 1e9 / bandwidth)))

    @property
    def seconds(self) -> float:
        """Of the smallest message."""
        return self.points[0][1]

    @property
    def bandwidth(self) -> float:
        """Bytes a second, of the largest messages."""
        (size, seconds), (larger, more) = self.points[-2:]
        return float((larger - size) / (more - seconds))

    def time(self, traffic: float, messages: float = 1.0) -> float:
        """Seconds. `traffic`: bytes that one device sends in all of them, as much in each."""
        if not messages:
            return 0.0
        size = traffic / messages
        sizes, seconds = zip(*self.points, strict=True)
        if size > sizes[-1]:
            return float(messages * (seconds[-1] + (size - sizes[-1]) / self.bandwidth))
        return messages * float(np.interp(size, sizes, seconds))

    def changed(self, begins: float, factor: float) -> Link:
        """One that takes `begins` seconds to begin with, and of all that comes on top `factor` times as long."""
        return Link(tuple((size, begins + factor * (seconds - self.seconds)) for size, seconds in self.points))


Collective = Literal["gather", "scatter", "reduce", "send"]
COLLECTIVES: tuple[Collective, ...] = get_args(Collective)


@dataclass(frozen=True)
class Links(Strict):
    """By what is sent: an all-gather, a reduce-scatter, an all-reduce, or a message from one device to another."""

    gather: Link
    scatter: Link
    reduce: Link
    send: Link

    def of(self, collective: Collective) -> Link:
        return {"gather": self.gather, "scatter": self.scatter, "reduce": self.reduce, "send": self.send}[collective]


@dataclass(frozen=True)
class Rates(Strict):
    """Of one device while all of its node's compute. `gemm`, `attention`: by the dtype of their inputs (`bf16`, `fp32`,
    `fp8`); `peak`: FLOP/s that utilisation is counted against. `elementwise`: bytes read and written a second by what is no
    product; `launch`: seconds that any of its kernels takes by itself. `update`: bytes a second of the optimizer."""

    peak: Mapping[str, float]
    gemm: Mapping[str, Roofline]
    attention: Mapping[str, Attention]
    elementwise: float
    update: float
    launch: float


@dataclass(frozen=True)
class Machine(Strict):
    """`memory`: bytes of a device that a process may fill; `process`: bytes of it that a process takes before it holds a
    model. `rates`: by the number of a node's devices that compute at once, which on a CPU share its cores; the one for the
    largest number that is not above a run's holds. `node`, `network`: links between devices of a node, and past it, of which a
    machine that was measured by itself knows nothing. `logits_tile`: bytes of logits that stand at once;
    `transformer_engine`: layers are its own. `reduction_copy`: bytes that a reduction over replicas takes beside each of its
    buffer's: gloo works on a copy, NCCL in place. `fp8_transposes`: products in FP8 read a weight along one side alone, so that
    a backward pass needs it transposed, as Hopper's do. `images_a_second`: that loaders feed a device; None where no one knows.
    """

    name: str
    source: str
    devices_a_node: int
    memory: float
    process: float
    rates: Mapping[int, Rates]
    node: Links
    network: Links | None
    logits_tile: float
    transformer_engine: bool
    reduction_copy: float
    fp8_transposes: bool = True
    images_a_second: float | None = None

    def rates_of(self, processes: int) -> Rates:
        """Of a device while `processes` run, at most a node's devices of them side by side."""
        beside = min(processes, self.devices_a_node)
        known = [count for count in self.rates if count <= beside]
        return self.rates[max(known) if known else min(self.rates)]

    def links(self, devices: int, apart: int, world: int) -> Links:
        """Of collectives of groups of `devices` that stand `apart` ranks from one another, of `world` ranks in all. Raises
        UserError where some of them are on several nodes, and what is between is not known.

        Past a node, data go around a ring that leaves it over the network port of each member there (NCCL's rings, one a rail),
        so a rank's rate is that of so many ports, or of the node's own link where that is less. Gathers and scatters begin
        with a step from each node to the next, reductions with those of a tree over nodes (Thakur et al. 2005; NCCL's trees).
        """
        between = self.pairs(devices, apart, world)
        if between is self.node:
            return between
        together = max(1, gcd(devices * apart, self.devices_a_node) // apart)  # the fewest that a node has of a group
        nodes = -(-devices // together)
        steps = {"gather": nodes - 1, "scatter": nodes - 1, "reduce": (nodes - 1).bit_length()}

        def ring(name: Collective) -> Link:
            near, far = self.node.of(name), between.of(name)
            begins = far.seconds + (steps[name] - 1) * max(0.0, far.seconds - near.seconds)
            return far.changed(begins, max(1 / together, min(1.0, far.bandwidth / near.bandwidth)))

        return Links(ring("gather"), ring("scatter"), ring("reduce"), between.send)

    def pairs(self, devices: int, apart: int, world: int) -> Links:
        """Of one device with one other of such a group, over the network if any group leaves a node. Raises UserError as
        `links`."""
        if self.within_node(devices, apart, world):
            return self.node
        if self.network is None:
            raise UserError(
                f"{self.name}: expected devices of one node, up to {self.devices_a_node}, found {world}: the network between "
                "nodes was not measured; write `network:` into the file, in the form of `node:`"
            )
        return self.network

    def within_node(self, devices: int, apart: int, world: int) -> bool:
        """Whether every such group is on one node, ranks laid over nodes in order."""
        block = devices * apart
        return world <= self.devices_a_node or (block <= self.devices_a_node and self.devices_a_node % block == 0)


def require_rates(machine: Machine, precision: Precision) -> None:
    """Raises UserError where `machine` has none for what a run computes in."""
    rates = machine.rates_of(1)
    for dtype in (precision.compute, *(["fp8"] if precision.fp8 else [])):
        if dtype not in rates.gemm or dtype not in rates.peak or precision.compute not in rates.attention:
            raise UserError(
                f"precision: {machine.name} has no rate of products in {dtype}, it has {', '.join(rates.gemm)}; plan another "
                "machine, or set precision.compute and precision.fp8"
            )


_MACHINE = TypeAdapter(Machine)


def read_machine(path: Path) -> Machine:
    """What `write_machine` wrote. Raises UserError where it is none."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: expected a machine as `pivot bench calibrate` writes it, found none: {' '.join(str(error).split())}"
        ) from None
    return machine_of(tree, str(path))


def machine_of(tree: Any, where: str) -> Machine:
    """Raises UserError naming `where` and the first key that is wrong."""
    try:
        return _MACHINE.validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {key}: {first['msg']}; write it again with `pivot bench calibrate`") from None


def write_machine(machine: Machine, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(asdict(machine), sort_keys=False))
