"""`pivot compare`: runs that differ in their objective alone, over seeds and counts."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pivot_megatron.cli import main
from pivot_megatron.data_prep.synthetic import write_pairs
from pivot_megatron.errors import UserError
from pivot_megatron.probe.table import Score
from pivot_megatron.recipe import compare, run_once
from pivot_megatron.recipe.comparison import Measured, as_text, members, variants
from pivot_megatron.recipe.run_differences import as_text as differences_text
from pivot_megatron.recipe.run_differences import differences
from pivot_megatron.train import tracking
from pivot_megatron.train.run_folder import read_metrics
from pivot_megatron.train.tracking import require_trackers
from tests.dist.runs import config_tree
from tests.dist.test_evolve import Launcher, world  # noqa: F401  (a fixture)
from tests.harness import Workers
from tests.html_page import whole_page
from tests.trackers import Fake


ALIKE = r"expected a run that differs from .*dpo.yaml in objective, optimizer.learning_rate and optimizer.weight_decay alone, found another"


def write_run(world: Path, folder: Path, name: str, **changes: Any) -> Path:  # noqa: F811
    tree = config_tree(world, folder / "unused") | {"name": name}
    tree["batch"]["steps"] = 2
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree | changes))
    return file


def test_runs_may_differ_in_one_thing(world: Path, tmp_path: Path) -> None:  # noqa: F811
    dpo = write_run(world, tmp_path, "dpo")
    found = variants([dpo], ["optimizer.learning_rate=3e-4"])
    assert [(name, run.objective.kind) for name, run in found.items()] == [("dpo", "dpo"), ("dpo-sft", "sft")]
    assert {run.optimizer.learning_rate for run in found.values()} == {3e-4}
    ipo = write_run(world, tmp_path, "ipo", objective={"kind": "dpo", "losses": {"ipo": 1}})
    sft = write_run(world, tmp_path, "sft", objective={"kind": "sft"}, optimizer={"learning_rate": 1e-5, "warmup_fraction": 0.1})
    assert list(variants([dpo, ipo, sft], [])) == ["dpo", "ipo", "sft"]
    with pytest.raises(UserError, match="expected a run to hold against SFT, found SFT itself"):
        variants([sft], [])
    with pytest.raises(UserError, match=r"name: expected one of its own, found 'dpo' twice"):
        variants([dpo, dpo], [])
    longer = write_run(world, tmp_path, "longer", data={"shards": [str(world / "pairs")], "sequence_length": 99})
    with pytest.raises(UserError, match=rf"longer.yaml: {ALIKE} data.sequence_length: 99, there 128"):
        variants([dpo, longer], [])
    slower = {"learning_rate": 1e-5, "warmup_fraction": 0.2, "beta2": 0.95}
    sooner = write_run(world, tmp_path, "sooner", objective={"kind": "sft"}, optimizer=slower)
    with pytest.raises(UserError, match=rf"{ALIKE} optimizer.warmup_fraction, optimizer.beta2: 0.2, there 0.1"):
        variants([dpo, sooner], [])


def test_what_differs_is_told_by_its_key(world: Path, tmp_path: Path) -> None:  # noqa: F811
    mpo = {"kind": "dpo", "beta": 0.5, "losses": {"sigmoid": 0.8, "sft": 1}, "reference": "online"}
    rates = {"learning_rate": 1e-5, "warmup_fraction": 0.1, "weight_decay": 0.05}
    files = [write_run(world, tmp_path, "dpo"), write_run(world, tmp_path, "mpo", objective=mpo, optimizer=rates)]
    files.append(write_run(world, tmp_path, "sft", objective={"kind": "sft"}))
    found = differences(variants(files, []))
    assert found == {
        "objective.kind": {"dpo": "dpo", "mpo": "dpo", "sft": "sft"},
        "objective.beta": {"dpo": 0.5, "mpo": 0.5, "sft": None},
        "objective.label_smoothing": {"dpo": 0.0, "mpo": 0.0, "sft": None},
        "objective.losses.sigmoid": {"dpo": 1.0, "mpo": 0.8, "sft": None},
        "objective.losses.sft": {"dpo": None, "mpo": 1.0, "sft": None},
        "optimizer.learning_rate": {"dpo": 1e-3, "mpo": 1e-5, "sft": 1e-3},
        "optimizer.weight_decay": {"dpo": 0.0, "mpo": 0.05, "sft": 0.0},
    }
    lines = [line.split() for line in differences_text(found, "").splitlines()]
    assert lines[0] == ["what", "differs", "dpo", "mpo", "sft"]
    assert ["optimizer.learning_rate", "0.001", "1e-05", "0.001"] in lines
    assert ["objective.losses.sft", "none", "1", "none"] in lines


def test_members_see_the_same_samples(world: Path, tmp_path: Path) -> None:  # noqa: F811
    found = members(variants([write_run(world, tmp_path, "dpo")], []), [1, 2], [None, 20], tmp_path)
    assert [(one.count, one.seed, one.variant) for one in found] == [
        (count, seed, name) for count in (None, 20) for seed in (1, 2) for name in ("dpo", "dpo-sft")
    ]
    assert [(one.config.seed, one.config.data.shards[0].most) for one in found[::2]] == [
        (1, None),
        (2, None),
        (1, 20),
        (2, 20),
    ]
    assert len({one.config.out for one in found}) == len(found)


def test_the_command(
    world: Path,  # noqa: F811
    tmp_path: Path,
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_once, "launch", launcher := Launcher(workers, stop_in=1))
    words = ["compare", str(write_run(world, tmp_path, "dpo")), "--set", "optimizer.learning_rate=1e-2"]
    words += ["--seeds", "1", "2", "--train", str(world / "train"), "--test", str(world / "test"), "--per-class", "8"]
    write_pairs(tmp_path / "held_out", 6, seed=4, image_size=48, progress=False)
    words += ["--draws", "2", "--out", str(tmp_path / "out"), "--pairs", str(tmp_path / "held_out")]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "compare: stopped in dpo-sft seed 1" in said
    twin = "the SFT twin of dpo trains at dpo's own learning rate, 0.01; the recipe has one for SFT (5e-06, configs/run/2_sft.yaml)"
    assert f"compare: {twin}" in said
    launcher.stop_in = None
    assert main(words) == 0
    assert launcher.runs == ["seed-1", "seed-1", "seed-2", "seed-2"]
    out = capsys.readouterr().out
    assert "all samples, encoder's accuracy, against the start:" in out and "dpo-sft - dpo: " in out and " points, " in out
    assert out.startswith("what differs ") and twin in out
    told = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert told["differences"]["objective.kind"] == {"dpo": "dpo", "dpo-sft": "sft"}
    found, answers, pairs = told["measured"]
    assert (answers["measure"], pairs["measure"]) == ("answers right", "pairs right")
    assert answers["against_the_start"] is None  # what they began from is no whole model
    assert all(0.0 <= score["mean"] <= 1.0 for score in pairs["against_the_first_variant"]["scores"])
    start, dpo, sft = found["against_the_start"]["scores"]
    assert len(start["seeds"]) == 2 and len(dpo["seeds"]) == len(sft["seeds"]) == 2
    assert np.mean(dpo["seeds"]) == pytest.approx(dpo["mean"])
    page = whole_page(tmp_path / "out" / "report.html")
    assert f"{100 * dpo['mean']:.2f}" in page.text and "learning rate 0.01" in page.text and "torch" in page.text
    assert twin in page.text and "objective.kind dpo sft" in page.text
    whole = json.loads((tmp_path / "out" / "compare.json").read_text())
    steps = read_metrics(tmp_path / "out" / "all" / "dpo" / "seed-2" / "run")
    told = f"seed 2 {steps[0]['loss']:.4g} \u2192 {steps[-1]['loss']:.4g}"
    assert "dpo-sft: loss seed 1 " in page.text and "dpo: reward_margin seed 1 " in page.text and told in page.text
    assert whole["runs"]["dpo seed 2"]["optimizer.weight_decay"] == 0.0 and whole["runs"]["dpo seed 2"]["seed"] == 2
    assert "parameters [] []" in page.text and "seed 1 / 2 1 / 2" in page.text
    one = whole["examples"][0]
    marks = [f"{name} {said['text']} {'right' if said['right'] else 'wrong'}" for name, said in one["answers"].items()]
    shown = " ".join(" ".join(["chosen", one["chosen"], *marks]).split())
    assert list(one["answers"]) == ["dpo", "dpo-sft"] and shown in page.text
    assert len(page.addresses) == len(whole["examples"]) > 0
    keys = [
        [line["keys"] for line in read_metrics(tmp_path / "out" / "all" / name / seed / "run")]
        for seed in ("seed-1", "seed-2")
        for name in ("dpo", "dpo-sft")
    ]
    assert keys[0] == keys[1] and keys[2] == keys[3] and keys[0] != keys[2]  # the same samples in the same order
    fake, set_there = Fake(), words.index("optimizer.learning_rate=1e-2")
    monkeypatch.setattr(tracking, "_opened", lambda _: [fake])
    monkeypatch.setattr(compare, "require_trackers", lambda asked: None if asked.tensorboard else pytest.fail("not asked"))
    assert main([*words[:set_there], "tracking.tensorboard=true", *words[set_there:]]) == 0
    assert fake.calls[0][1]["all_samples/encoder_s_accuracy/dpo"] == dpo["mean"]
    monkeypatch.setattr(compare, "require_trackers", require_trackers)
    answers_files = list((tmp_path / "out").rglob("answered-*.json"))
    assert len(answers_files) == 4 and main(words) == 0 and len(launcher.runs) == 4
    with monkeypatch.context() as patch:
        patch.setattr(compare, "_ANSWERED_BY", (__file__,))
        patch.setattr(compare, "ask_models", lambda *_: pytest.fail("asked"))
        with pytest.raises(pytest.fail.Exception, match="asked"):  # what other code answered is not believed
            main(words)
    weights = world / "encoder" / "model.safetensors"
    before = weights.read_bytes()
    changed = before[:-1] + bytes([before[-1] ^ 1])
    monkeypatch.setattr(run_once, "launch", lambda *told: (weights.write_bytes(changed), launcher(*told))[1])
    elsewhere = [str(tmp_path / "elsewhere") if word == str(tmp_path / "out") else word for word in words]
    assert main(elsewhere) == 2 and len(launcher.runs) == 5  # it changed as the first began
    assert f"dpo seed 1: model.encoder.hf: {world / 'encoder'}: expected weights " in capsys.readouterr().err
    assert main(words) == 2 and len(launcher.runs) == 5  # those that are finished began from what was there before
    assert f"dpo seed 1: model.encoder.hf: {world / 'encoder'}: expected weights " in capsys.readouterr().err
    weights.write_bytes(before)
    assert main([*words, "--set", "optimizer.learning_rate=1e-3"]) == 2
    assert "dpo seed 1: optimizer: begun with" in capsys.readouterr().err
    assert main([*words, "--samples", "41"]) == 2
    assert "--samples: expected at most the 40 that" in capsys.readouterr().err
    assert main([*words, "--samples", "8", "8"]) == 2 and "that differ, found 8, 8" in capsys.readouterr().err
    assert main([*words, "--seeds", "3"]) == 2 and "--seeds: expected two or more" in capsys.readouterr().err


def test_it_stops_between_models_and_goes_on(
    world: Path,  # noqa: F811
    tmp_path: Path,
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Asked while the first seed is probed, and again while the second model answers."""
    monkeypatch.setattr(run_once, "launch", launcher := Launcher(workers))
    write_pairs(tmp_path / "held_out", 3, seed=4, image_size=48, progress=False)
    words = ["compare", str(write_run(world, tmp_path, "dpo")), "--seeds", "1", "2", "--out", str(tmp_path / "out")]
    words += ["--train", str(world / "train"), "--test", str(world / "test"), "--per-class", "8", "--draws", "1"]
    words += ["--classifier", "prototypes", "--pairs", str(tmp_path / "held_out")]
    done: list[str] = []
    stop_after = {"probe_encoders": 1}

    def watched(name: str) -> None:
        work = getattr(compare, name)

        def working(*given: Any) -> Any:
            found = work(*given)
            done.append(name)
            if stop_after.get(name) == done.count(name):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)  # a thread hears it
            return found

        monkeypatch.setattr(compare, name, working)

    for name in ("probe_encoders", "ask_models"):
        watched(name)
    assert main(words) == 0 and "compare: stopped between two models" in capsys.readouterr().err
    assert done == ["probe_encoders"] and len(launcher.runs) == 4
    done.clear(), stop_after.clear()
    stop_after["ask_models"] = 2
    assert main(words) == 0 and "compare: stopped between two models" in capsys.readouterr().err
    assert done == ["probe_encoders"] * 2 + ["ask_models"] * 2 and not (tmp_path / "out" / "compare.json").exists()
    done.clear(), stop_after.clear()
    assert main(words) == 0 and done == ["probe_encoders"] * 2 + ["ask_models"] * 2  # what was asked before is kept
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["settings"]["probe"]["classifier"] == "prototypes" and len(launcher.runs) == 4


def test_what_is_inside_the_noise_is_called_so() -> None:
    draw = np.random.default_rng(0)
    base = draw.uniform(0.4, 0.6, (5, 50))
    start = Score("start", np.repeat(base.mean(axis=0)[None], 5, axis=0), {}, {})
    one, same, better = (
        Score(name, base + draw.normal(shift, 0.02, (5, 50)), {}, {})
        for name, shift in (("one", 0.1), ("same", 0.1), ("better", 0.2))
    )
    text = as_text([Measured(None, "accuracy", (start, one, same, better))])
    verdicts = [line for line in text.splitlines() if " - one: " in line]
    assert verdicts[0].endswith("inside the noise") and verdicts[1].endswith("points, outside the noise")
