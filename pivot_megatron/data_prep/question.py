"""What the kinds of synthetic images share: the question types, the palette, and how a template becomes a sentence.

A near miss is only hard if the text alone gives nothing away. So a question first draws an unordered couple of labels
(two neighbouring counts, two words a letter apart), then tosses a coin for which of them is true, and only then draws
an image to fit: each label is chosen and rejected equally often.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from PIL import Image

Task = Literal["text", "chart", "scene"]
TASKS: tuple[Task, ...] = ("text", "chart", "scene")

# Far apart in hue or lightness, so that a patch of 8x8 pixels settles which it is.
COLORS: Mapping[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (40, 160, 60),
    "blue": (35, 80, 210),
    "yellow": (245, 195, 0),
    "black": (25, 25, 25),
}
NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Ask:
    """A question, its right answer, a near miss in the same words, and the right answer's short form."""

    question: str
    chosen: str
    rejected: str
    label: str


@dataclass(frozen=True)
class View:
    """An image with all that is said about it: the main question, one more with the same image, and a caption."""

    image: Image.Image
    ask: Ask
    follow_up: Ask
    caption: str


@dataclass(frozen=True)
class Question:
    """A visual question. `image` is RGB and square; `label` is the short form of the right answer."""

    image: Image.Image
    question: str
    chosen: str
    rejected: str
    task: Task
    label: str


def toss(rng: Random, first: str, second: str) -> tuple[str, str]:
    """The two in either order: (right, wrong)."""
    return (first, second) if rng.random() < 0.5 else (second, first)


def phrase(
    rng: Random, questions: Sequence[str], answers: Sequence[str], right: str, wrong: str, slots: Mapping[str, str]
) -> Ask:
    """Fill one template of each list from `slots`; `{label}` in the answer is `right`, or `wrong` for the near miss."""
    question, answer = rng.choice(questions), rng.choice(answers)
    chosen, rejected = (answer.format(label=label, **slots) for label in (right, wrong))
    return Ask(question.format(**slots), sentence(chosen), sentence(rejected), right)


def count_ask(rng: Random, questions: Sequence[str], right: int, wrong: int, noun: str) -> Ask:
    """A counting question; `{noun}` of the templates is in the plural. Labels are number words."""
    chosen_form, rejected_form = (_counted(number, noun) for number in (right, wrong))
    answer = rng.choice(("There {be} {counted}.", "I see {counted}.", "The image shows {counted}."))
    question = rng.choice(questions).format(noun=noun + "s")
    chosen = answer.format(be="is" if right == 1 else "are", counted=chosen_form)
    rejected = answer.format(be="is" if wrong == 1 else "are", counted=rejected_form)
    return Ask(question, chosen, rejected, NUMBER_WORDS[right])


def sentence(text: str) -> str:
    """The same text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def _counted(number: int, noun: str) -> str:
    return f"{NUMBER_WORDS[number]} {noun}{'' if number == 1 else 's'}"
