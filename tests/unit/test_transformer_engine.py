"""Layers of Transformer Engine's classes and of megatron-core's own hold the same parameters and are one checkpoint.

Its modules can be built without a GPU, though not run. Where the package cannot be imported these tests are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories

import pivot_megatron.runtime  # noqa: F401
from pivot_megatron.checkpoints.folder import FORMAT
from pivot_megatron.config.schema import Layout, Precision, Recompute
from pivot_megatron.convert.load import parameters_by_global_name
from pivot_megatron.convert.saving import save_state
from pivot_megatron.convert.store import load_state, set_weights, sharded_weights
from pivot_megatron.families.architecture import EncoderArchitecture, HeadArchitecture
from pivot_megatron.model.composition import Architecture, Stage, build_model
from pivot_megatron.runtime import layers
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.runtime.distributed import process_groups
from pivot_megatron.runtime.layers import fuse_gradient_accumulation

try:
    import transformer_engine.pytorch  # noqa: F401, TID251
except Exception as error:  # a build for another torch or without its CUDA libraries fails in any way
    reason = (str(error).splitlines() or [""])[0][:200]
    pytest.skip(f"transformer_engine cannot be imported ({type(error).__name__}: {reason})", allow_module_level=True)

SIGLIP = EncoderArchitecture("siglip", 4, 96, 4, 176, 32, 8, 1e-6, "gelu_tanh", feature_layer=-2)
GIANT = EncoderArchitecture(
    "dinov2", 3, 96, 4, 256, 32, 8, 1e-6, "swiglu", -1, class_token=True, final_norm=True, layer_scale=True
)
QWEN2 = HeadArchitecture("qwen2", 4, 64, 4, 2, 16, 128, 200, 1e-6, 1e6, True, 1024)
QWEN3 = replace(QWEN2, family="qwen3", tied_embeddings=False, qkv_bias=False, qk_norm=True)
MODELS = {"siglip, qwen2": Architecture(SIGLIP, QWEN2, -2), "dinov2, qwen3": Architecture(GIANT, QWEN3, -1)}


@pytest.fixture(params=MODELS)
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Stage, Stage]]:
    """The model of megatron-core's classes, and of Transformer Engine's, with weights of their own."""
    arch, platform = MODELS[request.param], current_platform()
    made = []
    with process_groups(Layout(), seed=1):
        for engine in (False, True):
            chosen = replace(platform, transformer_engine=engine)
            monkeypatch.setattr(layers, "current_platform", lambda chosen=chosen: chosen)
            with pytest.MonkeyPatch.context() as building:
                if engine:  # its modules are built without a GPU if only they are not told so
                    building.setattr(torch.cuda, "is_available", lambda: True)  # noqa: TID251
                model = build_model(arch, Layout(), Precision("fp32"), Recompute())
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter)
            made.append(model)
        local, engine_model = made
        yield local, engine_model


def test_parameters_have_the_same_names_shapes_and_marks(both: tuple[Stage, Stage]) -> None:
    def facts(model: Stage) -> dict[str, tuple[Any, ...]]:
        return {
            name: (
                p.shape,
                p.dtype,
                bool(getattr(p, "tensor_model_parallel", False)),
                getattr(p, "partition_dim", -1) if getattr(p, "tensor_model_parallel", False) else None,
                bool(getattr(p, "sequence_parallel", False)),
            )
            for name, p in parameters_by_global_name(model)
        }

    local, engine = map(facts, both)
    assert local == engine
    assert any("LayerNormColumnParallelLinear" in type(m).__name__ for m in both[1].modules())


def test_checkpoint_keys_are_one(both: tuple[Stage, Stage]) -> None:
    def facts(model: Stage) -> dict[str, Any]:
        weights = sharded_weights(model)
        apply_factories(weights)  # gated MLPs, whose halves are tensors of their own there
        tensors = list(nested_values(weights))
        return {(t.key, t.global_offset): (t.global_shape, t.local_shape, t.dtype) for t in tensors}

    local, engine = map(facts, both)
    assert local == engine and len(local) > 20


class Nowhere:
    """Says nothing of the model that a checkpoint holds."""

    def copy_to(self, folder: Path) -> None:
        (folder / "model.json").write_text(json.dumps({"format": FORMAT}))


def test_weights_of_one_are_read_into_the_other(both: tuple[Stage, Stage], tmp_path: Path) -> None:
    """From a checkpoint, either way."""
    for direction, (source, target) in {"there": both, "back": both[::-1]}.items():
        saved = tmp_path / direction
        for parameter in source.parameters():
            torch.nn.init.normal_(parameter)
        save_state({"model": sharded_weights(source)}, saved, Nowhere())  # type: ignore[arg-type]
        loaded = load_state({"model": sharded_weights(target)}, saved)
        set_weights(target.whole, loaded["model"]["chunk0"])
        ours, theirs = (dict(parameters_by_global_name(model)) for model in (source, target))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_switches_have_the_names_that_are_set(both: tuple[Stage, Stage]) -> None:
    engine = both[1]
    linears = [m for m in engine.modules() if type(m).__name__.startswith("TE") and "Linear" in type(m).__name__]
    assert len(linears) >= 4 * 7
    for linear in linears:
        assert linear.is_first_microbatch is True and linear.fuse_wgrad_accumulation is False
        linear.weight.main_grad = torch.zeros_like(linear.weight)
    fuse_gradient_accumulation(engine)
    assert all(linear.fuse_wgrad_accumulation for linear in linears)


def test_megatron_core_takes_its_adam() -> None:
    """On a GPU; without one FusedAdam could not run, and ours stands there."""
    from megatron.core import optimizer

    assert optimizer.Adam.__name__ == ("FusedAdam" if current_platform().is_cuda else "GroupStepAdam")
