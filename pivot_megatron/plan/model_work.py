"""What one micro-batch costs one chunk of a pipeline, kernel by kernel, on one tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pivot_megatron.config.schema import Layout, Precision, Recompute
from pivot_megatron.families.architecture import EncoderArchitecture, HeadArchitecture
from pivot_megatron.model.composition import Architecture
from pivot_megatron.plan import layer_work
from pivot_megatron.plan.layer_work import LayerShape, Numbers, Operation, messages, product
from pivot_megatron.plan.parameters import Held
from pivot_megatron.plan.stages import Chunk
from pivot_megatron.plan.workload import Pack

Part = Literal["encoder", "head"]
_LOGITS_PASSES = 6.0
"""Times that a tile of float32 logits is read or written, forward or backward, beside its products."""


@dataclass(frozen=True)
class Weights:
    """Of a chunk: how many, and how many of them train; `encoder`, `projector`, `llm`: the share of each that trains. `added`: by
    part, the numbers of weights and of tensors whose gradients are added up in a pass of their own."""

    count: int
    trained: int
    encoder: float
    projector: float
    llm: float
    added: tuple[tuple[Part, int, int], ...]

    @classmethod
    def of(cls, parameters: Sequence[Held]) -> Weights:
        def share(part: str) -> float:
            counts = [(p.count, p.trains) for p in parameters if p.name.startswith(part + ".")]
            return sum(count for count, trains in counts if trains) / max(1, sum(count for count, _ in counts))

        training = [p for p in parameters if p.trains]
        vision = [p.count for p in training if not p.name.startswith("llm.")]
        # The vocabulary's two ends add theirs straight to the buffer.
        layers = [p.count for p in training if p.name.startswith("llm.") and "decoder." in p.name]
        return cls(
            count=sum(p.count for p in parameters),
            trained=sum(p.count for p in training),
            encoder=share("encoder"),
            projector=share("projector"),
            llm=share("llm"),
            added=(("encoder", sum(vision), len(vision)), ("head", sum(layers), len(layers))),
        )


@dataclass(frozen=True)
class Work:
    """Of one chunk on one micro-batch. What is recomputed stands in the backward pass of its part."""

    forward: Mapping[Part, tuple[Operation, ...]]
    backward: Mapping[Part, tuple[Operation, ...]]

    @property
    def useful_flops(self) -> float:
        """What is made anew not counted, nor the scores that attention's backward pass makes anew: one product of its five."""
        ahead = sum(op.flops for ops in self.forward.values() for op in ops)
        back = (op for ops in self.backward.values() for op in ops if not op.name.endswith("again"))
        return ahead + sum(op.flops * (0.8 if op.kind == "attention" else 1.0) for op in back)

    @property
    def forward_only(self) -> Work:
        return Work(self.forward, {"encoder": (), "head": ()})


def encoder_layer(arch: EncoderArchitecture) -> LayerShape:
    return LayerShape(
        hidden=arch.hidden,
        heads=arch.heads,
        groups=arch.heads,
        head_dim=arch.head_dim,
        ffn=arch.padded_ffn,
        gated=arch.gated,
        causal=False,
        biased=True,
    )


def head_layer(arch: HeadArchitecture) -> LayerShape:
    return LayerShape(
        hidden=arch.hidden,
        heads=arch.heads,
        groups=arch.groups,
        head_dim=arch.head_dim,
        ffn=arch.ffn,
        gated=True,
        causal=True,
        biased=False,
    )


