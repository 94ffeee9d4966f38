"""What one layout of a run takes on one machine: memory of every stage, seconds of a step, and what they add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd

from pivot_megatron.config.schema import Batch, Layout, ParameterRule, Precision, Recompute
from pivot_megatron.convert.plan import rows_by_parameter
from pivot_megatron.data.build import PACK_MULTIPLE
from pivot_megatron.data.plan import Size, plan_micro_batches
from pivot_megatron.model.composition import Architecture
from pivot_megatron.model.flops import Flops, SampleWork, Trained, Work, backward, forward, image_flops
from pivot_megatron.plan.machine import Machine
from pivot_megatron.plan.memory import Memory, stage_memory
from pivot_megatron.plan.model_work import Model, Weights
from pivot_megatron.plan.parameters import held
from pivot_megatron.plan.pipeline import even, interleaved
from pivot_megatron.plan.prediction import Prediction
from pivot_megatron.plan.stages import Chunk, chunks
from pivot_megatron.plan.step_time import Ends, Passage, ends, passage
from pivot_megatron.plan.workload import Lengths, Pack


@dataclass(frozen=True)
class Subject:
    """What is planned. `samples`: lengths of a global batch, or, `times` over, of a larger one. `steps` of the run, 0 where it is
    not known how many; `reference`: global batches that a frozen reference sees beforehand, once. `online`: it runs in every
    step instead. `token_multiple`: what a tensor-parallel rank's tokens are padded to."""

    arch: Architecture
    precision: Precision
    recompute: Recompute
    rules: tuple[ParameterRule, ...]
    batch: Batch
    samples: tuple[Lengths, ...]
    steps: int = 0
    reference: float = 0.0
    online: bool = False
    token_multiple: int = PACK_MULTIPLE
    times: int = 1

    @property
    def unit(self) -> str:
        """What a global batch is counted in."""
        return "pairs" if len(self.samples[0].branches) == 2 else "samples"


@dataclass(frozen=True)
class ChunkSeconds:
    """Of the mean micro-batch: its passes `forward` and `backward` through a chunk, and, of each, messages to and from other
    stages, `sends`."""

    forward: float
    backward: float
    sends: float


@dataclass(frozen=True)
class StageEstimate:
    """`layers`: of the language model. `passage`: of the mean micro-batch of the rank with the most work, `forward`: its way
    through alone. `sends`: seconds of a passage's messages that are the pipeline's own. `weights`, `chunks`: of each chunk."""

    layers: int
    weights: tuple[Weights, ...]
    memory: Memory
    passage: Passage
    forward: Passage
    chunks: tuple[ChunkSeconds, ...]
    ends: Ends

    @property
    def sends(self) -> float:
        return sum(2 * chunk.sends for chunk in self.chunks)

    @property
    def parameters(self) -> int:
        return sum(w.count for w in self.weights)

    @property
    def trained(self) -> int:
        return sum(w.trained for w in self.weights)


