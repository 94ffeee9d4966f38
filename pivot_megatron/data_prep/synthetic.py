"""Synthetic visual questions in three groups: reading text, reading charts, seeing shapes.

Every row is a function of (seed, index): a folder can be written again, extended with `start`, or split among machines.
Held-out questions are those of another seed or of later indices.
"""

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Literal

from PIL import Image

from pivot_megatron.data.sample import IMAGE_MARK
from pivot_megatron.data.shard_writer import ShardWriter
from pivot_megatron.data_prep.charts import chart_view
from pivot_megatron.data_prep.progress import track
from pivot_megatron.data_prep.question import COLORS, TASKS, Ask, Question, Task, View, phrase
from pivot_megatron.data_prep.scenes import SHAPES, Shape, draw_mask, draw_shapes, scattered, scene_view
from pivot_megatron.data_prep.text import text_view
from pivot_megatron.errors import UserError

SAMPLES_PER_SHARD = 1000
SCENE_CLASSES = tuple(f"{color} {shape}" for color in ("red", "green", "blue") for shape in SHAPES)
"""What the labels of `scene_classes` stand for, in order."""
MASK_CLASSES = ("paper", *SHAPES)
"""What the values of `scene_masks` stand for, in order."""

# Below this the digits of the charts are no longer digits.
_MIN_IMAGE_SIZE = 48
_VIEWS: Mapping[Task, Callable[[Random, int], View]] = {"text": text_view, "chart": chart_view, "scene": scene_view}


def make_question(seed: int, index: int, image_size: int = 64) -> Question:
    """The question at `index`: its task goes round text, chart, scene. Raises UserError below 48 pixels."""
    task, view = _view(seed, index, image_size)
    ask = view.ask
    return Question(view.image, ask.question, ask.chosen, ask.rejected, task, ask.label)


def write_pairs(
    out: str | Path,
    count: int,
    seed: int,
    image_size: int = 64,
    start: int = 0,
    progress: bool = True,
    text_only: float = 0.0,
) -> None:
    """Write `count` preference pairs, indices `start` and up, as shards in `out`.

    The JSON also holds `label` and `task`. Some questions carry the image mark and some do not, as in published data.
    A share `text_only` (0 to 1) of the rows has no image and asks a sum. Raises UserError.
    """
    if not 0 <= text_only <= 1:
        raise UserError(f"expected a text-only share from 0 to 1, found {text_only}")
    with ShardWriter(out, SAMPLES_PER_SHARD) as writer:
        for index in _indices(start, count, "pairs", progress):
            layout = _rng("layout", seed, index)
            if layout.random() < text_only:
                ask = _sum_ask(_rng("sum", seed, index))
                writer.write(_key(seed, index), None, "jpg", _pair_record(ask, ask.question, "text_only"))
                continue
            task, view = _view(seed, index, image_size)
            question = _marked(layout, view.ask.question)
            writer.write(_key(seed, index), _jpeg(view.image), "jpg", _pair_record(view.ask, question, task))


def write_conversations(
    out: str | Path,
    count: int,
    seed: int,
    image_size: int = 64,
    kind: Literal["caption", "instruct"] = "instruct",
    start: int = 0,
    progress: bool = True,
) -> None:
    """Write `count` conversations, indices `start` and up, as shards in `out`.

    `caption`: the human turn is the image mark alone and the answer says all that is in the image. `instruct`: a
    question and its right answer, in a quarter of the rows followed by a second question on the same image. The JSON
    also holds `label` (of the first question) and `task`. Raises UserError.
    """
    with ShardWriter(out, SAMPLES_PER_SHARD) as writer:
        for index in _indices(start, count, "conversations", progress):
            task, view = _view(seed, index, image_size)
            if kind == "caption":
                turns = [IMAGE_MARK, view.caption]
            else:
                layout = _rng("layout", seed, index)
                turns = [_marked(layout, view.ask.question), view.ask.chosen]
                if layout.random() < 0.25:
                    turns += [view.follow_up.question, view.follow_up.chosen]
            rows = [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(turns)]
            record = {"conversations": rows, "label": view.ask.label, "task": task}
            writer.write(_key(seed, index), _jpeg(view.image), "jpg", record)


