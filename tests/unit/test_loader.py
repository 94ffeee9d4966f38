"""One global order: whatever the ranks and micro-batches, the same samples make up each step."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import threading
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pivot_megatron.config.load import load_config
from pivot_megatron.config.schema import Source
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.loader import Loader
from pivot_megatron.data.order import Order, mixed
from pivot_megatron.data.reference import Facts, ReferenceFile, Row, write_rows
from pivot_megatron.data.shard_writer import ShardWriter
from pivot_megatron.errors import RunError, UserError
from pivot_megatron.train.checkpoint import decided_by
from tests.dist.runs import config_tree, loader, make_world, write_config
from tests.unit.test_shards import without_names

TOKENS = 9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), pairs=30)


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
    order = Order(np.arange(30), seed=1)
    epochs = [order.batch(epoch, 30) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order.batch(2, 12) == epochs[0][24:] + epochs[1][:6]  # a batch runs on into the next epoch
    assert Order(np.arange(30), seed=2).batch(0, 30) != epochs[0]


def test_a_mixture_takes_sources_by_cap_and_weight() -> None:
    sources = [Source("a"), Source("b", weight=2.5), Source("c", most=4), Source("d", weight=0.5, most=6)]
    counts = [3, 4, 10, 20]
    found = mixed(counts, sources, seed=1)
    assert (found == mixed(counts, sources, seed=1)).all() and (found != mixed(counts, sources, seed=2)).any()
    times = [
        Counter(found[(found >= first) & (found < first + count)].tolist())
        for first, count in zip((0, 3, 7, 17), counts)
    ]
    assert times[0] == {0: 1, 1: 1, 2: 1}
    assert sorted(times[1]) == [3, 4, 5, 6] and sorted(times[1].values()) == [2, 2, 3, 3]
    assert len(times[2]) == 4 and set(times[2].values()) == {1}
    assert len(times[3]) == 3 and set(times[3].values()) == {1}
    # What one source brings does not depend on the others.
    assert (mixed(counts[:3], sources[:3], seed=1) == found[: len(found) - 3]).all()


def test_steps_from_the_middle_are_the_same_steps(data: Path) -> None:
    made = loader(data)
    ahead = [[k for b in s.micro_batches for k in b.keys] for s in made.steps(2, 6)]
    assert ahead == [keys(made, step) for step in range(2, 6)]


def test_batches_are_the_same_for_any_number_of_threads(data: Path) -> None:
    steps = [list(loader(data, workers=workers).steps(0, 5)) for workers in (0, 1, 4)]
    in_order = [list(loader(data, workers=workers).in_order(3, 30)) for workers in (0, 1, 4)]
    for alone, *others in (steps, in_order):
        for ahead in others:
            assert [replace(one, micro_batches=()) for one in ahead] == [
                replace(one, micro_batches=()) for one in alone
            ]
            for ours, theirs in zip(ahead, alone):
                assert len(ours.micro_batches) == len(theirs.micro_batches)
                assert all(map(identical, ours.micro_batches, theirs.micro_batches))


def identical(a: PackedBatch, b: PackedBatch) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_no_thread_outlives_the_steps(data: Path, tmp_path: Path, workers: int) -> None:
    """Not at the end, nor where no more is asked for, nor after an error, which comes in its step's place."""
    before = threading.active_count()
    made = loader(data, workers=workers)
    assert len(list(made.steps(0, 4))) == 4 and threading.active_count() == before
    steps = made.steps(0, 10**6)
    next(steps)
    assert (threading.active_count() > before) == (workers > 0)
    steps.close()
    assert threading.active_count() == before
    with ShardWriter(tmp_path / "s", 30) as writer:
        for n in range(24):
            broken = image(1)[:-30] if n == 20 else image(1)
            writer.write(str(n), broken, "png", {"question": "what is it", "chosen": "red", "rejected": "blue"})
    failing = loader(data, shards=tmp_path / "s", workers=workers, global_size=4).in_order(0, 24)
    assert [next(failing).step for _ in range(5)] == [0, 4, 8, 12, 16]
    with pytest.raises(RunError, match="20: bad_image"):
        next(failing)
    assert threading.active_count() == before


def test_only_what_is_asked_for_is_made_without_threads(data: Path) -> None:
    loaded: list[int] = []
    made = loader(data, workers=0)
    text = lambda segments, answers: loaded.append(threading.get_ident()) or 1.0  # noqa: E731
    counted = replace(made, work=SimpleNamespace(images=len, text=text))
    next(counted.steps(0, 5))
    assert len(loaded) == 12 and set(loaded) == {threading.get_ident()}


def test_threads_decide_nothing_that_a_run_may_not_change(data: Path) -> None:
    config = load_config(write_config(data / "run.yaml", config_tree(data, data / "unused")))
    other = replace(config, data=replace(config.data, workers=9))
    assert decided_by(other, "data") == decided_by(config, "data")
    other = replace(config, data=replace(config.data, image_backend="pil"))
    assert decided_by(other, "data") != decided_by(config, "data")


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
    with pytest.raises(RunError, match="step 1: none of its 12 samples is sound and fits 20 tokens"):
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
    with pytest.raises(UserError, match=f"1 of 1 samples are broken, the first: sample broken-7: {message}"):
        loader(data, shards=tmp_path / "shards")
    with pytest.raises(RunError, match=r"data\.max_bad_share: 1 of 1 samples are broken"):
        loader(data, shards=tmp_path / "shards", on_bad_sample="skip")