@dataclass(frozen=True)
class Estimate:
    """`flops`: of a step's operations over all ranks, padding and all, but for what is made anew. `packs`: micro-batches of the
    rank with the most work."""

    subject: Subject
    layout: Layout
    gpus: int
    machine: Machine
    packs: tuple[Pack, ...]
    stages: tuple[StageEstimate, ...]
    flops: float

    @cached_property
    def forward_seconds(self) -> float:
        """Of one global batch through a frozen reference."""
        if self.layout.virtual_pipeline == 1:
            return even([stage.forward.total for stage in self.stages], len(self.packs))
        ahead = tuple(tuple(chunk.forward for chunk in stage.chunks) for stage in self.stages)
        return interleaved(ahead, None, len(self.packs))

    @cached_property
    def passages_seconds(self) -> float:
        """Of a step's micro-batches, forward and backward."""
        if self.layout.virtual_pipeline == 1:
            return even([stage.passage.total for stage in self.stages], len(self.packs))
        ahead = tuple(tuple(chunk.forward + chunk.sends for chunk in stage.chunks) for stage in self.stages)
        back = tuple(tuple(chunk.backward + chunk.sends for chunk in stage.chunks) for stage in self.stages)
        return interleaved(ahead, back, len(self.packs))

    @property
    def data_parallel(self) -> int:
        return self.gpus // self.layout.model_parallel_size

    @property
    def model(self) -> Model:
        subject = self.subject
        return Model(subject.arch, self.layout, subject.precision, subject.recompute, self.machine.transformer_engine)

    def chunks_of(self, stage: int) -> tuple[Chunk, ...]:
        return tuple(chunk for chunk in chunks(self.subject.arch.head.layers, self.layout) if chunk.stage == stage)

    @cached_property
    def slowest(self) -> StageEstimate:
        return max(self.stages, key=lambda stage: stage.passage.total)

    @cached_property
    def step_seconds(self) -> float:
        """Loaders run steps ahead, so whoever is slower sets the pace."""
        return max(self.device_seconds, self.loading_seconds)

    @cached_property
    def device_seconds(self) -> float:
        """Of a step whose data are there."""
        reference = self.forward_seconds if self.subject.online else 0.0
        return self.passages_seconds + reference + self.ends_seconds

    @property
    def images(self) -> int:
        """Of a step, that the rank with the most work loads."""
        return sum(sample.images for pack in self.packs for sample in pack.samples)

    @property
    def loading_seconds(self) -> float:
        """Of a step's images on the rank with the most work; 0 where no one knows what loaders feed."""
        rate = self.machine.images_a_second
        return self.images / rate if rate else 0.0

    @cached_property
    def ends_seconds(self) -> float:
        return max(stage.ends.total for stage in self.stages)

    @property
    def samples_a_second(self) -> float:
        return self.subject.times * len(self.subject.samples) / self.step_seconds

    @property
    def tokens_a_second(self) -> float:
        """As packs have them, prefixes once."""
        return self.subject.times * sum(sample.tokens for sample in self.subject.samples) / self.step_seconds

    @property
    def utilisation(self) -> float:
        """MFU: what the model takes by count, of the devices' peak."""
        _, peak = self.peak
        return model_flops(self.subject) / (self.step_seconds * self.gpus * peak)

    @property
    def peak(self) -> tuple[str, float]:
        """(dtype, FLOP/s) that utilisation is counted against: what the language model's products are in."""
        dtype = "fp8" if self.subject.precision.fp8_of("llm") else self.subject.precision.compute
        return dtype, self.machine.rates_of(self.gpus).peak[dtype]

    @property
    def hours(self) -> float | None:
        """Of the run's steps, and of the reference pass before them; None where it is not known how many there are."""
        if not self.subject.steps:
            return None
        reference = self.subject.reference * max(self.forward_seconds, self.loading_seconds)
        return (self.subject.steps * self.step_seconds + reference) / 3600

    @property
    def fullest(self) -> int:
        """The stage of which a rank holds the most."""
        return max(range(len(self.stages)), key=lambda n: self.stages[n].memory.total)

    @property
    def peak_bytes(self) -> float:
        return self.stages[self.fullest].memory.total

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.machine.memory

    @property
    def prediction(self) -> Prediction:
        slow = self.slowest
        passages = (slow.passage + slow.forward if self.subject.online else slow.passage).scaled(len(self.packs))
        parts = {
            "data": self.step_seconds - self.device_seconds,
            "encoder": passages.encoder,
            "head": passages.head,
            "communication": passages.messages + slow.ends.gradients + slow.ends.gather,
            "optimizer": slow.ends.update,
        }
        return Prediction(
            layout=self.layout,
            data_parallel=self.data_parallel,
            step_seconds=self.step_seconds,
            parts=parts,
            idle_seconds=max(0.0, self.step_seconds - sum(parts.values())),
            peak_bytes=[int(stage.memory.total) for stage in self.stages],
        )


