"""One global order: whatever the ranks and micro-batches, the same samples make up each step."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pivot_megatron.config.load import load_config
from pivot_megatron.convert.start import describe_start
from pivot_megatron.data.build import build_loader
from pivot_megatron.data.loader import Loader
from pivot_megatron.data.order import index_at, step_indices
from pivot_megatron.data.shards import ShardWriter
from pivot_megatron.errors import RunError
from tests.dist.runs import config_tree, make_world, write_config

TOKENS = 9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), pairs=30)


def loader(
    data: Path, rank: int = 0, size: int = 1, with_images: bool = True, shards: Path | None = None, **data_keys: object
) -> Loader:
    tree = config_tree(data, data / "unused")
    tree["batch"] |= {key: data_keys.pop(key) for key in ("global_size", "micro_tokens") if key in data_keys}
    tree["model"]["encoder"] |= {"image_size": data_keys.pop("image_size", None)}
    tree["data"] |= {"shards": [str(shards or data / "pairs")], **data_keys}
    config = load_config(write_config(data / "loader.yaml", tree))
    start = describe_start(config.model)
    arch = start.architecture()
    return build_loader(
        config, data / "llm", start.image_views(), arch.encoder, arch.head, 2, rank, size, with_images=with_images
    )


def keys(made: Loader, step: int) -> list[str]:
    return [key for batch in made.load(step).micro_batches for key in batch.keys]


def test_ranks_share_the_single_ranks_batch(data: Path) -> None:
    for step in range(4):
        whole = keys(loader(data), step)
        halves = [keys(loader(data, rank, 2), step) for rank in range(2)]
        assert len(whole) == 12 and sorted(halves[0] + halves[1]) == sorted(whole)
        assert loader(data).load(step).keys_digest == loader(data, 1, 2).load(step).keys_digest


def test_a_run_at_another_resolution_has_its_pixels_and_tokens(data: Path) -> None:
    batch = loader(data, image_size=64).load(0).micro_batches[0]
    assert batch.pixels.shape[1:] == (3, 64, 64)
    assert {view.tokens for view in batch.views} == {16}


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    epochs = [[index_at(e * 30 + i, 30, seed=1) for i in range(30)] for e in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert step_indices(2, 12, 30, seed=1) == epochs[0][24:] + epochs[1][:6]  # a batch runs on into the next epoch
    assert [index_at(i, 30, seed=2) for i in range(30)] != epochs[0]


def test_steps_from_the_middle_are_the_same_steps(data: Path) -> None:
    made = loader(data)
    ahead = [[k for b in s.micro_batches for k in b.keys] for s in made.steps(2, 6)]
    assert ahead == [keys(made, step) for step in range(2, 6)]


def test_stages_without_the_encoder_see_the_same_pack(data: Path) -> None:
    first, later = loader(data).load(0), loader(data, with_images=False).load(0)
    for a, b in zip(first.micro_batches, later.micro_batches):
        assert a.keys == b.keys and torch.equal(a.tokens, b.tokens) and torch.equal(a.positions, b.positions)
        assert a.pixels.shape[1:] == (3, 48, 48) and b.pixels.numel() == 0


def test_what_does_not_fit_is_dropped_and_named(data: Path) -> None:
    # The 25 tokens of the system turn and 9 of the image leave room for the shortest questions alone.
    lengths = [len(s.prefix) + max(len(b.ids) for b in s.branches) for s in tokenized(data)]
    limit = sorted(lengths)[15]
    step = loader(data, sequence_length=limit).load(0)
    assert step.samples + len(step.dropped) == 12 and step.dropped
    assert all(d.reason in ("prompt_too_long", "chosen_too_long", "rejected_too_long") and d.key for d in step.dropped)


def tokenized(data: Path) -> list:
    made = loader(data)
    return [made.tokenize(made.samples.read(i)) for i in range(30)]


def test_a_step_of_nothing_is_no_step_and_still_makes_a_pack(data: Path) -> None:
    with pytest.raises(RunError, match="step 1: none of its 12 samples fits 20 tokens"):
        loader(data, sequence_length=20).load(0)
    (step,) = loader(data, sequence_length=20).in_order(0, 12)
    assert step.samples == 0 and len(step.dropped) == 12
    assert all(batch.tokens.numel() == 16 for batch in step.micro_batches)


@pytest.mark.parametrize(
    ("image", "record", "message"),
    [
        (b"not a jpeg", {"question": "q", "chosen": "a", "rejected": "b"}, "bad_image"),
        (None, {"question": "q", "chosen": "a", "rejected": "a"}, "identical_answers"),
        (None, {"question": "q", "chosen": "a"}, "missing_field"),
    ],
)
def test_broken_samples_stop_the_run_by_name(data: Path, tmp_path: Path, image, record, message) -> None:
    with ShardWriter(tmp_path / "shards", 10) as writer:
        writer.write("broken-7", image, "jpg", record)
    with pytest.raises(RunError, match=f"broken-7: {message}"):
        loader(data, shards=tmp_path / "shards").load(0)


def test_micro_batches_keep_to_the_budget(data: Path) -> None:
    for rank in range(3):
        batches = loader(data, rank, 3).load(0).micro_batches
        assert all(batch.length <= 256 for batch in batches)
    assert len(loader(data, micro_tokens=1024).load(0).micro_batches) == 1


def image(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 48), (colour, 2 * colour, 9)).save(file, "PNG")
    return file.getvalue()


def write_pairs_of_images(folder: Path) -> Path:
    """Two pairs over one image, one over two images with one answer, one of text."""
    with ShardWriter(folder, 10) as writer:
        record = {"question": "what is it", "chosen": "red", "rejected": "blue"}
        writer.write("a", image(1), "png", record)
        writer.write("b", image(1), "png", record | {"question": "which colour is it"})
        writer.write("c", image(2), "png", record | {"rejected": "red"}, rejected_image=image(1))
        writer.write("d", None, "png", record)
    return folder


def test_samples_over_one_image_share_it(data: Path, tmp_path: Path) -> None:
    (batch,) = (
        loader(data, shards=write_pairs_of_images(tmp_path / "s"), global_size=4, micro_tokens=1024)
        .load(0)
        .micro_batches
    )
    assert batch.samples == 4 and batch.pixels.shape[0] == 2 and batch.image_positions.numel() == 4 * TOKENS
    shown = dict.fromkeys("abcd", ())
    assert batch.image_rows.view(4, TOKENS).diff().eq(1).all()
    places = iter(batch.image_rows[::TOKENS].tolist())
    for key in batch.keys:
        shown[key] = tuple(next(places) for _ in range({"c": 2, "d": 0}.get(key, 1)))
    assert shown["a"] == shown["b"] == shown["c"][1:] and shown["c"][0] != shown["c"][1] and shown["d"] == ()


def test_a_pair_of_images_shares_the_text_before_them(data: Path, tmp_path: Path) -> None:
    made = loader(data, shards=write_pairs_of_images(tmp_path / "s"))
    plain, apart = (made.tokenize(made.samples.read(i)) for i in (0, 2))
    assert plain.prefix[: len(apart.prefix)] == apart.prefix and apart.images[0] == len(apart.prefix) == plain.images[0]
    assert apart.images[1] == len(apart.prefix) + len(apart.branches[0].ids)
    rest = plain.prefix[len(apart.prefix) :]
    for branch in apart.branches:
        assert branch.ids[: len(rest)] == rest and not any(branch.loss[: len(rest)]) and all(branch.loss[len(rest) :])


def test_images_that_do_not_differ_are_no_preference(data: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s", 10) as writer:
        record = {"question": "what is it", "chosen": "red", "rejected": "red"}
        writer.write("same", image(1), "png", record, rejected_image=image(1))
    with pytest.raises(RunError, match="same: identical_answers"):
        loader(data, shards=tmp_path / "s").load(0)


def test_order_is_of_the_keys_in_the_shards(data: Path) -> None:
    made = loader(data)
    assert made.samples.key(3) == made.samples.read(3).key
    index = json.loads((data / "pairs" / "index.json").read_text())
    assert sum(shard["samples"] for shard in index["shards"]) == len(made.samples) == 30
    assert replace(made, seed=5).load(0).keys_digest != made.load(0).keys_digest
