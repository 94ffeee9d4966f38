"""Bytes that a rank of each pipeline stage holds at its fullest moment: the end of the last micro-batch's forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pivot_megatron.config.schema import Layout, Precision
from pivot_megatron.families.architecture import HeadArchitecture
from pivot_megatron.model.vocabulary import tile_shape
from pivot_megatron.plan.layer_work import LayerShape, Numbers
from pivot_megatron.plan.machine import Machine
from pivot_megatron.plan.model_work import Model, Weights, encoder_layer, head_layer
from pivot_megatron.plan.stages import Chunk
from pivot_megatron.plan.workload import Pack


@dataclass(frozen=True)
class Memory:
    """In bytes. `copies`: of linears' weights, in FP8. `activations`: of the language model's layers, those of every micro-batch
    in flight; `encoder`: the same of encoder and projector. `logits`: tiles of them and what stands beside. `working`: what a
    layer's backward pass makes for itself, and a recomputed layer's own activations. `reduction`: what is copied to reduce
    gradients over replicas. `reference`: a frozen model's weights where it is online. `process`: what is there before any model
    is, buffers of the collectives too."""

    weights: float
    copies: float
    gradients: float
    optimizer: float
    activations: float
    encoder: float
    logits: float
    working: float
    reduction: float
    reference: float
    process: float

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))


def weight_bytes(precision: Precision) -> int:
    return 2 if precision.compute == "bf16" else 4


def stage_memory(
    model: Model,
    machine: Machine,
    chunks: Sequence[Chunk],
    weights: Sequence[Weights],
    pack: Pack,
    micro_batches: int,
    data_parallel: int,
    online_reference: bool,
) -> Memory:
    """`chunks` of one stage, with the `weights` of each. `pack`: the largest micro-batch."""
    size = weight_bytes(model.precision)
    count, trained = sum(w.count for w in weights), sum(w.trained for w in weights)
    # Two moments, and with 16-bit weights a master copy: all float32, split over the replicas.
    optimizer = (8 if size == 4 else 12) * trained / data_parallel
    head = head_layer(model.arch.head)
    numbers, kinds = model.numbers(), stage_kinds(model, chunks)
    last = any(chunk.last for chunk in chunks)
    mode = model.recompute.llm
    kept = sum(n * kept_bytes(head, how, pack.tokens, pack.keys, mode) for how, n in kinds.items())
    alive = in_flight(model.layout, chunks[0].stage, micro_batches)
    activations = alive * kept
    if last:  # its last layer, of which one micro-batch is in flight, keeps past its attention what is of answers alone
        ((how, _),) = model.kinds("llm", range(model.arch.head.layers)[-1:])
        activations -= _past_attention(head, how, pack.tokens - pack.scored, mode)
    trains = any(w.encoder for w in weights)
    images = encoder_in_flight(model.layout, micro_batches)
    encoder, vision_working = _vision(model, pack, images, trains) if chunks[0].first else (0.0, 0.0)
    whole = list(kinds) if kinds.total() > last else []
    working = max((_working(head, how, pack.tokens, pack.keys, mode) for how in whole), default=0.0)
    return Memory(
        weights=size * count,
        copies=sum(n * each for n, each in copied_weights(model, machine, chunks, trains)),
        gradients=4.0 * trained,
        optimizer=optimizer,
        activations=activations + 2 * _stream(head, numbers, pack.tokens) * alive,
        encoder=encoder,
        logits=_logits(machine.logits_tile, pack, model.arch.head, numbers) if last else 0.0,
        working=max(working, vision_working),
        reduction=4.0 * trained * machine.reduction_copy if data_parallel > 1 else 0.0,
        reference=size * count if online_reference else 0.0,
        process=machine.process,
    )


def stage_kinds(model: Model, chunks: Sequence[Chunk]) -> Counter[Numbers]:
    """How the language model's layers of a stage compute, and how many compute so."""
    found: Counter[Numbers] = Counter()
    for chunk in chunks:
        found.update(dict(model.kinds("llm", chunk.layers)))
    return found


def copied_weights(
    model: Model, machine: Machine, chunks: Sequence[Chunk], encoder_trains: bool
) -> list[tuple[int, int]]:
    """(weights, bytes of each) that Transformer Engine holds in FP8 beside those in 16 bits, from a step's first micro-batch on:
    as they are, and where gradients go through them also transposed, if the recipe scales by block or the device's products in
    FP8 take no other side (module/linear.py, tensor/float8_tensor.py)."""
    fp8, tensor = model.precision.fp8, model.layout.tensor
    if fp8 is None:
        return []
    both = 2 if fp8.recipe == "blockwise" or machine.fp8_transposes else 1
    layers = [(head_layer(model.arch.head), stage_kinds(model, chunks), both)]
    if chunks[0].first:
        layers.append(
            (encoder_layer(model.arch.encoder), Counter(dict(model.kinds("encoder"))), both if encoder_trains else 1)
        )
    return [
        (count * sum(rows * columns for _, rows, columns in layer.linears(tensor)), each)
        for layer, kinds, each in layers
        for numbers, count in kinds.items()
        if numbers.recipe
    ]


