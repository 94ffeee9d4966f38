"""Configs: what a file, its bases and overrides become; every mistake as one line."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pivot_megatron.cli import main
from pivot_megatron.config import document
from pivot_megatron.config.keys import all_keys
from pivot_megatron.config.load import ConfigErrors, dump_config, load_config
from pivot_megatron.config.schema import Dpo, Fp8, ParameterRule, Sft, Source
from pivot_megatron.errors import UserError

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "configs" / "run"

VALID: dict[str, Any] = {
    "name": "n",
    "out": "runs/n",
    "model": {"encoder": {"hf": "e"}, "llm": {"hf": "l"}},
    "objective": {"kind": "dpo"},
    "data": {"shards": ["s"]},
    "optimizer": {"learning_rate": "1e-6"},
    "batch": {"global_size": 8, "micro_tokens": 4096, "epochs": 3},
    "parameters": [{"match": "encoder.*", "rate": "frozen"}],
}


def write(path: Path, tree: Any) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def set_key(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value
    return tree


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    return write(tmp_path / "run.yaml", VALID)


def errors_of(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Without the file's name, which every line must begin with."""
    with pytest.raises(ConfigErrors) as caught:
        load_config(path, overrides)
    assert all(line.startswith(f"{path}: ") for line in caught.value.errors)
    assert len(str(caught.value).splitlines()) == len(caught.value.errors)
    return [line.removeprefix(f"{path}: ") for line in caught.value.errors]


def test_a_file_becomes_a_config_with_defaults(valid: Path) -> None:
    config = load_config(valid)
    assert config.objective == Dpo(beta=0.1)
    assert config.optimizer.learning_rate == 1e-6  # text to YAML, which wants a dot
    assert config.data.shards == (Source("s"),)
    assert config.parameters == (ParameterRule("encoder.*", "frozen"),)
    assert (config.layout.tensor, config.seed) == (1, 777)


def test_bases_lie_under_the_file_and_later_ones_over_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "first.yaml", VALID | {"seed": 1, "layout": {"tensor": 2, "pipeline": 4}})
    write(tmp_path / "second.yaml", {"base": "deep/first.yaml", "seed": 2, "layout": {"pipeline": 1}})
    third = write(tmp_path / "third.yaml", {"seed": 3, "data": {"shards": ["t"]}})
    run = write(tmp_path / "run.yaml", {"base": ["second.yaml", third.name], "batch": {"epochs": 1}})
    config = load_config(run)
    assert (config.seed, config.layout.tensor, config.layout.pipeline) == (3, 2, 1)
    assert (config.data.shards, config.batch.epochs, config.batch.global_size) == ((Source("t"),), 1, 8)


