"""Rules across fields: everything that can be seen to be wrong before a model is built."""

from __future__ import annotations

from collections.abc import Iterator

from pivot_megatron.config.schema import Checkpoints, Component, Dpo, Faults, Layout, Precision, RunConfig, Tracking


def problems(config: RunConfig) -> list[str]:
    """Every broken rule as `dotted.path: what is wrong, what to do`; empty if the config can be run."""
    return [
        *_components(config),
        *_batch(config),
        *_layout(config.layout),
        *_precision(config.precision),
        *_optimizer(config),
        *_objective(config),
        *_checkpoints(config.checkpoints),
        *_faults(config.faults),
        *tracking_problems(config.tracking),
    ]


def _components(config: RunConfig) -> Iterator[str]:
    model = config.model
    for name, component, needed in (
        ("encoder", model.encoder, True),
        ("llm", model.llm, True),
        ("projector", model.projector, False),
    ):
        yield from _component(name, component, needed)
    if model.projector.keep != "both" and model.projector.checkpoint is None:
        yield "model.projector.keep: expected a checkpoint: whose first linear is kept, found none"
    if model.encoder.feature_layer is not None and model.encoder.feature_layer >= 0:
        yield (
            f"model.encoder.feature_layer: counts from the end, so it must be negative (-2 is the last layer but one), "
            f"found {model.encoder.feature_layer}"
        )
    for key in ("image_size", "max_patches"):
        if (number := getattr(model.encoder, key)) is not None and number < 1:
            yield f"model.encoder.{key}: must be at least 1, found {number}"
    if model.anyres is not None:
        if any(n < 1 for grid in model.anyres.every_grid for n in grid):
            yield f"model.anyres.grids: [rows, columns] of at least one tile each, found {model.anyres.grids}"
        if model.anyres.max_tiles < 1:
            yield f"model.anyres.max_tiles: must be at least 1, found {model.anyres.max_tiles}"


def _component(name: str, component: Component, needed: bool) -> Iterator[str]:
    sources = component.sources
    if len(sources) > 1:
        yield f"model.{name}: one of hf, checkpoint, fresh, found {' and '.join(sources)}"
    if not sources and needed:
        yield f"model.{name}: one of hf, checkpoint, fresh must say where it starts from, found none"
    if name == "projector" and component.hf is not None:
        yield "model.projector.hf: a projector comes from a checkpoint or starts fresh (leave it out)"


def _batch(config: RunConfig) -> Iterator[str]:
    batch = config.batch
    if batch.global_size < 1:
        yield f"batch.global_size: must be at least 1, found {batch.global_size}"
    for key in ("micro_tokens", "micro_images"):
        if (most := getattr(batch, key)) is not None and most < 1:
            yield f"batch.{key}: must be at least 1, found {most}"
    if (batch.epochs is None) == (batch.steps is None):
        yield "batch: exactly one of epochs and steps says how long the run is"
    for key in ("epochs", "steps"):
        value = getattr(batch, key)
        if value is not None and value <= 0:
            yield f"batch.{key}: must be positive, found {value}"


def _layout(layout: Layout) -> Iterator[str]:
    for key in ("tensor", "pipeline", "virtual_pipeline"):
        if getattr(layout, key) < 1:
            yield f"layout.{key}: must be at least 1, found {getattr(layout, key)}"
    for key in ("first_stage_layers", "last_stage_layers"):
        if getattr(layout, key) is not None and layout.pipeline == 1:
            yield f"layout.{key}: has a meaning only with pipeline > 1; leave it out"
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        yield "layout.virtual_pipeline: has a meaning only with pipeline > 1; leave it out"
    if layout.overlap_bucket_size is not None and layout.overlap_bucket_size < 1:
        yield f"layout.overlap_bucket_size: must be at least 1, found {layout.overlap_bucket_size}"
    if layout.cpu_threads is not None and layout.cpu_threads < 1:
        yield f"layout.cpu_threads: must be at least 1, found {layout.cpu_threads}"
    if layout.overlap_parameter_gather and not layout.overlap_gradient_reduce:
        yield "layout.overlap_parameter_gather: needs overlap_gradient_reduce: true"


def _precision(precision: Precision) -> Iterator[str]:
    fp8 = precision.fp8
    if fp8 is None:
        return
    if precision.compute != "bf16":
        yield f"precision.compute: FP8 layers take and give bf16, found {precision.compute}; set bf16, or precision.fp8: null"
    if not (fp8.encoder or fp8.llm):
        yield "precision.fp8: neither encoder nor llm is in FP8; set one of them true, or precision.fp8: null"
    kept = {key: getattr(fp8, key) for key in ("first_layers_bf16", "last_layers_bf16")}
    for key, layers in kept.items():
        if layers < 0:
            yield f"precision.fp8.{key}: must not be negative (0 keeps none), found {layers}"
    if fp8.recipe == "delayed" and any(layers > 0 for layers in kept.values()):
        yield (
            "precision.fp8.recipe: `delayed` scales all layers of a model together and can keep none in bf16; "
            "use tensorwise or blockwise, or set first_layers_bf16 and last_layers_bf16 to 0"
        )


