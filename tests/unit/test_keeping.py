"""Which checkpoints stay, when one may be written, and how one goes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivot_megatron.checkpoints import folder as folders
from pivot_megatron.checkpoints.folder import (
    Saved,
    appear,
    clear_leftovers,
    place_beside,
    remove,
    saved_of,
    steps_in,
)
from pivot_megatron.checkpoints.policy import prune, staying
from pivot_megatron.cli import main
from pivot_megatron.config.schema import Checkpoints, KeepBest
from pivot_megatron.train.keeping import Pace
from tests.checkpoints import flip, hollow

LOSSES = st.sampled_from([0.1, 0.2, 0.3, 0.4, float("nan"), float("inf"), None])


@st.composite
def runs(draw: st.DrawFn) -> list[Saved]:
    steps = sorted(draw(st.sets(st.integers(1, 60), min_size=1, max_size=15)))
    return [
        Saved(step, step - draw(st.integers(0, 2)), "", {}, {} if loss is None else {"loss": loss})
        for step in steps
        for loss in [draw(LOSSES)]
    ]


POLICIES = st.builds(
    Checkpoints,
    keep=st.integers(1, 4),
    keep_every=st.one_of(st.none(), st.integers(1, 9)),
    keep_best=st.one_of(st.none(), st.builds(KeepBest, st.just("loss"), st.integers(1, 3), st.booleans())),
)


def plainly(saved: list[Saved], policy: Checkpoints) -> set[int]:
    """The rules once more, one checkpoint at a time."""
    stay = set()
    for one in saved:
        newer = sum(other.step > one.step for other in saved)
        loss, best = one.metrics.get("loss"), policy.keep_best
        among = False
        if best is not None and loss is not None and abs(loss) < float("inf"):
            known = [o for o in saved if o is not one and abs(o.metrics.get("loss", float("inf"))) < float("inf")]
            beaten = [
                o
                for o in known
                if (o.metrics["loss"] > loss if best.largest else o.metrics["loss"] < loss)
                or (o.metrics["loss"] == loss and o.step > one.step)
            ]
            among = len(beaten) < best.count
        if newer < policy.keep or (policy.keep_every and one.due % policy.keep_every == 0) or among:
            stay.add(one.step)
    return stay


@settings(deadline=None)
@given(runs(), POLICIES)
def test_what_stays_is_what_the_rules_say(saved: list[Saved], policy: Checkpoints) -> None:
    assert set(staying(saved, policy)) == plainly(saved, policy)
    assert saved[-1].step in staying(saved, policy)


@settings(deadline=None)
@given(runs(), POLICIES)
def test_pruning_after_every_save_is_pruning_once(saved: list[Saved], policy: Checkpoints) -> None:
    there: list[Saved] = []
    for one in saved:
        there.append(one)
        stay = staying(there, policy)
        there = [s for s in there if s.step in stay]
    assert {s.step for s in there} == set(staying(saved, policy))
    assert list(staying(there, policy)) == [s.step for s in there]


def test_pruning_leaves_what_is_no_runs(tmp_path: Path) -> None:
    for step, loss in ((4, 0.3), (8, 0.1), (12, 0.2), (16, 0.2)):
        hollow(tmp_path, step, loss=loss)
    (hollow(tmp_path, 2) / "saved.json").unlink()
    gone = prune(tmp_path, Checkpoints(keep=1, keep_best=KeepBest("loss")))
    assert [path.name for path in gone] == ["step-000004", "step-000012"]
    assert [step for step, _ in steps_in(tmp_path)] == [2, 8, 16]


def test_pruning_leaves_what_it_cannot_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (4, 8, 12):
        hollow(tmp_path, step)
    (tmp_path / "step-000004" / "saved.json").write_text('{"step"')
    assert [path.name for path in prune(tmp_path, Checkpoints(keep=1))] == ["step-000008"]
    assert [step for step, _ in steps_in(tmp_path)] == [4, 12]
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "step-000004" / "saved.json") in line and line.endswith("its checkpoint is left alone")


def test_one_is_gone_to_readers_before_any_of_its_files_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that is cut off leaves nothing that counts as a checkpoint, and the next start clears it away."""
    whole = hollow(tmp_path, 4)

    def cut_off(path: Path, **_: object) -> None:
        assert not whole.exists() and (path / "model.json").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil, "rmtree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            remove(whole)
    assert not steps_in(tmp_path) and len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".step-mine").mkdir()
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".step-mine"]


