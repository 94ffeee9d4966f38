"""`pivot evolve`: an encoder through two heads, skipped where finished, resumed where open, stopped where it has fallen."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pivot_megatron.cli import main
from pivot_megatron.config.schema import Layout, Tracking
from pivot_megatron.convert.tiny_checkpoints import make_head
from pivot_megatron.data.build import load_tokenizer
from pivot_megatron.errors import RuleError
from pivot_megatron.probe import linear
from pivot_megatron.probe.interval import Interval
from pivot_megatron.recipe import evolve, run_once
from pivot_megatron.recipe.evolution import PhaseResult, Probed
from pivot_megatron.recipe.phase_runs import phases_of
from pivot_megatron.recipe.schedule import load_schedule
from pivot_megatron.requeue import StopRequests, mark_path
from pivot_megatron.train import tracking
from pivot_megatron.train.run_folder import read_metrics
from tests.dist.runs import config_tree, make_world, train_at
from tests.harness import Workers
from tests.html_page import whole_page
from tests.trackers import Fake

FREEZE = [{"match": "encoder.*", "rate": "frozen"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"), pairs=40)
    tokenizer = load_tokenizer(folder / "llm")
    make_head(
        folder / "wider", tokenizer, hidden_size=48, layers=2, heads=4, kv_heads=2, ffn=64, tied=True, seed=3
    )
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 8)):
        for name, color in (("dark", 60), ("light", 190)):
            (folder / split / name).mkdir(parents=True)
            for n in range(count):
                image = Image.fromarray((draw.normal(color, 30, (48, 48, 3))).clip(0, 255).astype(np.uint8))
                file = io.BytesIO()
                image.save(file, "PNG")
                (folder / split / name / f"{n}.png").write_bytes(file.getvalue())
    return folder


def write_schedule(world: Path, folder: Path) -> Path:
    run = {k: v for k, v in config_tree(world, folder).items() if k not in ("name", "out", "model")}
    run["batch"]["steps"] = 2
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    sft = {"base": "run.yaml", "objective": {"kind": "sft"}}
    tree: dict[str, Any] = {
        "name": "growth",
        "out": str(folder / "out"),
        "encoder": {"hf": str(world / "encoder")},
        "probe": {"train": str(world / "train"), "test": str(world / "test"), "per_class": 8, "draws": 2},
        "phases": [
            {"name": "align", "head": str(world / "llm"), "run": sft | {"parameters": FREEZE}},
            {"name": "dpo", "run": {"base": "run.yaml"}},
            {"name": "realign", "head": str(world / "wider"), "run": sft | {"parameters": FREEZE}},
            {"name": "dpo-wider", "run": {"base": "run.yaml"}, "most_fallen": 0.5},
        ],
    }
    file = folder / "schedule.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


class Launcher:
    """In the place of processes of their own: the tests' workers, which train for real, and this process, which judges. Stops in
    the run number `stop_in`."""

    def __init__(self, workers: Workers, stop_in: int | None = None) -> None:
        self.workers, self.stop_in = workers, stop_in
        self.runs: list[str] = []
        self.judged: list[str] = []

    def __call__(
        self, processes: int, arguments: Sequence[str], requests: StopRequests, *, answers: bool = True
    ) -> int:
        verb, file, *others = arguments
        if verb == "evolve":
            assert others[-2] == "--judge" and not answers
            self.judged.append(others[-1])
            with redirect_stdout(io.StringIO()):
                return main(list(arguments))
        assert (verb, processes, others, answers) == ("train", 1, [], True)
        if len(self.runs) == self.stop_in:
            out = mark_path(Path(file).parent / "run")
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("{}")
            return 0
        self.runs.append(Path(file).parent.name)
        self.workers.run(train_at, None, 1, Path(file), Layout())
        return 0


def test_an_encoder_goes_through_two_heads(
    world: Path, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write_schedule(world, tmp_path), tmp_path / "out"
    launcher = Launcher(workers, stop_in=2)
    monkeypatch.setattr(run_once, "launch", launcher)
    assert main(["evolve", str(file)]) == 0
    assert launcher.runs == ["align", "dpo"]
    assert "stopped in realign, which has saved; the same command goes on" in capsys.readouterr().err
    assert not (out / "align" / "encoder").exists() and (out / "dpo" / "encoder" / "model.safetensors").exists()

    launcher.stop_in = None
    assert main(["evolve", str(file)]) == 0
    assert launcher.runs == ["align", "dpo", "realign", "dpo-wider"]  # what was finished is not trained again
    assert launcher.judged == launcher.runs  # nor judged
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["phase", "align", "dpo", "realign", "dpo-wider"]
    assert [line.endswith("encoder as it was, bit for bit") for line in table[1:]] == [True, False, True, False]
    told = json.loads((out / "evolution.json").read_text())["phases"]
    assert [phase["projector"] for phase in told] == [False, True, False, True]
    assert [phase["probed"] is None for phase in told] == [True, False, True, False]
    assert all(0.5 <= phase["probed"]["accuracy"] <= 1.0 for phase in told if phase["probed"])
    # The second phase's reference is the model as it begins, so its first step moves nothing yet.
    assert read_metrics(out / "dpo-wider" / "run")[0]["reward_margin"] == pytest.approx(0.0, abs=1e-6)
    encoders = json.loads((out / "dpo-wider" / "linear.json").read_text())["scores"]
    before, after = (str(out / name / "encoder") for name in ("dpo", "dpo-wider"))
    assert [score["encoder"] for score in encoders] == [before, after, str(world / "encoder")]
    assert told[1]["probed"]["in_all"] is None  # the encoder that it found is the schedule's first
    means = {score["encoder"]: score["mean"] for score in encoders}
    assert told[3]["probed"]["in_all"] == pytest.approx(means[after] - means[str(world / "encoder")])
    assert told[3]["probed"]["difference"] == pytest.approx(means[after] - means[before])

    page = whole_page(out / "report.html")
    assert all(f"{100 * phase['probed']['accuracy']:.2f}" in page.text for phase in told if phase["probed"])
    assert page.text.count("encoder as it was, bit for bit") == 2 and "torch" in page.text

    before = json.dumps(told)
    assert main(["evolve", str(file)]) == 0 and len(launcher.runs) == 4
    assert json.dumps(json.loads((out / "evolution.json").read_text())["phases"]) == before
    assert main(["evolve", str(file), "--judge", "dpo"]) == 0 and main(["evolve", str(file), "--judge", "x"]) == 2
    assert main(["evolve", str(file), f"probe.test={tmp_path / 'nowhere'}", f"out={tmp_path / 'new'}"]) == 2
    assert not (tmp_path / "new" / "align" / "run").exists()  # said before anything is trained
    assert "--judge: expected one of align, dpo, realign, dpo-wider, found x" in capsys.readouterr().err
    assert main(["evolve", str(file), "phases.1.run.objective.beta=0.7"]) == 2
    assert "phase dpo: objective: begun with" in capsys.readouterr().err


def record_of(file: Path) -> Path:
    """Where the second phase's judgement is kept, as things are now."""
    schedule = load_schedule(file)
    phases = phases_of(schedule, file)
    return evolve.Evolution(schedule, phases, [str(file)])._record_of(phases[1])