def estimate(subject: Subject, layout: Layout, gpus: int, machine: Machine) -> Estimate:
    """`gpus` is a multiple of the layout's model-parallel size, and the model can be cut so."""
    data_parallel = gpus // layout.model_parallel_size
    packs = busiest_packs(subject, layout, data_parallel)
    largest = max(packs, key=lambda pack: pack.tokens)
    model = Model(subject.arch, layout, subject.precision, subject.recompute, machine.transformer_engine)
    passages = _Passages(model, machine, gpus, subject.rules, packs)
    found = chunks(subject.arch.head.layers, layout)
    stages = []
    for stage in range(layout.pipeline):
        own = [chunk for chunk in found if chunk.stage == stage]
        weights = [_weights(subject.arch, layout.tensor, chunk, subject.rules) for chunk in own]
        trained = sum(w.trained for w in weights)
        times = tuple(passages.seconds(chunk, _sends(model, machine, data_parallel, chunk, largest)) for chunk in own)
        sent = Passage(messages=sum(2 * chunk.sends for chunk in times))
        passage_of = sum((passages.of(chunk) for chunk in own), sent)
        memory = stage_memory(model, machine, own, weights, largest, len(packs), data_parallel, subject.online)
        shared = _shared_words(subject.arch, layout, stage)
        stages.append(
            StageEstimate(
                layers=sum(len(chunk.layers) for chunk in own),
                weights=tuple(weights),
                memory=memory,
                passage=passage_of,
                forward=sum((passages.forward_of(chunk) for chunk in own), Passage()),
                chunks=times,
                ends=ends(trained, layout, subject.precision, machine, data_parallel, 2 / 3 * passage_of.total, shared),
            )
        )
    return Estimate(
        subject=subject,
        layout=layout,
        gpus=gpus,
        machine=machine,
        packs=packs,
        stages=tuple(stages),
        flops=sum(passages.useful_flops(chunk) for chunk in found) * layout.tensor * data_parallel,
    )


def model_flops(subject: Subject) -> float:
    """Of a step, as `metrics.jsonl` counts its own (model/flops.py): no padding, attention as if nothing were masked."""
    arch, once = subject.arch, subject.samples
    work = Work(
        images=0,
        tokens=sum(sample.tokens for sample in once),
        scores=sum(queries * keys for sample in once for queries, keys in sample.segments),
        scored=sum(sample.scored for sample in once),
        last=sum(sample.scored for sample in once),
    )
    images = (image_flops(arch, sequences) for sequences in (_sequences(arch, sample) for sample in once) if sequences)
    forwards = sum(images, Flops()) + forward(arch, work)
    return subject.times * (forwards + backward(forwards, _trained(arch, subject.rules))).total


@lru_cache(maxsize=8)
def _trained(arch: Architecture, rules: tuple[ParameterRule, ...]) -> Trained:
    return Trained.by(rows_by_parameter(arch), rules)


class _Passages:
    """Of the mean micro-batch through each chunk. Many chunks, and many packs, are alike: each kind is counted once."""

    def __init__(
        self, model: Model, machine: Machine, gpus: int, rules: tuple[ParameterRule, ...], packs: Sequence[Pack]
    ) -> None:
        self._model, self._rules = model, rules
        self._rates, self._links = machine.rates_of(gpus), machine.links(model.layout.tensor, 1, gpus)
        self._packs = Counter(packs)
        self._known: dict[tuple[object, ...], tuple[Passage, Passage, float]] = {}

    def of(self, chunk: Chunk) -> Passage:
        return self._counted(chunk)[0]

    def forward_of(self, chunk: Chunk) -> Passage:
        return self._counted(chunk)[1]

    def seconds(self, chunk: Chunk, sends: float) -> ChunkSeconds:
        both, ahead, _ = self._counted(chunk)
        return ChunkSeconds(ahead.total, both.total - ahead.total, sends)

    def useful_flops(self, chunk: Chunk) -> float:
        """Of all micro-batches; what is made anew not counted."""
        return self._counted(chunk)[2]

    def _counted(self, chunk: Chunk) -> tuple[Passage, Passage, float]:
        kind = (len(chunk.layers), *self._model.kinds("llm", chunk.layers), chunk.first, chunk.last)
        if kind not in self._known:
            weights = _weights(self._model.arch, self._model.layout.tensor, chunk, self._rules)
            works = [(self._model.work(chunk, pack, weights), n) for pack, n in self._packs.items()]
            count = sum(self._packs.values())
            both = [(passage(work, self._rates, self._links), n) for work, n in works]
            ahead = [(passage(work.forward_only, self._rates, self._links), n) for work, n in works]
            flops = sum(n * work.useful_flops for work, n in works)
            self._known[kind] = (_mean(both, count), _mean(ahead, count), flops)
        return self._known[kind]


