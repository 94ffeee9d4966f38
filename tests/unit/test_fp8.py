"""FP8 as far as it goes without a GPU: settings that reach megatron-core, paddings, when weights are cast, what is kept."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pivot_megatron.runtime  # noqa: F401
from pivot_megatron.config.schema import Fp8, Fp8Recipe, Layout, Precision, Recompute
from pivot_megatron.convert.store import set_weights, sharded_weights
from pivot_megatron.families.architecture import EncoderArchitecture, HeadArchitecture
from pivot_megatron.model import specs
from pivot_megatron.model.composition import Architecture, Stage, build_model
from pivot_megatron.runtime import layers
from pivot_megatron.runtime.distributed import process_groups
from pivot_megatron.runtime.fp8 import own_statistics, token_multiple
from pivot_megatron.train.optimizer import wrap
from pivot_megatron.train.step import forward_logprobs
from tests.parity.jobs import packed
from tests.parity.reference import make_pairs, make_pixels

ENCODER = EncoderArchitecture("siglip", 4, 96, 4, 176, 32, 8, 1e-6, "gelu_tanh", feature_layer=-2)
HEAD = HeadArchitecture("qwen2", 4, 64, 4, 2, 16, 128, 200, 1e-6, 1e6, True, 1024)
ARCH = Architecture(ENCODER, HEAD, -2)
RECIPES: tuple[Fp8Recipe, ...] = ("delayed", "tensorwise", "blockwise")


without_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None,
    reason="where Transformer Engine is, FP8 is not let through",
)


@pytest.fixture
def any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 is let through; layers that know none compute as ever."""
    monkeypatch.setattr(specs, "require_fp8", lambda _: None)


@pytest.fixture
def groups() -> Iterator[None]:
    with process_groups(Layout(), seed=1):
        yield


def built(precision: Precision) -> Stage:
    model = build_model(ARCH, Layout(), precision, Recompute())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_part_has_its_own_switch(recipe: Fp8Recipe, any_machine: None) -> None:
    for encoder, llm in ((True, False), (False, True)):
        kept = 0 if recipe == "delayed" else 1
        fp8 = Fp8(recipe, encoder, llm, first_layers_bf16=kept)
        precision = Precision("bf16", fp8)
        configs = (
            specs.encoder_config(ENCODER, 3, Layout(), precision),
            specs.head_config(HEAD, Layout(), precision),
        )
        for config, wanted in zip(configs, (encoder, llm)):
            assert config.fp8 == ("hybrid" if wanted else None)
            if wanted:
                assert (config.fp8_recipe, config.num_layers_at_start_in_bf16) == (recipe, kept)
                assert (config.first_last_layers_bf16, config.num_layers_at_end_in_bf16) == (kept > 0, 0)
        assert specs.projector_config(ENCODER, HEAD, Layout(), precision).fp8 is None


@without_engine
@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_in_fp8_see_multiples_of_what_it_takes(recipe: Fp8Recipe, any_machine: None, groups: None) -> None:
    """The encoder's sequence, and what goes past the last attention, padded; features and log-probs the same."""
    plain, padded = built(Precision("fp32")), built(Precision("fp32", Fp8(recipe)))
    padded.load_state_dict(plain.state_dict())
    batch = packed(make_pairs(3, seed=7, vocabulary=200), make_pixels(3, seed=8), multiple=token_multiple(recipe))
    seen: dict[str, int] = {}

    def watch(name: str) -> Any:
        return lambda _module, given, _out: seen.__setitem__(name, given[0].shape[0])

    model = padded.whole
    model.encoder.decoder.layers[0].mlp.register_forward_hook(watch("encoder"))
    model.llm.decoder.layers[-1].mlp.register_forward_hook(watch("last"))
    (found,) = forward_logprobs(padded.eval(), [batch])
    (wanted,) = forward_logprobs(plain.eval(), [batch])
    assert found is not None and wanted is not None
    assert torch.allclose(found, wanted, atol=1e-6)
    assert seen["encoder"] >= 48 and seen["last"] >= batch.targets.numel()
    assert all(tokens % {"delayed": 16, "tensorwise": 16, "blockwise": 128}[recipe] == 0 for tokens in seen.values())


