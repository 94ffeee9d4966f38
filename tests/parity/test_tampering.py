"""What a wrong table does: a checkpoint made by the right one comes back otherwise in just the tensors that it names wrongly."""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pivot_megatron.cli import main
from pivot_megatron.convert import export, load
from pivot_megatron.convert.commands import export_checkpoint, import_checkpoint
from pivot_megatron.convert.export import Trained
from pivot_megatron.convert.plan import component_rows
from pivot_megatron.convert.store import describe
from pivot_megatron.convert.stream import CheckpointParameters
from pivot_megatron.errors import UserError
from pivot_megatron.families import qwen2, siglip
from pivot_megatron.families.table import Copy, FuseGatedMLP, Row
from pivot_megatron.model.composition import Architecture
from tests.parity.jobs import swap_query_and_key
from tests.parity.reference import make_checkpoints

Rows = tuple[Row, ...]
LAYERS = {"encoder": "vision_model.encoder.layers.", "llm": "model.layers."}


@dataclass(frozen=True)
class Transposed(Copy):
    def unfuse(self, shard: Tensor) -> list[Tensor]:
        return [shard.t()]


def swapped(rows: Rows) -> Rows:
    """Query and key exchanged."""
    return tuple(map(swap_query_and_key, rows))


def transposed(rows: Rows) -> Rows:
    """The square weight past attention the other way round, in layer 2."""
    name = "decoder.layers.2.self_attention.linear_proj.weight"
    return tuple(replace(row, transform=Transposed(1)) if row.megatron == name else row for row in rows)


def shifted(rows: Rows) -> Rows:
    """Layer 0 under layer 1's names, and the other way round."""
    other = {".layers.0.": ".layers.1.", ".layers.1.": ".layers.0."}

    def renamed(name: str) -> str:
        found = next((layer for layer in other if layer in name), None)
        return name if found is None else name.replace(found, other[found])

    return tuple(replace(row, hf=tuple(map(renamed, row.hf))) for row in rows)


def without_bias(rows: Rows) -> Rows:
    return tuple(row for row in rows if row.megatron != "decoder.layers.0.self_attention.linear_qkv.bias")


# How a table is tampered with; which tensors of a layer come back otherwise, and which not at all.
CASES: dict[str, tuple[Callable[[Rows], Rows], Callable[[str], bool], Callable[[str], bool]]] = {
    "right": (lambda rows: rows, lambda _: False, lambda _: False),
    "swapped": (swapped, lambda name: "q_proj" in name or "k_proj" in name, lambda _: False),
    "transposed": (
        transposed,
        lambda name: name in ("2.self_attn.out_proj.weight", "2.self_attn.o_proj.weight"),
        lambda _: False,
    ),
    "shifted": (shifted, lambda name: name.startswith(("0.", "1.")), lambda _: False),
    "no bias": (
        without_bias,
        lambda _: False,
        lambda name: name in tuple(f"0.self_attn.{x}_proj.bias" for x in "qkv"),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Encoder, head, and the checkpoint of both."""
    folder = tmp_path_factory.mktemp("tampering")
    encoder, head = make_checkpoints(folder)
    import_checkpoint(encoder, head, folder / "checkpoint", None, 5)
    return encoder, head, folder / "checkpoint"


@pytest.mark.parametrize("component", list(LAYERS))
@pytest.mark.parametrize("case", CASES)
def test_the_round_trip_shows_just_what_is_wrong(case: str, component: str, folders: tuple[Path, Path, Path]) -> None:
    tamper, differ, lack = CASES[case]
    encoder, head, checkpoint = folders
    arch = describe(checkpoint).architecture()
    stored = load_file((encoder if component == "encoder" else head) / "model.safetensors")
    built = {part for row in component_rows(arch, component) for part in row.hf}

    def tampered(arch: Architecture, component: str) -> Rows:
        return tamper(component_rows(arch, component))

    with unittest.mock.patch.object(export, "component_rows", tampered):
        found = dict(Trained(arch, CheckpointParameters(checkpoint / "tensors")).parts(component))
    assert found.keys() <= built
    assert built - found.keys() == {name for name in built if in_layer(name, component, lack)}
    wrong = {name for name, tensor in found.items() if not torch.equal(tensor, stored[name])}
    assert wrong == {name for name in built if in_layer(name, component, differ)}


def in_layer(name: str, component: str, said: Callable[[str], bool]) -> bool:
    """Of a tensor of a layer, what is said of its name behind the layer's prefix."""
    prefix = LAYERS[component]
    return name.startswith(prefix) and said(name.removeprefix(prefix))


def gate_as_up(rows: Rows) -> Rows:
    return tuple(replace(row, hf=row.hf[::-1]) if isinstance(row.transform, FuseGatedMLP) else row for row in rows)


# A family, its tables' mistake, and which checks see it.
BOTH_WAYS = {"encoder": (siglip, swapped, "encoder layer"), "llm": (qwen2, gate_as_up, "head")}


@pytest.mark.parametrize("component", BOTH_WAYS)
def test_a_table_that_is_wrong_both_ways_fails_the_forward_pass(
    component: str, folders, tmp_path: Path, capsys
) -> None:
    """Every tensor comes back bit for bit, from under the very names where it does not belong."""
    family, tamper, seen = BOTH_WAYS[component]
    folder = folders[0 if component == "encoder" else 1]
    table = family.table
    with unittest.mock.patch.object(family, "table", lambda arch: tamper(table(arch))):
        import_checkpoint(*folders[:2], tmp_path / "checkpoint", None, 5)
        export_checkpoint(tmp_path / "checkpoint", "mllm", tmp_path / "llava", "drop", None)
        assert main(["convert", "verify", str(tmp_path / "checkpoint"), f"--{component}", str(folder)]) == 1
    stored, back = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "llava"))
    back = {name.removeprefix("vision_tower.").removeprefix("language_model."): tensor for name, tensor in back.items()}
    same = [name for name, tensor in stored.items() if name in back and torch.equal(back[name], tensor)]
    assert {name for name in stored if ".layers.0." in name} <= set(same)
    lines = capsys.readouterr().out.splitlines()
    assert not any(line.startswith("FAIL tensor") for line in lines)
    assert any(line.startswith(f"FAIL {seen}") for line in lines)


def test_a_layer_that_is_not_there_is_not_made_up(tmp_path: Path) -> None:
    folders = make_checkpoints(tmp_path / "hf")
    lost = "decoder.layers.0.self_attention.linear_qkv.bias"
    rows = load.component_rows

    def without(arch: Architecture, component: str) -> tuple[Row, ...]:
        return tuple(row for row in rows(arch, component) if component != "llm" or row.megatron != lost)

    with unittest.mock.patch.object(load, "component_rows", without):
        import_checkpoint(*folders, tmp_path / "checkpoint", None, 5)
    with pytest.raises(UserError, match=f"expected the whole of llm.{lost}"):
        CheckpointParameters(tmp_path / "checkpoint" / "tensors").read(f"llm.{lost}")
