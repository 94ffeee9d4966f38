"""What one layout of a run takes on one machine: memory of every stage, seconds of a step, and what they add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pivot_megatron.config.schema import Batch, Layout, ParameterRule, Precision, Recompute
from pivot_megatron.data.build import PACK_MULTIPLE
from pivot_megatron.data.plan import Size, plan_micro_batches
from pivot_megatron.families.flops import encoder_flops, head_flops
from pivot_megatron.model.composition import Architecture
from pivot_megatron.plan.machine import Machine
from pivot_megatron.plan.memory import Memory, stage_memory
from pivot_megatron.plan.model_work import Model, Trained, Work
from pivot_megatron.plan.parameters import Held, held
from pivot_megatron.plan.prediction import Prediction
from pivot_megatron.plan.stages import Chunk, chunks
from pivot_megatron.plan.step_time import Ends, Passage, ends, passage, pipelined
from pivot_megatron.plan.workload import Lengths, Pack


@dataclass(frozen=True)
class Subject:
    """What is planned. `samples`: lengths of a global batch. `steps` of the run. `tile`: bytes of logits that stand at once;
    `fused`: layers are Transformer Engine's; `token_multiple`: tokens of a rank that its products need to divide by. `online`:
    the reference model runs in every step."""

    arch: Architecture
    precision: Precision
    recompute: Recompute
    rules: tuple[ParameterRule, ...]
    batch: Batch
    samples: tuple[Lengths, ...]
    steps: int
    tile: float
    fused: bool
    token_multiple: int = PACK_MULTIPLE
    online: bool = False


@dataclass(frozen=True)
class StageEstimate:
    """`layers`: of the language model. `passage`: of the mean micro-batch of the rank with the most work."""

    layers: int
    parameters: int
    memory: Memory
    passage: Passage
    ends: Ends


@dataclass(frozen=True)
class Estimate:
    """`flops`: of a step over all ranks, what is made anew not counted. `packs`: micro-batches of the rank with the most work."""

    subject: Subject
    layout: Layout
    gpus: int
    machine: Machine
    packs: tuple[Pack, ...]
    stages: tuple[StageEstimate, ...]
    flops: float
    forward_seconds: float

    @property
    def data_parallel(self) -> int:
        return self.gpus // self.layout.model_parallel_size

    @cached_property
    def slowest(self) -> StageEstimate:
        return max(self.stages, key=lambda stage: stage.passage.total)

    @cached_property
    def step_seconds(self) -> float:
        return self._passages + max(s.ends.gradients + s.ends.update + s.ends.gather for s in self.stages)

    @property
    def _passages(self) -> float:
        whole = pipelined([s.passage.total for s in self.stages], len(self.packs), self.layout.virtual_pipeline)
        return whole + (self.forward_seconds if self.subject.online else 0.0)

    @property
    def pairs_a_second(self) -> float:
        return len(self.subject.samples) / self.step_seconds

    @property
    def tokens_a_second(self) -> float:
        """As packs have them, prefixes once."""
        return sum(sample.tokens for sample in self.subject.samples) / self.step_seconds

    @property
    def utilisation(self) -> float:
        """Of the devices' peak, MFU."""
        dtype = "fp8" if self.subject.precision.fp8_of("llm") else self.subject.precision.compute
        peak = self.machine.rates_of(self.gpus).peak[dtype]
        return self.flops / (self.step_seconds * self.gpus * peak)

    @property
    def hours(self) -> float:
        """Of the run's steps, and of one forward pass of the reference over an epoch where that is not online."""
        return self.subject.steps * self.step_seconds / 3600

    @property
    def peak_bytes(self) -> float:
        return max(stage.memory.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.machine.memory

    @property
    def prediction(self) -> Prediction:
        slow, count = self.slowest, len(self.packs)
        parts = {
            "data": 0.0,
            "encoder": count * slow.passage.encoder,
            "head": count * slow.passage.head,
            "communication": count * slow.passage.messages + slow.ends.gradients + slow.ends.gather,
            "optimizer": slow.ends.update,
        }
        return Prediction(
            layout=self.layout,
            data_parallel=self.data_parallel,
            step_seconds=self.step_seconds,
            parts=parts,
            idle_seconds=self.step_seconds - sum(parts.values()),
            peak_bytes=[int(stage.memory.total) for stage in self.stages],
        )


def estimate(subject: Subject, layout: Layout, gpus: int, machine: Machine) -> Estimate:
    """`gpus` is a multiple of the layout's model-parallel size, and the model can be cut so."""
    data_parallel = gpus // layout.model_parallel_size
    packs = busiest_packs(subject, layout, data_parallel)
    model = Model(subject.arch, layout, subject.precision, subject.recompute, subject.fused)
    rates, link = machine.rates_of(gpus), machine.link(layout.tensor)
    largest = max(packs, key=lambda pack: pack.tokens)
    found = chunks(subject.arch.head.layers, layout)
    parameters = {chunk: held(subject.arch, layout, chunk, subject.rules) for chunk in found}
    stages = []
    flops = forward_seconds = 0.0
    for stage in range(layout.pipeline):
        own = [chunk for chunk in found if chunk.stage == stage]
        works = _works(model, own, parameters, packs)
        flops += sum(_useful(work) for work in works) * layout.tensor * data_parallel
        total = sum((passage(work, rates, link) for work in works), Passage())
        mean = Passage(*(part / len(packs) for part in (total.encoder, total.head, total.messages)))
        messages = _stage_messages(model, layout, machine, data_parallel, stage, largest)
        mean += Passage(messages=messages)
        forward_seconds += sum(passage(Work(w.forward, {"encoder": (), "head": ()}), rates, link).total for w in works)
        flat = [parameter for chunk in own for parameter in parameters[chunk]]
        shared = _shared_words(flat, subject.arch, layout, stage)
        stages.append(
            StageEstimate(
                layers=sum(len(chunk.layers) for chunk in own),
                parameters=sum(parameter.count for parameter in flat),
                memory=stage_memory(
                    model,
                    own,
                    [parameters[chunk] for chunk in own],
                    largest,
                    len(packs),
                    data_parallel,
                    subject.tile,
                    machine.process,
                    subject.online,
                ),
                passage=mean,
                ends=ends(flat, layout, subject.precision, machine, data_parallel, 2 / 3 * mean.total, shared),
            )
        )
    return Estimate(subject, layout, gpus, machine, packs, tuple(stages), flops, forward_seconds)


def busiest_packs(subject: Subject, layout: Layout, data_parallel: int) -> tuple[Pack, ...]:
    """As the loader packs them, of the rank that gets the most work."""
    arch, batch = subject.arch, subject.batch
    image = encoder_flops(arch.encoder, arch.encoder_layers)
    sizes = [
        Size(s.tokens, s.images, s.images * image + head_flops(arch.head, s.segments, s.scored)) for s in subject.samples
    ]
    ranks = plan_micro_batches(
        sizes, data_parallel, batch.micro_tokens, batch.micro_images, layout.micro_batch_multiple
    )
    busiest = max(ranks, key=lambda bins: sum(sizes[i].flops for found in bins for i in found))
    multiple = layout.tensor * subject.token_multiple
    return tuple(Pack(tuple(subject.samples[i] for i in found), multiple) for found in busiest)


def _works(
    model: Model, own: Sequence[Chunk], parameters: dict[Chunk, tuple[Held, ...]], packs: Sequence[Pack]
) -> list[Work]:
    return [
        model.work(chunk, pack, Trained.of(parameters[chunk]), parameters[chunk]) for chunk in own for pack in packs
    ]


def _useful(work: Work) -> float:
    ways = (work.forward, work.backward)
    return sum(op.flops for way in ways for ops in way.values() for op in ops if not op.name.endswith("again"))


def _stage_messages(
    model: Model, layout: Layout, machine: Machine, data_parallel: int, stage: int, pack: Pack
) -> float:
    """Seconds a micro-batch that a stage sends and receives for, activations and their gradients, to the next one and back."""
    if layout.pipeline == 1:
        return 0.0
    link = machine.link(2, layout.tensor * data_parallel)
    size = 2 if model.precision.compute == "bf16" else 4
    sent = size * pack.tokens * model.arch.head.hidden / layout.tensor
    crossings = 2 * layout.virtual_pipeline - (stage == 0) - (stage == layout.pipeline - 1)
    return 2 * crossings * (link.seconds + sent / link.bandwidth)


def _shared_words(parameters: Sequence[Held], arch: Architecture, layout: Layout, stage: int) -> int:
    """Entries of tied embeddings, whose gradients the first and the last stage add up."""
    if not arch.head.tied_embeddings or layout.pipeline == 1 or stage not in (0, layout.pipeline - 1):
        return 0
    return arch.head.padded_vocabulary * arch.head.hidden // layout.tensor
