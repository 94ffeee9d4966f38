"""Checkpoints that know no layout: megatron-core's `torch_dist` format beside the Hugging Face files that describe the model.

tensors/           metadata.json, .metadata, *.distcp, with 0.16 common.pt: tensors, by global name
model.json         format version, feature layer
hf/encoder, llm    config.json, image processor, tokenizer
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from pydantic import TypeAdapter
from torch.distributed.checkpoint.api import CheckpointException

from pivot_megatron.checkpoints.folder import FORMAT, facts_of, opened
from pivot_megatron.config.schema import AnyRes
from pivot_megatron.convert.hf import PROCESSOR, TOKENIZER_FILES, copy_file, read_json
from pivot_megatron.convert.stacks import Sharded, alone, layer_of
from pivot_megatron.convert.stored import master_place, require_common_sound, require_sound, stored_tensors
from pivot_megatron.data.build import image_views
from pivot_megatron.data.views import ImageViews
from pivot_megatron.errors import UserError
from pivot_megatron.families.registry import encoder_architecture, head_architecture
from pivot_megatron.families.table import MASTERS
from pivot_megatron.model.composition import Architecture, Stage
from pivot_megatron.runtime.fp8 import own_statistics
from pivot_megatron.runtime.masters import holds_in_full, set_weight


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

    def copy_to(self, checkpoint: Path) -> None:
        for name, source, files in (
            ("encoder", self.encoder, ("config.json", PROCESSOR)),
            ("llm", self.llm, ("config.json", *TOKENIZER_FILES)),
        ):
            target = checkpoint / "hf" / name
            target.mkdir(parents=True, exist_ok=True)
            for file in files:
                if (source / file).exists():
                    copy_file(source / file, target / file)
        facts = _Facts(self.feature_layer, self.image_size, self.max_patches, self.anyres, self.template)
        # The id names these weights to whatever is computed from them.
        told = {"format": FORMAT, "id": uuid.uuid4().hex, **dataclasses.asdict(facts)}
        (checkpoint / "model.json").write_text(json.dumps(told, indent=2) + "\n")


@dataclass(frozen=True)
class _Facts:
    """`model.json` but for its format and id: what a Description says beside its folders."""

    feature_layer: int
    image_size: int | None
    max_patches: int | None
    anyres: AnyRes | None
    template: str


_FACTS = TypeAdapter(_Facts)


def describe(checkpoint: Path) -> Description:
    """Raises UserError if `checkpoint` is not as it was written, or by a version whose format this one does not know."""
    opened(checkpoint)
    facts = facts_of(checkpoint)
    found = _FACTS.validate_python({field.name: facts[field.name] for field in dataclasses.fields(_Facts)})
    return Description(checkpoint / "hf" / "encoder", checkpoint / "hf" / "llm", **vars(found))


def content_metadata() -> dict[str, Any]:
    metadata: dict[str, Any] = ensure_metadata_has_dp_cp_group(
        {
            "distrib_optim_sharding_type": "fully_reshardable",
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
        }
    )
    return metadata


def saved_metadata() -> dict[str, str | bool]:
    """As it is written: without its process groups."""
    return {name: value for name, value in content_metadata().items() if isinstance(value, str | bool)}


def load_state(state: dict[str, Any], checkpoint: Path, *prefixes: str) -> dict[str, Any]:
    """`state`'s tensors from `checkpoint`, whatever layout it was saved at, with its common entries. Collective over all ranks.

    Raises UserError where what is read is not what was written. `prefixes`: what the keys of all that `state` asks for begin
    with; any, if left out.
    """
    require_sound(checkpoint, *prefixes)
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(checkpoint / "tensors"))
    except (CheckpointException, CheckpointingException, OSError, EOFError) as error:
        told = _first_line(beginning(error))
        raise UserError(f"{checkpoint}: not a whole checkpoint ({told}); was the copy cut off?") from None
    return loaded


def beginning(error: BaseException) -> BaseException:
    """The one that began it, where torch wraps those of all ranks."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def common_state(checkpoint: Path) -> Mapping[str, Any]:
    """What is not tensors: progress, scheduler."""
    require_common_sound(checkpoint)
    common: Mapping[str, Any] = dist_checkpointing.load_common_state_dict(str(checkpoint / "tensors"))
    return common


