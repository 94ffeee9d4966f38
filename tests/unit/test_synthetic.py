"""Synthetic questions: true to their images, reproducible, and with nothing in the text that gives the answer away."""

import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pivot_megatron.data.sample import Conversation, Pair
from pivot_megatron.data.shards import open_shards
from pivot_megatron.data_prep.question import COLORS, NUMBER_WORDS, TASKS
from pivot_megatron.data_prep.scenes import Shape, draw_shapes
from pivot_megatron.data_prep.synthetic import (
    MASK_CLASSES,
    SCENE_CLASSES,
    make_question,
    scene_classes,
    scene_masks,
    write_conversations,
    write_pairs,
)
from pivot_megatron.errors import UserError


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9]+", text)


def blobs(image: Image.Image, color: str) -> int:
    """How many separate regions of at least 12 pixels have about this color."""
    near = np.abs(np.asarray(image, dtype=int) - COLORS[color]).max(axis=2) < 30
    left, count = set(zip(*np.nonzero(near), strict=True)), 0
    while left:
        edge, size = [left.pop()], 1
        while edge:
            y, x = edge.pop()
            for step in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if step in left:
                    left.remove(step)
                    edge.append(step)
                    size += 1
        count += size >= 12
    return count


def middle(image: Image.Image, color: str) -> tuple[float, float]:
    """Mean row and column of a color."""
    near = np.abs(np.asarray(image, dtype=int) - COLORS[color]).max(axis=2) < 30
    rows, columns = np.nonzero(near)
    return float(rows.mean()), float(columns.mean())


def heights(image: Image.Image) -> dict[str, int]:
    """For each color of a chart, the rows its bar takes up."""
    pixels = np.asarray(image, dtype=int)
    rows = {color: int((np.abs(pixels - rgb).max(axis=2) < 12).any(axis=1).sum()) for color, rgb in COLORS.items()}
    return {color: height for color, height in rows.items() if height > 3}


def test_question_is_a_function_of_seed_and_index() -> None:
    first, again, other = make_question(1, 5), make_question(1, 5), make_question(2, 5)
    assert first == again and first.image.tobytes() == again.image.tobytes()
    assert first.image.tobytes() != other.image.tobytes()
    assert [make_question(1, index).task for index in range(6)] == [*TASKS, *TASKS]
    assert (make_question(3, 0, 96).image.size, make_question(3, 0, 96).image.mode) == ((96, 96), "RGB")
    with pytest.raises(UserError, match="48"):
        make_question(1, 0, 32)


def test_label_is_in_the_chosen_answer_only_and_templates_agree() -> None:
    for index in range(900):
        question = make_question(4, index, 48)
        chosen, rejected = words(question.chosen), words(question.rejected)
        lower = [word if question.task == "text" else word.lower() for word in chosen]
        assert question.label in lower, question
        assert question.label not in [word if question.task == "text" else word.lower() for word in rejected], question
        # One template: the answers differ in the label, and in the number of verb and noun where it is a count.
        assert len(chosen) == len(rejected), question
        allowed = 3 if question.label in NUMBER_WORDS else 1
        assert 1 <= sum(a != b for a, b in zip(chosen, rejected, strict=True)) <= allowed, question


def test_every_label_is_chosen_as_often_as_rejected() -> None:
    """Otherwise a model that never looks at the image could learn the preference."""
    chosen: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for index in range(3000):
        question = make_question(5, index, 48)
        pairs = list(zip(words(question.chosen), words(question.rejected), strict=True))
        right, wrong = next(pair for pair in pairs if question.label in (pair[0], pair[0].lower()))
        chosen[f"{question.task} {right.lower()}"] += 1
        rejected[f"{question.task} {wrong.lower()}"] += 1
    for label in set(chosen) | set(rejected):
        total = chosen[label] + rejected[label]
        # Five standard deviations of a fair coin.
        assert abs(chosen[label] - rejected[label]) <= 5 * total**0.5, (label, chosen[label], rejected[label])
    common = [label for label, times in (chosen + rejected).items() if times > 60]
    assert len(common) > 20


