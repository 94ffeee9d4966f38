"""Layouts that tests run at, as data: (name, layout, processes)."""

from __future__ import annotations

import pytest

from pivot_megatron.config.schema import Layout

SINGLE = ("TP1", Layout(), 1)
TP2 = ("TP2", Layout(tensor=2), 2)
PP2 = ("PP2", Layout(pipeline=2), 2)
UNEVEN_PP2 = ("PP2-uneven", Layout(pipeline=2, first_stage_layers=1), 2)
DP2 = ("DP2", Layout(), 2)
DP2_OVERLAP = ("DP2-overlap", Layout(overlap_gradient_reduce=True, overlap_parameter_gather=True), 2)
DP2_BUCKETS = (
    "DP2-overlap-buckets",
    Layout(overlap_gradient_reduce=True, overlap_parameter_gather=True, overlap_bucket_size=5000),
    2,
)
PP2_DP2_OVERLAP = (
    "PP2xDP2-overlap",
    Layout(pipeline=2, overlap_gradient_reduce=True, overlap_parameter_gather=True),
    4,
)
TP2_PP2 = ("TP2xPP2", Layout(tensor=2, pipeline=2), 4)

FORWARD = (SINGLE, TP2, PP2, TP2_PP2)
TRAINING = (SINGLE, TP2, PP2, UNEVEN_PP2, DP2, DP2_OVERLAP, DP2_BUCKETS, PP2_DP2_OVERLAP, TP2_PP2)


def layouts(*entries: tuple[str, Layout, int]) -> pytest.MarkDecorator:
    """Parametrise a test over `layout` and `world`."""
    return pytest.mark.parametrize(
        ("layout", "world"), [pytest.param(layout, world, id=name) for name, layout, world in entries]
    )