def test_each_phase_is_a_file_that_trains_by_itself(
    world: Path, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a chain of jobs does it: a run, then its judgement."""
    file, out = write_schedule(world, tmp_path), tmp_path / "out"
    assert main(["evolve", str(file), "--runs"]) == 0
    told = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in told] == ["align", "dpo", "realign", "dpo-wider"]
    assert main(["evolve", str(file), "--judge", "align"]) == 2
    assert "phase align: expected a finished run in" in capsys.readouterr().err
    for name, run in told[:2]:
        workers.run(train_at, None, 1, Path(run), Layout())
        assert main(["evolve", str(file), "--judge", name]) == 0
    judged = json.loads((out / "evolution.json").read_text())["phases"]
    assert [phase["name"] for phase in judged] == ["align", "dpo"] and (out / "report.html").exists()
    assert (out / "dpo" / "encoder").exists()
    monkeypatch.setattr(run_once, "launch", launcher := Launcher(workers))
    assert main(["evolve", str(file)]) == 0
    assert launcher.runs == ["realign", "dpo-wider"]  # finished runs are not started again

    weights = (out / "dpo-wider" / "encoder" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "dpo-wider" / "run")
    rate = "phases.3.run.optimizer.learning_rate=0.03"
    assert main(["evolve", str(file), rate]) == 2
    assert "expected the encoder of" in capsys.readouterr().err
    shutil.rmtree(out / "dpo-wider" / "encoder")
    assert main(["evolve", str(file), rate]) == 0
    assert (out / "dpo-wider" / "encoder" / "model.safetensors").read_bytes() != weights
    launcher.runs.pop()

    # A run that is finished and is not the one that was asked for.
    other = yaml.safe_load((out / "dpo" / "run.yaml").read_text())
    for run, told in (
        (other | {"optimizer": {"learning_rate": 0.05}}, f"phase dpo: optimizer: {out / 'dpo'}"),
        (other, f"phase realign: model.encoder.checkpoint: {out / 'dpo'}"),
    ):
        for left in ("run", "encoder"):
            shutil.rmtree(out / "dpo" / left)
        (tmp_path / "again.yaml").write_text(yaml.safe_dump(run))
        workers.run(train_at, None, 1, tmp_path / "again.yaml", Layout())
        assert main(["evolve", str(file), rate]) == 2
        error = capsys.readouterr().err
        assert told in error and f"remove {out / told.split(':')[0].split()[1]} and what came after it" in error
        (out / "dpo" / "encoder").mkdir(exist_ok=True)

    shutil.rmtree(out / "dpo")
    assert main(["evolve", str(file)]) == 2
    assert "phase realign: has begun, and dpo before it is not finished; remove " in capsys.readouterr().err
    for name in ("realign", "dpo-wider"):
        shutil.rmtree(out / name)
    launcher.runs.clear()
    assert main(["evolve", str(file)]) == 0 and launcher.runs == ["dpo", "realign", "dpo-wider"]
    judged = list((out / "dpo").glob("judged-*.json"))
    assert judged == [record_of(file)]
    monkeypatch.setattr(evolve, "_JUDGED_BY", (*evolve._JUDGED_BY, __file__))
    assert record_of(file) not in judged  # other code
    monkeypatch.setattr(evolve, "_JUDGED_BY", evolve._JUDGED_BY[:-1])
    image = next((world / "test").rglob("*.png"))
    image.write_bytes(image.read_bytes() + b" ")
    assert record_of(file) not in judged  # other images
    image.write_bytes(image.read_bytes()[:-1])
    assert main(["evolve", str(file), "probe.per_class=6"]) == 0
    assert len(launcher.runs) == 3 and len(list((out / "dpo").glob("judged-*.json"))) == len(judged) + 1
    monkeypatch.setattr(linear, "LogisticRegression", lambda **_: pytest.fail("fitted"))
    assert main(["evolve", str(file), "probe.classifier=prototypes"]) == 0
    probed = json.loads((out / "evolution.json").read_text())["phases"][-1]["probed"]
    assert probed["difference_interval"]["low"] < probed["difference"] < probed["difference_interval"]["high"]
    assert "by the nearest class mean" in whole_page(out / "report.html").text


@pytest.mark.parametrize(
    ("probe", "told"),
    [
        ("probe.per_class=13", "expected 13 images of every class, found 12 of dark"),
        ("probe.per_class=12", "expected draws that differ, found that 12 a class are all there are"),
        ("probe.per_class=4", "expected at least 2 classes, 2 training samples of each and 5 a class"),
        ("probe.test={world}", "expected the 2 classes of"),
        ("probe.test={world}/train", "expected images that are in one alone, found 24 in both"),
    ],
)
def test_a_probe_that_cannot_be_is_said_before_anything_is_trained(
    probe: str, told: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_once, "launch", lambda *_: pytest.fail("trained"))
    assert main(["evolve", str(write_schedule(world, tmp_path)), probe.format(world=world)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line and not (tmp_path / "out").exists()


def test_a_fallen_encoder_ends_the_schedule(world: Path, tmp_path: Path) -> None:
    file = write_schedule(world, tmp_path)
    schedule = load_schedule(file)
    evolution = evolve.Evolution(schedule, phases_of(schedule, file), [str(file)])
    probed = Probed(0.3, Interval(0.2, 0.4), -0.6, Interval(-0.65, -0.55))
    result = PhaseResult("dpo-wider", "dpo", "qwen2 48", True, 2, 24, 1.0, 0.7, 0.0, "encoder", probed)
    with pytest.raises(RuleError, match=r"phase dpo-wider: the probe's accuracy fell by 60\.00 points, by more than 50\.00"):
        evolution.require_gate(result)
    unsure = replace(probed, difference_interval=Interval(-0.75, -0.45))
    evolution.require_gate(replace(result, probed=unsure))
    evolution.require_gate(replace(result, name="dpo"))  # which has no gate
    evolution.require_gate(replace(result, probed=None))


def test_small_losses_add_up(world: Path, tmp_path: Path) -> None:
    """No phase falls by more than its gate allows, and the schedule's first encoder is left behind."""
    from pivot_megatron.recipe.phase_runs import phases_of
    from pivot_megatron.recipe.schedule import load_schedule

    file = write_schedule(world, tmp_path)
    schedule = load_schedule(file, ["most_fallen_in_all=0.02"])
    evolution = evolve.Evolution(schedule, phases_of(schedule, file), [str(file)])
    probed = Probed(0.7, Interval(0.6, 0.8), -0.01, Interval(-0.015, -0.005), -0.04, Interval(-0.06, -0.03))
    result = PhaseResult("dpo-wider", "dpo", "qwen2 48", True, 2, 24, 1.0, 0.7, 0.0, "encoder", probed)
    assert PhaseResult.from_json(json.loads(json.dumps(asdict(result)))) == result
    told = r"phase dpo-wider: the probe's accuracy has fallen since the schedule began by 4\.00 points, by more than 2\.00 for sure"
    with pytest.raises(RuleError, match=told):
        evolution.require_gate(result)
    evolution.require_gate(replace(result, probed=replace(probed, in_all_interval=Interval(-0.06, -0.01))))
    first = replace(probed, in_all=None, in_all_interval=None)  # the encoder that it found is the first
    evolution.require_gate(replace(result, probed=first))
    with pytest.raises(RuleError, match="has fallen since the schedule began by"):
        evolution.require_gate(replace(result, name="dpo", probed=replace(first, difference_interval=Interval(-0.06, -0.03))))


def one_trained(world: Path, folder: Path, workers: Workers) -> Path:
    """A schedule of one phase, whose run is finished and not judged."""
    file = write_schedule(world, folder)
    tree = yaml.safe_load(file.read_text())
    tree["phases"] = [{"name": "dpo", "head": str(world / "llm"), "run": {"base": "run.yaml", "objective": {"kind": "sft"}}}]
    file.write_text(yaml.safe_dump(tree))
    assert main(["evolve", str(file), "--runs"]) == 0
    workers.run(train_at, None, 1, folder / "out" / "dpo" / "run.yaml", Layout())
    return file


def test_a_phase_is_judged_in_a_process_that_ends(
    world: Path, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of which the probe's words are shown, and its one row is not: this process opens no encoder, and prints the table."""
    file = one_trained(world, tmp_path, workers)
    capfd.readouterr()
    for name in ("probe_encoders", "export_once"):
        monkeypatch.setattr(evolve, name, lambda *_: pytest.fail("in this process"))
    assert main(["evolve", str(file)]) == 0
    told = capfd.readouterr()
    assert "probe: " in told.err and [line.split()[0] for line in told.out.splitlines()] == ["phase", "dpo"]
    assert (tmp_path / "out" / "dpo" / "encoder" / "model.safetensors").exists()
    assert json.loads((tmp_path / "out" / "evolution.json").read_text())["phases"][0]["probed"] is not None


@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_judgement_that_fails_ends_the_schedule_with_its_code(
    code: int, world: Path, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = one_trained(world, tmp_path, workers)
    monkeypatch.setattr(run_once, "launch", lambda *_, **__: code)
    assert main(["evolve", str(file)]) == code
    folder = tmp_path / "out" / "dpo"
    said = f"pivot: phase dpo: its judgement ended with exit code {code}, and said why above; see {folder}"
    assert capsys.readouterr().err.splitlines()[-1] == said


def test_a_schedule_that_changes_meanwhile_is_said(
    world: Path, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = one_trained(world, tmp_path, workers)
    monkeypatch.setattr(run_once, "launch", lambda *_, **__: main(["evolve", str(file), "probe.per_class=6", "--judge", "dpo"]))
    assert main(["evolve", str(file)]) == 1
    assert f"phase dpo: its judgement is of another schedule; {file} has changed since" in capsys.readouterr().err


def test_evolve_starts_its_processes_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["evolve", "none.yaml"]) == 2
    assert "evolve: expected to be started alone, for it starts the processes of its runs itself" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["evolve", "none.yaml"]) == 2 and "none.yaml: no such file" in capsys.readouterr().err


def test_trackers_are_told_of_a_new_report(
    world: Path, tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = one_trained(world, tmp_path, workers)
    fake = Fake()
    monkeypatch.setattr(tracking, "_opened", lambda _: [fake])
    monkeypatch.setattr(run_once, "launch", Launcher(workers))
    asked: list[Tracking] = []
    monkeypatch.setattr(evolve, "require_trackers", asked.append)
    words = ["evolve", str(file), "every.tracking.tensorboard=true"]
    assert main(words) == 0 and main(words) == 0
    (step, values), _ = fake.calls  # the second time it is the same
    told = json.loads((tmp_path / "out" / "evolution.json").read_text())["phases"][0]
    assert step == 1 and values["dpo/accuracy"] == told["probed"]["accuracy"] and values["dpo/loss"] == told["loss"]
    assert values["report"] == tmp_path / "out" / "report.html" and "against the phase's start" in values["table"]
    assert set(asked) == {Tracking(tensorboard=True)}
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main([*words, f"out={tmp_path / 'new'}"]) == 2 and not (tmp_path / "new").exists()
    assert "tracking.tensorboard: expected the package tensorboard" in capsys.readouterr().err