def test_one_that_appears_takes_the_place_of_another(tmp_path: Path) -> None:
    out = hollow(tmp_path, 4, loss=0.1)
    hollow(tmp_path / "new", 4, loss=0.2).rename(part := place_beside(out))
    appear(part, out)
    found = saved_of(out)
    assert found is not None and found.metrics == {"loss": 0.2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "step-000004"]


def test_a_save_waits_until_its_share_of_the_time_is_there() -> None:
    pace = Pace(most=0.05, since=100.0)
    assert pace.too_much(100.0) is None  # what the first costs is not known
    pace.begun(110.0)
    pace.blocked(1.0)
    pace.blocked(0.5)
    assert "1.5 s" in (pace.too_much(130.0) or "")
    assert pace.too_much(140.1) is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 5), st.floats(0.0, 2)), max_size=200), st.floats(0.01, 0.5))
def test_saves_take_no_more_than_their_share(steps: list[tuple[float, float]], most: float) -> None:
    """Steps of (seconds, what a save after it would cost). The last save is paid for by the time to come."""
    now, pace, spent, before = 0.0, Pace(most, 0.0), 0.0, 0.0
    for seconds, cost in steps:
        now += seconds
        if pace.too_much(now) is None:
            spent += before
            pace.begun(now)
            pace.blocked(cost)
            now, before = now + cost, cost
    assert spent <= most * now + 1e-6


def cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["checkpoint", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (4, 8):
        hollow(tmp_path / "run" / "checkpoints", step, loss=0.25)
    (tmp_path / "run" / "checkpoints" / "step-000008" / "saved.json").write_text("")
    code, out, _ = cli(capsys, "list", tmp_path / "run")
    first, second = out.splitlines()
    assert code == 0 and "step-000004" in first and "loss 0.2500" in first and "pipeline 2, 4 processes" in first
    assert "saved.json: expected" in second
    records = json.loads(cli(capsys, "list", tmp_path / "run", "--json")[1])
    assert records[0]["step"] == 4 and records[0]["metrics"] == {"loss": 0.25} and records[0]["bytes"] > 100
    assert "saved.json" in records[1]["problem"]


def test_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    for step in (4, 8, 12, 16):
        hollow(run / "checkpoints", step)
    left = lambda: [step for step, _ in steps_in(run / "checkpoints")]  # noqa: E731
    code, out, _ = cli(capsys, "prune", run, "--keep", 1, "--keep-every", 8, "--dry-run")
    assert code == 0 and left() == [4, 8, 12, 16]
    assert [line.split("step-")[1] for line in out.splitlines()] == ["000004", "000012"]
    code, out, _ = cli(capsys, "prune", run, "--keep", 1, "--keep-every", 8)
    assert code == 0 and left() == [8, 16] and out.startswith("removed")
    assert cli(capsys, "prune", run, "--keep", 1)[0] == 0 and left() == [16]
    assert cli(capsys, "prune", run, "--keep", 1)[1] == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("list", "nowhere"), "nowhere: expected a checkpoint or a run's folder"),
        (("inspect", "nowhere"), "nowhere: expected a checkpoint or a run's folder"),
        (("prune", "nowhere"), "nowhere: expected a checkpoint or a run's folder"),
        (("prune", "run"), "give --keep"),
        (("prune", "run", "--keep", "0"), "--keep: must be at least 1, found 0"),
        (("prune", "run", "--keep", "1", "--keep-every", "0"), "--keep-every: must be at least 1, found 0"),
    ],
)
def test_what_users_get_wrong(arguments, said: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    hollow(tmp_path / "run" / "checkpoints", 4)
    code, out, err = cli(capsys, *arguments)
    assert code == 2 and not out and said in err and err.count("\n") == 1
    assert steps_in(tmp_path / "run" / "checkpoints")


def test_inspect_names_the_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = hollow(tmp_path / "run" / "checkpoints", 4)
    flip(out / "tensors" / "__0_0.distcp", -1)
    code, told, _ = cli(capsys, "inspect", tmp_path / "run", "--json")
    assert code == 1 and "__0_0.distcp: expected CRC-32" in json.loads(told)["damage"]


def test_list_and_prune_start_without_torch(tmp_path: Path) -> None:
    hollow(tmp_path / "checkpoints", 4)
    told = "import sys; from pivot_megatron.cli import main; main({}); print('torch' in sys.modules)"
    for command in (["list"], ["prune", "--keep", "1"]):
        arguments = ["checkpoint", *command, str(tmp_path)]
        ended = subprocess.run(
            [sys.executable, "-c", told.format(arguments)], capture_output=True, text=True, check=True
        )
        assert ended.stdout.splitlines()[-1] == "False", ended
