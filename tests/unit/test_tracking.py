"""Trackers: what they are given, what they cannot do to a run, and what wandb and TensorBoard make of it."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from pivot_megatron.config.load import decoded, dump_config, load_config
from pivot_megatron.config.schema import RunConfig, Tracking
from pivot_megatron.errors import UserError
from pivot_megatron.train import tracking
from pivot_megatron.train.run_folder import RunFolder, read_metrics
from pivot_megatron.train.tracker import Held, Subject
from pivot_megatron.train.tracking import Follower, Trackers, require_trackers
from tests.unit.test_config import VALID

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the tracking extra: wandb")
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs the tracking extra: tensorboard"
)

LINE = {"loss": 0.1 + 0.2, "grad_norm": 1e-300, "applied": True, "pairs": 2**53 - 1, "keys": "ab12"}


class Fake:
    name = "fake"

    def __init__(self, held: int = 0, fails: int = 0, waits: threading.Event | None = None) -> None:
        self.held, self.fails, self.waits = held, fails, waits
        self.calls: list[Any] = []

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if self.waits:
            self.waits.wait()
        self.calls.append((step, dict(values)))
        if len(self.calls) <= self.fails:
            raise ConnectionError("gone\nfor good")

    def close(self, failed: bool) -> None:
        self.calls.append(("closed", failed))


def config_in(folder: Path, **asked: Any) -> RunConfig:
    return decoded({**VALID, "out": str(folder / "run"), "tracking": asked}, "test")


def begun(config: RunConfig, steps: int = 0, first: int = 1, **other: Any) -> RunFolder:
    """The folder of a run that made steps `first` to `steps`."""
    folder = RunFolder(config)
    folder.create(config, {"python": "3"})
    for step in range(first, steps + 1):
        folder.log({"step": step, **LINE, **other})
    return folder


def run_on(config: RunConfig, upto: int, **other: Any) -> None:
    """What a run does: opens trackers, then makes the steps to `upto`."""
    folder = RunFolder(config)
    with Trackers(config.name) as trackers:
        trackers.open(config)
        for step in range(folder.last_step() + 1, upto + 1):
            trackers.log(folder.log({"step": step, **LINE, **other}))


def as_given(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "step" and value is not None}


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


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB, each chunk with CRC, length and type) after a header
    of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield Record.FromString(parts)
            parts = b""


def wandb_history(run: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, values) of every offline session of a run that has ended, oldest first. Their last records may come to the files
    after the call that ends a session has returned."""
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    rows = []
    for file in files:
        deadline = time.monotonic() + 30
        while not any(one.WhichOneof("record_type") == "exit" for one in wandb_records(file)):
            assert time.monotonic() < deadline, f"{file}: no end"
            time.sleep(0.1)
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                rows.append(
                    (record.history.step.num, {name: v for name, v in items.items() if not name.startswith("_")})
                )
    return rows


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
    code = f"from tests.unit.test_tracking import *; with_killed_service(Path({str(tmp_path)!r}))"
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # of this process
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    told = [line for line in found.stderr.splitlines() if line.startswith("r: tracking.wandb: ")]
    assert len([line for line in told if "step 1 was not taken" in line]) == 1
    assert "r: tracking.wandb: 3 of 3 lines were not taken; metrics.jsonl has them" in told
    assert len(read_metrics(tmp_path / "run")) == 3


def events(run: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[tuple[int, str]]]]:
    """(step, value) by name, of numbers and of texts, as TensorBoard reads them."""
    from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

    folder, ending = str(run / "tensorboard"), "/text_summary"
    scalars = event_accumulator.EventAccumulator(folder, size_guidance={event_accumulator.SCALARS: 0})
    tensors = plugin_event_accumulator.EventAccumulator(folder, tensor_size_guidance={"text": 0})
    scalars.Reload()
    tensors.Reload()
    numbers = {tag: [(event.step, event.value) for event in scalars.Scalars(tag)] for tag in scalars.Tags()["scalars"]}
    texts = {
        tag.removesuffix(ending): [
            (event.step, event.tensor_proto.string_val[0].decode()) for event in tensors.Tensors(tag)
        ]
        for tag in tensors.Tags()["tensors"]
        if tag.endswith(ending)
    }
    return numbers, texts


def single(value: Any) -> Any:
    """As float32 has it; a text as it is."""
    return value if isinstance(value, str) else float(np.float32(value))


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