def scene_classes(seed: int, count: int, image_size: int = 64) -> tuple[list[bytes], list[int]]:
    """Scenes for a linear probe: JPEG files, and for each the index in SCENE_CLASSES of its one large shape.

    Up to three small shapes of any look stand in the corners, so neither the color nor the outline alone of the whole
    image gives the class away. Classes come equally often. Raises UserError.
    """
    _check_size(image_size)
    images, labels = [], []
    for index in range(count):
        rng = _rng("classes", seed, index)
        label = index % len(SCENE_CLASSES)
        color, kind = SCENE_CLASSES[label].split()
        x, y = 0.5 + rng.uniform(-0.06, 0.06), 0.5 + rng.uniform(-0.06, 0.06)
        shapes = [Shape(color, kind, x, y, rng.uniform(0.18, 0.24))]
        for corner in rng.sample([(0.12, 0.12), (0.12, 0.88), (0.88, 0.12), (0.88, 0.88)], rng.randint(1, 3)):
            shapes.append(Shape(rng.choice(sorted(COLORS)), rng.choice(SHAPES), *corner, radius=0.08))
        images.append(_jpeg(draw_shapes(shapes, (245, 245, 240), image_size)))
        labels.append(label)
    return images, labels


def scene_masks(seed: int, count: int, image_size: int = 64) -> list[tuple[bytes, bytes]]:
    """Scenes of one to four shapes for a segmentation probe: a JPEG file each, and a PNG mask of indices in MASK_CLASSES.
    Raises UserError."""
    _check_size(image_size)
    found = []
    for index in range(count):
        shapes = scattered(_rng("masks", seed, index))
        mask = io.BytesIO()
        draw_mask(shapes, image_size).save(mask, "PNG")
        found.append((_jpeg(draw_shapes(shapes, (245, 245, 240), image_size)), mask.getvalue()))
    return found


def _view(seed: int, index: int, image_size: int) -> tuple[Task, View]:
    _check_size(image_size)
    task = TASKS[index % len(TASKS)]
    return task, _VIEWS[task](_rng("question", seed, index), image_size)


def _rng(purpose: str, seed: int, index: int) -> Random:
    # Seeding with text hashes it, so neighbouring seeds and indices share nothing.
    return Random(f"{purpose}:{seed}:{index}")


def _indices(start: int, count: int, label: str, progress: bool) -> Iterable[int]:
    if count < 1 or start < 0:
        raise UserError(f"expected a count of at least 1 and a start of at least 0, found {count} and {start}")
    indices = range(start, start + count)
    return track(indices, count, label) if progress else indices


def _check_size(image_size: int) -> None:
    if image_size < _MIN_IMAGE_SIZE:
        raise UserError(
            f"expected an image size of at least {_MIN_IMAGE_SIZE} pixels, found {image_size}: "
            f"smaller text cannot be read"
        )


def _key(seed: int, index: int) -> str:
    return f"s{seed}-{index:08d}"


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    # Full color resolution: at 64 pixels the usual halving smears one shape's color into the next.
    image.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def _marked(rng: Random, question: str) -> str:
    return f"{IMAGE_MARK}\n{question}" if rng.random() < 0.5 else question


def _pair_record(ask: Ask, question: str, task: str) -> dict[str, str]:
    fields = {"question": question, "chosen": ask.chosen, "rejected": ask.rejected}
    return {**fields, "label": ask.label, "task": task}


def _sum_ask(rng: Random) -> Ask:
    first, second = rng.randint(1, 9), rng.randint(1, 9)
    right = first + second
    wrong = right + rng.choice((-1, 1))
    questions = ("What is {a} plus {b}?", "Add {a} and {b}.")
    slots = {"a": str(first), "b": str(second)}
    return phrase(rng, questions, ("{a} plus {b} is {label}.", "The sum is {label}."), str(right), str(wrong), slots)
