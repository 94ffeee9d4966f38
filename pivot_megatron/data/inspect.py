"""What a folder of shards holds, as facts: text, JSON and the contact sheet say the same ones."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from random import Random

from PIL import Image

from pivot_megatron.data.histogram import ASPECT_RATIOS, Measure, measures
from pivot_megatron.data.images import IMAGE_FORMATS
from pivot_megatron.data.sample import IMAGE_MARK, BadSample, Pair, Sample
from pivot_megatron.data.shards import ShardReader
from pivot_megatron.data.tokens import Tokenizer

LOOKED_AT = 2000
"""Reading a sample reads its image too, so a large set is judged by this many of its samples, spread evenly."""

_IMAGES = 8


@dataclass(frozen=True)
class Broken:
    """Samples that cannot be trained on, for one reason: how many, and the first one's key and what is wrong with it."""

    count: int
    key: str
    detail: str


@dataclass(frozen=True)
class Facts:
    """Of a folder of shards. `samples`, `tars` and `bytes` are of all of it, the rest of the `looked_at` samples.

    `kinds` counts pairs and conversations, `formats` their images' (the rejected ones too), `broken` is by reason.
    `first_images` are such as `JPEG 640x480`.
    `measures`: lengths of texts in characters and, where a tokenizer was given, in tokens (of the text alone: no image, no
    chat template); widths, heights (pixels) and width / height of images.
    """

    folder: str
    samples: int
    tars: int
    bytes: int
    looked_at: int
    kinds: Mapping[str, int]
    broken: Mapping[str, Broken]
    with_image: int
    formats: Mapping[str, int]
    first_images: Sequence[str]
    measures: Sequence[Measure]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def gather(reader: ShardReader, tokenizer: Tokenizer | None = None) -> Facts:
    """The facts of the set that `reader` has open. Broken samples are among them, and stop nothing."""
    positions = spread(len(reader), LOOKED_AT)
    tally = _Tally(tokenizer)
    for position in positions:
        try:
            tally.add(reader.read(position))
        except BadSample as error:
            tally.add_broken(error)
    return tally.facts(reader, len(positions))


def spread(count: int, most: int) -> Sequence[int]:
    """Positions of at most `most` of `count` samples, at even distances."""
    return [i * count // most for i in range(most)] if count > most else range(count)


def drawn(count: int, most: int, seed: int) -> Sequence[int]:
    """Positions of at most `most` of `count` samples, drawn at random and then in order."""
    return sorted(Random(seed).sample(range(count), min(most, count)))


def texts_of(sample: Sample) -> list[tuple[str, str]]:
    """(name, text) of what a sample says: question, chosen and rejected, or each turn by its role."""
    if isinstance(sample, Pair):
        return [("question", sample.question), ("chosen", sample.chosen), ("rejected", sample.rejected)]
    return [(turn.role, turn.text) for turn in sample.turns]


def images_of(sample: Sample) -> list[bytes]:
    """The encoded images, a pair's rejected one last."""
    rejected = sample.rejected_image if isinstance(sample, Pair) else None
    return [image for image in (sample.image, rejected) if image is not None]


@dataclass(frozen=True)
class ImageHead:
    """What an image file says of itself: its format, and its width and height in pixels."""

    format: str
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.format} {self.width}x{self.height}"


def image_head(encoded: bytes) -> ImageHead | None:
    """None where it cannot be read. Nothing is decoded, and no other program is started on the bytes."""
    try:
        with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
            return ImageHead(str(image.format), image.width, image.height)
    except Exception:  # Pillow's readers answer broken bytes with anything
        return None


@dataclass
class _Tally:
    """Of the samples added so far. Their images are not kept: a set's images need not fit in memory."""

    tokenizer: Tokenizer | None
    kinds: Counter[str] = field(default_factory=Counter)
    broken: dict[str, Broken] = field(default_factory=dict)
    with_image: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    first_images: list[str] = field(default_factory=list)
    characters: dict[str, list[int]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    pixels: dict[str, list[int]] = field(default_factory=lambda: {"width": [], "height": []})
    ratios: list[float] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        self.kinds["pairs" if isinstance(sample, Pair) else "conversations"] += 1
        for name, text in texts_of(sample):
            self.characters.setdefault(name, []).append(len(text))
            if self.tokenizer is not None:
                ids = self.tokenizer.encode(text.replace(IMAGE_MARK, ""), add_special_tokens=False)
                self.tokens.setdefault(name, []).append(len(ids))
        heads = [image_head(image) for image in images_of(sample)]
        if heads:
            self.with_image += 1
            if len(self.first_images) < _IMAGES:
                self.first_images.append(str(heads[0] or "unreadable"))
        for head in filter(None, heads):
            self.formats[head.format] += 1
            self.pixels["width"].append(head.width)
            self.pixels["height"].append(head.height)
            self.ratios.append(head.width / head.height)

    def add_broken(self, error: BadSample) -> None:
        before = self.broken.get(error.reason, Broken(0, error.key, error.detail))
        self.broken[error.reason] = Broken(before.count + 1, before.key, before.detail)

    def facts(self, reader: ShardReader, looked_at: int) -> Facts:
        return Facts(
            folder=reader.where,
            samples=len(reader),
            tars=len(reader.shards),
            bytes=sum(shard.bytes for shard in reader.shards),
            looked_at=looked_at,
            kinds=dict(self.kinds.most_common()),
            broken=dict(sorted(self.broken.items(), key=lambda item: -item[1].count)),
            with_image=self.with_image,
            formats=dict(self.formats.most_common()),
            first_images=self.first_images,
            measures=[
                *measures("characters", self.characters),
                *measures("tokens", self.tokens),
                *measures("pixels", self.pixels),
                *measures("ratio", {"width/height": self.ratios}, ASPECT_RATIOS),
            ],
        )
