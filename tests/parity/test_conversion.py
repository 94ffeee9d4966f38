"""Hugging Face to megatron-core and back: every tensor, every bit, at every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pivot_megatron.convert.plan import join, slice_for
from pivot_megatron.families import qwen2, siglip
from pivot_megatron.families.table import Copy, FuseGatedMLP, FuseQKV, Padding
from tests import matrix
from tests.harness import Workers
from tests.parity import jobs
from tests.parity.reference import make_checkpoints

LAYOUTS = (matrix.SINGLE, matrix.TP2, matrix.PP2, matrix.UNEVEN_PP2, matrix.TP2_PP2)


@pytest.fixture(scope="module", params=["fp32-tied", "bf16-untied"])
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    encoder, head = make_checkpoints(tmp_path_factory.mktemp("hf"), tied="untied" not in request.param)
    if request.param.startswith("bf16"):
        for folder in (encoder, head):
            file = folder / "model.safetensors"
            save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
            config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
            (folder / "config.json").write_text(json.dumps(config))
    return encoder, head


def stored(encoder: Path, head: Path) -> dict[str, Tensor]:
    """All tensors of both folders but those past the feature layer, which are never loaded."""
    tensors = load_file(encoder / "model.safetensors") | load_file(head / "model.safetensors")
    past = ("vision_model.encoder.layers.3.", "vision_model.post_layernorm.", "vision_model.head.")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(past)}


@matrix.layouts(*LAYOUTS, slow=(matrix.TP4, matrix.TP4_PP2))
def test_round_trip_is_bit_exact(layout, world, workers: Workers, checkpoints) -> None:
    wanted = stored(*checkpoints)
    for found in workers.run(jobs.round_trip, layout, world, *checkpoints):
        hub = {name: tensor for name, tensor in found.items() if not name.startswith("multi_modal_projector.")}
        assert hub.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(hub[name].to(tensor.dtype), tensor), name


@matrix.layouts(matrix.SINGLE, matrix.TP2, slow=(matrix.TP4,))
def test_table_covers_the_model_and_its_tp_axes(layout, world, workers: Workers, checkpoints) -> None:
    """Both ways: no parameter without a row, no row without a parameter; the split is megatron-core's own."""
    for rows, parameters in workers.run(jobs.table_and_model, layout, world, *checkpoints):
        assert rows.keys() == parameters.keys()
        for name, tp_dim in rows.items():
            tensor_parallel, partition_dim = parameters[name]
            assert tensor_parallel == (tp_dim is not None), name
            if tp_dim is not None:
                assert partition_dim == tp_dim, name


def test_a_table_that_writes_otherwise_than_it_read_fails_the_round_trip(workers: Workers, checkpoints) -> None:
    """One that is wrong both ways comes back exactly all the same: test_tampering.py has it fail the forward pass."""
    _, layout, world = matrix.SINGLE
    found = workers.run(jobs.round_trip, layout, world, *checkpoints, True)[0]
    wanted = stored(*checkpoints)
    wrong = {n for n, t in wanted.items() if not torch.equal(found[n].to(t.dtype), t)}
    assert any("q_proj" in n for n in wrong) and any("k_proj" in n for n in wrong)
    assert all("q_proj" in n or "k_proj" in n for n in wrong)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_join_to_the_parts(size: int) -> None:
    """Slicing every part, fusing, unfusing and joining is the identity; fusing first and cutting afterwards is not."""
    query, key, value = torch.randn(32, 6), torch.randn(16, 6), torch.randn(16, 6)
    cases = [
        (FuseQKV(groups=4, heads_per_group=2, head_dim=4), [query, key, value]),
        (FuseGatedMLP(), [torch.randn(8, 6), torch.randn(8, 6)]),
    ]
    for transform, parts in cases:
        shards = []
        for rank in range(size):
            cuts = [slice_for(transform, len(part), rank, size) for part in parts]
            shards.append(transform.fuse([p[c.start : c.stop] for p, c in zip(parts, cuts)]))
        assert all(torch.equal(a, b) for a, b in zip(join(transform, shards), parts))
    if size > 1:
        gate_first = FuseGatedMLP().fuse(cases[1][1]).chunk(size)
        assert not torch.equal(join(FuseGatedMLP(), gate_first)[0], cases[1][1][0])


def test_padded_vocabulary_is_cut_on_export() -> None:
    rows = torch.randn(300, 4)
    transform = Copy(0, Padding(300, 384))
    shards = []
    for rank in range(4):
        cut = slice_for(transform, 300, rank, 4)
        shards.append(torch.cat([rows[cut.start : cut.stop], torch.zeros(cut.zeros, 4)]))
    assert [len(s) for s in shards] == [96] * 4
    assert torch.equal(join(transform, shards)[0], rows)


def test_tables_of_true_sizes() -> None:
    """Every row of a So400m encoder and a 7B head, by the shapes that their config.json implies."""
    arch = siglip.architecture(
        {
            "image_size": 384,
            "patch_size": 14,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
        },
        "x",
    )
    assert (arch.tokens, arch.head_dim) == (729, 72)
    head = qwen2.architecture(
        {
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "intermediate_size": 18944,
            "vocab_size": 152064,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
        },
        "x",
    )
    assert (head.head_dim, head.padded_vocabulary) == (128, 152064)
    assert any(row.megatron == "output_layer.weight" for row in qwen2.table(head))
