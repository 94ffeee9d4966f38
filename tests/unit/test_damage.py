"""Every kind of damage in `tests/damage`, from the index to the batch: named, never silent, and nothing sound is lost by it."""

from __future__ import annotations

import faulthandler
import json
import resource
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pivot_megatron.cli import main
from pivot_megatron.config.schema import Data, Source
from pivot_megatron.data.build import open_samples
from pivot_megatron.data.commands import inspect_shards
from pivot_megatron.data.images import ImageTransform, PixelSteps
from pivot_megatron.data.index import index_tar, tars_of, write_index
from pivot_megatron.data.loader import Loader, StepData
from pivot_megatron.data.order import Order
from pivot_megatron.data.shards import open_shards
from pivot_megatron.data.views import ImageViews, Native, Tiled, pixels_of
from pivot_megatron.errors import RunError, UserError
from tests.damage import KINDS
from tests.damage.kinds import SOUND, Kind, base, encoded, files
from tests.dist.runs import loader, make_world
from tests.unit.test_dali import needs_dali

BACKENDS = ("torch", pytest.param("dali", marks=needs_dali))
TOKENS = 9
SECONDS = 60
MEMORY = 3 << 30
FEWEST = 300

_STEPS = {"resample": 3, "rescale_factor": 1 / 255, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
TILED = Tiled(ImageTransform(**_STEPS, image_size=48), 3, ((1, 2), (2, 1), (2, 2)), 4)  # type: ignore[arg-type]
NATIVE = Native(PixelSteps(**_STEPS), 16, 64)  # type: ignore[arg-type]

Seen = dict[str, tuple[bytes, list[Tensor]]]
"""Of each sample of a batch, a name of its tokens and the pixels of its images."""


@pytest.fixture(scope="module", params=BACKENDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loader:
    return loader(make_world(tmp_path_factory.mktemp("world"), pairs=4), image_backend=request.param)


@pytest.fixture(scope="module")
def truth(made: Loader, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("sound")
    files(base)(folder)
    index(folder)
    return seen(run(made, folder, "stop"))


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """A test that hangs or takes the memory of the machine fails."""

    def late(*_: object) -> None:
        pytest.fail(f"not done in {SECONDS} seconds")

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


def index(folder: Path) -> None:
    """As those who write shards do, without decoding."""
    write_index(folder, [index_tar(tar, decode=False) for tar in tars_of(folder)])


def run(made: Loader, folder: Path, on_bad: str, kind: Kind | None = None) -> StepData:
    """One batch of every sample."""
    data = Data(shards=(Source(str(folder)),), on_bad_sample=on_bad, max_bad_share=1.0)  # type: ignore[arg-type]
    samples = open_samples(data)
    if kind and kind.opened:
        kind.opened(folder)
    order = Order(np.arange(len(samples)), seed=1)
    found = replace(made, samples=samples, order=order, global_size=len(samples), skip_bad=on_bad == "skip")
    return found.load(0)


def seen(data: StepData) -> Seen:
    found: Seen = {}
    for batch, chosen in zip(data.micro_batches, data.chosen, strict=True):
        images = iter((batch.image_rows.view(-1, TOKENS)[:, 0] // TOKENS).tolist())
        for (_, sample), digest in zip(chosen, batch.digests, strict=True):
            assert sample.key not in found
            found[sample.key] = digest, [batch.pixels[next(images)] for _ in sample.images]
        assert not list(images)
    return found


def require_whole(found: Seen, truth: Seen, kind: Kind) -> None:
    """Every sound sample that could be found is there as it always is; of others, those alone that may be."""
    expected = set(SOUND) - set(kind.lost) - kind.bad.keys()
    assert set(found) - {kind.key} == expected
    for key in expected:
        assert found[key][0] == truth[key][0]
        assert all(torch.equal(*pixels) for pixels in zip(found[key][1], truth[key][1], strict=True))


def require_sound(found: Seen, kind: Kind, made: Loader) -> None:
    if kind.key is not None:
        pixels = found[kind.key][1]
        assert bool(pixels) == bool(kind.shown)
        if kind.shown:
            (expected,) = pixels_of(made.images, encoded(kind.shown(), "PNG"), "torch")
            assert (pixels[0] - expected).abs().mean() < 0.04


def require_named(data: StepData, kind: Kind) -> None:
    named = {one.key: one.reason for one in (*data.dropped, *data.bad)}
    assert len(named) == len(data.dropped) + len(data.bad)
    require_reasons(named, kind)
    assert all(one.bad == (kind.fate != "long") for one in (*data.dropped, *data.bad))
    for one in (*data.dropped, *data.bad):
        require_line(one.detail)


def require_reasons(named: Mapping[str, str], kind: Kind) -> None:
    expected = {key: named[key] if named.get(key) in reasons else reasons for key, reasons in kind.bad.items()}
    assert dict(named) == expected


def require_line(text: str) -> None:
    """One that a person can read, and that is not about our own memory."""
    assert text.isprintable() and len(text) < 800 and "MemoryError" not in text


def require_stop(made: Loader, folder: Path, kind: Kind, error: type[Exception], on_bad: str = "stop") -> None:
    with pytest.raises(error) as caught:
        run(made, folder, on_bad, kind)
    said = str(caught.value)
    require_line(said)
    named = [key for key in kind.bad if f"sample {key}: " in said and any(r in said for r in kind.bad[key])]
    assert named if kind.fate == "bad" else kind.says in said


def indexed(
    folder: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, dict[str, str], dict[str, int]]:
    """`pivot data index`: its exit code, what is broken, and what was left alone."""
    code = main(["data", "index", str(folder), "--workers", "0", "--json", *options])
    said = capsys.readouterr()
    if code == 2:
        require_line(said.err.strip())
        return code, {said.err: ""}, {}
    record = json.loads(said.out)
    for row in record["bad"]:
        require_line(row["key"] + row["detail"])
    return code, {row["key"]: row["reason"] for row in record["bad"]}, record["ignored"]


def test_there_are_many() -> None:
    assert len(KINDS) >= FEWEST


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.fate == "bad"])
def test_damage_is_named(name: str, made: Loader, truth: Seen, tmp_path: Path, capsys) -> None:
    kind, folder = KINDS[name], tmp_path / "shards"
    kind.write(folder)
    if kind.seen == "decode":
        index(folder)
        require_stop(made, folder, kind, RunError)
        data = run(made, folder, "skip")
        require_named(data, kind)
        require_whole(seen(data), truth, kind)
    code, found, _ = indexed(folder, capsys)
    if kind.seen == "run":
        assert (code, found) == (0, {})
        if kind.opened:
            require_stop(made, folder, kind, RunError)
            folder = tmp_path / "again"
            kind.write(folder)
            index(folder)
    else:
        assert code == 1
        require_reasons(found, kind)
        plain = tmp_path / "plain"
        kind.write(plain)
        if kind.seen == "index":
            index(plain)
            require_stop(made, plain, kind, UserError)
    inspect_shards(folder, 3)
    if kind.seen != "run" or not kind.opened:
        require_stop(made, folder, kind, RunError if kind.seen == "run" else UserError)
    data = run(made, folder, "skip", kind)
    require_named(data, kind)
    require_whole(seen(data), truth, kind)
    require_sound(seen(data), kind, made)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.fate in ("sound", "long")])
def test_what_is_odd_and_sound_is_trained_on(name: str, made: Loader, truth: Seen, tmp_path: Path, capsys) -> None:
    kind, folder = KINDS[name], tmp_path / "shards"
    kind.write(folder)
    assert indexed(folder, capsys) == (0, {}, dict(kind.ignored))
    if kind.indexed:
        kind.indexed(folder)
    inspect_shards(folder, 3)
    data = run(made, folder, "stop", kind)
    require_named(data, kind)
    found = seen(data)
    if kind.fate == "sound":
        require_sound(found, kind, made)
    require_whole(found, truth, kind)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.fate == "unseen"])
