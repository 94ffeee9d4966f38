"""Which layers stand in which chunk is as megatron-core has it."""

from __future__ import annotations

from itertools import product

import pytest
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from pivot_megatron.config.schema import Layout, Precision
from pivot_megatron.families.architecture import HeadArchitecture
from pivot_megatron.model.fit import stages_problem
from pivot_megatron.model.specs import head_config
from pivot_megatron.plan.stages import Chunk, chunks

STATED = (None, 1, 2, 3, 6)
LAYOUTS = [
    Layout(pipeline=p, virtual_pipeline=v, first_stage_layers=first, last_stage_layers=last)
    for p, v, first, last in product((1, 2, 3, 4, 7, 8), (1, 2, 3), STATED, STATED)
]


def head(layers: int) -> HeadArchitecture:
    return HeadArchitecture("qwen2", layers, 64, 4, 2, 16, 128, 512, 1e-6, 1e6, True, 1024)


@pytest.mark.parametrize("layers", [6, 8, 12, 24, 28, 80])
def test_layers_fall_as_megatron_core_places_them(layers: int) -> None:
    layouts = [layout for layout in LAYOUTS if not stages_problem(layers, layout)]
    assert len(layouts) >= 8 and any(layout.virtual_pipeline > 1 for layout in layouts)
    for layout in layouts:
        config = head_config(head(layers), layout, Precision("fp32"))
        for chunk in chunks(layers, layout):
            vp_stage = chunk.chunk if layout.chunks else None
            first = get_transformer_layer_offset(config, vp_stage, chunk.stage)
            count = get_num_layers_to_build(config, vp_stage, chunk.stage)
            assert chunk.layers == range(first, first + count), layout


@pytest.mark.parametrize("layers", [6, 8, 12, 24, 28, 80])
def test_each_layer_stands_in_one_chunk_and_each_end_too(layers: int) -> None:
    for layout in LAYOUTS:
        if stages_problem(layers, layout):
            continue
        found = chunks(layers, layout)
        assert sorted(layer for chunk in found for layer in chunk.layers) == list(range(layers))
        assert [(c.stage, c.chunk) for c in found] == list(
            product(range(layout.pipeline), range(layout.virtual_pipeline))
        )
        assert [c for c in found if c.first] == [found[0]] and [c for c in found if c.last] == [found[-1]]


def test_a_virtual_pipeline_goes_round_the_stages() -> None:
    assert chunks(8, Layout(pipeline=2, virtual_pipeline=2)) == (
        Chunk(0, 0, range(0, 2), first=True, last=False),
        Chunk(0, 1, range(4, 6), first=False, last=False),
        Chunk(1, 0, range(2, 4), first=False, last=False),
        Chunk(1, 1, range(6, 8), first=False, last=True),
    )


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pipeline=3),
        Layout(virtual_pipeline=2),
        Layout(pipeline=2, first_stage_layers=8),
        Layout(pipeline=2, virtual_pipeline=2, first_stage_layers=3),
        Layout(pipeline=2, virtual_pipeline=2, first_stage_layers=4, last_stage_layers=4),
    ],
)
def test_what_does_not_fall_so_is_refused(layout: Layout) -> None:
    with pytest.raises(ValueError, match=r"layers|stage"):
        chunks(8, layout)


def test_megatron_core_cannot_place_two_stated_stages_in_chunks() -> None:
    layout = Layout(pipeline=2, virtual_pipeline=2, first_stage_layers=2, last_stage_layers=6)
    with pytest.raises(ZeroDivisionError):
        get_transformer_layer_offset(head_config(head(8), layout, Precision("fp32")), 0, 1)
