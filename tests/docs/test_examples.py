"""The examples of the pages on extending, run as they stand there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration, Qwen2ForCausalLM

from pivot_megatron.cli import main
from pivot_megatron.data_prep.synthetic import make_question
from pivot_megatron.recipe import tiny_world
from pivot_megatron.recipe.demo_scale import DemoScale
from pivot_megatron.recipe.phase_runs import phases_of
from pivot_megatron.recipe.schedule import load_schedule
from tests.dist.runs import config_tree, make_world, write_config
from tests.docs.commands import ROOT, blocks
from tests.prep import encoded, report, samples, write_images

OBJECTIVE = ROOT / "docs" / "adding-an-objective.md"


def python_block(page: str, holding: str) -> str:
    (found,) = [
        content for language, content in blocks(ROOT / "docs" / page) if language == "python" and holding in content
    ]
    return found


def edits() -> Iterator[tuple[str, list[str], list[str]]]:
    """(file, lines before, lines after) of each change that the page on objectives shows."""
    for language, content in blocks(OBJECTIVE):
        if language != "diff":
            continue
        first, *lines = content.splitlines()
        before = [line[1:] for line in lines if line[:1] in (" ", "-")]
        after = [line[1:] for line in lines if line[:1] in (" ", "+")]
        yield first.removeprefix("--- "), before, after


def test_what_is_to_be_changed_is_there() -> None:
    """Once: the page names a place and no more than that."""
    for file, before, _ in edits():
        assert (ROOT / file).read_text().count("\n".join(before) + "\n") == 1, f"{file}: {before}"


@pytest.mark.slow
def test_objectives_are_added(tmp_path: Path) -> None:
    """To a copy of the project: both examples in closed form, and a run with each."""
    shutil.copytree(ROOT / "pivot_megatron", tmp_path / "pivot_megatron", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for file, before, after in edits():
        path = tmp_path / file
        path.write_text(path.read_text().replace("\n".join(before) + "\n", "\n".join(after) + "\n"))
    (tmp_path / "pivot_megatron" / "objective" / "simpo.py").write_text(
        python_block(OBJECTIVE.name, "class SimpoObjective")
    )
    build = tmp_path / "pivot_megatron" / "objective" / "build.py"
    build.write_text(
        build.read_text().replace(
            "from pivot_megatron.objective.types",
            "from pivot_megatron.objective.simpo import SimpoObjective\nfrom pivot_megatron.objective.types",
        )
    )
    run_copy(tmp_path, "-c", CLOSED_FORM)
    world = make_world(tmp_path / "world", pairs=24)
    for name, objective in {
        "simpo": {"kind": "simpo", "gamma": 0.5},
        "squared": {"kind": "dpo", "losses": {"squared_hinge": 1.0}},
    }.items():
        tree = config_tree(world, tmp_path / name) | {"objective": objective}
        tree["batch"]["steps"] = 2
        run_copy(tmp_path, "-m", "pivot_megatron.cli", "train", str(write_config(tmp_path / f"{name}.yaml", tree)))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 2 and all(line["applied"] and "reward_margin" in line for line in lines)
        if name == "squared":
            assert lines[0]["loss"] == pytest.approx(1.0, abs=1e-5)  # no margin yet


CLOSED_FORM = """
import math, torch
from pivot_megatron.config.schema import Simpo
from pivot_megatron.objective.build import build_objective
from pivot_megatron.objective.losses import squared_hinge
from pivot_megatron.objective.types import AnswerLogprobs