def _optimizer(config: RunConfig) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.learning_rate <= 0:
        yield f"optimizer.learning_rate: must be positive, found {optimizer.learning_rate}"
    if not 0 <= optimizer.minimum_learning_rate <= optimizer.learning_rate:
        yield (
            f"optimizer.minimum_learning_rate: must be between 0 and learning_rate {optimizer.learning_rate}, "
            f"found {optimizer.minimum_learning_rate}"
        )
    if config.seed < 0:
        yield f"seed: must not be negative, found {config.seed}"
    if not 0 <= optimizer.warmup_fraction < 1:
        yield f"optimizer.warmup_fraction: must be in [0, 1), found {optimizer.warmup_fraction}"
    for key, low, high in (("beta1", 0.0, 1.0), ("beta2", 0.0, 1.0)):
        if not low <= getattr(optimizer, key) < high:
            yield f"optimizer.{key}: must be in [{low:g}, {high:g}), found {getattr(optimizer, key)}"
    if optimizer.epsilon <= 0:
        yield f"optimizer.epsilon: must be positive, found {optimizer.epsilon}"
    for key in ("weight_decay", "clip_gradient"):
        if getattr(optimizer, key) < 0:
            yield f"optimizer.{key}: must not be negative (0 is none), found {getattr(optimizer, key)}"
    for i, rule in enumerate(config.parameters):
        if rule.rate != "frozen" and rule.rate <= 0:
            yield f"parameters.{i}.rate: a positive factor or `frozen`, found {rule.rate}"


def _losses(objective: Dpo) -> Iterator[str]:
    losses, smoothing = objective.losses, objective.label_smoothing
    if not losses:
        yield "objective.losses: at least one loss with its weight, such as {sigmoid: 1.0}, found none"
    for name, weight in losses.items():
        if weight <= 0:
            yield f"objective.losses.{name}: must be positive (leave out what has no weight), found {weight}"
    if set(losses) == {"sft"}:
        yield "objective.losses: `sft` alone compares no answers; use `kind: sft`, which needs no reference model"
    if "robust" in losses and smoothing == 0:
        yield "objective.label_smoothing: `robust` needs the share of flipped pairs, more than 0 and under 0.5, found 0"
    if losses and smoothing and not losses.keys() & {"sigmoid", "robust"}:
        yield (
            f"objective.label_smoothing: acts on `sigmoid` and `robust` alone, "
            f"found {smoothing} with {', '.join(losses)}; leave it out"
        )


def _objective(config: RunConfig) -> Iterator[str]:
    objective = config.objective
    if objective.kind == "dpo":
        if objective.beta <= 0:
            yield f"objective.beta: must be positive, found {objective.beta}"
        if not 0 <= objective.label_smoothing < 0.5:
            yield f"objective.label_smoothing: must be in [0, 0.5), found {objective.label_smoothing}"
        yield from _losses(objective)
        if config.data.too_long == "truncate":
            yield "data.too_long: `truncate` would cut answers whose whole log-prob DPO compares; use `drop`"
    if not 0 <= config.data.max_bad_share <= 1:
        yield f"data.max_bad_share: must be in [0, 1], found {config.data.max_bad_share}"
    if config.data.sequence_length < 1:
        yield f"data.sequence_length: must be positive, found {config.data.sequence_length}"
    if config.data.workers < 0:
        yield f"data.workers: must not be negative (0 is none), found {config.data.workers}"
    if not config.data.shards:
        yield "data.shards: at least one folder of shards, found none"
    for number, source in enumerate(config.data.shards):
        if not source.weight > 0:
            yield f"data.shards.{number}.weight: must be positive, found {source.weight}"
        if source.most is not None and source.most < 1:
            yield f"data.shards.{number}.most: must be at least 1, found {source.most}"
        if "://" in source.folder and config.data.cache is None:
            yield f"data.cache: needed for {source.folder}; set data.cache.folder to a folder on this machine's disk"
    if config.data.cache is not None and not config.data.cache.gib > 0:
        yield f"data.cache.gib: must be positive, found {config.data.cache.gib}"


def _checkpoints(checkpoints: Checkpoints) -> Iterator[str]:
    for key in ("every", "keep"):
        if getattr(checkpoints, key) < 1:
            yield f"checkpoints.{key}: must be at least 1, found {getattr(checkpoints, key)}"
    stays = checkpoints.keep_every
    if stays is not None and checkpoints.every >= 1 and (stays < 1 or stays % checkpoints.every):
        yield f"checkpoints.keep_every: must be a multiple of every {checkpoints.every}, found {stays}"
    if checkpoints.keep_best is not None and checkpoints.keep_best.count < 1:
        yield f"checkpoints.keep_best.count: must be at least 1, found {checkpoints.keep_best.count}"
    if not 0 < checkpoints.most_blocked <= 1:
        yield f"checkpoints.most_blocked: must be above 0 and at most 1, found {checkpoints.most_blocked}"


def _faults(faults: Faults) -> Iterator[str]:
    if faults.most_skipped < 0:
        yield f"faults.most_skipped: must not be negative (0 stops at the first), found {faults.most_skipped}"
    for key in ("spike_factor", "straggler_factor"):
        if (factor := getattr(faults, key)) is not None and factor <= 1:
            yield f"faults.{key}: must be more than 1, found {factor}"
    for key in ("spike_window", "straggler_steps"):
        if (count := getattr(faults, key)) < 1:
            yield f"faults.{key}: must be at least 1, found {count}"
    for key in ("seconds_to_hang", "seconds_for_files", "seconds_silent"):
        if (seconds := getattr(faults, key)) <= 0:
            yield f"faults.{key}: must be positive, found {seconds}"


def tracking_problems(tracking: Tracking) -> Iterator[str]:
    """A line a mistake, with its key."""
    project = tracking.project
    if not 1 <= len(project) <= 128 or set(project) & set("/\\#?%:"):
        yield f"tracking.project: 1 to 128 characters, none of / \\ # ? % :, as wandb wants it, found {project!r}"