@without_engine
def test_encoder_alone_in_fp8_casts_its_weights_each_step(any_machine: None, groups: None) -> None:
    """megatron-core asks the config of what it is given, the language model's here, whether anything is in FP8."""
    model = built(Precision("fp32", Fp8("tensorwise", llm=False)))
    in_fp8, other = (SimpleNamespace(fp8=kind) for kind in ("hybrid", None))
    modules = {"encoder": (model.whole.encoder, in_fp8), "projector": (model.whole.projector, other)}
    for parent, config in modules.values():
        parent.linear = torch.nn.Linear(2, 2)
        parent.linear.config, parent.linear.is_first_microbatch = config, False
    batch = packed(make_pairs(1, seed=7, vocabulary=200), make_pixels(1, seed=8))
    forward_logprobs(wrap(model, Layout()), [batch])
    assert model.whole.encoder.linear.is_first_microbatch
    assert not model.whole.projector.linear.is_first_microbatch  # in bf16 there is nothing to cast


class Fused(torch.nn.Linear):
    """Stands for Transformer Engine's: the switch has its name, see test_transformer_engine.py."""

    fuse_wgrad_accumulation = False


def test_gradients_are_added_in_products_where_there_is_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, frozen, other = Fused(2, 2), Fused(2, 2), torch.nn.Linear(2, 2)
    for module in (trained, other):
        module.weight.main_grad = torch.zeros(2, 2)  # type: ignore[union-attr]
    model = torch.nn.ModuleList([trained, frozen, other])
    layers.fuse_gradient_accumulation(model)
    assert not trained.fuse_wgrad_accumulation  # a machine without such products
    monkeypatch.setattr(layers, "gradient_accumulation", lambda: "te")
    layers.fuse_gradient_accumulation(model)
    assert trained.fuse_wgrad_accumulation and not frozen.fuse_wgrad_accumulation
    assert not hasattr(other, "fuse_wgrad_accumulation")


class Keeps(torch.nn.Module):
    """Keeps statistics as Transformer Engine's layers do under `delayed`, and reads them if it is told to trust the file."""

    def __init__(self, statistics: bytes) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.statistics = statistics

    def get_extra_state(self) -> bytes:
        return self.statistics

    def set_extra_state(self, state: bytes) -> None:
        if state and os.environ.get("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE") != "1":
            raise RuntimeError("Refusing to load")
        self.statistics = state


def test_a_checkpoint_holds_statistics_only_where_they_are_asked_for(groups: None) -> None:
    """Local layers and Transformer Engine's name different ones, all empty but under `delayed`."""
    model = built(Precision("fp32"))
    asked, plain = (sharded_weights(model, statistics)["chunk0"] for statistics in (True, False))
    assert asked.keys() > plain.keys()
    assert all(name.endswith("_extra_state") for name in asked.keys() - plain.keys())
    assert plain.keys() == {name for name in model.whole.state_dict() if not name.endswith("_extra_state")}


def test_statistics_come_back_and_may_be_missing() -> None:
    layer = Keeps(b"")
    set_weights(layer, {"weight": torch.ones(2), "_extra_state": b"scales"})
    assert layer.statistics == b"scales" and layer.weight.eq(1).all()
    set_weights(layer, {"weight": torch.ones(2)})
    assert layer.statistics == b"scales"
    for wrong in ({}, {"weight": torch.ones(2), "other": torch.ones(2)}):
        with pytest.raises(RuntimeError, match="have not the same tensors"):
            set_weights(layer, wrong)
    assert "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE" not in os.environ


def test_trust_ends_with_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "0")
    with pytest.raises(ValueError), own_statistics():
        assert os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] == "1"
        raise ValueError
    assert os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] == "0"
