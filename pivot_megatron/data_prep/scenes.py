"""Images of one to four colored shapes on a light grid: how many, what color, what shape, and where."""

import math
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from pivot_megatron.data_prep.question import COLORS, NUMBER_WORDS, Ask, View, count_ask, phrase, sentence, toss

SHAPES = ("circle", "square", "triangle", "star")

_GRID = 3
_CELLS = tuple((row, column) for row in range(_GRID) for column in range(_GRID))
_MAX_SHAPES = 4
# Shapes are drawn this many times larger and averaged down, which smooths their edges.
_OVERSAMPLING = 4
_PAPERS = ((250, 250, 250), (240, 240, 235), (235, 242, 250))
_COUNT_QUESTIONS = ("How many {noun} are there?", "How many {noun} do you see?", "Count the {noun}.")

Look = tuple[str, str]
"""A shape's color and kind."""
Cell = tuple[int, int]
"""Row and column on the grid, from the top left."""


@dataclass(frozen=True)
class Shape:
    """A shape: look, and center and radius as fractions of the image's edge, from the top left."""

    color: str
    kind: str
    x: float
    y: float
    radius: float


def scene_view(rng: Random, image_size: int) -> View:
    """An image `[image_size, image_size]` RGB with one to four shapes, and the questions on it."""
    kind = rng.choice(("count", "color", "shape", "position"))
    if kind == "count":
        placed, ask = _count(rng)
    elif kind == "position":
        placed, ask = _position(rng)
    else:
        placed, ask = _attribute(rng, kind)
    image = draw_shapes([_jittered(rng, look, cell) for look, cell in placed], rng.choice(_PAPERS), image_size)
    return View(image, ask, _where_ask(rng, placed) if kind == "count" else _total_ask(rng, placed), _caption(placed))


def draw_shapes(shapes: list[Shape], paper: tuple[int, int, int], image_size: int) -> Image.Image:
    """Draw shapes on a faint grid. RGB, `[image_size, image_size]`."""
    edge = image_size * _OVERSAMPLING
    image = Image.new("RGB", (edge, edge), paper)
    draw = ImageDraw.Draw(image)
    faint = (paper[0] - 16, paper[1] - 16, paper[2] - 16)
    for line in range(1, _GRID):
        at = edge * line / _GRID
        draw.line((at, 0, at, edge), fill=faint, width=_OVERSAMPLING)
        draw.line((0, at, edge, at), fill=faint, width=_OVERSAMPLING)
    for shape in shapes:
        _draw_shape(draw, shape, edge, COLORS[shape.color])
    return image.reduce(_OVERSAMPLING)


def draw_mask(shapes: list[Shape], image_size: int) -> Image.Image:
    """What each pixel of `draw_shapes` shows: grey, `[image_size, image_size]`; 0 is paper, 1 and up are SHAPES in order."""
    mask = Image.new("L", (image_size, image_size))
    for shape in shapes:
        _draw_shape(ImageDraw.Draw(mask), shape, image_size, 1 + SHAPES.index(shape.kind))
    return mask


def scattered(rng: Random) -> list[Shape]:
    """One to four shapes of any look, each in a cell of its own."""
    looks = [(rng.choice(sorted(COLORS)), rng.choice(SHAPES)) for _ in range(rng.randint(1, _MAX_SHAPES))]
    return [_jittered(rng, look, cell) for look, cell in _place(rng, looks)]


def _place(rng: Random, looks: list[Look]) -> list[tuple[Look, Cell]]:
    """Each look in a cell of its own, listed from the top left to the bottom right."""
    cells = rng.sample(_CELLS, len(looks))
    return sorted(zip(looks, cells, strict=True), key=lambda placed: placed[1])


def _count(rng: Random) -> tuple[list[tuple[Look, Cell]], Ask]:
    """Count all shapes, those of a kind, or those of a color; the others are of other kinds or colors."""
    low = rng.randint(1, _MAX_SHAPES - 1)
    right, wrong = (low, low + 1) if rng.random() < 0.5 else (low + 1, low)
    color, kind, what = rng.choice(sorted(COLORS)), rng.choice(SHAPES), rng.choice(("shape", "kind", "color"))
    others = 0 if what == "shape" else rng.randint(0, _MAX_SHAPES - right)
    other_colors, other_kinds = [c for c in COLORS if c != color], [k for k in SHAPES if k != kind]
    if what == "kind":
        looks = [(rng.choice(sorted(COLORS)), kind) for _ in range(right)]
        looks += [(rng.choice(sorted(COLORS)), rng.choice(other_kinds)) for _ in range(others)]
    elif what == "color":
        looks = [(color, rng.choice(SHAPES)) for _ in range(right)]
        looks += [(rng.choice(other_colors), rng.choice(SHAPES)) for _ in range(others)]
    else:
        looks = [(rng.choice(sorted(COLORS)), rng.choice(SHAPES)) for _ in range(right)]
    noun = {"shape": "shape", "kind": kind, "color": f"{color} shape"}[what]
    return _place(rng, looks), count_ask(rng, _COUNT_QUESTIONS, right, wrong, noun)