def test_another_kind_replaces_the_objective_of_the_base(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", set_key(copy.deepcopy(VALID), "objective.beta", 0.3))
    sft = write(tmp_path / "sft.yaml", {"base": "base.yaml", "objective": {"kind": "sft"}})
    same = write(tmp_path / "same.yaml", {"base": "base.yaml", "objective": {"label_smoothing": 0.1}})
    assert load_config(sft).objective == Sft()
    assert load_config(same).objective == Dpo(beta=0.3, label_smoothing=0.1)


def test_losses_merge_with_a_base_and_are_replaced_on_the_command_line(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", set_key(copy.deepcopy(VALID), "objective.losses", {"sigmoid": "8e-1", "bco": 1}))
    run = write(tmp_path / "run.yaml", {"base": "base.yaml", "objective": {"losses": {"bco": 0.2, "sft": 1}}})
    assert load_config(run).objective == Dpo(losses={"sigmoid": 0.8, "bco": 0.2, "sft": 1.0})
    assert load_config(run, ["objective.losses={ipo: 2}"]).objective == Dpo(losses={"ipo": 2.0})


def test_overrides(valid: Path) -> None:
    overrides = [
        "layout.tensor=2",
        "data.shards=[a, b/c]",
        "batch.epochs=null",
        "batch.steps=7",
        "parameters.0.rate=0.5",
        "model.encoder.hf=null",
        "model.encoder.checkpoint=runs/x",
        "model.projector.checkpoint=runs/x",
        "name=a=b",
        "precision.compute=fp32",
    ]
    config = load_config(valid, overrides)
    assert config.layout.tensor == 2
    assert config.data.shards == (Source("a"), Source("b/c"))
    assert (config.batch.epochs, config.batch.steps) == (None, 7)
    assert config.parameters == (ParameterRule("encoder.*", 0.5),)
    assert config.model.encoder.sources == config.model.projector.sources == ("checkpoint",)
    assert (config.name, config.precision.compute) == ("a=b", "fp32")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("layout.tensor", "expected key=value"),
        ("=3", "expected key=value"),
        ("data.shards=[a", "the value is not YAML"),
        ("parameters.1.rate=0.5", "expected a place in a list of 1 (0 to 0), found '1'"),
        ("parameters.rate=0.5", "found 'rate'"),
    ],
)
def test_a_wrong_override_is_named(valid: Path, override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(valid, [override])
    message = str(caught.value)
    assert repr(override) in message and says in message and "\n" not in message


def test_a_cycle_of_bases_is_named(tmp_path: Path) -> None:
    first = write(tmp_path / "first.yaml", {"base": "second.yaml"})
    write(tmp_path / "second.yaml", {"base": ["first.yaml"]})
    with pytest.raises(UserError, match=r"base: .*first\.yaml -> .*second\.yaml -> .*first\.yaml"):
        load_config(first)


def test_one_base_twice_is_no_cycle(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", VALID)
    write(tmp_path / "a.yaml", {"base": "base.yaml", "seed": 1})
    write(tmp_path / "b.yaml", {"base": "base.yaml"})
    run = write(tmp_path / "run.yaml", {"base": ["a.yaml", "b.yaml"]})
    assert load_config(run).seed == 1


def test_files_that_are_no_configs(tmp_path: Path) -> None:
    for name, text, says in (
        ("list.yaml", "[1]", "expected a mapping of keys, found [1]"),
        ("empty.yaml", "", "expected a mapping of keys, found nothing"),
        ("broken.yaml", "a: [", "not YAML"),
        ("base.yaml", "base: 3", "base: expected a file or a list of files, found 3"),
        ("lost.yaml", "base: gone.yaml", "no such file, named by base: in"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as caught:
            load_config(tmp_path / name)
        assert says in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("optimiser", {}, "optimiser: unknown key; did you mean optimizer?"),
        ("layout.tensr", 2, "layout.tensr: unknown key; did you mean layout.tensor?"),
        ("learning_rate", 1, "learning_rate: unknown key; did you mean optimizer.learning_rate?"),
        ("objective.beto", 1, "objective.beto: unknown key; did you mean objective.beta?"),
        ("objective", {"kind": "sft", "beta": 1}, "objective.beta: unknown key; the keys here are kind"),
        (
            "objective.losses",
            {"ippo": 1},
            'objective.losses.ippo: expected "sigmoid", "robust", "hinge", "ipo", "bco" or "sft", found "ippo"',
        ),
        ("objective.losses", ["ipo"], 'objective.losses: expected a mapping of keys, found ["ipo"]'),
        (
            "checkpoints.x",
            1,
            "checkpoints.x: unknown key; the keys here are every, keep, keep_every, keep_best, asynchronous, most_blocked",
        ),
        ("objective", {"kind": "ppo"}, 'objective.kind: expected "sft" or "dpo", found "ppo"'),
        ("objective", {}, 'objective.kind: missing; expected "sft" or "dpo"'),
        ("objective", "dpo", 'objective: expected a mapping of keys, found "dpo"'),
        ("objective.beta", "big", 'objective.beta: expected a number, found "big"'),
        ("parameters", [{"match": "a", "rate": "x"}], 'parameters.0.rate: expected a number or "frozen", found "x"'),
        (
            "parameters",
            [{"match": "a", "rate": 1}, {"math": "b", "rate": 1}],
            "parameters.1.math: unknown key; did you mean parameters.1.match?",
        ),
        ("data.shards", "s", 'data.shards: expected a list, found "s"'),
        ("data.sequence_length", 2.5, "data.sequence_length: expected a whole number, found 2.5"),
        ("data.template", None, 'data.template: expected "qwen_1_5", "plain" or "tokenizer", found null'),
        ("layout", None, "layout: expected a mapping of keys, found null"),
        (
            "layout.overlap_gradient_reduce",
            "maybe",
            'layout.overlap_gradient_reduce: expected true or false, found "maybe"',
        ),
    ],
)
def test_a_schema_mistake_is_one_line_with_its_dotted_path(tmp_path: Path, key: str, value: Any, line: str) -> None:
    lines = errors_of(write(tmp_path / "run.yaml", set_key(copy.deepcopy(VALID), key, value)))
    if key == "parameters" and "math" in line:
        assert lines.pop(0) == "parameters.1.match: missing; it has no default"
    assert lines == [line]


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    tree = copy.deepcopy(VALID)
    del tree["optimizer"]["learning_rate"], tree["name"]
    assert errors_of(write(tmp_path / "run.yaml", tree)) == [
        "name: missing; it has no default",
        "optimizer.learning_rate: missing; it has no default",
    ]


def test_three_mistakes_are_three_lines_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = copy.deepcopy(VALID)
    for key, value in (
        ("data.shards", 3),
        ("optimizer.lerning_rate", 1),
        ("parameters", [{"match": "a", "rate": "x"}]),
    ):
        set_key(tree, key, value)
    path = write(tmp_path / "run.yaml", tree)
    expected = [
        f"{path}: data.shards: expected a list, found 3",
        f"{path}: optimizer.lerning_rate: unknown key; did you mean optimizer.learning_rate?",
        f'{path}: parameters.0.rate: expected a number or "frozen", found "x"',
    ]
    for command in ("check", "train"):
        assert main([command, str(path)]) == 2
        out, err = capsys.readouterr()
        assert [line.removeprefix("pivot: ") for line in err.splitlines()] == expected
        assert not out


def test_check_reports_every_file(tmp_path: Path, valid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = write(tmp_path / "wrong.yaml", VALID | {"seed": "x"})
    assert main(["check", str(wrong), str(valid), str(tmp_path / "none.yaml")]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{valid}: ok, but for its layout, which is not held against the model: e does not exist"
    ]
    assert err.splitlines()[0] == f'{wrong}: seed: expected a whole number, found "x"'
    assert "none.yaml: no such file" in err.splitlines()[1]
    assert main(["check", str(valid)]) == 0


@pytest.mark.parametrize(
    ("key", "value", "path"),
    [
        ("model.encoder.checkpoint", "c", "model.encoder"),
        ("model.llm", {}, "model.llm"),
        ("model.projector.hf", "p", "model.projector.hf"),
        ("model.encoder.feature_layer", 3, "model.encoder.feature_layer"),
        ("batch.global_size", 0, "batch.global_size"),
        ("batch.micro_tokens", 0, "batch.micro_tokens"),
        ("batch.micro_images", 0, "batch.micro_images"),
        ("layout.cpu_threads", 0, "layout.cpu_threads"),
        ("batch.steps", 5, "batch"),
        ("batch.epochs", None, "batch"),
        ("batch.epochs", -1, "batch.epochs"),
        ("layout.tensor", 0, "layout.tensor"),
        ("layout.first_stage_layers", 2, "layout.first_stage_layers"),
        ("layout.overlap_parameter_gather", True, "layout.overlap_parameter_gather"),
        ("precision", {"compute": "fp32", "fp8": "tensorwise"}, "precision.compute"),
        ("precision.fp8", {"recipe": "blockwise", "encoder": False, "llm": False}, "precision.fp8"),
        ("precision.fp8", {"recipe": "blockwise", "last_layers_bf16": -1}, "precision.fp8.last_layers_bf16"),
        ("precision.fp8", {"recipe": "delayed", "first_layers_bf16": 1}, "precision.fp8.recipe"),
        ("optimizer.learning_rate", 0, "optimizer.learning_rate"),
        ("optimizer.warmup_fraction", 1, "optimizer.warmup_fraction"),
        ("parameters", [{"match": "a", "rate": 0}], "parameters.0.rate"),
        ("objective.beta", 0, "objective.beta"),
        ("objective.label_smoothing", 0.5, "objective.label_smoothing"),
        ("objective.losses", {}, "objective.losses"),
        ("objective.losses", {"sigmoid": 1, "bco": 0}, "objective.losses.bco"),
        ("objective.losses", {"hinge": -1}, "objective.losses.hinge"),
        ("objective.losses", {"sft": 1}, "objective.losses"),
        ("objective.losses", {"robust": 1}, "objective.label_smoothing"),
        (
            "objective",
            {"kind": "dpo", "label_smoothing": 0.1, "losses": {"ipo": 1, "bco": 1}},
            "objective.label_smoothing",
        ),
        ("data.too_long", "truncate", "data.too_long"),
        ("data.shards", [], "data.shards"),
        ("data.shards", ["s3://bucket/pairs"], "data.cache"),
        ("checkpoints.keep", 0, "checkpoints.keep"),
        ("checkpoints.every", 0, "checkpoints.every"),
        ("checkpoints.keep_every", 150, "checkpoints.keep_every"),
        ("checkpoints.keep_best", {"metric": "loss", "count": 0}, "checkpoints.keep_best.count"),
        ("checkpoints.most_blocked", 0, "checkpoints.most_blocked"),
    ],
)
def test_a_rule_across_fields_is_one_line(tmp_path: Path, key: str, value: Any, path: str) -> None:
    (line,) = errors_of(write(tmp_path / "run.yaml", set_key(copy.deepcopy(VALID), key, value)))
    assert line.startswith(f"{path}: ")


def test_fp8_may_be_written_as_its_recipe_alone(tmp_path: Path) -> None:
    short = load_config(write(tmp_path / "run.yaml", VALID | {"precision": {"fp8": "tensorwise"}}))
    assert short.precision.fp8 == Fp8("tensorwise")
    assert short.precision.fp8_of("encoder") and short.precision.fp8_of("llm")
    one = {"recipe": "tensorwise", "encoder": False, "first_layers_bf16": 1}
    long = load_config(write(tmp_path / "run.yaml", VALID | {"precision": {"fp8": one}}))
    assert long.precision.fp8 == Fp8("tensorwise", encoder=False, first_layers_bf16=1)
    assert long.precision.fp8_of("encoder") is None and long.precision.fp8_of("llm") == long.precision.fp8
    again = write(tmp_path / "again.yaml", yaml.safe_load(dump_config(long)))
    assert load_config(again) == long
    (line,) = errors_of(write(tmp_path / "run.yaml", VALID | {"precision": {"fp8": "fast"}}))
    assert line == 'precision.fp8: expected "delayed", "tensorwise" or "blockwise", found "fast"'


def test_what_is_dumped_loads_to_an_equal_config(tmp_path: Path, valid: Path) -> None:
    for source in (valid, *sorted(RUNS.glob("*.yaml"))):
        config = load_config(source)
        again = tmp_path / "again.yaml"
        again.write_text(dump_config(config))
        assert load_config(again) == config


def test_the_page_of_keys_is_up_to_date() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == document.page(), "run: make docs"


def test_every_key_has_a_meaning_and_every_meaning_a_key() -> None:
    explained = {
        f"{owner.__name__}.{key.name}"
        for key in all_keys()
        for owner in key.owner.__mro__
        if key.name in vars(owner).get("__annotations__", {})
    }
    assert explained == set(document._MEANINGS)


def test_every_shipped_run_passes(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(path) for folder in ("run", "demo") for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))]
    assert len(runs) >= 10
    assert main(["check", *runs]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("layout", sorted((ROOT / "configs" / "layout").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_layout_fits_every_shipped_run(tmp_path: Path, layout: Path) -> None:
    for run in sorted(RUNS.glob("*.yaml")):
        both = write(tmp_path / "run.yaml", {"base": [str(run), str(layout)]})
        assert replace(load_config(both), layout=load_config(run).layout) == load_config(run)


def test_show_prints_what_a_run_would_be(valid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(valid), "layout.tensor=2"]) == 0
    shown = write(tmp_path / "shown.yaml", yaml.safe_load(capsys.readouterr().out))
    assert load_config(shown) == load_config(valid, ["layout.tensor=2"])
    for key, value in (
        ("out", "runs/n"),
        ("layout.tensor", "2"),
        ("data.shards.0.folder", "s"),
        ("batch.steps", "null"),
    ):
        assert main(["show", str(valid), "layout.tensor=2", "--key", key]) == 0
        assert capsys.readouterr().out == f"{value}\n"
    for key in ("outt", "layout.tensors", "out.x", "data.shards.1", "data.shards.first"):
        assert main(["show", str(valid), "--key", key]) == 2
        assert f"--key {key}: the config has no" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(errno.ENOENT, 2), (errno.ENOSPC, 2), (errno.ESTALE, 1), (errno.EIO, 1)])
def test_a_file_error_that_may_pass_is_no_mistake_of_the_user(
    number: int, code: int, valid: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(number, os.strerror(number), "a/file")

    monkeypatch.setattr("pivot_megatron.config.load.load_config", fails)
    assert main(["show", str(valid)]) == code
    assert capsys.readouterr().err == f"pivot: a/file: {os.strerror(number)}\n"
