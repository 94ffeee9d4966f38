"""Schedules of `pivot evolve`: what each phase's run begins from, and what may be wrong."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pivot_megatron.config.load import ConfigErrors, dump_config, load_config
from pivot_megatron.config.schema import AnyRes, Component, Projector
from pivot_megatron.config.shipped import shipped_config
from pivot_megatron.convert.commands import import_checkpoint
from pivot_megatron.convert.tiny_checkpoints import make_encoder, make_head, make_tokenizer
from pivot_megatron.recipe.phase_runs import Phase, phases_of
from pivot_megatron.recipe.schedule import load_schedule

RUN = {
    "objective": {"kind": "sft"},
    "data": {"shards": ["shards/captions"]},
    "optimizer": {"learning_rate": 1e-3},
    "batch": {"global_size": 4, "micro_tokens": 256, "steps": 5},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`encoder`, heads of three sizes, of which `b` and `c` are as wide as each other, and `start`, a checkpoint with `a`."""
    folder = tmp_path_factory.mktemp("models")
    make_encoder(folder / "encoder", image_size=16, patch_size=8, hidden_size=32, layers=3, heads=4, ffn=48, seed=0)
    tokenizer = make_tokenizer(["a red circle"], 300)
    for name, hidden, layers in (("a", 32, 2), ("b", 48, 2), ("c", 48, 3)):
        make_head(
            folder / name, tokenizer, hidden_size=hidden, layers=layers, heads=4, kv_heads=2, ffn=64, tied=True, seed=1
        )
    import_checkpoint(folder / "encoder", folder / "a", folder / "start", feature_layer=None, seed=1)
    return folder


def tree(models: Path, out: Path) -> dict[str, Any]:
    """Align and prefer, with a head, then a wider one, then one as wide."""

    def phase(name: str, head: str | None = None, **run: Any) -> dict[str, Any]:
        return {
            "name": name,
            "run": {"base": "run.yaml", **run},
            **({"head": str(models / head)} if head else {}),
        }

    dpo = {"objective": {"kind": "dpo", "beta": 0.3}, "data": {"shards": ["shards/pairs"]}}
    return {
        "name": "growth",
        "out": str(out),
        "encoder": {"hf": str(models / "encoder")},
        "every": {"seed": 5},
        "phases": [
            phase("align-a", "a"),
            phase("dpo-a", **dpo),
            phase("align-b", "b", parameters=[{"match": "encoder.*", "rate": "frozen"}]),
            phase("dpo-b", batch={"steps": 9}, **dpo),
            phase("align-c", "c"),
            phase("dpo-c", seed=6, **dpo),
        ],
    }


def resolved(folder: Path, schedule: dict[str, Any], *overrides: str) -> list[Phase]:
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    file = folder / "schedule.yaml"
    file.write_text(yaml.safe_dump(schedule))
    return phases_of(load_schedule(file, overrides), file)


def test_phases_hand_on_what_fits(models: Path, tmp_path: Path) -> None:
    phases = resolved(tmp_path, tree(models, tmp_path / "out"))
    names = ["align-a", "dpo-a", "align-b", "dpo-b", "align-c", "dpo-c"]
    assert [phase.name for phase in phases] == names
    runs = [Component(checkpoint=tmp_path / "out" / name / "run") for name in names]
    heads = {name: Component(hf=models / name) for name in "abc"}
    starts = [phase.config.model for phase in phases]
    assert starts[0].encoder.hf == models / "encoder"
    trained = [runs[0], runs[1], runs[1], runs[3], runs[4]]  # not where it stood still
    assert [start.encoder.checkpoint for start in starts[1:]] == [run.checkpoint for run in trained]
    assert [start.llm for start in starts] == [heads["a"], runs[0], heads["b"], runs[2], heads["c"], runs[4]]
    nothing, handed_on = Projector(), [Projector(checkpoint=run.checkpoint) for run in runs]
    assert [start.projector for start in starts] == [nothing, handed_on[0], nothing, *handed_on[2:5]]
    assert [phase.projector for phase in phases] == [False, True, False, True, True, True]
    assert [phase.config.seed for phase in phases] == [5, 5, 5, 5, 5, 6]
    assert [phase.config.batch.steps for phase in phases] == [5, 5, 5, 9, 5, 5]
    assert [phase.config.objective.kind for phase in phases] == ["sft", "dpo"] * 3