def _attribute(rng: Random, asked: str) -> tuple[list[tuple[Look, Cell]], Ask]:
    """What color a kind has, or what shape a color has. All looks differ in both, and the near miss is in the scene."""
    number = rng.randint(2, _MAX_SHAPES)
    colors, kinds = rng.sample(sorted(COLORS), number), rng.sample(SHAPES, number)
    placed = _place(rng, list(zip(colors, kinds, strict=True)))
    slots = {"color": colors[0], "kind": kinds[0]}
    if asked == "color":
        questions = ("What color is the {kind}?", "Which color does the {kind} have?")
        answers = ("The {kind} is {label}.", "The color of the {kind} is {label}.", "It is {label}.")
        return placed, phrase(rng, questions, answers, colors[0], colors[1], slots)
    questions = ("What shape is {color}?", "Which shape is the {color} one?")
    answers = ("The {color} shape is a {label}.", "The {label} is {color}.", "It is a {label}.")
    return placed, phrase(rng, questions, answers, kinds[0], kinds[1], slots)


def _position(rng: Random) -> tuple[list[tuple[Look, Cell]], Ask]:
    """Left or right of, above or below another shape; in half of the scenes a third one stands by."""
    number = rng.choice((2, 3))
    looks = list(zip(rng.sample(sorted(COLORS), number), rng.sample(SHAPES, number), strict=True))
    across = rng.random() < 0.5
    right, wrong = toss(rng, "left", "right") if across else toss(rng, "above", "below")
    near, far = sorted(rng.sample(range(_GRID), 2))
    first, second = (near, far) if right in ("left", "above") else (far, near)
    # The other coordinate is the same for both, so that only one relation holds.
    same = rng.randrange(_GRID)
    cells = [(same, first), (same, second)] if across else [(first, same), (second, same)]
    cells += rng.sample([cell for cell in _CELLS if cell not in cells], number - 2)
    slots = {"one": " ".join(looks[0]), "other": " ".join(looks[1])}
    if across:
        questions = ("Is the {one} left or right of the {other}?", "On which side of the {other} is the {one}?")
        answers = ("The {one} is to the {label} of the {other}.", "It is on the {label}.", "It is to the {label}.")
    else:
        questions = ("Is the {one} above or below the {other}?", "Is the {one} over or under the {other}?")
        answers = ("The {one} is {label} the {other}.", "It is {label} the {other}.", "It is {label} it.")
    placed = sorted(zip(looks, cells, strict=True), key=lambda item: item[1])
    return placed, phrase(rng, questions, answers, right, wrong, slots)


def _total_ask(rng: Random, placed: list[tuple[Look, Cell]]) -> Ask:
    number = len(placed)
    return count_ask(rng, _COUNT_QUESTIONS, number, number + (1 if number < _MAX_SHAPES else -1), "shape")


def _where_ask(rng: Random, placed: list[tuple[Look, Cell]]) -> Ask:
    """Where a shape is, or, where all looks come twice, how many shapes there are."""
    looks = [look for look, _ in placed]
    unique = [item for item in placed if looks.count(item[0]) == 1]
    if not unique:
        return _total_ask(rng, placed)
    look, cell = rng.choice(unique)
    wrong = rng.choice([other for other in _CELLS if other != cell])
    answers = ("The {one} is at the {label}.", "It is at the {label}.")
    return phrase(rng, ("Where is the {one}?",), answers, _cell_name(cell), _cell_name(wrong), {"one": " ".join(look)})


def _caption(placed: list[tuple[Look, Cell]]) -> str:
    parts = ", ".join(f"a {color} {kind} at the {_cell_name(cell)}" for (color, kind), cell in placed)
    return f"{sentence(NUMBER_WORDS[len(placed)])} shape{'' if len(placed) == 1 else 's'}: {parts}."


def _cell_name(cell: Cell) -> str:
    row, column = ("top", "center", "bottom")[cell[0]], ("left", "center", "right")[cell[1]]
    return row if row == column else f"{row} {column}".replace("center ", "").replace(" center", "")


def _jittered(rng: Random, look: Look, cell: Cell) -> Shape:
    x, y = ((index + 0.5) / _GRID + rng.uniform(-0.025, 0.025) for index in (cell[1], cell[0]))
    return Shape(*look, x=x, y=y, radius=rng.uniform(0.115, 0.14))


def _draw_shape(draw: ImageDraw.ImageDraw, shape: Shape, edge: int, fill: int | tuple[int, int, int]) -> None:
    x, y, radius = shape.x * edge, shape.y * edge, shape.radius * edge
    if shape.kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape.kind == "square":
        half = radius * 0.88
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape.kind == "triangle":
        draw.polygon(_corners(x, y + radius * 0.15, [radius * 1.15] * 3), fill=fill)
    else:
        draw.polygon(_corners(x, y, [radius * 1.2, radius * 0.5] * 5), fill=fill)


def _corners(x: float, y: float, radii: list[float]) -> list[tuple[float, float]]:
    """Points around (x, y) at these distances and equal angles, the first straight up."""
    turn = 2 * math.pi / len(radii)
    return [(x + r * math.sin(i * turn), y - r * math.cos(i * turn)) for i, r in enumerate(radii)]