_STATISTICS = "_extra_state"  # as torch ends the name of what a module keeps beside its tensors


def sharded_weights(chunks: Iterable[Any], statistics: bool = False) -> dict[str, dict[str, Any]]:
    """Of each of a stage's chunks. Tensors go by global names, so a checkpoint forgets which chunk one was in.

    `statistics`: with what layers keep beside their tensors, which is only anything under the FP8 recipe `delayed`. Which of
    them say so, with nothing to keep, differs between Transformer Engine's classes and megatron-core's own, and checkpoints
    of the two are one.
    """
    states = [chunk.sharded_state_dict(metadata=content_metadata()) for chunk in chunks]
    return {
        f"chunk{n}": {k: v for k, v in state.items() if statistics or not k.endswith(_STATISTICS)}
        for n, state in enumerate(states)
    }


def set_weights(chunk: torch.nn.Module, weights: Mapping[str, Any]) -> None:
    """All of a chunk's, as `sharded_weights` names them; statistics that are not there begin anew."""
    with own_statistics():
        missing, unexpected = chunk.load_state_dict(weights, strict=False)
    if amiss := [*(name for name in missing if not name.endswith(_STATISTICS)), *unexpected]:
        raise RuntimeError(f"a checkpoint and its model have not the same tensors: {', '.join(amiss[:3])}")


def load_weights(model: Stage, checkpoint: Path, component: str, leave: Collection[str] = ()) -> None:
    """Set `component` of this stage from a checkpoint, at any layout, but for parameters to `leave` as they are.

    Where a parameter here holds float32 numbers, or has a master that does, they come from the master that the checkpoint has of
    it, if any: not from the 16-bit weight. FP8's running statistics begin anew.
    """
    wanted = {
        chunk: {n: value for n, value in weights.items() if n.startswith(component + ".") and n not in leave}
        for chunk, weights in sharded_weights(model).items()
    }
    parameters = {chunk: {name: value.data for name, value in own.items()} for chunk, own in wanted.items()}
    asked: dict[str, Any] = {"model": wanted}
    in_full = [p for own in parameters.values() for p in own.values() if holds_in_full(p)]
    if any(parameter.dtype is not torch.float32 for parameter in in_full):
        # Of a stack all layers alike: megatron-core reads what lies in one tensor as one.
        asked["model"] = {chunk: {n: _in_full(v, v.key) for n, v in own.items()} for chunk, own in wanted.items()}
    if in_full:
        stored = stored_tensors(checkpoint)
        asked["masters"] = {
            chunk: {n: m for n, v in own.items() if (m := _master(v, stored)) is not None}
            for chunk, own in wanted.items()
        }
    # megatron-core's load is collective: a stage without the component joins with nothing of its own.
    loaded = load_state(asked, checkpoint, component + ".", f"{MASTERS}{component}.")
    for chunk, own in parameters.items():
        found = loaded.get("model", {}).get(chunk, {}) | loaded.get("masters", {}).get(chunk, {})
        if missing := [name for name in own if name not in found]:
            raise UserError(
                f"{checkpoint}: expected {component} tensors, found no {missing[0]} ({len(missing)} missing)"
            )
        for name, parameter in own.items():
            set_weight(parameter, found[name])


def _in_full(weight: Sharded, key: str) -> Sharded:
    """`weight` as float32 numbers of its own, on the CPU, of what is stored under `key`."""
    data = torch.empty_like(weight.data, dtype=torch.float32, device="cpu")
    dtype = {"dtype": data.dtype} if isinstance(weight, ShardedTensor) else {}
    found: Sharded = dataclasses.replace(weight, key=key, data=data, **dtype)
    return found


def _master(weight: Sharded, stored: Mapping[str, Any]) -> Sharded | None:
    """The float32 numbers behind `weight`, where it is not float32 itself and they are among what is `stored`."""
    layer = layer_of(weight)
    place = master_place(stored, weight.key, layer)
    if place is None:
        return None
    master = _in_full(weight, MASTERS + weight.key)
    found: Sharded = master if place[1] == layer else alone(master)
    return found
