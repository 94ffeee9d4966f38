"""What each process of a run does that `pivot bench layouts` times: the steps of `pivot train`, saved nowhere."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from pivot_megatron.bench.gemm import device_rate
from pivot_megatron.bench.step_regions import REST, timed_parts
from pivot_megatron.config.load import load_config
from pivot_megatron.data.loader import Loader, StepData
from pivot_megatron.requeue import StopRequests
from pivot_megatron.runtime.device import current_platform, device_count, wait_for
from pivot_megatron.runtime.distributed import pipeline_stage
from pivot_megatron.runtime.memory import peak_memory
from pivot_megatron.runtime.regions import Regions
from pivot_megatron.train.run_folder import write_atomically
from pivot_megatron.train.session import Session, prepare
from pivot_megatron.train.tracking import Trackers
from pivot_megatron.train.trainer import before_reference_batch, make_steps, watched


@dataclass(frozen=True)
class Job:
    """`config`: a run's YAML. Steps: some that pay for the first use of everything, those that are timed, and those whose time
    is divided. `repeat`: they all see the first one's batch, which stands ready."""

    config: str
    warm_up: int
    timed: int
    divided: int
    repeat: bool

    @property
    def steps(self) -> int:
        return self.warm_up + self.timed + self.divided

    @property
    def run_steps(self) -> int:
        """What the run's config says: one more, which is not made, for a run saves its last step."""
        return self.steps + 1

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Job:
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class RankFound:
    """Of one process: `peak_bytes` up to the end of its timed steps, and seconds of the divided steps by region.

    Before each timed step and after the last all processes stand and multiply matrices at once: `rates`, FLOP/s of this one's
    device, and `looked`, the seconds that took, which the wait for the next step's data has in it.
    """

    rank: int
    stage: int
    peak_bytes: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    rates: Sequence[float] = ()
    looked: Sequence[float] = ()


def make_job(job: Job) -> None:
    """In each process of the run; its folder gets `metrics.jsonl`, and a `RankFound` from every process."""
    config = load_config(Path(job.config))
    requests = StopRequests()
    with Trackers(config.name) as trackers, watched(config) as watch:
        session = prepare(config, watch, trackers, before_reference_batch(watch, requests))
        probe = _Probe(session, job)
        session.loader = _Observed(**vars(session.loader), probe=probe)
        make_steps(session, lambda *_: None, requests)
        found = RankFound(dist.get_rank(), pipeline_stage(), probe.peak, probe.seconds, probe.rates, probe.looked)
        folder = ranks_folder(config.out)
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"{found.rank:05d}.json", json.dumps(asdict(found)))


def read_ranks(run: Path) -> list[RankFound]:
    """By rank."""
    return [RankFound(**json.loads(file.read_text())) for file in sorted(ranks_folder(run).glob("*.json"))]


def ranks_folder(run: Path) -> Path:
    return run / "ranks"


@dataclass
class _Probe:
    """Looks at a run where it asks for a step's data, which is where one step ends and the next begins."""

    session: Session
    job: Job
    peak: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    looked: list[float] = field(default_factory=list)

    def steps(self, source: Iterator[StepData]) -> Iterator[StepData]:
        for _ in range(self.job.warm_up):
            yield next(source)
        for _ in range(self.job.timed):
            self._look()
            yield next(source)
        self.peak = peak_memory()
        self._look()
        regions = Regions(REST, settle=partial(wait_for, current_platform().device))
        with timed_parts(self.session, regions):
            for _ in range(self.job.divided):
                with regions.within("data"):
                    data = next(source)
                yield data
            self.seconds = regions.stop()

    def _look(self) -> None:
        """At what the machine multiplies matrices now."""
        began = time.perf_counter()
        wait_for(current_platform().device)
        dist.barrier()
        self.rates.append(device_rate(torch.bfloat16 if device_count() else torch.float32))
        dist.barrier()
        self.looked.append(time.perf_counter() - began)


@dataclass(frozen=True, kw_only=True)
class _Observed(Loader):
    """Of the steps it is asked for it gives those that the job is about."""

    probe: _Probe

    def steps(self, first: int, last: int) -> Iterator[StepData]:
        job = self.probe.job
        source = self._repeated(job.steps) if job.repeat else super().steps(first, last)
        yield from self.probe.steps(source)

    def _repeated(self, steps: int) -> Iterator[StepData]:
        data = self.load(0)
        for step in range(steps):
            yield replace(data, step=step)
