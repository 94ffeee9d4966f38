"""Layouts that tests run at, as data: (name, layout, processes)."""

from __future__ import annotations

from collections.abc import Sequence

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
PP4 = ("PP4", Layout(pipeline=4), 4)
PP2_VPP2 = ("PP2xVPP2", Layout(pipeline=2, virtual_pipeline=2), 2)
UNEVEN_PP2_VPP2 = ("PP2xVPP2-uneven", Layout(pipeline=2, virtual_pipeline=2, first_stage_layers=2), 2)
PP2_VPP2_DP2_OVERLAP = (
    "PP2xVPP2xDP2-overlap",
    Layout(pipeline=2, virtual_pipeline=2, overlap_gradient_reduce=True, overlap_parameter_gather=True),
    4,
)
TP2_PP2_VPP2 = ("TP2xPP2xVPP2", Layout(tensor=2, pipeline=2, virtual_pipeline=2), 4)
TP2_DP2 = ("TP2xDP2", Layout(tensor=2), 4)
TP4 = ("TP4", Layout(tensor=4), 4)  # more ranks than the tests' heads have key-value groups
TP4_PP2 = ("TP4xPP2", Layout(tensor=4, pipeline=2), 8)

FORWARD = (SINGLE, TP2, PP2, TP2_PP2, TP4, PP2_VPP2)
TRAINING = (SINGLE, TP2, PP2, UNEVEN_PP2, PP2_VPP2, DP2, DP2_OVERLAP, DP2_BUCKETS, PP2_DP2_OVERLAP, TP2_PP2, TP4)
MORE_TRAINING = (PP4, UNEVEN_PP2_VPP2, PP2_VPP2_DP2_OVERLAP, TP2_PP2_VPP2, TP2_DP2)  # left to the slow tests


def layouts(*entries: tuple[str, Layout, int], slow: Sequence[tuple[str, Layout, int]] = ()) -> pytest.MarkDecorator:
    """Parametrise a test over `layout` and `world`; those in `slow` are left to the slow tests."""
    marked = [(entry, ()) for entry in entries] + [(entry, (pytest.mark.slow,)) for entry in slow]
    return pytest.mark.parametrize(
        ("layout", "world"),
        [pytest.param(layout, world, id=name, marks=marks) for (name, layout, world), marks in marked],
    )
