"""What a run's rules freeze is at its end, bit for bit, what it began from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pivot_megatron.checkpoints.folder import resolve_checkpoint
from pivot_megatron.config.load import load_config
from pivot_megatron.config.schema import Layout, ParameterRule
from pivot_megatron.convert.frozen import changed_parameters, frozen_names, require_frozen
from pivot_megatron.convert.load import FreshParts
from pivot_megatron.convert.plan import Slice, part_shapes
from pivot_megatron.convert.store import describe
from pivot_megatron.convert.stream import CheckpointParameters
from pivot_megatron.errors import RuleError
from pivot_megatron.train.run_folder import finished_path
from tests import matrix
from tests.dist.runs import config_tree, make_world, train_at, write_config
from tests.harness import Workers

FREEZE = [{"match": "encoder.*", "rate": "frozen"}, {"match": "llm.*", "rate": "frozen"}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), pairs=40)


def config(data: Path, folder: Path, rules: list[dict[str, str]], **changes: object) -> Path:
    tree = config_tree(data, folder / "run") | {"parameters": rules} | changes
    tree["batch"]["steps"], tree["checkpoints"]["every"] = 2, 100
    tree["objective"] = {"kind": "sft"}
    folder.mkdir()
    return write_config(folder / "run.yaml", tree)


def train_with_nothing_frozen(config_file: Path) -> str:
    """A worker's job: the message of a run that does not do as its rules say."""
    from pivot_megatron.train import session

    apply_rules = session.apply_rules
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "apply_rules", lambda model, rules: apply_rules(model, ()))
        try:
            train_at(config_file, Layout())
        except RuleError as error:
            return str(error)
    raise AssertionError("the run went through")


@matrix.layouts(matrix.TP2, matrix.PP2, slow=(matrix.TP2_DP2,))
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_only_what_trains_changes(layout, world, compute: str, data: Path, tmp_path: Path, workers: Workers) -> None:
    file = config(data, tmp_path / "a", FREEZE, precision={"compute": compute})
    workers.run(train_at, None, world, file, layout)
    first = load_config(file)
    checkpoint = resolve_checkpoint(first.out)
    arch = describe(checkpoint).architecture()
    every = frozen_names(arch, [ParameterRule("*", "frozen")])
    changed = changed_parameters(checkpoint, first.model, first.seed, set(every))
    assert changed == [name for name in every if name.startswith("projector.")]
    assert require_frozen(checkpoint, first.model, first.seed, first.parameters) == len(every) - len(changed)

    parts = {part: {"checkpoint": str(first.out)} for part in ("encoder", "projector", "llm")}
    second = load_config(config(data, tmp_path / "b", FREEZE[:1], precision={"compute": compute}, model=parts))
    workers.run(train_at, None, world, tmp_path / "b" / "run.yaml", layout)
    changed = changed_parameters(resolve_checkpoint(second.out), second.model, second.seed, set(every))
    assert changed and not [name for name in changed if name.startswith("encoder.")]
    assert {name.split(".")[0] for name in changed} == {"projector", "llm"}


@matrix.layouts(matrix.TP2, matrix.PP2)
def test_one_plus_one(layout, world, data: Path, tmp_path: Path, workers: Workers) -> None:
    """The first linear of a trained projector, frozen, and a new second one, the same at every layout."""
    file = config(data, tmp_path / "a", FREEZE)
    workers.run(train_at, None, world, file, layout)
    first = load_config(file)
    kept = {"checkpoint": str(first.out), "keep": "first"}
    model = {"encoder": {"checkpoint": str(first.out)}, "llm": {"hf": str(data / "llm")}, "projector": kept}
    rules = [*FREEZE, {"match": "projector.encoder.linear_fc1.*", "rate": "frozen"}]
    second = load_config(config(data, tmp_path / "b", rules, model=model))
    workers.run(train_at, None, world, tmp_path / "b" / "run.yaml", layout)
    checkpoint = resolve_checkpoint(second.out)
    every = frozen_names(describe(checkpoint).architecture(), [ParameterRule("projector.*", "frozen")])
    changed = changed_parameters(checkpoint, second.model, second.seed, set(every))
    linears = [name for name in every if "linear_fc" in name]
    assert changed == [name for name in linears if "linear_fc2" in name]
    ours, theirs = (CheckpointParameters(resolve_checkpoint(run.out) / "tensors") for run in (second, first))
    same = {name: torch.equal(ours.read(name), theirs.read(name)) for name in linears}
    assert same == {name: "linear_fc1" in name for name in linears}

    before = load_config(config(data, tmp_path / "c", rules, model=model, optimizer={"learning_rate": 1e-30}))
    workers.run(train_at, None, world, tmp_path / "c" / "run.yaml", layout)  # what it begins with, as good as unmoved
    begun = CheckpointParameters(resolve_checkpoint(before.out) / "tensors")
    shapes = part_shapes(describe(checkpoint).architecture(), "projector")
    drawn = FreshParts(shapes, before.seed).read("multi_modal_projector.linear_2.weight", Slice())
    torch.testing.assert_close(begun.read("projector.encoder.linear_fc2.weight"), drawn, atol=1e-12, rtol=0)


def test_a_run_that_was_killed_before_it_said_so_is_finished_by_the_next(data: Path, tmp_path: Path, workers: Workers) -> None:
    file = config(data, tmp_path / "a", FREEZE)
    assert workers.run(train_at, None, 2, file, Layout()) == [2, 2]
    mark = finished_path(load_config(file).out)
    mark.unlink()
    assert workers.run(train_at, None, 2, file, Layout()) == [0, 0] and mark.exists()


def test_what_did_not_stay_is_named(data: Path, tmp_path: Path, workers: Workers) -> None:
    file = config(data, tmp_path / "a", FREEZE)
    (message,) = workers.run(train_with_nothing_frozen, None, 1, file)
    assert [message] == workers.run(train_with_nothing_frozen, None, 1, file)  # with no step left to make
    assert not finished_path(load_config(file).out).exists()
    assert "frozen parameters are not what the run began from (first: encoder." in message
    with pytest.raises(RuleError, match=r"first: encoder\."):
        run = load_config(file)
        require_frozen(resolve_checkpoint(run.out), run.model, run.seed, run.parameters)