def in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once, an interleaved stage's chunks counted as parts of one: as
    megatron-core's schedules warm up, 1F1B (Narayanan et al. 2021, section 2.2) and interleaved."""
    stages, chunks = layout.pipeline, layout.virtual_pipeline
    if chunks == 1:
        return float(min(micro_batches, stages - stage))
    warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    return min(micro_batches * chunks, warm_up) / chunks


def encoder_in_flight(layout: Layout, micro_batches: int) -> int:
    """Micro-batches whose images' activations the first stage holds at once. They pass through its first chunk, which an
    interleaved schedule fills for a second round of the stages before the first round comes back."""
    return min(micro_batches, layout.pipeline * (1 if layout.virtual_pipeline == 1 else 2))


def kept_bytes(
    layer: LayerShape, numbers: Numbers, tokens: int, keys: int, mode: Literal["none", "selective", "full"]
) -> float:
    """What one layer keeps for its backward pass: its input alone, if it is made anew; else the inputs of norms, products and
    activation, and queries, keys, values and output of attention. Where attention is made anew it keeps what came out of qkv,
    of which grouped queries are a copy. In FP8 the inputs of linears take a byte; but proj keeps attention's output as it came,
    with `delayed` its own cast of it beside what attention keeps (megatron-core's attention.py)."""
    stream = _stream(layer, numbers, tokens)
    if mode == "full":
        return stream
    query, key = layer.query_width(numbers.tensor), layer.key_width(numbers.tensor)
    if mode == "selective":
        copied = query if layer.groups < layer.heads else 0
        attention = float(tokens * (query + (query + 2 * key) + copied))
    else:
        attention = tokens * query * 3.0 + keys * key * 2.0
    cast = 0.0
    if numbers.recipe == "delayed":
        cast = float(tokens * query) * (1 if mode == "none" else 1 - numbers.size)
    return 2 * stream + 2 * _saved(stream, numbers) + numbers.size * attention + cast + _mlp(layer, numbers, tokens)


def _saved(size: float, numbers: Numbers) -> float:
    """Bytes of a linear's input that is `size` in the activations' type."""
    return size / numbers.size if numbers.recipe else size


def _mlp(layer: LayerShape, numbers: Numbers, tokens: int) -> float:
    """Bytes that the MLP keeps: the activation's input, gate and value where gated, and its output, which is fc2's input."""
    one = numbers.size * tokens * layer.ffn / numbers.tensor
    return (2 if layer.gated else 1) * one + _saved(one, numbers)


def _past_attention(layer: LayerShape, numbers: Numbers, tokens: int, mode: str) -> float:
    """Of `tokens`, what a layer keeps past its attention."""
    if mode == "full":
        return 0.0
    stream = _stream(layer, numbers, tokens)
    return stream + _saved(stream, numbers) + _mlp(layer, numbers, tokens)


def _stream(layer: LayerShape, numbers: Numbers, tokens: float) -> float:
    """The residual stream, which sequence parallelism splits over tokens."""
    return numbers.size * tokens * layer.hidden / numbers.tensor


def _working(layer: LayerShape, numbers: Numbers, tokens: int, keys: int, mode: str) -> float:
    """The MLP's two widest gradients with the stream's, and a recomputed layer's activations; with tensor parallelism also the
    whole sequence, gathered."""
    gradients = 4 * numbers.size * tokens * layer.ffn / numbers.tensor
    gathered = numbers.size * tokens * layer.hidden * (2 if numbers.tensor > 1 else 1)
    again = kept_bytes(layer, numbers, tokens, keys, "none") if mode == "full" else 0.0
    return gradients + gathered + again


def _vision(model: Model, pack: Pack, alive: int, trains: bool) -> tuple[float, float]:
    """(kept, working) bytes of encoder and projector. A frozen encoder has no backward pass to keep anything for."""
    arch, tensor, numbers, kinds = model.arch, model.layout.tensor, model.numbers(), model.kinds("encoder")
    layer, (images, places) = encoder_layer(arch.encoder), pack.images(arch.encoder.places)
    kept = sum(n * kept_bytes(layer, how, places, places, model.recompute.encoder) for how, n in kinds)
    pixels = 4.0 * images * 3 * arch.encoder.image_size**2
    # The projector's input, its activation's input and output, and its own output, whole.
    projector = numbers.size * places * (arch.encoder.hidden / tensor + (2 / tensor + 1) * arch.head.hidden)
    if not trains:
        return alive * projector + pixels, 0.0
    working = max(_working(layer, how, places, places, model.recompute.encoder) for how, _ in kinds)
    return alive * (kept + projector) + pixels, working


def _logits(tile: float, pack: Pack, head: HeadArchitecture, numbers: Numbers) -> float:
    """Hidden states of all answers twice, and a tile; with 16-bit activations also its slope in theirs, and the weight's gradient
    for it."""
    tokens, words = tile_shape(pack.scored, head.hidden, numbers.size, int(tile))
    words = min(words, head.padded_vocabulary // numbers.tensor)
    beside = 0 if numbers.size == 4 else words * (numbers.size * tokens + 4 * head.hidden)
    return 4.0 * words * tokens + beside + pack.scored * head.hidden * (4 + numbers.size)
