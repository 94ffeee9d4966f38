"""What a schedule's phases need is looked for before the first of them trains, all of it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pivot_megatron.cli import main
from pivot_megatron.data.index import index_tar, tars_of, write_index
from pivot_megatron.data_prep.synthetic import write_conversations, write_pairs
from pivot_megatron.train.run_folder import finished_path
from tests.dist.runs import config_tree, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"), pairs=24)
    write_conversations(folder / "captions", 12, seed=4, image_size=48, kind="caption", progress=False)
    return folder


def schedule(world: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Align, prefer, and prefer again."""
    run = {k: v for k, v in config_tree(world, folder).items() if k not in ("name", "out", "model")}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    align = {"base": "run.yaml", "objective": {"kind": "sft"}, "data": {"shards": [str(world / "captions")]}}
    tree: dict[str, Any] = {
        "name": "growth",
        "out": str(folder / "out"),
        "encoder": {"hf": str(world / "encoder")},
        "phases": [
            {"name": "align", "head": str(world / "llm"), "run": align},
            {"name": "dpo", "run": {"base": "run.yaml"}},
            {"name": "again", "run": {"base": "run.yaml"}},
        ],
    }
    return folder / "schedule.yaml", tree


def check(file: Path, tree: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of `pivot check`, and what it said."""
    file.write_text(yaml.safe_dump(tree))
    code = main(["check", str(file)])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_a_schedule_is_checked_as_one(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its own file, by one that has another as its base, and beside runs."""
    file, tree = schedule(world, tmp_path)
    assert check(file, tree, capsys) == (0, f"{file}: ok: 3 phases\n")
    (tmp_path / "based.yaml").write_text("base: schedule.yaml\nname: other\n")
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(config_tree(world, tmp_path / "whole")))
    assert main(["check", str(tmp_path / "based.yaml"), str(tmp_path / "whole.yaml")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'based.yaml'}: ok: 3 phases\n{tmp_path / 'whole.yaml'}: ok\n"
    tree["nme"] = "x"
    assert check(file, tree, capsys) == (2, f"{file}: nme: unknown key; did you mean name?\n")
    assert not (tmp_path / "out").exists()


def test_what_later_phases_need_is_told_at_once(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tree = schedule(world, tmp_path)
    align, dpo, again = (phase["run"] for phase in tree["phases"])
    align["batch"] = {"steps": None, "epochs": 0.5}  # six samples, and batches of twelve
    dpo["data"] = {"shards": [{"folder": str(world / "pairs"), "most": 25}, str(world / "captions"), "nowhere"]}
    again["parameters"] = [{"match": "nothing.*", "rate": "frozen"}]
    code, said = check(file, tree, capsys)
    one, two = f"{file}: phases.1 (dpo): data.shards", f"{file}: phases.0 (align): batch.epochs"
    assert code == 2 and said.splitlines() == [
        f"{file}: phases.2 (again): parameters.0.match: no parameter is named like 'nothing.*'; names begin with encoder., "
        "projector. and llm., such as encoder.decoder.layers.0.mlp.linear_fc1.weight",
        f"{two}: 0.5 epochs of 12 samples do not fill one batch of 12; lower global_size or raise epochs",
        f"{one}.0.most: expected at most the 24 samples of {world / 'pairs'}, found 25; lower it, or leave it out for all",
        f"{one}.1.folder: expected pairs, whose answers the objective compares, found none in {world / 'captions'}",
        f"{one}.2.folder: expected a folder of shards at nowhere, found none (No such file or directory)",
    ]
    monkeypatch.setattr("pivot_megatron.recipe.run_once.launch", lambda *_: pytest.fail("trained"))
    assert main(["evolve", str(file)]) == 2 and capsys.readouterr().err.count(f"{file}: phases.") == 5
    assert main(["evolve", str(file), "--runs"]) == 2 and not (tmp_path / "out").exists()


def test_a_finished_phases_data_may_be_gone(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, tree = schedule(world, tmp_path)
    tree["phases"][0]["run"]["data"] = {"shards": ["nowhere"]}
    assert check(file, tree, capsys)[0] == 2
    mark = finished_path(tmp_path / "out" / "align" / "run")
    mark.parent.mkdir(parents=True)
    mark.write_text("{}")
    assert check(file, tree, capsys)[0] == 0


def test_a_head_without_its_files_is_told(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, tree = schedule(world, tmp_path)
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "config.json").write_text((world / "llm" / "config.json").read_text())
    realign = tree["phases"][0]["run"]
    tree["phases"].append({"name": "realign", "head": str(tmp_path / "head"), "run": realign})
    code, said = check(file, tree, capsys)
    key = f"{file}: phases.3 (realign): head: {tmp_path / 'head'}"
    weights, tokenizer = said.splitlines()
    assert code == 2 and tokenizer.startswith(f"{key}: expected a tokenizer")
    assert weights.startswith(f"{key}: expected model.safetensors")


def test_broken_samples_are_told(tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "pairs", 24, seed=3, image_size=48, progress=False)
    (tar,) = tars_of(tmp_path / "pairs")
    tar.write_bytes(tar.read_bytes().replace(b'"rejected"', b'"rejecter"', 2))
    write_index(tmp_path / "pairs", [index_tar(tar, decode=False)])
    file, tree = schedule(world, tmp_path)
    again = tree["phases"][2]["run"]
    again["data"] = {"shards": [str(tmp_path / "pairs")]}
    assert "phases.2 (again): data.shards: 2 of 24 samples are broken, the first" in check(file, tree, capsys)[1]
    again["data"] |= {"on_bad_sample": "skip"}
    assert "phases.2 (again): data.max_bad_share: 2 of 24 samples are broken" in check(file, tree, capsys)[1]
    again["data"] |= {"max_bad_share": 0.1}
    assert check(file, tree, capsys)[0] == 0
