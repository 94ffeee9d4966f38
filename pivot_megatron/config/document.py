"""docs/configuration.md, written from the schema: `python -m pivot_megatron.config.document > docs/configuration.md`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping

from pivot_megatron.config.keys import Key, all_keys

_INTRODUCTION = """\
# Configuration

One YAML file is one run. This page is written from the schema by `make docs`; a test fails where the two differ.

- **`base:`** names one file or a list of files, relative to the file that names them. They are read first, later ones
  over earlier ones, and the file itself over all of them. Mappings merge key by key; lists and values replace, and so
  does a mapping that names another `kind`.
- **`key=value`** after the file on the command line goes over the file, with a dotted key and a YAML value:
  `layout.tensor=2`, `data.shards=[shards/a, shards/b]`, `parameters.0.rate=0.1` (where the file has
  such a rule). `null` takes a value away:
  `model.encoder.hf=null`.
- **Paths** are relative to the folder that `pivot` is started in.
- **Mistakes** are reported together, one line each with the dotted key, wrong keys and values first
  and then broken rules, by `pivot check FILE...` as by `pivot train`;
  the exit code is then 2. A key that this page does not know is a mistake.
- The resolved config of a run is `config.yaml` in its folder, and is itself a file that `pivot train` takes.

`N` in a key stands for a place in a list, counted from 0. A key without a default must be given.
"""

_MEANINGS: Mapping[str, str] = {
    "RunConfig.name": "what the run is called in progress lines and reports",
    "RunConfig.out": "the run's folder: metrics, checkpoints and exports; a run resumes from what it finds there",
    "RunConfig.model": "the three parts and where their weights come from",
    "RunConfig.objective": "what is minimised; `kind` says which",
    "RunConfig.data": "samples and how they become tokens and pixels",
    "RunConfig.optimizer": "AdamW and its learning-rate schedule",
    "RunConfig.batch": "samples a step, and the length of the run",
    "RunConfig.parameters": "ordered rules that freeze parameters or scale their learning rate; the first match holds",
    "RunConfig.layout": "how the model is split over processes",
    "RunConfig.precision": "number formats",
    "RunConfig.recompute": "activations traded for time",
    "RunConfig.checkpoints": "when to save and how much to keep",
    "RunConfig.faults": "harmful steps, hanging processes, slow ones",
    "RunConfig.tracking": "who else is told what `metrics.jsonl` is told",
    "RunConfig.seed": "of the sample order and of fresh weights",
    "Model.encoder": "the vision encoder",
    "Model.llm": "the language model that serves as the head",
    "Model.projector": "the two linears between them; without a source it starts fresh",
    "Component.hf": "a Hugging Face folder: config and safetensors",
    "Component.checkpoint": "a run's folder (its newest checkpoint), or one checkpoint",
    "Component.fresh": "a Hugging Face folder whose config alone is used; weights are drawn from `seed`",
    "Projector.keep": "which of its linears a checkpoint gives; with `first` the second starts fresh",
    "Encoder.feature_layer": "index into `hidden_states` from the end; left out, the family's: -2 for SigLIP and CLIP, else -1",
    "Encoder.image_size": "pixels a side, where it is not the checkpoint's own; position embeddings are interpolated",
    "Encoder.max_patches": "most patches an image, where an encoder keeps aspect ratios; left out, its image processor's own",
    "Model.anyres": "images as tiles at higher resolution; left out, as the projector's checkpoint has it, else squares",
    "AnyRes.grids": "[rows, columns] of tiles that an image may be laid on; null: every grid up to [6, 6]",
    "AnyRes.max_tiles": "an image that takes more tokens than so many tiles is scaled down to them",
    "Sft.kind": "negative log-likelihood of the answer (a pair's chosen one)",
    "Dpo.kind": "preference optimisation on pairs",
    "Dpo.beta": "strength of the pull towards the reference model; more than 0",
    "Dpo.reference": "log-probs of the frozen model: `cached` beside the shards, made once where missing; `online`, every step",
    "Dpo.label_smoothing": "share of pairs taken to be labelled the wrong way round, 0 to under 0.5; for `sigmoid`, `robust`",
    "Dpo.losses": "positive weight of each loss that is summed",
    "Data.shards": "folders of tars with an `index.json`, read as one set; a text alone is a `folder`",
    "Source.folder": "a path, or a URL that fsspec knows (`s3://bucket/folder`)",
    "Source.weight": "how often each sample stands in an epoch; above 0",
    "Source.most": "use so many of the folder's samples, drawn by the seed; null: all",
    "Data.cache": "where what was read of folders behind a URL is kept; needed where there is one",
    "ShardCache.folder": "a folder on disk, made where missing; ranks and runs share it",
    "ShardCache.gib": "most GiB of samples; what is made from them comes on top",
    "Data.template": "chat template; `tokenizer` is the one in the head's folder",
    "Data.sequence_length": "most tokens of a prompt with one answer, image tokens counted",
    "Data.too_long": "what becomes of a longer sample; DPO only drops",
    "Data.image_backend": "what decodes and resizes: `pil` is bit for bit Hugging Face's slow processor, `torch` is faster, "
    "`dali` is for GPUs, which it decodes on (`pip install 'pivot-megatron[dali]'`)",
    "Data.workers": "threads of each process that decode images, for steps ahead; 0: each step as it is asked for, in no thread",
    "Data.on_bad_sample": "a broken sample stops the run with its name, or is left out, counted and named in `dropped.jsonl`",
    "Data.max_bad_share": "share of all samples that may be broken and skipped; past it the run stops even so; 0 to 1",
    "Optimizer.learning_rate": "peak, of parameters that no rule scales",
    "Optimizer.minimum_learning_rate": "where a cosine schedule ends",
    "Optimizer.schedule": "after the warm-up",
    "Optimizer.warmup_fraction": "share of all steps over which the rate rises from 0; 0 to under 1",
    "Optimizer.weight_decay": "decoupled, on matrices only",
    "Optimizer.beta1": "decay of Adam's first moment",
    "Optimizer.beta2": "decay of Adam's second moment",
    "Optimizer.epsilon": "added to the root of Adam's second moment",
    "Optimizer.clip_gradient": "largest norm of the whole gradient; 0 does not clip",
    "Batch.global_size": "samples (pairs) a step over all processes",
    "Batch.micro_tokens": "most tokens packed into one forward pass of one process; changes memory and speed, not the result",
    "Batch.micro_images": "most images (tiles, with `anyres`) in one forward pass of one process; null: no limit but the tokens",
    "Batch.epochs": "length as passes over the data; what does not fill a last batch is left out",
    "Batch.steps": "length in steps; give this or `epochs`",
    "ParameterRule.match": "shell-style pattern over parameter names, which begin with `encoder.`, `projector.`, `llm.`",
    "ParameterRule.rate": "a positive factor on the learning rate, or `frozen`",
    "Layout.tensor": "tensor-parallel size; above 1, sequence parallelism goes with it",
    "Layout.pipeline": "pipeline-parallel size",
    "Layout.virtual_pipeline": "chunks of LLM layers on each pipeline stage (megatron-core's interleaved schedule)",
    "Layout.first_stage_layers": "LLM layers on the first pipeline stage, beside the encoder; null splits evenly",
    "Layout.last_stage_layers": "LLM layers on the last pipeline stage, beside the output layer; null splits evenly",
    "Layout.overlap_gradient_reduce": "reduce gradients over data-parallel ranks during the backward pass",
    "Layout.overlap_parameter_gather": "gather parameters during the forward pass; needs `overlap_gradient_reduce`",
    "Layout.cpu_threads": "threads of each process where the model runs on CPU; null: its share of the cores",
    "Layout.overlap_bucket_size": "parameters reduced or gathered together where that overlaps; null: megatron-core's choice",
    "Precision.compute": "weights and activations; gradients, master weights and Adam's state are fp32",
    "Precision.fp8": "FP8 in transformer layers; a text alone is its `recipe`. Needs transformer-engine on a Hopper GPU or newer",
    "Fp8.recipe": "how values are scaled into FP8's range",
    "Fp8.encoder": "the vision encoder's layers",
    "Fp8.llm": "the language model's layers",
    "Fp8.first_layers_bf16": "first layers of each of the two that stay in bf16; not with `delayed`",
    "Fp8.last_layers_bf16": "last layers of each that stay in bf16; of the encoder, of those up to the feature layer",
    "Recompute.encoder": "what the backward pass computes again: nothing, core attention, or whole layers",
    "Recompute.llm": "the same, for the language model",
    "Checkpoints.every": "steps between checkpoints; the last step is always saved",
    "Checkpoints.keep": "newest checkpoints that stay",
    "Checkpoints.keep_every": "checkpoints at multiples of so many steps stay too; a multiple of `every`; null: none for that",
    "Checkpoints.keep_best": "the best stay too, by a metric of `metrics.jsonl`; null: none for that",
    "Checkpoints.asynchronous": "train on while a checkpoint is written, from a copy of it on the host",
    "Checkpoints.most_blocked": "of the time, what asynchronous saves may hold up training for; past it one is put off; "
    "above 0, at most 1",
    "KeepBest.metric": "`loss`, or one that the objective adds, such as `reward_accuracy`",
    "KeepBest.count": "how many stay",
    "KeepBest.largest": "the largest is the best",
    "Faults.most_skipped": "steps in a row that may be left unapplied; the next one stops the run",
    "Faults.spike_factor": "how far above the median a loss or gradient norm is a spike; above 1; null: none is",
    "Faults.spike_window": "applied steps that the median is of",
    "Faults.seconds_to_hang": "what a process may take for its part of a step (waiting for data, forward and backward, update)",
    "Faults.seconds_for_files": "what it may take for a checkpoint, and for each thing that comes before its first step is made",
    "Faults.seconds_silent": "without a sign of life a process counts as dead",
    "Faults.straggler_factor": "a process this many times slower than the median is named on stderr; more than 1",
    "Faults.straggler_steps": "steps over which processes are compared, a line in `stragglers.jsonl` each time",
    "Tracking.wandb": "Weights & Biases; `offline`: files alone, for `wandb sync` (`pip install 'pivot-megatron[tracking]'`)",
    "Tracking.project": "of wandb; its entity is the login's own, or `WANDB_ENTITY`",
    "Tracking.tensorboard": "TensorBoard's event files (`pip install 'pivot-megatron[tracking]'`)",
}


def page() -> str:
    """The page's Markdown. Raises KeyError for a schema field without a meaning here."""
    sections = [_INTRODUCTION]
    groups: dict[tuple[str, type], list[Key]] = {}
    for key in all_keys():
        groups.setdefault((key.path.rpartition(".")[0], key.owner), []).append(key)
    for (parent, owner), keys in groups.items():
        paragraphs = [f"## {_title(parent, owner)}", _docstring(owner), "\n".join(_table(keys))]
        sections.append("\n\n".join(filter(None, paragraphs)) + "\n")
    return "\n".join(sections)


def meaning(key: Key) -> str:
    """A field is explained where it is first declared."""
    for owner in key.owner.__mro__:
        if text := _MEANINGS.get(f"{owner.__name__}.{key.name}"):
            return text
    raise KeyError(f"{key.owner.__name__}.{key.name}: no meaning in {__name__}; add one, then run: make docs")


def _title(parent: str, owner: type) -> str:
    kind = getattr(owner, "kind", None)
    return f"`{parent}`, kind `{kind}`" if kind else f"`{parent}`" if parent else "The run"


def _docstring(owner: type) -> str:
    """Empty for a class without one: dataclasses then write their signature into it."""
    text = inspect.cleandoc(owner.__doc__ or "")
    return "" if text.startswith(f"{owner.__name__}(") else text


def _table(keys: list[Key]) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for key in keys:
        default = {None: "", "": "see its keys"}.get(key.default, f"`{key.default}`")
        yield f"| `{key.name}` | {key.kind} | {default} | {meaning(key)} |"


if __name__ == "__main__":
    sys.stdout.write(page())
