"""Damage of a sample's image, and images that are odd and sound."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tests.damage.kinds import RECORD, Kind, among, encoded, look, member

Make = Callable[[], bytes]


def _sample(make: Make, extension: str) -> Any:
    return among(lambda: member("odd.json", RECORD) + member(f"odd.{extension}", make()))


def bad(make: Make, extension: str = "jpg", seen: Any = "index") -> Kind:
    return Kind(_sample(make, extension), "bad", {"odd": ("bad_image",)}, seen=seen)


def decoded(make: Make, extension: str = "jpg") -> Kind:
    """Its head is whole."""
    return bad(make, extension, seen="decode")


def unseen(make: Make, extension: str = "jpg") -> Kind:
    return Kind(_sample(make, extension), "unseen", {"odd": ("bad_image",)}, key="odd", seen="decode")


def sound(make: Make, extension: str = "jpg", shown: Callable[[], Image.Image] = look) -> Kind:
    return Kind(_sample(make, extension), "sound", key="odd", shown=shown)


def pair(record: dict[str, str], image: Make, rejected: Make, kind: str, **fate: Any) -> Kind:
    def make() -> bytes:
        return member("odd.json", record) + member("odd.png", image()) + member("odd.rejected.png", rejected())

    return Kind(among(make), kind, **fate)  # type: ignore[arg-type]


def jpeg(share: float = 1.0, **options: Any) -> bytes:
    whole = encoded(look(), "JPEG", **options)
    return whole[: round(len(whole) * share)]


def png(share: float = 1.0) -> bytes:
    whole = encoded(look(), "PNG")
    return whole[: round(len(whole) * share)]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, data: bytes, bits: int = 8, color: int = 2, more: Sequence[bytes] = ()) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + body


def png_with(at: int, data: bytes, of: bytes = b"IDAT") -> bytes:
    """`data` written over a PNG from `at` bytes past where a chunk's data begin; from the chunk's end where negative."""
    whole = bytearray(png())
    begin = whole.index(of) + 4
    (size,) = struct.unpack(">I", whole[begin - 8 : begin - 4])
    place = begin + at if at >= 0 else begin + size - at - 1
    whole[place : place + len(data)] = data
    return bytes(whole)


def frame(height: int, width: int) -> bytes:
    """A JPEG that lies about its size."""
    whole = bytearray(jpeg())
    at = whole.index(b"\xff\xc0") + 5
    whole[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(whole)


def over(whole: bytes, share: float, data: bytes) -> bytes:
    at = round(len(whole) * share)
    return whole[:at] + data + whole[at + len(data) :]


def random_scan() -> bytes:
    whole = jpeg()
    return whole[: whole.index(b"\xff\xda") + 14] + random.Random(1).randbytes(600)


def deep(color: int) -> bytes:
    """A PNG of 16 bits a channel: grey (0) or colours (2)."""
    levels = np.asarray(look().convert("L") if color == 0 else look()).astype(np.uint16) * 257
    return png_of(48, 48, b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels), 16, color)


def thin(width: int, height: int) -> bytes:
    return png_of(width, height, (b"\0" + bytes((width + 7) // 8)) * height, bits=1, color=0)


def tiff_of(width: int, height: int) -> bytes:
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 4, height), (279, 4, width * height % 2**32)]
    lines = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + lines + bytes(4)


def bmp_of(width: int, height: int) -> bytes:
    return over(encoded(look(), "BMP"), 18 / len(encoded(look(), "BMP")), struct.pack("<ii", width, height))


def animated(kind: str) -> bytes:
    first, second = (image.convert("P") if kind == "GIF" else image for image in (look(), look(200)))
    return encoded(first, kind, save_all=True, append_images=[second])


def turned(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(look(size=(48, 24)), kind, exif=exif)


def grey() -> Image.Image:
    return look().convert("L").convert("RGB")


def half_white() -> Image.Image:
    return Image.blend(look(), Image.new("RGB", (48, 48), "white"), 127 / 255)


def see_through(kind: str) -> bytes:
    image = look().convert({"GRAY": "LA", "PALETTE": "P"}.get(kind, "RGBA"))
    if kind == "PALETTE":
        return encoded(image, "PNG", transparency=bytes([128]) * 256)
    image.putalpha(128)
    return encoded(image, "PNG")


def one_colour(level: int) -> Image.Image:
    return Image.new("RGB", (48, 48), (level, level, level))


JPEG = {
    "empty": bad(lambda: b""),
    "zeros": bad(lambda: bytes(1000)),
    "of-three-bytes": bad(lambda: jpeg()[:3]),
    "cut-in-its-head": bad(lambda: jpeg(0.2)),
    "cut-in-the-middle": decoded(lambda: jpeg(0.75)),
    "cut-near-the-end": decoded(lambda: jpeg(0.95)),
    "progressive-cut": decoded(lambda: jpeg(0.8, progressive=True)),
    "without-end-mark": Kind(_sample(lambda: jpeg()[:-2], "jpg"), "unseen", {"odd": ("bad_image",)}, "odd", "decode"),
    "says-65535-a-side": bad(lambda: frame(65535, 65535)),
    "says-no-width": bad(lambda: frame(48, 0)),
    "says-no-height": bad(lambda: frame(0, 48)),
    "says-twice-its-size": unseen(lambda: frame(96, 96)),
    "garbage-in-the-middle": unseen(lambda: over(jpeg(), 0.8, b"\x55" * 50)),
    "marks-in-the-middle": unseen(lambda: over(jpeg(), 0.8, b"\xff\xd8" * 25)),
    "random-after-its-head": unseen(random_scan),
    "half-and-an-end-mark": unseen(lambda: jpeg(0.8) + b"\xff\xd9"),
    "after-a-newline": unseen(lambda: b"\n" + jpeg()),
    "is-text": bad(lambda: b"not found"),
    "is-html": bad(lambda: b"<!DOCTYPE html><html><body>403 Forbidden</body></html>"),
    "is-json": bad(lambda: b'{"error": "no such image"}'),
    "is-svg": bad(lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"),
    "is-pdf": bad(lambda: b"%PDF-1.7\n1 0 obj <<>> endobj"),
    "is-postscript": bad(lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 48\n%%EndComments\nshowpage\n"),
    "is-avif": bad(lambda: b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miaf" + bytes(100)),
    "is-png": sound(png),
    "is-gif": sound(lambda: encoded(look().convert("P"), "GIF"), shown=lambda: look().convert("P").convert("RGB")),
    "is-bmp": sound(lambda: encoded(look(), "BMP")),
    "is-tiff": sound(lambda: encoded(look(), "TIFF")),
    "cmyk": sound(lambda: encoded(look().convert("CMYK"), "JPEG")),
    "grey": sound(lambda: encoded(look().convert("L"), "JPEG"), shown=grey),
    "progressive": sound(lambda: jpeg(progressive=True)),
    "turned-by-exif": sound(lambda: turned("JPEG"), shown=lambda: look(size=(48, 24))),
    "exif-garbage": sound(lambda: jpeg(exif=b"Exif\0\0" + b"garbage" * 20)),
    "profile-garbage": sound(lambda: jpeg(icc_profile=b"garbage" * 100)),
    "with-more-after-its-end": sound(lambda: jpeg() + b"more" * 100),
}

PNG = {
    "empty": bad(lambda: b"", "png"),
    "signature-alone": bad(lambda: png()[:8], "png"),
    "cut-in-its-data": decoded(lambda: png(0.5), "png"),
    "cut-before-its-end": decoded(lambda: png()[:-12], "png"),
    "wrong-checksum-of-its-head": bad(lambda: png_with(-1, bytes(4), b"IHDR"), "png"),
    "wrong-checksum-of-its-data": decoded(lambda: png_with(-1, bytes(4)), "png"),
    "flipped-bits": decoded(lambda: png_with(60, b"\xaa\x55\xaa"), "png"),
    "too-few-lines": decoded(lambda: png_of(48, 48, bytes(500)), "png"),
    "no-width": bad(lambda: png_of(0, 48, b""), "png"),
    "no-height": bad(lambda: png_of(48, 0, b""), "png"),
    "says-30000-a-side": bad(lambda: png_of(30000, 30000, bytes(100)), "png"),
    "says-12000-a-side": bad(lambda: png_of(12000, 12000, bytes(100)), "png"),
    "80-million-wide": bad(lambda: thin(80_000_000, 1), "png"),
    "70000-high": bad(lambda: thin(8, 70_000), "png"),
    "text-bomb": bad(
        lambda: png_of(1, 1, bytes(4), more=[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26)))]), "png"
    ),
    "is-webp": sound(lambda: encoded(look(), "WEBP"), "png"),
    "16-bit-grey": sound(lambda: deep(0), "png", grey),
    "16-bit-colours": sound(lambda: deep(2), "png"),
    "one-bit": sound(lambda: encoded(look().convert("1"), "PNG"), "png", lambda: look().convert("1").convert("RGB")),
    "see-through": sound(lambda: see_through("RGBA"), "png", half_white),
    "see-through-grey": sound(
        lambda: see_through("GRAY"), "png", lambda: Image.blend(grey(), Image.new("RGB", (48, 48), "white"), 127 / 255)
    ),
    "see-through-palette": sound(
        lambda: see_through("PALETTE"),
        "png",
        lambda: Image.blend(look().convert("P").convert("RGB"), Image.new("RGB", (48, 48), "white"), 127 / 255),
    ),
    "animated": sound(lambda: animated("PNG"), "png"),
    "one-pixel": sound(lambda: encoded(one_colour(77).crop((0, 0, 1, 1)), "PNG"), "png", lambda: one_colour(77)),
    "20000-wide": sound(lambda: encoded(one_colour(77).resize((20000, 1)), "PNG"), "png", lambda: one_colour(77)),
    "20000-high": sound(lambda: encoded(one_colour(77).resize((1, 20000)), "PNG"), "png", lambda: one_colour(77)),
    "with-more-after-its-end": sound(lambda: png() + b"more" * 100, "png"),
}

OTHER = {
    "webp-cut": bad(lambda: encoded(look(), "WEBP", lossless=False)[:-200], "webp"),
    "webp-head": bad(lambda: encoded(look(), "WEBP")[:24], "webp"),
    "webp-flipped-bits": unseen(lambda: over(encoded(look(), "WEBP", lossless=False), 0.5, b"\xaa\x55" * 8), "webp"),
    "webp-animated": sound(lambda: animated("WEBP"), "webp"),
    "gif-cut": decoded(lambda: encoded(look().convert("P"), "GIF")[:-600]),
    "gif-of-nothing": bad(lambda: b"GIF89a" + bytes(7) + b";"),
    "gif-animated": sound(lambda: animated("GIF"), shown=lambda: look().convert("P").convert("RGB")),
    "bmp-cut": decoded(lambda: encoded(look(), "BMP")[:3000]),
    "bmp-no-width": bad(lambda: bmp_of(0, 48)),
    "bmp-negative": bad(lambda: bmp_of(-48, 48)),
    "bmp-bottom-up": sound(lambda: bmp_of(48, -48), shown=lambda: look().transpose(Image.Transpose.FLIP_TOP_BOTTOM)),
    "tiff-cut": decoded(lambda: encoded(look(), "TIFF")[:3000]),
    "tiff-says-60000-a-side": bad(lambda: tiff_of(60000, 60000)),
    "tiff-no-height": bad(lambda: tiff_of(0xFFFFFFFF, 0)),
    "tiff-without-data": decoded(lambda: tiff_of(40, 40)),
    "tiff-turned": sound(
        lambda: encoded(look(size=(48, 24)), "TIFF", tiffinfo={274: 6}),
        shown=lambda: look(size=(48, 24)).transpose(Image.Transpose.ROTATE_270),
    ),
}

_SAME = RECORD | {"rejected": RECORD["chosen"]}
PAIRS = {
    "rejected-is-broken": pair(RECORD, png, lambda: b"broken", "bad", bad={"odd": ("bad_image",)}),
    "rejected-is-cut": pair(RECORD, png, lambda: png(0.5), "bad", bad={"odd": ("bad_image",)}, seen="decode"),
    "chosen-is-cut": pair(_SAME, lambda: png(0.5), png, "bad", bad={"odd": ("bad_image",)}, seen="decode"),
    "all-the-same": pair(_SAME, png, png, "bad", bad={"odd": ("identical_answers",)}),
    "same-images": pair(RECORD, png, png, "sound", key="odd", shown=look),
    "beside-a-conversation": pair(
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},  # type: ignore[dict-item]
        png,
        png,
        "bad",
        bad={"odd": ("ambiguous_fields",)},
    ),
}
