"""Charts of a page: their scales, and lines that keep to them."""

import math
import re

import pytest

from pivot_megatron.report.charts import Series, line_chart, nice_ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 17, [0, 5, 10, 15]), (1, 300, [100, 200, 300]), (2, 2, [2])],
)
def test_nice_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_line_chart_keeps_to_its_box_and_breaks_at_nan() -> None:
    svg = line_chart([Series("loss", [(1, 2.0), (2, 1.0), (3, math.nan), (4, 3.0), (5, 2.0)], 0)], title="<loss>")
    path = re.search(r'd="([^"]+)"', svg)
    assert path is not None and path[1].count("M") == 2 and "nan" not in svg and "&lt;loss&gt;" in svg
    corners = [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", path[1])]
    assert corners[0] == (46, 92) and max(y for _, y in corners) == 174 and min(y for _, y in corners) == 10
    assert line_chart([Series("loss", [(1, math.nan)], 0)], title="loss") == ""
    assert "nan" not in line_chart([Series("flat", [(3, 1.0)], 0)], title="flat")
