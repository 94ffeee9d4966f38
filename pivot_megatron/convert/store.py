"""Checkpoints that know no layout: megatron-core's `torch_dist` format beside the Hugging Face files that describe the model.

step-000100/  metadata.json, *.distcp, common.pt   tensors, by global name
              model.json                           format version, feature layer
              hf/encoder, hf/llm                   config.json, image processor, tokenizer
"""

from __future__ import annotations

import dataclasses
import json
import queue
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch.distributed.checkpoint.api import CheckpointException

from pivot_megatron.config.schema import AnyRes
from pivot_megatron.convert.hf import PROCESSOR, TOKENIZER_FILES, read_json
from pivot_megatron.data.build import image_views
from pivot_megatron.data.views import ImageViews
from pivot_megatron.errors import UserError
from pivot_megatron.families.registry import encoder_architecture, head_architecture
from pivot_megatron.model.compat import accepted
from pivot_megatron.model.composition import Architecture, VisionLanguageModel
from pivot_megatron.runtime.distributed import is_main_process

FORMAT = 4
_STEP = re.compile(r"step-(\d+)$")


@dataclass(frozen=True)
class Description:
    """Where the files that describe a model lie: folders with an encoder's and a head's `config.json`.

    `image_size`, `max_patches`, `anyres`: how it sees images, where that is not as the encoder's own files say. `template`: the
    chat template that it was trained with last.
    """

    encoder: Path
    llm: Path
    feature_layer: int
    image_size: int | None = None
    max_patches: int | None = None
    anyres: AnyRes | None = None
    template: str = "qwen_1_5"

    def architecture(self) -> Architecture:
        """Raises UserError where the files, or what is said beside them, do not make a model."""
        encoder = encoder_architecture(read_json(self.encoder / "config.json"), str(self.encoder / "config.json"))
        if encoder.native and (self.image_size is not None or self.anyres is not None):
            raise UserError(
                f"{self.encoder}: its encoder keeps aspect ratios, so neither anyres nor image_size means anything to it; "
                "model.encoder.max_patches sets its resolution"
            )
        if not encoder.native and self.max_patches is not None:
            raise UserError(
                f"model.encoder.max_patches: {self.encoder} has an encoder of one resolution; set image_size, or leave it out"
            )
        if not -encoder.layers <= self.feature_layer < 0:
            raise UserError(
                f"model.encoder.feature_layer: expected -1 to {-encoder.layers}, the encoder's layers from the end, "
                f"found {self.feature_layer}"
            )
        size = encoder.image_size if self.image_size is None else self.image_size
        if size < encoder.patch_size:
            raise UserError(f"image_size: expected a patch of {encoder.patch_size} pixels at least, found {size}")
        return Architecture(
            dataclasses.replace(encoder, image_size=size),
            head_architecture(read_json(self.llm / "config.json"), str(self.llm / "config.json")),
            self.feature_layer,
            self.anyres,
        )

    def image_views(self) -> ImageViews:
        """Raises UserError where the encoder's image processor does not fit it."""
        encoder = self.architecture().encoder
        return image_views(self.encoder, encoder, self.image_size, self.max_patches, self.anyres)

    def copy_to(self, checkpoint: Path, dtype: torch.dtype) -> None:
        """`dtype`: that of the checkpoint's tensors."""
        for name, source, files in (
            ("encoder", self.encoder, ("config.json", PROCESSOR)),
            ("llm", self.llm, ("config.json", *TOKENIZER_FILES)),
        ):
            target = checkpoint / "hf" / name
            target.mkdir(parents=True, exist_ok=True)
            for file in files:
                if (source / file).exists():
                    shutil.copyfile(source / file, target / file)
        (checkpoint / "model.json").write_text(
            json.dumps(
                {
                    "format": FORMAT,
                    "id": uuid.uuid4().hex,  # names these weights to whatever is computed from them
                    "feature_layer": self.feature_layer,
                    "image_size": self.image_size,
                    "max_patches": self.max_patches,
                    "anyres": self.anyres and dataclasses.asdict(self.anyres),
                    "template": self.template,
                    "dtype": _name(dtype),
                },
                indent=2,
            )
            + "\n"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor_dtype(checkpoint: Path) -> torch.dtype:
    """In which dtype `checkpoint` was trained and saved."""
    dtype: torch.dtype = getattr(torch, read_json(checkpoint / "model.json")["dtype"])
    return dtype


def describe(checkpoint: Path) -> Description:
    """Raises UserError if `checkpoint` was written by a version whose format this one does not know."""
    facts = read_json(checkpoint / "model.json")
    if facts.get("format") != FORMAT:
        raise UserError(f"{checkpoint}: checkpoint format {facts.get('format')}, this version reads {FORMAT}")
    if missing := {"feature_layer", "image_size", "max_patches", "anyres", "template", "dtype"} - facts.keys():
        raise UserError(
            f"{checkpoint}: model.json: expected {', '.join(sorted(missing))}, found none; was the copy cut off?"
        )
    tiles = facts["anyres"]
    return Description(
        checkpoint / "hf" / "encoder",
        checkpoint / "hf" / "llm",
        facts["feature_layer"],
        facts["image_size"],
        facts["max_patches"],
        AnyRes(tiles["grids"] and tuple(map(tuple, tiles["grids"])), tiles["max_tiles"]) if tiles else None,
        facts["template"],
    )


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints in a `checkpoints` folder, oldest first. One that a crash cut off carries another name."""
    found = [(int(m[1]), path) for path in folder.glob("step-*") if (m := _STEP.search(path.name))]
    return sorted(found)


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint folder from a checkpoint, a run's folder (its newest), or its `checkpoints` folder."""
    if (path / "model.json").exists():
        return path
    for folder in (path / "checkpoints", path):
        if steps := steps_in(folder):
            return steps[-1][1]
    raise UserError(f"{path}: expected a checkpoint or a run's folder with one, found none; has that run saved yet?")


def content_metadata() -> dict[str, Any]:
    metadata: dict[str, Any] = ensure_metadata_has_dp_cp_group(
        {
            "distrib_optim_sharding_type": "fully_reshardable",
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
        }
    )
    return metadata


def save_state(state: dict[str, Any], out: Path, description: Description, dtype: torch.dtype) -> None:
    """Write `state` (model tensors in `dtype`) so that `out` is whole or absent. Collective over all ranks."""
    # Saving happens in this process, so its results need none of their own. The one that megatron-core would start takes
    # seconds, and lives on for ever where a run is killed.
    filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
    options = accepted(dist_checkpointing.save, async_strategy="mcore")

    def write(folder: Path) -> None:
        dist_checkpointing.save(state, str(folder), content_metadata=content_metadata(), **options)

    save_whole(out, description, dtype, write)


def save_whole(out: Path, description: Description, dtype: torch.dtype, write: Callable[[Path], None]) -> None:
    """A checkpoint whose tensors `write` writes into the folder it is given, whole or absent. Collective over all ranks."""
    part = out.with_name(out.name + ".part")
    if is_main_process():
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        description.copy_to(part, dtype)
        # megatron-core wants an empty folder for its own files and warns otherwise.
        (part / "tensors").mkdir()
    dist.barrier()
    try:
        write(part / "tensors")
    except BaseException as error:
        if is_main_process():
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, CheckpointException | OSError):
            raise UserError(f"{out}: cannot write ({_first_line(error)}); is the disk full?") from None
        raise
    dist.barrier()
    if is_main_process():
        shutil.rmtree(out, ignore_errors=True)
        part.replace(out)
    dist.barrier()