def test_a_phase_is_a_run_like_any_other(models: Path, tmp_path: Path) -> None:
    for phase in resolved(tmp_path, tree(models, tmp_path / "out")):
        file = tmp_path / "phase.yaml"
        file.write_text(dump_config(phase.config))
        assert load_config(file) == phase.config


def test_overrides_and_a_start_from_checkpoints(models: Path, tmp_path: Path) -> None:
    schedule = tree(models, tmp_path / "out") | {"projector": {"checkpoint": str(models / "start")}}
    first, *_ = resolved(tmp_path, schedule, "every.batch.micro_tokens=512", "phases.0.run.objective={kind: dpo}")
    assert first.config.batch.micro_tokens == 512 and first.config.objective.kind == "dpo" and first.projector
    assert first.config.model.projector == Projector(checkpoint=models / "start")


def test_tiles_stay_through_a_new_head(models: Path, tmp_path: Path) -> None:
    """Whose fresh projector has none to bring along; what a phase says itself holds from there on."""
    schedule = tree(models, tmp_path / "out")
    schedule["phases"][0]["run"]["model"] = {"anyres": {"grids": [[1, 2]], "max_tiles": 3}}
    schedule["phases"][3]["run"]["model"] = {"anyres": {"max_tiles": 2}}
    tiles, own = AnyRes(((1, 2),), 3), AnyRes(max_tiles=2)
    found = [phase.config.model.anyres for phase in resolved(tmp_path, schedule)]
    assert found == [tiles, None, tiles, own, None, None]  # None: as the projector has it
    del schedule["phases"][0]["run"]["model"]
    wider = resolved(tmp_path, schedule, f"phases.4.head={models / 'a'}")
    assert [phase.config.model.anyres for phase in wider] == [None, None, None, own, own, None]


def test_an_override_changes_one_phase_alone(models: Path, tmp_path: Path) -> None:
    """Where phases share a mapping by an alias, or merge one in."""
    schedule = tree(models, tmp_path / "out")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    run = "&run {base: run.yaml, batch: &batch {steps: 7}}"
    phases = f"[{{name: a, head: {models / 'a'}, run: {run}}}, {{name: b, run: *run}}, {{name: c, run: {{<<: *run, seed: 3}}}}]"
    file = tmp_path / "schedule.yaml"
    file.write_text(f"name: x\nout: {tmp_path}\nencoder: {schedule['encoder']}\nphases: {phases}\n")
    found = phases_of(load_schedule(file, ["phases.1.run.batch.steps=9"]), file)
    assert [phase.config.batch.steps for phase in found] == [7, 9, 7]