assert squared_hinge(torch.tensor([-1.0, 0.5, 2.0])).tolist() == [4.0, 0.25, 0.0]
policy = torch.tensor([-1.0, -3.0, -4.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
found = build_objective(Simpo(beta=2.0, gamma=0.5))(AnswerLogprobs(policy, torch.tensor([0, 0, 1, 2, 3]), 4))
margins = [2 * (-2.0) - 2 * (-4.0), 2 * (-2.0) - 2 * (-0.5)]
expected = sum(math.log1p(math.exp(-(m - 0.5))) for m in margins)
assert abs(found.total.item() - expected) < 1e-12 and found.count == 2
assert found.metrics["reward_accuracy"].item() == 1 and abs(found.metrics["reward_margin"].item() - sum(margins)) < 1e-12
found.total.backward()
slope = 1 / (1 + math.exp(margins[0] - 0.5))
assert abs(policy.grad[0].item() + slope * 2 / 2) < 1e-12 and abs(policy.grad[2].item() - slope * 2) < 1e-12
"""


def run_copy(project: Path, *words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(
        [sys.executable, *words], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_data_set_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [make_question(1, index, 48) for index in range(6)]
    photos = [encoded(q.image, "JPEG") for q in questions[:5]]
    write_images(tmp_path / "photos", {f"{n}.jpg": photo for n, photo in enumerate(photos)})
    lines = [f"{n}.jpg,Which?,{q.chosen},{q.chosen if n == 1 else q.rejected}" for n, q in enumerate(questions)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,question,better,worse", *lines]) + "\n")
    monkeypatch.chdir(tmp_path)
    exec(
        compile(
            python_block("adding-a-data-set.md", "class CsvPairs").replace("workers=2", "workers=0"), "page", "exec"
        ),
        {},
    )
    made = samples(tmp_path / "shards" / "mine")
    assert [pair.key for pair in made] == [f"pairs-{n:08d}" for n in (0, 2, 3, 4)]
    assert [(pair.chosen, pair.rejected, pair.image) for pair in made] == [
        (questions[n].chosen, questions[n].rejected, photos[n]) for n in (0, 2, 3, 4)
    ]
    dropped = report(tmp_path / "shards" / "mine")["dropped"]
    assert {reason: found["count"] for reason, found in dropped.items()} == {"tie": 1, "image_not_found": 1}
    capsys.readouterr()
    world = make_world(tmp_path / "world", pairs=2)
    assert main(["data", "inspect", "shards/mine", "--sheet", "page.html", "--tokenizer", str(world / "llm")]) == 0


def test_shards_are_written_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [make_question(2, index, 48) for index in range(3)]
    photos = [encoded(q.image, "JPEG") for q in questions]
    write_images(tmp_path, {f"{n}.jpg": photo for n, photo in enumerate(photos)})
    rows = [
        {
            "id": f"k{n}",
            "image": f"{n}.jpg",
            "question": q.question,
            "chosen": q.chosen,
            "rejected": q.rejected,
            "more": 1,
        }
        for n, q in enumerate(questions)
    ]
    monkeypatch.chdir(tmp_path)
    exec(compile(python_block("shards.md", "ShardWriter("), "page", "exec"), {"rows": rows})
    made = samples(tmp_path / "shards" / "mmpr-20k")
    assert [(pair.question, pair.image) for pair in made] == [
        (q.question, photo) for q, photo in zip(questions, photos)
    ]


@pytest.mark.slow
def test_a_head_is_taken_out_of_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to what Megatron-Bridge is given: the same logits, from a folder of Qwen2ForCausalLM with its tokenizer."""
    world = make_world(tmp_path / "world", pairs=2)
    words = ["--encoder", str(world / "encoder"), "--llm", str(world / "llm"), "--out", str(tmp_path / "checkpoint")]
    assert main(["convert", "import", *words]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "export", "checkpoint", "--part", "mllm", "--out", "exports/mllm"]) == 0
    exec(compile(python_block("nemo.md", "Qwen2ForCausalLM("), "page", "exec"), {})
    config = json.loads((tmp_path / "exports" / "head" / "config.json").read_text())
    assert (
        config["architectures"] == ["Qwen2ForCausalLM"] and (tmp_path / "exports" / "head" / "tokenizer.json").exists()
    )
    tokens = torch.tensor([[5, 9, 2, 7]])
    with torch.no_grad():
        whole = LlavaForConditionalGeneration.from_pretrained("exports/mllm", dtype=torch.bfloat16)(
            input_ids=tokens
        ).logits
        alone = Qwen2ForCausalLM.from_pretrained("exports/head", dtype=torch.bfloat16)(input_ids=tokens).logits
    assert torch.equal(whole, alone)


def test_the_tiny_world_has_what_its_schedule_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the smallest size: every phase of configs/evolve/tiny.yaml finds its models, and its shards are there."""
    tiny_world.make_world(tmp_path / "runs" / "tiny", DemoScale.smallest())
    monkeypatch.chdir(tmp_path)
    file = ROOT / "configs" / "evolve" / "tiny.yaml"
    schedule = load_schedule(file)
    phases = phases_of(schedule, file)
    assert len(phases) == 6 and schedule.probe is not None
    wanted = {source.folder for phase in phases for source in phase.config.data.shards}
    assert all(Path(folder).is_dir() for folder in (*wanted, schedule.probe.train, schedule.probe.test))


def test_pages_name_what_exists() -> None:
    """Files of the project and names of tests that the pages on extending send a reader to."""
    for page in (
        "adding-an-encoder.md",
        "adding-an-objective.md",
        "adding-a-data-set.md",
        "nemo.md",
        "troubleshooting.md",
    ):
        text = (ROOT / "docs" / page).read_text()
        for name in re.findall(r"`((?:tests|tools|launch|configs|pivot_megatron)/[\w/.-]+\.\w+)`", text):
            assert (ROOT / name).exists() or name == "pivot_megatron/objective/simpo.py", f"{page}: {name}"