def test_what_no_decoder_need_notice(name: str, made: Loader, truth: Seen, tmp_path: Path, capsys) -> None:
    kind, folder = KINDS[name], tmp_path / "shards"
    kind.write(folder)
    index(folder)
    data = run(made, folder, "skip", kind)
    found = seen(data)
    require_whole(found | {}, truth, replace(kind, bad={}))
    named = {one.key for one in (*data.dropped, *data.bad)}
    assert named | (found.keys() - truth.keys()) == {"odd"} and len(named) + len(found) == len(truth) + 1
    assert indexed(folder, capsys)[0] in (0, 1)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.fate in ("refused", "stops")])
def test_damage_of_what_the_index_speaks_of(name: str, made: Loader, truth: Seen, tmp_path: Path, capsys) -> None:
    kind = KINDS[name]
    for on_bad in ("stop", "skip"):
        folder = tmp_path / on_bad
        kind.write(folder)
        index(folder)
        if kind.indexed:
            kind.indexed(folder)
        require_stop(made, folder, kind, UserError if kind.fate == "refused" else RunError, on_bad)
    if kind.mended:
        code, found, _ = indexed(folder, capsys)
        data = run(made, folder, "skip")
        named = {one.key for one in (*data.dropped, *data.bad)}
        assert code == bool(found) and named == found.keys()
        require_whole(seen(data), truth, replace(kind, key="odd"))