WRONG: dict[str, tuple[list[str], str]] = {
    "no head": (["phases.0.head=null"], "phases.0.head: missing; the first phase needs a language model"),
    "two of a name": (["phases.1.name=align-a"], "phases.1.name: expected a name of its own, found 'align-a' twice"),
    "a name that is a path": (["phases.1.name=../x"], "phases.1.name: expected letters, digits, dots and dashes"),
    "a name that is taken": (["phases.1.name=features"], "phases.1.name: expected letters"),
    "a name that is a tracker's": (["phases.1.name=wandb"], "phases.1.name: expected letters"),
    "a name that is the report's": (["phases.1.name=report.html"], "phases.1.name: expected letters"),
    "a name that is its JSON's": (["phases.1.name=evolution.json"], "phases.1.name: expected letters"),
    "a gate without a probe": (
        ["phases.1.most_fallen=0.1"],
        "phases.1.most_fallen: expected a share of 0 or more, and a",
    ),
    "a gate on all of nothing": (
        ["most_fallen_in_all=0.1"],
        "most_fallen_in_all: expected a share of 0 or more, and a probe",
    ),
    "an unknown key": (
        ["phases.1.most_falen=0.1"],
        "phases.1.most_falen: unknown key; did you mean phases.1.most_fallen?",
    ),
    "an unknown key of a run": (
        ["phases.1.run.batch.stepz=1"],
        "phases.1 (dpo-a): batch.stepz: unknown key; did you mean batch.steps?",
    ),
    "a model in a run": (
        ["phases.1.run.model.llm.hf=x"],
        "phases.1 (dpo-a): run.model.llm: follows from the schedule; leave it out",
    ),
    "a model that is none": (
        ["phases.1.run.model=5"],
        "phases.1 (dpo-a): run.model: expected a mapping of keys, found 5",
    ),
    "a folder in every run": (
        ["every.out=x"],
        "phases.0 (align-a): every.out: follows from the schedule; leave it out",
    ),
    "no preference through a fresh projector": (
        ["phases.0.run.objective={kind: dpo}"],
        "phases.0 (align-a): objective.kind: its head is new, and its projector fresh or another head's, through which no dpo",
    ),
    "nor of a wider head": (
        ["phases.2.run.objective={kind: dpo}"],
        "phases.2 (align-b): objective.kind: its head is new",
    ),
    "nor of one as wide": (
        ["phases.4.run.objective={kind: dpo}"],
        "phases.4 (align-c): objective.kind: its head is new",
    ),
    "a layout that cannot be": (["phases.3.run.layout.pipeline=7"], "phases.3 (dpo-b): layout.pipeline: "),
    "a rule that nothing answers to": (
        ["phases.3.run.parameters=[{match: nothing.*, rate: frozen}]"],
        "phases.3 (dpo-b): parameters.0.match: no parameter is named like 'nothing.*'",
    ),
    "a projector that is not there": (["projector.checkpoint=nowhere"], "projector: nowhere"),
    "two encoders": (["encoder.checkpoint=x"], "encoder: expected one of hf, checkpoint and fresh"),
    "a projector of a folder": (["projector.hf=x"], "projector: expected a checkpoint, or nothing for a fresh one"),
    "no phases": (["phases=[]"], "phases: expected one at least, found none"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_by_its_key(wrong: str, models: Path, tmp_path: Path) -> None:
    overrides, message = WRONG[wrong]
    with pytest.raises(ConfigErrors) as caught:
        resolved(tmp_path, tree(models, tmp_path / "out"), *overrides)
    assert f"{tmp_path / 'schedule.yaml'}: {message}" in str(caught.value)


LOST = [("encoder", "image_size", 32), ("encoder", "feature_layer", -1), ("encoder", "max_patches", 16)]


@pytest.mark.parametrize(("part", "key", "value"), [*LOST, ("projector", "keep", "first")])
def test_what_a_base_says_of_the_model_is_not_lost(
    part: str, key: str, value: Any, models: Path, tmp_path: Path
) -> None:
    """Nor where it stands in a base of a base; a start alone is the schedule's own, and what the schedule says too is kept."""
    said = {"model": {part: {key: value, "checkpoint": "elsewhere"}}}
    (tmp_path / "inner.yaml").write_text(yaml.safe_dump(said))
    (tmp_path / "outer.yaml").write_text("base: inner.yaml\n")
    (tmp_path / "start.yaml").write_text(yaml.safe_dump({"model": {part: {"checkpoint": "elsewhere"}}}))
    (tmp_path / "taken.yaml").write_text(yaml.safe_dump({"model": {part: {key: None}}}))
    schedule = tree(models, tmp_path / "out")
    schedule["phases"][1]["run"]["base"] = ["outer.yaml", "run.yaml", "start.yaml"]
    with pytest.raises(ConfigErrors) as caught:
        resolved(tmp_path, schedule)
    where = "for all phases" if part == "encoder" else "of its first phase alone"
    assert str(caught.value) == (
        f"{tmp_path / 'schedule.yaml'}: phases.1 (dpo-a): run.base: outer.yaml sets model.{part}.{key} to {value}, which the "
        f"schedule says {where}; take it out of outer.yaml, and set {part}.{key} in the schedule where that is meant"
    )
    schedule["phases"][1]["run"]["base"] = ["outer.yaml", "run.yaml", "taken.yaml"]
    assert len(resolved(tmp_path, schedule)) == 6


def test_what_a_base_and_the_schedule_both_say_is_kept(models: Path, tmp_path: Path) -> None:
    (tmp_path / "seen.yaml").write_text(yaml.safe_dump({"model": {"encoder": {"feature_layer": -1}}}))
    schedule = tree(models, tmp_path / "out")
    schedule["encoder"]["feature_layer"] = -1
    for phase in schedule["phases"]:
        phase["run"]["base"] = ["run.yaml", "seen.yaml"]
    assert resolved(tmp_path, schedule)[0].config.model.encoder.feature_layer == -1


def test_every_mistake_is_told_at_once(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors) as caught:
        resolved(
            tmp_path,
            tree(models, tmp_path / "out"),
            "phases.1.run.batch.stepz=1",
            "phases.2.head=nowhere",
            "phases.3.run.layout.pipeline=7",
            "phases.5.run.optimizer=null",
            "phases.5.run.layout.pipeline=7",
            f"encoder.hf={models / 'lost'}",
        )
    where = [line.removeprefix(f"{tmp_path / 'schedule.yaml'}: ").split(": ")[0] for line in caught.value.errors]
    assert where == ["encoder", "phases.1 (dpo-a)", "phases.2 (align-b)", "phases.5 (dpo-c)"]
    assert "phases.2 (align-b): head: nowhere/config.json: no such file" in str(caught.value)


def test_a_fresh_encoder_cannot_be_probed(models: Path, tmp_path: Path) -> None:
    schedule = tree(models, tmp_path / "out") | {
        "encoder": {"fresh": str(models / "encoder")},
        "probe": {"train": "a", "test": "b"},
    }
    with pytest.raises(ConfigErrors, match=r"probe: expected an encoder that is there to begin with"):
        resolved(tmp_path, schedule)
    del schedule["probe"]
    assert resolved(tmp_path, schedule)[0].config.model.encoder.fresh == models / "encoder"


SO400M = {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16}
SO400M |= {"intermediate_size": 4304, "image_size": 384, "patch_size": 16}
QWEN = {"0.5B": (896, 24, 14, 2, 4864), "1.5B": (1536, 28, 12, 2, 8960), "3B": (2048, 36, 16, 2, 11008)}
QWEN |= {"7B": (3584, 28, 28, 4, 18944)}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


@pytest.fixture
def true_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configs alone of what the shipped schedules name, where they look for it."""
    configs = {"siglip2-so400m-patch16-384": SO400M}
    for size, numbers in QWEN.items():
        more = {"model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": size != "7B", "rope_theta": 1e6}
        configs[f"Qwen2.5-{size}-Instruct"] = dict(zip(SIZES, numbers, strict=True)) | more
    for name, config in configs.items():
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("true_sizes")
@pytest.mark.parametrize(
    ("name", "heads", "objectives"),
    [
        ("single", 1, ["sft", "sft", "dpo"]),
        ("mpo", 1, ["sft", "sft", "dpo"]),
        ("grow_7b", 4, ["sft", "sft", "dpo"] * 4),
    ],
)
def test_shipped_schedules_fit_their_models(name: str, heads: int, objectives: list[str]) -> None:
    file = shipped_config(f"evolve/{name}.yaml")
    schedule = load_schedule(file)
    phases = phases_of(schedule, file)
    assert [phase.config.objective.kind for phase in phases] == objectives
    assert sum(spec.head is not None for spec in schedule.phases) == heads
    assert [phase.projector for phase in phases] == [False, True, True] * heads
    frozen = [any(rule.match == "encoder.*" and rule.rate == "frozen" for rule in p.config.parameters) for p in phases]
    assert frozen == [True, False, False] + [True, True, False] * (heads - 1)


@pytest.mark.usefixtures("true_sizes")
def test_the_single_phase_is_the_papers_runs() -> None:
    file = shipped_config("evolve/single.yaml")
    for phase in phases_of(load_schedule(file), file):
        run = load_config(shipped_config(f"run/{phase.name}.yaml"))
        assert replace(run, out=phase.config.out, model=phase.config.model, name=phase.name) == phase.config


@pytest.mark.usefixtures("true_sizes")
def test_the_other_objective_begins_from_the_same_run() -> None:
    """As the comment of mpo.yaml says."""
    words = [
        line.strip("# ").rstrip()
        for line in shipped_config("evolve/mpo.yaml").read_text().splitlines()
        if line[0] == "#"
    ]
    command = shlex.split(" ".join(words[words.index(next(w for w in words if w.startswith("pivot evolve"))) :]))
    schedule = load_schedule(shipped_config("evolve/mpo.yaml"), command[3:])
    run = Path("runs/single/1b_pretrain/run")
    assert schedule.encoder.checkpoint == schedule.projector.checkpoint == run and schedule.encoder.hf is None
    *_, last = load_schedule(shipped_config("evolve/mpo.yaml")).phases
    assert schedule.phases == (replace(last, head=Component(checkpoint=run)),)
