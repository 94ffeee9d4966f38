"""Images with masks from folders and parquet, and masks as they are stored."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pivot_megatron.data.images import ImageError, decode_mask
from pivot_megatron.errors import UserError
from pivot_megatron.probe.masked import MaskedImages
from tests.masked import pairs, png, write_folder, write_parquet

SOME = pairs(5, seed=1)


def contents(found: MaskedImages) -> list[tuple[bytes, bytes]]:
    return [(found.read(n), found.read_mask(n)) for n in range(len(found))]


def test_a_folder_whole_or_a_split_of_it(tmp_path: Path) -> None:
    train = write_folder(tmp_path, "training", SOME[:3])
    write_folder(tmp_path, "validation", SOME[3:])
    assert contents(MaskedImages.opened(train)) == SOME[:3]
    assert contents(MaskedImages.opened(train.with_name("validation"))) == SOME[3:]
    whole = MaskedImages.opened(tmp_path)
    assert contents(whole) == SOME and whole.fingerprint != MaskedImages.opened(train).fingerprint
    assert whole.fingerprint == MaskedImages.opened(tmp_path).fingerprint
    assert whole.mask_names[4] == str(tmp_path / "annotations" / "validation" / "deep" / "0001.png")
    (tmp_path / "annotations" / "validation" / "deep" / "0001.png").write_bytes(SOME[0][1] + b"\0")
    assert whole.fingerprint != MaskedImages.opened(tmp_path).fingerprint


def test_the_last_folder_of_images_on_the_way_is_meant(tmp_path: Path) -> None:
    assert contents(MaskedImages.opened(write_folder(tmp_path / "images" / "ade", "training", SOME))) == SOME


@pytest.mark.parametrize("column", ["annotation", "mask", "label"])
def test_parquet_by_row_groups(column: str, tmp_path: Path) -> None:
    """As the hub has data sets: both splits in one folder."""
    write_parquet(tmp_path / "train-00000-of-00002.parquet", SOME[:3], 2, column)
    second = write_parquet(tmp_path / "train-00001-of-00002.parquet", SOME[3:], 1, column)
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", SOME[:1], 1, column)
    found = MaskedImages.opened(tmp_path / "train-*.parquet")
    assert contents(found) == SOME and found.read(0) == SOME[0][0]
    assert found.names[2].endswith("00000-of-00002.parquet: row 2") and found.names[4] == f"{second}: row 1"
    assert found.mask_names[4] == f"{second}: row 1: {column}"
    assert len(MaskedImages.opened(tmp_path)) == 6 and len(MaskedImages.opened(second)) == 2


def test_parquet_of_bare_bytes(tmp_path: Path) -> None:
    table = pa.table({"image": [one for one, _ in SOME], "annotation": [one for _, one in SOME], "label": [1] * 5})
    pq.write_table(table, tmp_path / "a.parquet")
    assert contents(MaskedImages.opened(tmp_path)) == SOME


def test_folders_that_do_not_go_together_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder, and no parquet file that fits; give a folder"):
        MaskedImages.opened(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"expected folders images and annotations in it, or .*found none of them"):
        MaskedImages.opened(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="expected images, found none"):
        MaskedImages.opened(tmp_path)
    train = write_folder(tmp_path, "training", SOME)
    mask = tmp_path / "annotations" / "training" / "deep" / "0003.png"
    (train / "deep" / "0003.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"0003\.png: expected one image that it is the mask of, found .*jpg and .*png"):
        MaskedImages.opened(train)
    (train / "deep" / "0003.jpg").unlink(), (train / "deep" / "0003.png").unlink()
    with pytest.raises(UserError, match=r"0003\.png: expected an image of the same name in .*training, found none"):
        MaskedImages.opened(train)
    mask.unlink(), mask.with_name("0002.png").unlink()
    with pytest.raises(
        UserError, match=r"0002\.png: expected its mask at .*annotations/training/deep/0002\.png, found none"
    ):
        MaskedImages.opened(train)
    (train / "ADE_train_1.jpg").write_bytes(b""), (train / "ADE_train_1_seg.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"ADE_train_1_seg\.png: this is the full ADE20K release, .*SceneParse150"):
        MaskedImages.opened(train)


def test_parquet_that_does_not_fit_is_told(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", SOME, 2, "segments")
    with pytest.raises(
        UserError, match=r"in columns image and annotation or mask or label, found the columns image .*segments"
    ):
        MaskedImages.opened(tmp_path)
    pq.write_table(pa.table({"image": [b"one"], "label": [3]}), path)
    with pytest.raises(UserError, match=r"found the columns image \(binary\), label \(int64\)"):
        MaskedImages.opened(tmp_path)
    write_parquet(path, SOME, 2)
    write_parquet(tmp_path / "b.parquet", SOME, 2, "mask")
    with pytest.raises(UserError, match=r"b\.parquet: expected a column annotation as in .*a\.parquet, found mask"):
        MaskedImages.opened(tmp_path)
    write_parquet(path, [(SOME[0][0], None)], 1), (tmp_path / "b.parquet").unlink()  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"expected encoded images in columns"):
        MaskedImages.opened(tmp_path)
    write_parquet(path, [SOME[0], (SOME[0][0], None)], 1)  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"a\.parquet: row 1: annotation: expected an encoded image, found no bytes"):
        contents(MaskedImages.opened(tmp_path))
    write_parquet(path, [], 1), write_parquet(path, SOME, 1)
    path.write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"a\.parquet: not a parquet file that can be read \(.*fetch it again"):
        MaskedImages.opened(tmp_path)


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "1"])
def test_masks_are_read_as_they_are_stored(mode: str) -> None:
    draw = np.random.default_rng(0)
    values = draw.integers(0, 2 if mode == "1" else 60000 if mode == "I;16" else 256, (7, 9))
    image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8) * (255 if mode == "1" else 1))
    if mode == "P":
        image.putpalette(draw.integers(0, 256, 768).tolist())
    file = io.BytesIO()
    (image.convert("1") if mode == "1" else image).save(file, "PNG")
    assert Image.open(io.BytesIO(file.getvalue())).mode == mode
    assert decode_mask(file.getvalue()).dtype == np.uint16
    assert np.array_equal(decode_mask(file.getvalue()), values)


def test_a_mask_with_a_bit_that_flipped_is_none() -> None:
    whole = bytearray(png(np.arange(256, dtype=np.uint8).reshape(16, 16)))
    whole[60] ^= 4
    with pytest.raises(ImageError):
        decode_mask(bytes(whole))
