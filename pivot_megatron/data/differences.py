"""Two answers side by side: which words differ, and what of a long text is shown."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

_CJK = r"\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
# Chinese and Japanese write no spaces, so there a character is a word. Spaces belong to the word before them.
_WORD = re.compile(rf"(?:[{_CJK}]|[0-9]+(?:[.,][0-9]+)+|[.,;:!?]+|[^\s.,;:!?{_CJK}]+|^)\s*")
_COMPARED = 1000
"""Words compared past the first difference: the work grows with their square, and fewer are shown."""
_KEPT = 80
"""Characters shown at each end of a long stretch that both texts share."""

_ELLIPSIS = "\u2026"
_JOINER = "\u200d"


@dataclass(frozen=True)
class Piece:
    """A stretch of a text; `differs` where the other text has something else, or nothing, in its place."""

    text: str
    differs: bool = False


def clipped(text: str, limit: int) -> str:
    """At most `limit` characters and, where some are left out, an ellipsis. A character keeps its accents."""
    if len(text) <= limit:
        return text
    cut = limit
    while cut > 1 and (_continues(text[cut]) or text[cut - 1] == _JOINER):
        cut -= 1
    return text[:cut].rstrip() + _ELLIPSIS


def compared(first: str, second: str, limit: int) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Both texts with their differing words marked, each cut to about `limit` characters.

    Of a text that is too long, the middle of what both share goes first, so that differences are among what is shown.
    """
    a, b = _WORD.findall(first), _WORD.findall(second)
    same = _common_start(a, b)
    marks = [False] * len(a[: same + _COMPARED]), [False] * len(b[: same + _COMPARED])
    middle = [[word.rstrip() for word in words[same : same + _COMPARED]] for words in (a, b)]
    for kind, a_from, a_to, b_from, b_to in SequenceMatcher(None, middle[0], middle[1], autojunk=False).get_opcodes():
        if kind != "equal":
            marks[0][same + a_from : same + a_to] = [True] * (a_to - a_from)
            marks[1][same + b_from : same + b_to] = [True] * (b_to - b_from)
    return _shown(first, a, marks[0], limit), _shown(second, b, marks[1], limit)


def _common_start(a: Sequence[str], b: Sequence[str]) -> int:
    same = 0
    while same < min(len(a), len(b)) and a[same].rstrip() == b[same].rstrip():
        same += 1
    return same


def _shown(text: str, words: Sequence[str], marks: Sequence[bool], limit: int) -> tuple[Piece, ...]:
    if not any(marks):
        return (Piece(clipped(text, limit)),)
    pieces = _pieces(words, marks)
    if len(text) <= limit:
        return tuple(pieces)
    return tuple(_cut(map(_without_middle, pieces), limit, more=len(words) > len(marks)))


def _pieces(words: Sequence[str], marks: Sequence[bool]) -> list[Piece]:
    """A mark covers the spaces between its words, and none around them."""
    parts = []
    for word, differs, next_differs in zip(words, marks, [*marks[1:], False], strict=False):
        bare = word.rstrip()
        parts += [(bare, differs), (word[len(bare) :], differs and next_differs)]
    groups = groupby(parts, key=lambda part: part[1])
    pieces = [Piece("".join(text for text, _ in group), differs) for differs, group in groups]
    return [piece for piece in pieces if piece.text]


def _without_middle(piece: Piece) -> Piece:
    text = piece.text
    if piece.differs or len(text) <= 3 * _KEPT:
        return piece
    start = len(text) - _KEPT
    while _continues(text[start]) or text[start - 1] == _JOINER:
        start += 1
        if start == len(text):
            return Piece(clipped(text, _KEPT))
    return Piece(f"{clipped(text, _KEPT)} {text[start:].lstrip()}")


def _cut(pieces: Iterable[Piece], limit: int, more: bool) -> Iterator[Piece]:
    for piece in pieces:
        if len(piece.text) > limit:
            yield Piece(clipped(piece.text, limit), piece.differs)
            return
        yield piece
        limit -= len(piece.text)
    if more:
        yield Piece(_ELLIPSIS)


def _continues(character: str) -> bool:
    """Whether it is drawn as part of the one before: an accent, a vowel sign, a joiner, a variant's mark."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")