def test_past_the_share_the_run_stops(made: Loader, tmp_path: Path, capsys) -> None:
    KINDS["json-cut"].write(tmp_path / "s")
    indexed(tmp_path / "s", capsys)
    data = Data(shards=(Source(str(tmp_path / "s")),), on_bad_sample="skip", max_bad_share=0.1)
    with pytest.raises(
        RunError, match=r"data\.max_bad_share: 1 of 7 samples are broken, .* `pivot data index` names them"
    ):
        open_samples(data)
    assert len(open_samples(replace(data, max_bad_share=0.2))) == 7


@pytest.mark.parametrize(
    "name", [name for name, kind in KINDS.items() if kind.opened and kind.fate in ("unseen", "bad")]
)
def test_a_check_tells_what_a_run_cannot(name: str, tmp_path: Path, capsys) -> None:
    kind, folder = KINDS[name], tmp_path / "shards"
    kind.write(folder)
    assert indexed(folder, capsys)[0] == 0
    assert indexed(folder, capsys, "--check")[0] == 0
    assert kind.opened
    kind.opened(folder)
    assert main(["data", "index", str(folder), "--workers", "0", "--check"]) == 1
    assert "changed: x.tar: expected SHA-256" in capsys.readouterr().out


@pytest.mark.parametrize("view", [TILED, NATIVE], ids=["tiles", "native"])
def test_odd_images_take_the_room_that_was_kept_for_them(view: ImageViews, tmp_path: Path) -> None:
    """A sample's tokens are counted from its image's head, before the image is decoded."""
    for name, kind in KINDS.items():
        if kind.fate == "sound" and kind.shown and not kind.opened:
            kind.write(tmp_path / name)
            index(tmp_path / name)
            reader = open_shards(tmp_path / name)
            at = reader.keys.index(kind.key)
            expected = view.view(*reader.image_sizes(at)[0])
            image = reader.read(at).image
            assert image is not None and pixels_of(view, image, "torch").shape[0] in (
                len(expected.grids),
                expected.tokens,
            )


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.fate == "unindexed"])
def test_folders_that_cannot_be_indexed(name: str, tmp_path: Path, capsys) -> None:
    kind, folder = KINDS[name], tmp_path / "shards"
    kind.write(folder)
    code, said, _ = indexed(folder, capsys)
    assert code == 2 and kind.says in next(iter(said))
    assert not (folder / "index.json").exists()
