"""What TensorBoard makes of what it is told."""

from __future__ import annotations

from pathlib import Path

from pivot_megatron.config.load import dump_config
from pivot_megatron.train.run_folder import read_metrics
from tests.trackers import (
    LINE,
    as_given,
    begun,
    config_in,
    events,
    needs_tensorboard,
    run_on,
    single,
)


@needs_tensorboard
def test_tensorboard_holds_what_metrics_has(tmp_path: Path) -> None:
    """Of steps that are made again, what they became."""
    config = config_in(tmp_path, tensorboard=True)
    folder = begun(config)
    run_on(config, 4, loss=9.0)
    folder.rewind(2)
    run_on(config, 6)
    numbers, texts = events(config.out)
    lines = read_metrics(config.out)
    for name, value in as_given(lines[0]).items():
        found = texts[name] if isinstance(value, str) else numbers[name]
        assert found == [(line["step"], single(line[name])) for line in lines], name
    assert numbers["loss"][1:3] == [(2, 9.0), (3, single(0.3))]
    assert numbers.keys() | texts.keys() == {*LINE, "save_seconds", "config", "environment"}
    indented = [f"    {line}" for line in dump_config(config).splitlines()]
    assert texts["config"][-1][1].splitlines() == indented
