"""What a rank holds, by the tables: against the shards that weights are loaded as, and against published sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pivot_megatron.config.schema import AnyRes, Layout, ParameterRule
from pivot_megatron.convert.load import shard_of
from pivot_megatron.convert.plan import Slice, part_shapes, rows_by_parameter
from pivot_megatron.families.registry import encoder_architecture, head_architecture
from pivot_megatron.model.composition import Architecture
from pivot_megatron.plan.parameters import Held, held
from pivot_megatron.plan.stages import chunks
from tests.plans import HEADS, MAE_BASE, SO400M, TINY, TINY_UNTIED, model

LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(tensor=4),
    Layout(pipeline=2),
    Layout(tensor=2, pipeline=2, virtual_pipeline=2),
]


class Shapes:
    """A source of tensors that have shapes alone."""

    where = "shapes"

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, part: Slice) -> Tensor:
        whole = torch.empty(self._shapes[name], device="meta")
        return whole if part.dim is None else whole.narrow(part.dim, part.start, part.stop - part.start)


def every(arch: Architecture, layout: Layout, rules: tuple[ParameterRule, ...] = ()) -> list[Held]:
    return [one for chunk in chunks(arch.head.layers, layout) for one in held(arch, layout, chunk, rules)]


@pytest.mark.parametrize("arch", [TINY, TINY_UNTIED, model(SO400M, HEADS["1.5B"])], ids=["tied", "untied", "true"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_every_rank_is_loaded_with_what_is_held(arch: Architecture, tensor: int) -> None:
    rows = rows_by_parameter(arch)
    shapes = {c: Shapes(part_shapes(arch, c)) for c in ("encoder", "projector", "llm")}
    for one in every(arch, Layout(tensor=tensor)):
        source = shapes[one.name.partition(".")[0]]
        assert {tuple(shard_of(rows[one.name], source, r, tensor).shape) for r in range(tensor)} == {one.shape}, (
            one.name
        )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("arch", [TINY, TINY_UNTIED], ids=["tied", "untied"])
def test_stages_hold_each_parameter_once_but_for_tied_words(arch: Architecture, layout: Layout) -> None:
    names = [one.name for one in every(arch, layout)]
    copies = ["llm.embedding.word_embeddings.weight"] if arch.head.tied_embeddings and layout.pipeline > 1 else []
    assert sorted(names) == sorted([*rows_by_parameter(arch), *copies])


# What the checkpoints' safetensors add up to; their vocabularies need no padding.
@pytest.mark.parametrize(
    ("size", "count"),
    [("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("7B", 7_615_616_512), ("72B", 72_706_203_648)],
)
def test_heads_have_the_published_number_of_parameters(size: str, count: int) -> None:
    arch = model(SO400M, HEADS[size])
    found = sum(one.count for one in every(arch, Layout()) if one.name.startswith("llm."))
    assert found == count


def test_fixed_positions_and_frozen_parameters_do_not_train() -> None:
    arch = Architecture(
        encoder_architecture(MAE_BASE, "encoder"), head_architecture(HEADS["0.5B"], "head"), -1, AnyRes()
    )
    rules = (ParameterRule("llm.*.linear_qkv.*", 0.1), ParameterRule("llm.*", "frozen"))
    trains = {one.name: one.trains for one in every(arch, Layout(), rules)}
    assert not trains["encoder.position_embedding.weight"]
    assert trains["encoder.patch_embedding.weight"] and trains["projector.image_newline"]
    assert trains["llm.decoder.layers.3.self_attention.linear_qkv.weight"]
    assert not trains["llm.decoder.layers.3.mlp.linear_fc1.weight"]
    learned = {one.name: one.trains for one in every(model(SO400M, HEADS["0.5B"]), Layout())}
    assert all(learned.values())


def test_what_does_not_divide_is_refused() -> None:
    arch = model(SO400M, HEADS["0.5B"])
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.linear_fc1\.weight: 4352 entries do not divide by tensor-parallel size 3"
    ):
        held(arch, Layout(tensor=3), *chunks(arch.head.layers, Layout(tensor=3)))
