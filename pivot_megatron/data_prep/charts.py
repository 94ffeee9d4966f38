"""Images of small bar charts: which bar is the tallest or the shortest, how many there are, and what they say."""

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from pivot_megatron.data_prep.question import COLORS, NUMBER_WORDS, Ask, View, count_ask, phrase, sentence, toss
from pivot_megatron.data_prep.text import load_font

_MAX_VALUE = 6
_PAPERS = ((255, 255, 255), (246, 246, 240), (240, 245, 250))
_COUNT_QUESTIONS = ("How many {noun} are there?", "How many {noun} does the chart have?", "Count the {noun}.")


@dataclass(frozen=True)
class Bar:
    """A bar: its color and its value, 1 to 6."""

    color: str
    value: int


def chart_view(rng: Random, image_size: int) -> View:
    """An image `[image_size, image_size]` RGB with a chart of two to four bars, and the questions on it."""
    kind = rng.choice(("extreme", "count", "value"))
    if kind == "count":
        bars, ask = _count(rng)
        follow_up = _extreme_ask(rng, bars)
    else:
        bars, ask = _value(rng) if kind == "value" else _extreme(rng)
        wrong = len(bars) + (1 if len(bars) < 4 else -1)
        follow_up = count_ask(rng, _COUNT_QUESTIONS, len(bars), wrong, "bar")
    return View(_draw(rng, bars, image_size), ask, follow_up, _caption(rng, bars))


def _bars(rng: Random, number: int) -> tuple[Bar, ...]:
    colors, values = rng.sample(sorted(COLORS), number), rng.sample(range(1, _MAX_VALUE + 1), number)
    return tuple(Bar(color, value) for color, value in zip(colors, values, strict=True))


def _count(rng: Random) -> tuple[tuple[Bar, ...], Ask]:
    low = rng.choice((2, 3))
    right, wrong = (low, low + 1) if rng.random() < 0.5 else (low + 1, low)
    return _bars(rng, right), count_ask(rng, _COUNT_QUESTIONS, right, wrong, "bar")


def _extreme(rng: Random) -> tuple[tuple[Bar, ...], Ask]:
    bars = _bars(rng, rng.choice((2, 3, 4)))
    return bars, _extreme_ask(rng, bars)


def _extreme_ask(rng: Random, bars: tuple[Bar, ...]) -> Ask:
    which = rng.choice(("tallest", "shortest"))
    best, second, *_ = sorted(bars, key=lambda bar: bar.value, reverse=which == "tallest")
    questions = ("Which bar is the {which}?", "What color is the {which} bar?")
    answers = ("The {label} bar is the {which}.", "The {which} bar is {label}.", "It is the {label} bar.")
    return phrase(rng, questions, answers, best.color, second.color, {"which": which})


def _value(rng: Random) -> tuple[tuple[Bar, ...], Ask]:
    low = rng.randint(1, _MAX_VALUE - 1)
    right, wrong = toss(rng, str(low), str(low + 1))
    bars = list(_bars(rng, rng.choice((2, 3, 4))))
    # Values stay distinct: the bar that has the asked value already, if there is one, takes the asked bar's.
    place = rng.randrange(len(bars))
    bars = [Bar(bar.color, bars[place].value if bar.value == int(right) else bar.value) for bar in bars]
    bars[place] = Bar(bars[place].color, int(right))
    questions = ("What is the value of the {color} bar?", "How high is the {color} bar?")
    answers = ("The {color} bar is {label}.", "The value of the {color} bar is {label}.", "It is {label}.")
    return tuple(bars), phrase(rng, questions, answers, right, wrong, {"color": bars[place].color})


def _caption(rng: Random, bars: tuple[Bar, ...]) -> str:
    values = ", ".join(f"{bar.color} {bar.value}" for bar in bars)
    tallest = max(bars, key=lambda bar: bar.value).color
    opening = rng.choice(("a chart with {count} bars: {values}.", "{count} bars, from left to right: {values}."))
    text = opening.format(count=NUMBER_WORDS[len(bars)], values=values)
    return sentence(f"{text} The {tallest} bar is the tallest.")


def _draw(rng: Random, bars: tuple[Bar, ...], image_size: int) -> Image.Image:
    image = Image.new("RGB", (image_size, image_size), rng.choice(_PAPERS))
    draw = ImageDraw.Draw(image)
    unit = image_size / 9
    base = image_size * 0.93 - rng.uniform(0, 0.04) * image_size
    left, right = image_size * 0.05, image_size * 0.95
    for line in range(1, _MAX_VALUE + 1):
        draw.line((left, base - line * unit, right, base - line * unit), fill=(214, 214, 214))
    font = load_font("DejaVuSans-Bold.ttf", round(image_size * 0.18))
    slot = (right - left) / len(bars)
    width = min(slot * rng.uniform(0.55, 0.8), image_size * 0.22)
    for position, bar in enumerate(bars):
        middle = left + (position + 0.5) * slot
        top = base - bar.value * unit
        draw.rectangle((middle - width / 2, top, middle + width / 2, base), fill=COLORS[bar.color])
        draw.text((middle, top - image_size * 0.03), str(bar.value), font=font, fill=(70, 70, 70), anchor="ms")
    draw.line((left, base, right, base), fill=(90, 90, 90), width=max(1, image_size // 64))
    return image
