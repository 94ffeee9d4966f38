"""Images of a letter, a two-digit number or a three-letter word, to be read. A near miss differs in one character."""

import importlib.util
from functools import lru_cache
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont

from pivot_megatron.data_prep.question import COLORS, Ask, View, phrase, toss
from pivot_megatron.errors import UserError

_WORD_LIST = (
    "BAG BAR BAT BOX BUG BUN BUS CAN CAP CAR CAT COT CUP CUT DOG DOT FAN FOX HAT HEN HOP HOT HUG HUT "
    "JAR JET LEG LOG MAP MAT MOP MUG NET NUT PAN PEN PET PIG PIN POT RAT RUG RUN SUN TAG TOP VAN WIG"
)
WORDS = tuple(_WORD_LIST.split())
# Couples that are mistaken for each other on a small image.
_LETTER_LIST = "AH AR BD BP BE CG CO DO EF FP GO GS HN HK KX LE LT MN MW PR SZ TY UV UO VY XY ZE WV"
_LETTER_COUPLES = tuple(_LETTER_LIST.split())
_DIGITS = "123456789"
_INKS = ("red", "green", "blue", "black")
_PAPERS = ((255, 255, 255), (238, 238, 232), (226, 236, 250), (252, 240, 220), (228, 244, 228))
# They come with matplotlib, so every machine draws the same glyphs.
_FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "cmb10.ttf",
    "cmss10.ttf",
)

_QUESTIONS = {
    "letter": ("Which letter is shown?", "What letter is this?", "Read the letter."),
    "number": ("Which number is shown?", "What number is this?", "Read the number."),
    "word": ("Which word is shown?", "What does the image say?", "Read the word."),
}


def text_view(rng: Random, image_size: int) -> View:
    """An image `[image_size, image_size]` RGB with one text, and the questions on it."""
    kind = rng.choice(("letter", "number", "word"))
    right, wrong = _couple(rng, kind)
    ink = rng.choice(_INKS)
    answers = (f"The {kind} is {{label}}.", "It says {label}.", f"The image shows the {kind} {{label}}.")
    if kind == "word" and right[0] != wrong[0] and rng.random() < 0.3:
        ask = _first_letter_ask(rng, right[0], wrong[0])
    else:
        ask = phrase(rng, _QUESTIONS[kind], answers, right, wrong, {})
    caption = f"The {kind} {right} in {ink}." if rng.random() < 0.5 else f"A {ink} {kind}: {right}."
    return View(_draw(rng, right, ink, image_size), ask, _ink_ask(rng, kind, ink), caption)


@lru_cache(maxsize=512)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of matplotlib's at a size in pixels. Raises UserError where matplotlib is not installed."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise UserError("expected matplotlib, for its fonts, found none: run: pip install matplotlib")
    path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / name
    # The basic layout, because whether the other engine exists depends on how Pillow was built.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _couple(rng: Random, kind: str) -> tuple[str, str]:
    if kind == "letter":
        couple = rng.choice(_LETTER_COUPLES)
        return toss(rng, couple[0], couple[1])
    if kind == "word":
        return toss(rng, *rng.choice(_word_couples()))
    digits = rng.sample(_DIGITS, 2)
    other = rng.choice(_DIGITS)
    first, second = (digit + other for digit in digits) if rng.random() < 0.5 else (other + digit for digit in digits)
    return first, second


@lru_cache(maxsize=1)
def _word_couples() -> tuple[tuple[str, str], ...]:
    """All words that differ in one letter."""
    return tuple(
        (first, second)
        for first in WORDS
        for second in WORDS
        if first < second and sum(a != b for a, b in zip(first, second, strict=True)) == 1
    )


def _first_letter_ask(rng: Random, right: str, wrong: str) -> Ask:
    questions = ("What is the first letter of the word?", "Which letter does the word start with?")
    return phrase(rng, questions, ("The first letter is {label}.", "It starts with {label}."), right, wrong, {})


def _ink_ask(rng: Random, kind: str, ink: str) -> Ask:
    wrong = rng.choice([color for color in _INKS if color != ink])
    return phrase(
        rng,
        ("What color is the {kind}?", "Which color is the {kind}?"),
        ("The {kind} is {label}.", "It is {label}."),
        ink,
        wrong,
        {"kind": kind},
    )


def _draw(rng: Random, text: str, ink: str, image_size: int) -> Image.Image:
    image = Image.new("RGB", (image_size, image_size), rng.choice(_PAPERS))
    name = rng.choice(_FONTS)
    scale = rng.uniform(0.82, 1.0)
    left, top, right, bottom = load_font(name, 100).getbbox(text)
    # As large as 84 % of the width and 62 % of the height allow, and then a little smaller at random.
    size = int(scale * image_size * 100 * min(0.84 / (right - left), 0.62 / (bottom - top)))
    font = load_font(name, size)
    left, top, right, bottom = font.getbbox(text)
    slack_x, slack_y = image_size - (right - left), image_size - (bottom - top)
    x = slack_x / 2 + rng.uniform(-0.35, 0.35) * slack_x - left
    y = slack_y / 2 + rng.uniform(-0.25, 0.25) * slack_y - top
    ImageDraw.Draw(image).text((round(x), round(y)), text, font=font, fill=COLORS[ink])
    return image