def load_state(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """`state`'s tensors from `checkpoint`, whatever layout it was saved at, with its common entries."""
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(checkpoint / "tensors"))
    except (CheckpointException, CheckpointingException, OSError, EOFError) as error:
        raise UserError(f"{checkpoint}: not a whole checkpoint ({_first_line(error)}); was the copy cut off?") from None
    return loaded


def _first_line(error: BaseException) -> str:
    """Of the one that began it, where torch wraps those of all ranks."""
    failures = getattr(error, "failures", None)
    first = next(iter(failures.values()))[0] if failures else error
    return (str(first).splitlines() or [type(first).__name__])[0]


def common_state(checkpoint: Path) -> Mapping[str, Any]:
    """What is not tensors: progress, scheduler, layout."""
    common: Mapping[str, Any] = dist_checkpointing.load_common_state_dict(str(checkpoint / "tensors"))
    return common


def save_weights(model: VisionLanguageModel, out: Path, description: Description) -> None:
    state = {"model": model.sharded_state_dict(metadata=content_metadata())}
    save_state(state, out, description, model.config.params_dtype)


def load_weights(model: VisionLanguageModel, checkpoint: Path, component: str, leave: Collection[str] = ()) -> None:
    """Set `component` of this stage from a checkpoint, at any layout, but for parameters to `leave` as they are.

    FP8's running statistics begin anew.
    """
    wanted = {
        name: value
        for name, value in model.sharded_state_dict(metadata=content_metadata()).items()
        if name.startswith(component + ".") and name not in leave and not isinstance(value, ShardedObject)
    }
    # megatron-core's load is collective: a stage without the component joins with nothing of its own.
    loaded = load_state({"model": wanted}, checkpoint)
    found = loaded.get("model", {})
    missing = [n for n in model.load_state_dict(found, strict=False).missing_keys if n in wanted]
    if missing:
        raise UserError(f"{checkpoint}: expected {component} tensors, found no {missing[0]} ({len(missing)} missing)")
