"""What a run is, as frozen dataclasses. One YAML file decodes into one `RunConfig`; nothing is changed after loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field


class Strict:
    """An unknown key is an error; a number written as text (`1e-5` is text to YAML) is a number."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Component(Strict):
    """Where a part of the model starts from: exactly one of the three for encoder and llm; the projector may have none.

    `hf`: a Hugging Face folder (config and safetensors). `checkpoint`: a run's folder, its newest checkpoint, or one
    checkpoint. `fresh`: a Hugging Face folder whose config alone is used, weights drawn at random from the run's seed.
    """

    hf: Path | None = None
    checkpoint: Path | None = None
    fresh: Path | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for name in ("hf", "checkpoint", "fresh") if getattr(self, name) is not None)


@dataclass(frozen=True)
class Encoder(Component):
    """`feature_layer` indexes Hugging Face's `hidden_states`: -2 is the output of the last layer but one, -1 of the last, normed
    where the family's features are. Left out, it is the family's own: -2 for SigLIP and CLIP, -1 for the others.

    Layers past it are not built: they could not train. `image_size`: pixels a side, where it is not the checkpoint's own;
    position embeddings are interpolated. `max_patches`: of an image, where an encoder keeps aspect ratios (SigLIP2 NaFlex) and
    it is not the image processor's own number.
    """

    feature_layer: int | None = None
    image_size: int | None = None
    max_patches: int | None = None


@dataclass(frozen=True)
class Projector(Component):
    """`keep`: which of its two linears a `checkpoint` gives. With `first` the second starts fresh: the paper's "1+1" projector,
    whose first linear a rule for `projector.encoder.linear_fc1.*` then freezes.
    """

    keep: Literal["both", "first"] = "both"


@dataclass(frozen=True)
class AnyRes(Strict):
    """Each image as one square and, laid on the grid of squares that suits its shape best, as tiles (LLaVA-OneVision): black bars
    are left out of what the language model sees, and an embedding of its own ends each row of patches.

    `grids`: rows and columns of tiles that may be laid out, the first of equals winning. `max_tiles`: what takes more tokens than
    so many tiles is scaled down to them.
    """

    grids: tuple[tuple[int, int], ...] | None = None
    max_tiles: int = 9

    @property
    def every_grid(self) -> tuple[tuple[int, int], ...]:
        """`grids`, or all up to 6 by 6."""
        return self.grids or tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7))


@dataclass(frozen=True)
class Model(Strict):
    """`anyres` left out is as the projector's checkpoint has it."""

    encoder: Encoder
    llm: Component
    projector: Projector = field(default_factory=Projector)
    anyres: AnyRes | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        """Those that its components start from."""
        components: tuple[Component, ...] = (self.encoder, self.llm, self.projector)
        return tuple(getattr(component, source) for component in components for source in component.sources)


@dataclass(frozen=True)
class ParameterRule(Strict):
    """`match` is a shell-style pattern over parameter names such as `encoder.decoder.layers.0.*`; `rate` multiplies the
    learning rate, or is `frozen`. The first rule that matches a parameter holds."""

    match: str
    rate: float | Literal["frozen"]


PairLoss = Literal["sigmoid", "robust", "hinge", "ipo", "bco", "sft"]


@dataclass(frozen=True)
class Sft(Strict):
    """Mean negative log-likelihood per answer token, over the first branch (the chosen answer of a pair)."""

    kind: Literal["sft"] = "sft"


@dataclass(frozen=True)
class Dpo(Strict):
    """A weighted sum of losses over pairs. `losses` maps each one's name to its weight:

    - `sigmoid`: DPO (Rafailov et al. 2023, eq. 7), with `label_smoothing` conservative DPO.
    - `robust`: DPO that is unbiased where `label_smoothing` of the pairs are flipped (Chowdhury et al. 2024).
    - `hinge`: nothing is lost once the reward margin reaches 1 (SLiC, Zhao et al. 2023).
    - `ipo`: Azar et al. 2024, eq. 17, `beta` as its tau, each log-ratio divided by its answer's tokens, as its authors do.
    - `bco`: each answer classified against the mean reward of all earlier steps (Jung et al. 2024), 0 in the first.
    - `sft`: mean negative log-likelihood per token of the chosen answer, pair by pair.

    InternVL's MPO is `{sigmoid: 0.8, bco: 0.2, sft: 1.0}`. A file merges its losses into its bases' key by key; on the
    command line `objective.losses={ipo: 1.0}` replaces them.
    """

    kind: Literal["dpo"] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    losses: Mapping[PairLoss, float] = field(default_factory=lambda: {"sigmoid": 1.0})
    reference: Literal["cached", "online"] = "cached"