def test_scene_answers_are_true_to_the_pixels() -> None:
    checked: Counter[str] = Counter()
    for index in range(2, 1200, 3):
        question = make_question(6, index)
        text, label, image = question.question, question.label, question.image
        if match := re.search(r"(\w+) shapes", text):
            colors = [match[1]] if match[1] in COLORS else list(COLORS)
            assert sum(blobs(image, color) for color in colors) == NUMBER_WORDS.index(label), question
            checked["count"] += 1
        elif label in COLORS:
            wrong = next(word for word in words(question.rejected.lower()) if word in COLORS)
            assert blobs(image, label) == blobs(image, wrong) == 1
            checked["color"] += 1
        elif label in ("left", "right", "above", "below"):
            one, other = re.findall("|".join(COLORS), text)
            if text.startswith("On which side"):
                one, other = other, one
            down, across = np.subtract(middle(image, one), middle(image, other))
            expected = {"left": across < -10, "right": across > 10, "above": down < -10, "below": down > 10}
            assert expected[label], question
            checked["position"] += 1
    assert min(checked[kind] for kind in ("count", "color", "position")) > 50


def test_shape_and_color_answers_are_true_to_the_pixels() -> None:
    """A shape covers a share of its bounding box that tells its kind."""
    checked: Counter[str] = Counter()
    shares = {}
    for kind in ("circle", "square", "triangle", "star"):
        shares[kind] = share(draw_shapes([Shape("red", kind, 0.5, 0.5, 0.13)], (250, 250, 250), 256), "red")
    for index in range(2, 900, 3):
        question = make_question(7, index, 256)
        if question.label in shares:
            match = re.search("|".join(COLORS), question.question)
            assert match is not None
            color, kind = match[0], question.label
            checked["shape"] += 1
        elif question.label in COLORS:
            color, kind = question.label, next(word for word in words(question.question) if word in shares)
            checked["color"] += 1
        else:
            continue
        found = share(question.image, color)
        assert min(shares, key=lambda other: abs(shares[other] - found)) == kind, question
    assert min(checked["shape"], checked["color"]) > 50


def share(image: Image.Image, color: str) -> float:
    near = np.abs(np.asarray(image, dtype=int) - COLORS[color]).max(axis=2) < 30
    rows, columns = np.nonzero(near)
    return float(near.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1)))


def test_chart_answers_are_true_to_the_pixels() -> None:
    checked: Counter[str] = Counter()
    for index in range(1, 900, 3):
        question = make_question(8, index)
        bars = heights(question.image)
        assert len(set(bars.values())) == len(bars), question
        if question.label in COLORS:
            ordered = sorted(bars, key=lambda color: bars[color], reverse="tallest" in question.question)
            wrong = next(word for word in words(question.rejected.lower()) if word in COLORS)
            assert ordered[:2] == [question.label, wrong], (question, bars)
            checked["extreme"] += 1
        elif question.label.isdigit():
            match = re.search("|".join(COLORS), question.question)
            assert match is not None
            assert round((bars[match[0]] - 1) * 9 / 64) == int(question.label), (question, bars)
            checked["value"] += 1
        else:
            assert len(bars) == NUMBER_WORDS.index(question.label), (question, bars)
            checked["count"] += 1
    assert min(checked.values()) > 50 and len(checked) == 3


def test_text_near_misses_differ_in_one_character() -> None:
    for index in range(0, 600, 3):
        question = make_question(9, index, 48)
        wrong = [word for word in words(question.rejected) if word.isupper() or word.isdigit()][-1]
        assert len(wrong) == len(question.label)
        assert sum(a != b for a, b in zip(question.label, wrong, strict=True)) == 1


def test_pairs_on_disk(tmp_path: Path) -> None:
    write_pairs(tmp_path / "a", 60, seed=1, image_size=48, start=30, progress=False, text_only=0.3)
    samples = [(reader := open_shards(tmp_path / "a")).read(i) for i in range(60)]
    assert list(reader.keys)[:1] == ["s1-00000030"]
    marks: Counter[bool] = Counter()
    for number, sample in enumerate(samples):
        assert isinstance(sample, Pair)
        if sample.image is None:
            assert sample.meta["task"] == "text_only" and "<image>" not in sample.question
            continue
        expected = make_question(1, 30 + number, 48)
        assert sample.question.removeprefix("<image>\n") == expected.question
        assert (sample.chosen, sample.rejected) == (expected.chosen, expected.rejected)
        assert sample.meta == {"label": expected.label, "task": expected.task}
        with Image.open(io.BytesIO(sample.image)) as image:
            assert (image.format, image.size) == ("JPEG", (48, 48))
            assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected.image)).mean() < 4
        marks[sample.question.startswith("<image>\n")] += 1
    assert min(marks[True], marks[False]) > 5
    assert 8 < sum(sample.image is None for sample in samples) < 30
    write_pairs(tmp_path / "b", 60, seed=1, image_size=48, start=30, progress=False, text_only=0.3)
    assert open_shards(tmp_path / "b").fingerprint == reader.fingerprint


