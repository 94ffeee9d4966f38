"""What wandb is told, online and offline, and what it makes of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from pivot_megatron.config.load import decoded
from pivot_megatron.config.schema import Tracking
from pivot_megatron.errors import UserError
from pivot_megatron.train.run_folder import read_metrics
from pivot_megatron.train.tracker import Subject
from pivot_megatron.train.tracking import Trackers, require_trackers
from tests.trackers import (
    LINE,
    as_given,
    begun,
    config_in,
    needs_wandb,
    run_on,
    wandb_history,
    wandb_records,
)


class FakeWandb(ModuleType):
    """wandb's calls as this project makes them. `server`: the step that the server goes on from; None: it is out of reach."""

    def __init__(self, server: int | None = None, key: bool = True) -> None:
        super().__init__("wandb")
        self.server, self.key = server, key
        self.calls: list[Any] = []
        self.Settings = lambda **settings: settings

    def login(self, **asked: Any) -> bool:
        assert asked == {"prompt": False, "verify": False}
        return self.key

    def teardown(self) -> None:
        self.calls.append("teardown")

    def init(self, **asked: Any) -> Any:
        self.calls.append(asked)
        if asked["mode"] == "online" and self.server is None:
            raise ConnectionError("connection refused\nretrying")

        def log(values: Mapping[str, Any], step: int, commit: bool) -> None:
            assert commit
            self.calls.append((step, values))

        def finish(exit_code: int) -> None:
            self.calls.append(("finish", exit_code))

        return SimpleNamespace(starting_step=self.server or 0, log=log, finish=finish)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def fake(**about: Any) -> FakeWandb:
        wandb = FakeWandb(**about)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        sys.modules.pop("pivot_megatron.train.track_wandb", None)
        return wandb

    yield fake
    sys.modules.pop("pivot_megatron.train.track_wandb", None)


def test_no_login_is_one_line(faked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(key=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    require_trackers(Tracking("offline"))
    with pytest.raises(UserError, match=r"^tracking.wandb: expected a login.*wandb login.*$"):
        require_trackers(Tracking("online"))


def test_wandb_is_told_what_the_run_is(faked: Any, tmp_path: Path) -> None:
    wandb = faked(server=0)
    config = config_in(tmp_path, wandb="online", project="vision")
    begun(config)
    run_on(config, 2)
    init, *steps, end = wandb.calls
    told = {name: init[name] for name in ("project", "name", "resume", "mode", "dir")}
    assert told == {"project": "vision", "name": "n", "resume": "allow", "mode": "online", "dir": config.out}
    assert init["config"]["environment"] == {"python": "3"}
    assert decoded(init["config"]["config"], "told") == config
    assert steps == [(line["step"], as_given(line)) for line in read_metrics(config.out)]
    assert end == ("finish", 0)


def test_an_online_run_is_resumed_where_the_server_stands(faked: Any, tmp_path: Path) -> None:
    """It lacks step 3, which was lost on its way; or has steps that are made again."""
    config = config_in(tmp_path, wandb="online")
    folder = begun(config)
    first = faked(server=0)
    run_on(config, 3)
    behind = faked(server=3)
    run_on(config, 5)
    folder.rewind(4)
    ahead = faked(server=6)
    run_on(config, 7)
    assert [call[0] for call in behind.calls[1:-1]] == [3, 4, 5]
    assert [call[0] for call in ahead.calls[1:-1]] == [6, 7]
    assert first.calls[0]["id"] == behind.calls[0]["id"] == ahead.calls[0]["id"]
    other = config_in(tmp_path / "other", wandb="online")
    begun(other)
    elsewhere = faked(server=0)
    run_on(other, 1)
    assert elsewhere.calls[0]["id"] != first.calls[0]["id"]  # another folder is another run


def test_a_server_out_of_reach_makes_the_run_offline(
    faked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = faked(server=None)
    config = config_in(tmp_path, wandb="online")
    begun(config)
    run_on(config, 2)
    online, teardown, offline, *steps, _ = wandb.calls
    assert (online["mode"], teardown, offline["mode"]) == ("online", "teardown", "offline")
    assert online["id"] == offline["id"] and [step for step, _ in steps] == [1, 2]
    (line,) = capsys.readouterr().err.splitlines()
    assert "connection refused retrying" in line and f"wandb sync {config.out}/wandb/offline-run-*" in line


@needs_wandb
def test_wandb_offline_holds_what_metrics_has(tmp_path: Path) -> None:
    config = config_in(tmp_path, wandb="offline")
    folder = begun(config)
    run_on(config, 4)
    folder.rewind(2)
    time.sleep(1.1)  # wandb names a session by the second
    run_on(config, 6)
    sessions = sorted(config.out.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(sessions) == 2 and len({path.name for path in sessions}) == 1  # by the run's id
    assert wandb_history(config.out) == [(line["step"], as_given(line)) for line in read_metrics(config.out)]
    told = {
        update.key: json.loads(update.value_json)
        for record in wandb_records(sessions[0])
        if record.WhichOneof("record_type") == "run"
        for update in record.run.config.update
    }
    assert told["environment"] == {"python": "3"} and decoded(told["config"], "told") == config


@needs_wandb
@pytest.mark.slow
def test_wandb_without_a_server_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "local-" + "0" * 40)
    from pivot_megatron.train.track_wandb import WandbTracker

    config = config_in(tmp_path, wandb="online")
    folder = begun(config)
    require_trackers(config.tracking)
    began = time.monotonic()
    described, lines = folder.described(), folder.metrics.name
    tracker = WandbTracker(Subject(config.name, config.out, config.tracking, described, lines, 0, seconds=2))
    tracker.log(1, LINE)
    tracker.close(failed=False)
    assert time.monotonic() - began < 60
    assert wandb_history(config.out) == [(1, LINE)]
    assert "wandb sync" in capsys.readouterr().err


@needs_wandb
def test_wandb_without_a_key_asks_nobody(tmp_path: Path) -> None:
    """In a process of its own: wandb remembers a key it has seen."""
    code = "from pivot_megatron.train.tracking import *; require_trackers(Tracking('online'))"
    other = {name: value for name, value in os.environ.items() if name not in ("WANDB_API_KEY", "WANDB_SERVICE")}
    environment = other | {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "none"),
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "UserError: tracking.wandb: expected a login" in found.stderr


def with_killed_service(out: Path) -> None:
    """A run whose wandb service, a process of its own, is killed before the first step."""
    config = config_in(out, wandb="offline")
    folder = begun(config)
    with Trackers("r") as trackers:
        trackers.open(config)
        (service,) = [child for child in psutil.Process().children(recursive=True) if "wandb-core" in child.name()]
        service.kill()
        service.wait()
        for step in range(1, 4):
            trackers.log(folder.log({"step": step, **LINE}))


@needs_wandb
def test_a_wandb_that_dies_ends_no_run(tmp_path: Path) -> None:
    code = f"from tests.unit.test_track_wandb import *; with_killed_service(Path({str(tmp_path)!r}))"
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # of this process
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    told = [line for line in found.stderr.splitlines() if line.startswith("r: tracking.wandb: ")]
    assert len([line for line in told if "step 1 was not taken" in line]) == 1
    assert "r: tracking.wandb: 3 of 3 lines were not taken; metrics.jsonl has them" in told
    assert len(read_metrics(tmp_path / "run")) == 3