@dataclass(frozen=True)
class Source(Strict):
    """A folder of tars with an index, on this machine or behind a URL (`s3://bucket/folder`). Written as a text alone, it is
    the whole folder, once an epoch.

    `most`: of its samples, drawn by the run's seed, so many alone are used. `weight`: how often each of them stands in an epoch:
    2 is twice, 0.25 is a quarter of them, drawn by the seed, 1.5 is each once and half of them again.
    """

    folder: str
    weight: float = 1.0
    most: int | None = None


@dataclass(frozen=True)
class ShardCache(Strict):
    """Where samples of remote shards are kept that were read: at most `gib` GiB, the longest unused going first. Reference
    log-probs lie below it too, so where several nodes train on cached ones, they share this folder.
    """

    folder: Path
    gib: float = 64.0


def _source(value: Any) -> Any:
    return {"folder": str(value)} if isinstance(value, str | Path) else value


@dataclass(frozen=True)
class Data(Strict):
    """`sequence_length` counts image tokens too, per branch with its prefix.

    `image_backend`: `dali` decodes JPEGs in RGB or grey by NVIDIA DALI, on the GPU where there is one, and takes all else as
    `torch` does. `workers` change neither the batches nor their order.
    """

    shards: tuple[Annotated[Source, BeforeValidator(_source)], ...]
    cache: ShardCache | None = None
    template: Literal["qwen_1_5", "plain", "tokenizer"] = "qwen_1_5"
    sequence_length: int = 2048
    too_long: Literal["drop", "truncate"] = "drop"
    image_backend: Literal["pil", "torch", "dali"] = "torch"
    workers: int = 4
    on_bad_sample: Literal["stop", "skip"] = "stop"
    max_bad_share: float = 0.01


@dataclass(frozen=True)
class Optimizer(Strict):
    learning_rate: float
    minimum_learning_rate: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_fraction: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_gradient: float = 1.0


@dataclass(frozen=True)
class Batch(Strict):
    """`global_size` samples (pairs) a step over all ranks, packed into micro-batches of up to `micro_tokens` tokens and
    `micro_images` images; a sample past either goes alone. One of `epochs` and `steps`."""

    global_size: int
    micro_tokens: int
    micro_images: int | None = None
    epochs: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Layout(Strict):
    """Parallelism. Data parallelism is what the number of processes leaves. Sequence parallelism goes with tensor > 1.

    `cpu_threads`: of each process, where the model runs on CPU; null is its share of the machine's cores.
    `virtual_pipeline`: chunks of LLM layers on each pipeline stage, visited in turn, which fills a pipeline sooner and
    sends more (megatron-core's interleaved schedule).
    `overlap_bucket_size`: parameters that are reduced or gathered together where that overlaps; null lets megatron-core choose.
    `first_stage_layers` / `last_stage_layers`: LLM layers on those pipeline stages, where the encoder (first) or the
    output layer (last) make an even split uneven in time.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    overlap_gradient_reduce: bool = False
    overlap_parameter_gather: bool = False
    overlap_bucket_size: int | None = None
    cpu_threads: int | None = None

    @property
    def model_parallel_size(self) -> int:
        return self.tensor * self.pipeline

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1

    @property
    def micro_batch_multiple(self) -> int:
        """What the number of a rank's micro-batches divides by: the interleaved schedule goes by groups of as many as stages."""
        return self.pipeline if self.virtual_pipeline > 1 else 1

    @property
    def chunks(self) -> int | None:
        """`virtual_pipeline` as megatron-core takes it: None where a stage is one piece."""
        return self.virtual_pipeline if self.virtual_pipeline > 1 else None


Fp8Recipe = Literal["delayed", "tensorwise", "blockwise"]