def _mean(passages: Sequence[tuple[Passage, int]], count: int) -> Passage:
    total = sum((p.scaled(n) for p, n in passages), Passage())
    return total.scaled(1 / count)


@lru_cache(maxsize=4096)
def _weights(arch: Architecture, tensor: int, chunk: Chunk, rules: tuple[ParameterRule, ...]) -> Weights:
    """Many layouts have chunks in common."""
    return Weights.of(held(arch, Layout(tensor=tensor), chunk, rules))


def busiest_packs(subject: Subject, layout: Layout, data_parallel: int) -> tuple[Pack, ...]:
    """As the loader packs them, of the rank that gets the most work. Of a batch that is one several times over, replicas that
    share it out alike are packed once."""
    alike = gcd(subject.times, data_parallel)
    samples = subject.samples * (subject.times // alike)
    own = subject.arch, subject.rules, subject.batch, samples
    ranks = _packed(*own, data_parallel // alike, layout.micro_batch_multiple)
    multiple = layout.tensor * subject.token_multiple
    return tuple(Pack(samples, multiple) for samples in ranks)


@lru_cache(maxsize=256)
def _packed(
    arch: Architecture,
    rules: tuple[ParameterRule, ...],
    batch: Batch,
    samples: tuple[Lengths, ...],
    data_parallel: int,
    multiple: int,
) -> tuple[tuple[Lengths, ...], ...]:
    """Many layouts have their packs in common."""
    work = SampleWork(arch, _trained(arch, rules))  # as the loader weighs samples
    sizes = [
        Size(s.tokens, s.images, work.images(_sequences(arch, s)) + work.text(s.segments, s.scored)) for s in samples
    ]
    ranks = plan_micro_batches(sizes, data_parallel, batch.micro_tokens, batch.micro_images, multiple)
    busiest = max(ranks, key=lambda bins: sum(sizes[i].flops for found in bins for i in found))
    return tuple(tuple(samples[i] for i in found) for found in busiest)


def _sequences(arch: Architecture, sample: Lengths) -> list[int]:
    """Patches of each of its images."""
    return [sample.places // max(1, sample.images) - int(arch.encoder.class_token)] * sample.images


def _sends(model: Model, machine: Machine, data_parallel: int, chunk: Chunk, pack: Pack) -> float:
    """Seconds that a micro-batch's pass through a chunk sends and receives for: activations, or their gradients, in and out."""
    layout = model.layout
    if layout.pipeline == 1:
        return 0.0
    link = machine.pairs(
        layout.pipeline, layout.tensor * data_parallel, layout.model_parallel_size * data_parallel
    ).send
    size = 2 if model.precision.compute == "bf16" else 4
    sent = size * pack.tokens * model.arch.head.hidden / layout.tensor
    return (2 - chunk.first - chunk.last) * link.time(sent)


def _shared_words(arch: Architecture, layout: Layout, stage: int) -> int:
    """Entries of tied embeddings, whose gradients the first and the last stage add up."""
    if not arch.head.tied_embeddings or layout.pipeline == 1 or stage not in (0, layout.pipeline - 1):
        return 0
    return arch.head.padded_vocabulary * arch.head.hidden // layout.tensor
