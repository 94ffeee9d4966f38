"""What of a JPEG's segments is kept, and which are nobody's to guess at."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pivot_megatron.data.jpeg import plain_jpeg
from tests.jpegs import jpeg, photo, plain


@pytest.mark.parametrize("name", ["photo (97, 64)", "progressive", "restarts", "grey", "rgb", "turned", "profile"])
def test_what_is_kept_has_the_same_pixels_and_no_metadata(name: str) -> None:
    whole = plain()[name]
    kept = plain_jpeg(whole)
    assert kept is not None and b"profile" not in kept and b"Exif" not in kept
    assert plain_jpeg(kept) == kept == plain_jpeg(whole + b"and more")
    before, after = (np.asarray(Image.open(io.BytesIO(file))) for file in (whole, kept))
    assert np.array_equal(before, after)


def test_no_jpeg_that_is_cut_off_is_plain() -> None:
    for name in ("photo (16, 16)", "progressive", "restarts"):
        whole = plain()[name]
        assert all(plain_jpeg(whole[:end]) is None for end in range(len(whole)))


def test_no_odd_one_is_either() -> None:
    whole = jpeg(photo(40, 30))
    frame, scan, end = whole.index(b"\xff\xc0"), whole.index(b"\xff\xda"), len(whole) - 2
    length = int.from_bytes(whole[frame + 2 : frame + 4]) + 2
    segment = whole[frame : frame + length]
    odd = {
        "two frames": whole[:frame] + segment + whole[frame:],
        "no frame": whole[:frame] + whole[frame + length :],
        "lossless": whole[: frame + 1] + b"\xc3" + whole[frame + 2 :],
        "a byte between segments": whole[:frame] + b"\0" + whole[frame:],
        "a segment that is too short": whole[:frame] + b"\xff\xdd\x00\x01" + whole[frame:],
        "a second scan": whole[:end] + whole[scan : scan + 14] + whole[end:],
        "an unknown marker in the pixels": whole[: scan + 100] + b"\xff\x9c" + whole[scan + 102 :],
        "a comment behind the pixels": whole[:end] + b"\xff\xfe\x00\x04ab" + whole[end:],
        "no scan": whole[:scan] + b"\xff\xd9",
        "another file": b"\x89PNG\r\n\x1a\n",
    }
    assert plain_jpeg(whole) == whole
    assert {name: plain_jpeg(file) for name, file in odd.items()} == dict.fromkeys(odd)
