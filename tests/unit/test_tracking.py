"""Trackers: what they are given, and what they cannot do to a run."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pivot_megatron.config.load import dump_config, load_config
from pivot_megatron.config.schema import Tracking
from pivot_megatron.errors import UserError
from pivot_megatron.train import tracking
from pivot_megatron.train.run_folder import read_metrics
from pivot_megatron.train.tracker import Held
from pivot_megatron.train.tracking import Follower, Trackers, require_trackers
from tests.trackers import (
    LINE,
    Fake,
    as_given,
    begun,
    config_in,
    run_on,
)
from tests.unit.test_config import VALID


def test_a_tracker_gets_the_line_without_step_and_nulls() -> None:
    fake = Fake()
    follower = Follower(fake, "run")
    follower.log({"step": 1, **LINE, "loss": None})
    follower.log({"step": 2, **LINE})
    follower.end(failed=True)
    follower.wait()
    assert fake.calls == [(1, as_given({**LINE, "loss": None})), (2, LINE), ("closed", True)]
    assert "loss" not in fake.calls[0][1]


def test_steps_that_a_tracker_holds_are_not_given_again() -> None:
    fake = Fake(held=5)
    follower = Follower(fake, "run")
    for step in range(3, 8):
        follower.log({"step": step})
    follower.end(failed=False)
    follower.wait()
    assert [call[0] for call in fake.calls] == [6, 7, "closed"]


def test_a_tracker_that_fails_is_told_once_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake(fails=3)
    follower = Follower(fake, "r")
    for step in range(1, 6):
        follower.log({"step": step})
    follower.end(failed=False)
    follower.wait()
    assert [call[0] for call in fake.calls] == [1, 2, 3, 4, 5, "closed"]
    assert capsys.readouterr().err.splitlines() == [
        "r: tracking.fake: step 1 was not taken (ConnectionError: gone for good); going on",
        "r: tracking.fake: 3 of 5 lines were not taken; metrics.jsonl has them",
    ]


def test_a_tracker_that_hangs_holds_nothing_up(capsys: pytest.CaptureFixture[str]) -> None:
    free = threading.Event()
    follower = Follower(Fake(waits=free), "r", seconds_to_finish=0.2)
    began = time.monotonic()
    for step in range(1, 1000):
        follower.log({"step": step})
    follower.end(failed=False)
    follower.wait()
    assert 0.2 <= time.monotonic() - began < 2
    free.set()
    assert "r: tracking.fake: has not finished after 0.2 s and is left" in capsys.readouterr().err


def test_lines_that_a_tracker_lacks_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of before it was asked for, and those that were on their way when a run was killed."""
    config = config_in(tmp_path, tensorboard=True)
    begun(config, steps=4, loss=float("nan"))
    fakes = [Fake(), Fake(held=3)]
    monkeypatch.setattr(tracking, "_opened", lambda *_: fakes)
    run_on(config, 6)
    lines = [(line["step"], as_given(line)) for line in read_metrics(config.out)]
    assert [line["loss"] for line in read_metrics(config.out)] == [None] * 4 + [LINE["loss"]] * 2
    assert fakes[0].calls == [*lines, ("closed", False)]
    assert fakes[1].calls == [*lines[3:], ("closed", False)]


def test_a_run_that_fails_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_in(tmp_path, tensorboard=True)
    begun(config)
    fake = Fake()
    monkeypatch.setattr(tracking, "_opened", lambda *_: [fake])
    with pytest.raises(RuntimeError, match="planted"), Trackers("r") as trackers:
        trackers.open(config)
        raise RuntimeError("planted")
    assert fake.calls == [("closed", True)]


def test_off_writes_and_imports_nothing(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    begun(config)
    before = set(sys.modules)
    require_trackers(config.tracking)
    run_on(config, 2)
    assert {path.name for path in config.out.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
    }
    assert not {name.partition(".")[0] for name in set(sys.modules) - before} & {"wandb", "tensorboard"}


@pytest.mark.parametrize(("key", "asked"), [("wandb", "online"), ("wandb", "offline"), ("tensorboard", True)])
def test_a_missing_package_is_one_line(key: str, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, key, None)
    with pytest.raises(UserError, match=rf"^tracking.{key}: .*pip install 'pivot-megatron\[tracking\]'.*$"):
        require_trackers(Tracking(**{key: asked}))


@pytest.mark.parametrize("text", ["", "[]", '{"id": "a"}', '{"id": "a", "step": null}'])
def test_a_broken_record_of_what_is_held_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "held.json").write_text(text)
    with pytest.raises(UserError, match=r"^tracking: .*held.json: expected an id and a step.*$"):
        Held(tmp_path, "id")


@pytest.mark.parametrize("written", ["off", "false", '"off"'])
def test_off_as_yaml_reads_it(written: str, tmp_path: Path) -> None:
    """A bare `off` is false to YAML 1.1."""
    file = tmp_path / "run.yaml"
    file.write_text(f"{json.dumps(VALID | {'optimizer': {'learning_rate': 1.0}})}\n")
    config = load_config(file, [f"tracking.wandb={written}"])
    assert config.tracking == Tracking("off")
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tracking.wandb=on", 'tracking.wandb: expected "off", "offline" or "online", found true'),
        ("tracking.wandb=disabled", 'tracking.wandb: expected "off", "offline" or "online", found "disabled"'),
        ("tracking.tensorboard=logs", 'tracking.tensorboard: expected true or false, found "logs"'),
        ("tracking.project=a/b", "tracking.project: 1 to 128 characters, none of / \\ # ? % :"),
        ("tracking.project=''", "tracking.project: 1 to 128 characters"),
    ],
)
def test_wrong_words_are_named(override: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{json.dumps(VALID)}\n")
    with pytest.raises(UserError) as caught:
        load_config(file, [override])
    assert says in str(caught.value) and "\n" not in str(caught.value)