@dataclass(frozen=True)
class Model:
    """All that decides a chunk's work but its pack."""

    arch: Architecture
    layout: Layout
    precision: Precision
    recompute: Recompute
    fused: bool  # Transformer Engine's layers, whose products add weight gradients up themselves

    def numbers(self) -> Numbers:
        """Of all that is not in FP8."""
        return Numbers(self.precision.compute, self.layout.tensor, self.fused)

    def kinds(self, part: Literal["encoder", "llm"], layers: range | None = None) -> list[tuple[Numbers, int]]:
        """How `layers` compute, by their index in the part, all of them where it is left out; and how many compute so."""
        of = self.arch.encoder_layers if part == "encoder" else self.arch.head.layers
        layers, plain, fp8 = range(of) if layers is None else layers, self.numbers(), self.precision.fp8_of(part)
        found = [(plain, len(layers))]
        if fp8:
            eight = len(range(max(layers.start, fp8.first_layers_bf16), min(layers.stop, of - fp8.last_layers_bf16)))
            found = [(replace(plain, recipe=fp8.recipe), eight), (plain, len(layers) - eight)]
        return [(numbers, count) for numbers, count in found if count]

    def work(self, chunk: Chunk, pack: Pack, weights: Weights) -> Work:
        encoder_forward, encoder_backward = self._vision(pack, weights) if chunk.first else ([], [])
        head_forward, head_backward = self._layers(chunk, pack, weights)
        if chunk.first:
            head_forward = [*self._words(pack), *head_forward]
        if chunk.last:
            forward, backward = self._logits(pack, weights)
            head_forward, head_backward = [*head_forward, *forward], [*head_backward, *backward]
        backwards: dict[Part, list[Operation]] = {"encoder": encoder_backward, "head": head_backward}
        return Work(
            forward={"encoder": tuple(encoder_forward), "head": tuple(head_forward)},
            backward={part: (*backwards[part], *self._adding(count, n)) for part, count, n in weights.added},
        )

    def _adding(self, count: int, tensors: int) -> tuple[Operation, ...]:
        """Weight gradients into the data-parallel buffer, which is float32."""
        if not count:
            return ()
        size = 2 if self.precision.compute == "bf16" else 4
        each = 8.0 if self.fused else 8.0 + 2 * size  # alone, a gradient is written and read once more
        return (Operation("adding up weight gradients", "elementwise", traffic=each * count, launches=tensors),)

    def _vision(self, pack: Pack, trained: Weights) -> tuple[list[Operation], list[Operation]]:
        arch, numbers = self.arch.encoder, self.numbers()
        layer, (images, places) = encoder_layer(arch), pack.images(arch.places)
        segments = [(places // images, places // images)] * images
        patches = places - images * int(arch.class_token)
        embedding = product(
            "patch embedding", patches, arch.hidden, 3 * arch.patch_size**2, numbers.dtype, numbers.size
        )
        forward, backward = [embedding], []
        if trained.encoder:
            backward.append(replace(embedding, name="patch embedding, towards its weight"))
        for how, times in self.kinds("encoder"):
            once = layer_work.forward(layer, how, places, segments, None)
            forward += _repeated(once, times)
            if trained.encoder:
                back = layer_work.backward(layer, how, places, segments, None, weights_train=True)
                again = self._again(once, self.recompute.encoder)
                backward += _repeated([*again, *_share(back, trained.encoder)], times)
        projector_forward, projector_backward = self._projector(pack, trained)
        return [*forward, *projector_forward], [*projector_backward, *backward]

    def _projector(self, pack: Pack, trained: Weights) -> tuple[list[Operation], list[Operation]]:
        encoder, head, tensor = self.arch.encoder, self.arch.head, self.layout.tensor
        numbers = self.numbers()
        (_, places), width = pack.images(encoder.places), head.hidden
        linears = (("projector fc1", width // tensor, encoder.hidden), ("projector fc2", width, width // tensor))

        def products(suffix: str, turned: bool, weights: bool) -> list[Operation]:
            found = []
            for name, n, k in linears:
                m, n, k = (n, k, places) if weights else (places, *((k, n) if turned else (n, k)))
                found.append(product(name + suffix, m, n, k, numbers.gemm, numbers.size))
            return found

        gathered = messages(numbers, head.hidden, "gather", [places, places])
        forward = [*products("", False, False), *gathered]
        backward = (
            [*products(", towards its input", True, False), *gathered] if trained.encoder or trained.projector else []
        )
        if trained.projector:
            backward += _share(products(", towards its weight", False, True), trained.projector)
        return forward, backward

    def _words(self, pack: Pack) -> list[Operation]:
        """Word embeddings, with the images' features put in their places."""
        numbers = self.numbers()
        touched = 6.0 * pack.tokens * self.arch.head.hidden * numbers.size
        return [
            Operation("word embeddings", "elementwise", traffic=touched, launches=8),
            *messages(numbers, self.arch.head.hidden, "reduce", [pack.tokens]),
        ]

    def _layers(self, chunk: Chunk, pack: Pack, trained: Weights) -> tuple[list[Operation], list[Operation]]:
        shape, segments = head_layer(self.arch.head), pack.segments
        forward: list[Operation] = []
        backward: list[Operation] = []
        whole = chunk.layers[:-1] if chunk.last else chunk.layers
        ways: list[tuple[int | None, tuple[Numbers, int]]] = [(None, kind) for kind in self.kinds("llm", whole)]
        ways += [(pack.scored, kind) for kind in self.kinds("llm", chunk.layers[len(whole) :])]
        for past_attention, (numbers, times) in ways:
            once = layer_work.forward(shape, numbers, pack.tokens, segments, past_attention)
            back = layer_work.backward(
                shape, numbers, pack.tokens, segments, past_attention, weights_train=trained.llm > 0
            )
            forward += _repeated(once, times)
            backward += _repeated([*self._again(once, self.recompute.llm), *_share(back, trained.llm)], times)
        return forward, backward

    def _logits(self, pack: Pack, trained: Weights) -> tuple[list[Operation], list[Operation]]:
        arch, numbers = self.arch.head, self.numbers()
        tokens, words, width = pack.scored, arch.padded_vocabulary // self.layout.tensor, arch.hidden
        logits = product("logits", tokens, words, width, numbers.dtype, 4)
        passes = Operation("softmax over tiles", "elementwise", traffic=_LOGITS_PASSES * 4 * tokens * words, launches=8)
        forward = [logits, passes]
        # Sums over tiles are float32, in which a 16-bit product stands by itself once before it is added.
        summed = 8 if numbers.dtype == "fp32" else 16
        backward = [
            replace(logits, name="logits, again"),
            replace(passes, name="their gradient"),
            product("logits, towards their input", tokens, width, words, numbers.dtype, summed),
        ]
        if trained.llm:
            backward.append(product("logits, towards their weight", words, width, tokens, numbers.dtype, summed))
        gathered = messages(numbers, width, "gather", [tokens])
        return [*forward, *gathered], [*backward, *messages(replace(numbers, dtype="fp32"), width, "reduce", [tokens])]

    def _again(self, once: list[Operation], mode: str) -> list[Operation]:
        kept = {"none": [], "selective": [op for op in once if op.kind == "attention"], "full": once}[mode]
        return [replace(op, name=f"{op.name}, again") for op in kept]


def _repeated(operations: Iterable[Operation], times: int) -> list[Operation]:
    """As many times over: every cost is linear in them."""
    return [_scaled(op, times) for op in operations] if times else []


def _scaled(op: Operation, factor: float) -> Operation:
    costs = (op.flops * factor, op.traffic * factor, op.launches * factor)
    return Operation(op.name, op.kind, *costs, op.dtype, op.collective)


def _share(operations: Iterable[Operation], trained: float) -> list[Operation]:
    """Products towards weights as far as these train, all else whole."""
    return [
        _scaled(op, trained) if op.name.endswith("towards its weight") else op
        for op in operations
        if trained or not op.name.endswith("towards its weight")
    ]