@dataclass(frozen=True)
class Fp8(Strict):
    """Which layers compute in FP8, by a Transformer Engine recipe: the four linears of each of their transformer layers. Written
    as a text alone, it is the recipe. Attention, the projector, embeddings and the output layer stay in `compute`, and so does
    all of a reference model.

    `tensorwise` scales a tensor by its own largest value, `delayed` by that of earlier micro-batches, `blockwise` each 128 by
    128 of a weight and each 128 of a token's values.
    """

    recipe: Fp8Recipe
    encoder: bool = True
    llm: bool = True
    first_layers_bf16: int = 0
    last_layers_bf16: int = 0


def _fp8(value: Any) -> Any:
    return {"recipe": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class Precision(Strict):
    """`fp8` null leaves every GEMM in `compute`. Master weights and Adam are fp32."""

    compute: Literal["bf16", "fp32"] = "bf16"
    fp8: Annotated[Fp8 | None, BeforeValidator(_fp8)] = None

    def fp8_of(self, part: Literal["encoder", "llm"]) -> Fp8 | None:
        """Null where `part` stays in `compute`."""
        return self.fp8 if self.fp8 is not None and getattr(self.fp8, part) else None


@dataclass(frozen=True)
class Recompute(Strict):
    """Activations computed again in the backward pass: none, the core attention only, or every layer."""

    encoder: Literal["none", "selective", "full"] = "none"
    llm: Literal["none", "selective", "full"] = "none"


@dataclass(frozen=True)
class KeepBest(Strict):
    """The `count` checkpoints with the smallest (or `largest`) mean of a metric over the steps since the checkpoint before."""

    metric: str
    count: int = 1
    largest: bool = False


@dataclass(frozen=True)
class Checkpoints(Strict):
    """`every` steps (and always at the end). The newest `keep` stay, and what `keep_every` or `keep_best` asks for.

    `asynchronous`: training goes on from a copy on the host, as large as what a process saves, while that is written; such a save
    is put off for as long as the one before is being written, or where it would hold up training for more than
    `most_blocked` of the time since that one began. The last step's never is.
    """

    every: int = 100
    keep: int = 2
    keep_every: int | None = None
    keep_best: KeepBest | None = None
    asynchronous: bool = False
    most_blocked: float = 0.05


@dataclass(frozen=True)
class Faults(Strict):
    """What becomes of a step that would do harm, and of a process that does not get on.

    A step whose loss or gradient norm is not finite is not applied: weights, optimizer and schedule stay as they are, the data
    goes on, and `faults.jsonl` in the run's folder names step, samples, modules and parameters. With `spike_factor` f, neither
    is one that spikes, measured against the medians of the last `spike_window` steps that were applied, once there are as
    many: its loss lies above median + (f - 1) * max(|median|, 0.1), or its gradient norm above
    f * max(median, optimizer.clip_gradient).

    A process that gives no sign of life for `seconds_silent`, or holds the others up for longer than its time, ends the job and
    is named; what every process was doing is then in the run's folder `stacks`.
    """

    most_skipped: int = 3
    spike_factor: float | None = None
    spike_window: int = 50
    seconds_to_hang: float = 600.0
    seconds_for_files: float = 1800.0
    seconds_silent: float = 60.0
    straggler_factor: float = 1.5
    straggler_steps: int = 20


def _off(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


@dataclass(frozen=True)
class Tracking(Strict):
    """Who is told, beside `metrics.jsonl`, what is written there, step by step. It needs the `tracking` extra.

    wandb's files are in the run's folder `wandb`, TensorBoard's in `tensorboard`. Where wandb's server cannot be reached an
    `online` run goes on `offline`; neither ever ends a run, or holds it up.
    """

    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(_off)] = "off"
    project: str = "pivot"
    tensorboard: bool = False

    @property
    def asked(self) -> bool:
        """Whether anyone is told."""
        return self.wandb != "off" or self.tensorboard


@dataclass(frozen=True)
class RunConfig(Strict):
    name: str
    out: Path
    model: Model
    objective: Annotated[Sft | Dpo, Field(discriminator="kind")]
    data: Data
    optimizer: Optimizer
    batch: Batch
    parameters: tuple[ParameterRule, ...] = ()
    layout: Layout = field(default_factory=Layout)
    precision: Precision = field(default_factory=Precision)
    recompute: Recompute = field(default_factory=Recompute)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    faults: Faults = field(default_factory=Faults)
    tracking: Tracking = field(default_factory=Tracking)
    seed: int = 777