def test_sums_are_right(tmp_path: Path) -> None:
    write_pairs(tmp_path, 40, seed=2, image_size=48, progress=False, text_only=1.0)
    reader = open_shards(tmp_path)
    for sample in map(reader.read, range(40)):
        assert isinstance(sample, Pair) and sample.image is None
        assert sum(map(int, re.findall(r"\d+", sample.question))) == int(sample.meta["label"])
        assert words(sample.chosen)[-1] == sample.meta["label"] != words(sample.rejected)[-1]


def test_conversations_on_disk(tmp_path: Path) -> None:
    write_conversations(tmp_path / "i", 60, seed=1, image_size=48, kind="instruct", progress=False)
    write_conversations(tmp_path / "c", 30, seed=1, image_size=48, kind="caption", progress=False)
    reader = open_shards(tmp_path / "i")
    lengths: Counter[int] = Counter()
    for number in range(60):
        sample, expected = reader.read(number), make_question(1, number, 48)
        assert isinstance(sample, Conversation)
        assert sample.turns[0].text.removeprefix("<image>\n") == expected.question
        assert sample.turns[1].text == expected.chosen
        assert len({turn.text for turn in sample.turns[::2]}) == len(sample.turns) // 2
        lengths[len(sample.turns)] += 1
    assert set(lengths) == {2, 4}
    captions = open_shards(tmp_path / "c")
    for number in range(30):
        sample, expected = captions.read(number), make_question(1, number, 48)
        assert isinstance(sample, Conversation)
        assert [turn.text for turn in sample.turns[:-1]] == ["<image>"]
        # The first letter of a word is in the word; of a count, the caption gives the things themselves.
        if expected.label not in (*NUMBER_WORDS, "left", "right", "above", "below"):
            assert expected.label in sample.turns[1].text.lower() or expected.label in sample.turns[1].text


def test_progress_and_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "a", 3, seed=1, image_size=48)
    assert capsys.readouterr().err == "pairs: 3 of 3\n"
    with pytest.raises(UserError, match="count"):
        write_pairs(tmp_path / "b", 0, seed=1)
    with pytest.raises(UserError, match="share"):
        write_pairs(tmp_path / "b", 1, seed=1, text_only=1.5)


def test_masks_cover_the_shapes_of_their_scenes() -> None:
    pairs = scene_masks(3, 24, 64)
    assert pairs == scene_masks(3, 24, 64)
    seen = set()
    for encoded, encoded_mask in pairs:
        image = np.asarray(Image.open(io.BytesIO(encoded)), dtype=int)
        mask = np.asarray(Image.open(io.BytesIO(encoded_mask)))
        assert mask.shape == (64, 64) and mask.dtype == np.uint8
        seen |= set(np.unique(mask).tolist())
        shown = np.min([np.abs(image - rgb).max(axis=2) for rgb in COLORS.values()], axis=0) < 30
        # They part at smoothed edges alone.
        assert (shown & (mask == 0)).sum() < 20 and ((mask > 0) & ~shown).sum() < 0.5 * (mask > 0).sum()
    assert seen == set(range(len(MASK_CLASSES)))


def test_scene_classes_are_balanced_and_named_by_the_large_shape() -> None:
    images, labels = scene_classes(3, 48, 64)
    assert (images, labels) == scene_classes(3, 48, 64)
    assert set(Counter(labels).values()) == {4} and len(set(labels)) == len(SCENE_CLASSES) == 12
    assert len(set(images)) == 48
    for data, label in zip(images, labels, strict=True):
        with Image.open(io.BytesIO(data)) as image:
            center = np.asarray(image, dtype=int)[30:34, 30:34].reshape(-1, 3).mean(axis=0)
        color = min(COLORS, key=lambda name: float(np.abs(center - COLORS[name]).sum()))
        assert color == SCENE_CLASSES[label].split()[0]