def test_an_image_that_does_not_decode_stops_the_run_by_name(data: Path, tmp_path: Path) -> None:
    """Its head is whole, so that nobody knew."""
    with ShardWriter(tmp_path / "shards", 10) as writer:
        writer.write("broken-7", image(1)[:-30], "png", {"question": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(RunError, match=r"broken-7: bad_image.*set data\.on_bad_sample: skip"):
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


def test_pairs_over_one_image_are_packed_together(data: Path, tmp_path: Path) -> None:
    """Four an image, side by side in the shards. An index of before does not say which images are one."""
    with ShardWriter(tmp_path / "s", 10) as writer:
        for n in range(24):
            record = {"question": "what is it" + ", and why" * (5 * n % 7), "chosen": "red", "rejected": "blue"}
            writer.write(f"{n}", image(n // 4), "png", record)

    def passes() -> tuple[int, list[str]]:
        (step,) = loader(data, shards=tmp_path / "s", global_size=24, micro_tokens=512).in_order(0, 24)
        keys = sorted(key for batch in step.micro_batches for key in batch.keys)
        return sum(len(batch.views) for batch in step.micro_batches), keys

    together, keys = passes()
    without_names(tmp_path / "s")
    scattered, same = passes()
    assert keys == same and together <= 10 and scattered > 14  # of 24 pairs over 6 images


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
    with pytest.raises(UserError, match="same: identical_answers"):
        loader(data, shards=tmp_path / "s")


def test_a_pair_with_a_broken_image_leaves_the_others_theirs(data: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s", 10) as writer:
        record = {"question": "what is it", "chosen": "red", "rejected": "blue"}
        writer.write("a", image(1), "png", record | {"rejected": "red"}, rejected_image=image(3)[:-30])
        writer.write("b", image(2), "png", record)
        writer.write("c", image(1), "png", record)
        writer.write("d", image(4)[:-30], "png", record)
    made = loader(data, shards=tmp_path / "s", global_size=4, micro_tokens=1024, on_bad_sample="skip")
    step = replace(made, order=replace(made.order, seed=3)).load(0)
    (batch,) = step.micro_batches
    assert {(bad.key, bad.reason) for bad in step.bad} == {("a", "bad_image"), ("d", "bad_image")}
    assert set(batch.keys) == {"b", "c"} and batch.pixels.shape[0] == 2
    alone = [made.images.assembled(48, 48, [np.full((48, 48, 3), (n, 2 * n, 9), np.uint8)])[0] for n in (1, 2)]
    shown = dict(zip(batch.keys, batch.image_rows[::TOKENS] // TOKENS))
    assert all(torch.equal(batch.pixels[shown[key]], pixels) for key, pixels in zip("cb", alone))


def test_dali_that_is_missing_is_asked_for_before_anything_is_read(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="pivot-megatron\\[dali\\]"):
        loader(data, image_backend="dali")


def test_order_is_of_the_keys_in_the_shards(data: Path) -> None:
    made = loader(data)
    assert made.samples.key(3) == made.samples.read(3).key
    index = json.loads((data / "pairs" / "index.json").read_text())
    assert sum(shard["samples"] for shard in index["shards"]) == len(made.samples) == 30
    assert replace(made, order=replace(made.order, seed=5)).load(0).keys_digest != made.load(0).keys_digest


def test_an_image_that_is_not_the_references_is_said(tmp_path: Path) -> None:
    """Of a tar that was changed at its size and not indexed again, by the ranks that read images."""
    world = make_world(tmp_path, pairs=12)
    made = loader(world)
    rows: dict[str, Row] = {}
    for data in made.in_order(0, 12):
        for batch in data.micro_batches:
            counts = torch.bincount(batch.branch, minlength=batch.branches).tolist()
            for n, told in enumerate(zip(batch.keys, batch.digests, batch.image_digests, strict=True)):
                rows[told[0]] = Row(*told, *([0.0] * count for count in counts[2 * n : 2 * n + 2]))
    facts = Facts({}, {}, "", 128)
    write_rows(tmp_path / facts.name, [rows[key] for key in made.samples.keys], facts, 0.0)
    reference = [ReferenceFile(tmp_path / facts.name, facts, made.samples.keys)]
    made, elsewhere = (replace(loader(world, with_images=i), reference=reference) for i in (True, False))
    assert all(batch.reference is not None for batch in made.with_reference(made.load(0)).micro_batches)
    tar = next((world / "pairs").glob("*.tar"))
    with tarfile.open(tar) as file:
        member = next(one for one in file if one.name.endswith(".jpg"))
    with tar.open("r+b") as file:
        file.seek(member.offset_data + member.size - 40)  # of its pixels
        file.write(bytes(8))
    with pytest.raises(
        RunError, match=f"sample {member.name[:-4]} has another image than when it was made, so its tar"
    ):
        made.with_reference(made.load(0))
    elsewhere.with_reference(elsewhere.load(0))
