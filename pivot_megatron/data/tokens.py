"""Samples to token ids: one prefix, its branches, and where the image goes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, Protocol

from pivot_megatron.data.chat import Rendered, Template, from_tokenizer, plain, qwen_1_5, render
from pivot_megatron.data.sample import IMAGE_MARK, BadSample, Pair, Sample
from pivot_megatron.data.views import View
from pivot_megatron.errors import UserError


class Tokenizer(Protocol):
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


_MOST_CHARACTERS = 64
"""Of a text for each token of a sequence. What has more is not worth the seconds that a megabyte takes every rank."""


class DoesNotFit(BadSample):
    """A sound sample that this run's sequence length has no room for: dropped and counted, where others stop the run."""


@dataclass(frozen=True)
class Branch:
    """`loss[i]`: whether `ids[i]` is predicted in the loss."""

    ids: tuple[int, ...]
    loss: tuple[bool, ...]


@dataclass(frozen=True)
class Tokenized:
    """`images`: where each image's tokens begin, counted over `prefix` and `branches` laid end to end; `views`: how each is seen.

    None for text only, one in the prefix where branches share it, one in each branch where they do not.
    """

    key: str
    prefix: tuple[int, ...]
    branches: tuple[Branch, ...]
    images: tuple[int, ...]
    views: tuple[View, ...]

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that name the tokens, which of them are predicted, and where images stand."""
        told = (self.prefix, [(b.ids, b.loss) for b in self.branches], self.images, self.views)
        return hashlib.blake2b(repr(told).encode(), digest_size=16).digest()

    @property
    def length(self) -> int:
        return len(self.prefix) + sum(len(branch.ids) for branch in self.branches)

    @property
    def sequences(self) -> int:
        """The encoder's, that show the sample's images."""
        return sum(len(view.grids) for view in self.views)

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(queries, keys) of each branch: the first one's queries are the prefix and itself, every other's itself alone."""
        prefix = len(self.prefix)
        return tuple(
            (len(branch.ids) + (0 if b else prefix), prefix + len(branch.ids)) for b, branch in enumerate(self.branches)
        )


def template_by_name(name: Literal["qwen_1_5", "plain", "tokenizer"], tokenizer: Tokenizer) -> Template:
    return {"qwen_1_5": qwen_1_5, "plain": plain}.get(name) or from_tokenizer(tokenizer)


@dataclass(frozen=True)
class SampleTokenizer:
    """Tokenizes prefix and answers apart, as LLaVA and TRL do, so that no merge crosses from one into the other.

    `view`: that of every image, None where they differ. `sequence_length` bounds prefix + branch, image tokens counted.
    `branches`: how many answers of a sample are trained on, 2 for DPO, 1 (the first) otherwise.
    """

    tokenizer: Tokenizer
    template: Template
    view: View | None
    sequence_length: int
    branches: int
    too_long: Literal["drop", "truncate"]

    def __post_init__(self) -> None:
        if self.view is not None and self.view.tokens >= self.sequence_length:
            raise UserError(
                f"data.sequence_length: an image alone takes {self.view.tokens} tokens, so no answer fits into "
                f"{self.sequence_length}; raise it (cutting image tokens is never right)"
            )

    def __call__(self, sample: Sample, views: Sequence[View] | None = None) -> Tokenized:
        """`views`: of the sample's images, the chosen answer's first; left out, all are `view`.

        Raises DoesNotFit for a sample that is too long, BadSample for one that is wrong.
        """
        rendered = render(sample, self.template)
        if len(rendered.branches) < self.branches:
            raise BadSample(sample.key, "not_a_pair", "DPO needs question, chosen and rejected; found a conversation")
        apart = isinstance(sample, Pair) and sample.rejected_image is not None
        seen = self._views(rendered, apart, views)
        if len(rendered.prefix) > self._most_characters:
            raise DoesNotFit(sample.key, "prompt_too_long", f"prompt has {len(rendered.prefix)} characters")
        prefix, leads = self._prefix(rendered, seen, apart)
        if not prefix and not leads:
            raise BadSample(
                sample.key, "empty_prompt", "nothing stands before the answer to predict its first token from"
            )
        # Both answers of a pair must fit, also where one is trained on: a control run sees the same pairs as DPO.
        branches = tuple(
            self._branch(sample.key, rendered, i, len(prefix), leads[i] if leads else ())
            for i in range(len(rendered.branches))
        )
        branches = branches[: self.branches]
        images = self._images(rendered, prefix, branches, in_branches=bool(leads))
        return Tokenized(sample.key, prefix, branches, images, seen[: len(images)])

    @property
    def _most_characters(self) -> int:
        return _MOST_CHARACTERS * self.sequence_length

    def _views(self, rendered: Rendered, apart: bool, views: Sequence[View] | None) -> tuple[View, ...]:
        images = (1 + apart) if IMAGE_MARK in rendered.prefix else 0
        if views is not None:
            if len(views) != images:
                raise ValueError(f"expected {images} views, got {len(views)}")
            return tuple(views)
        if self.view is None and images:
            raise ValueError("images are seen each in its own way here: say how")
        return (self.view,) * images if self.view is not None else ()

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    def _prefix(
        self, rendered: Rendered, views: Sequence[View], apart: bool
    ) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """What branches share, and what each begins with: its image and the text after that, where they are `apart`."""
        before, mark, after = rendered.prefix.partition(IMAGE_MARK)
        head = tuple(self._encode(before))
        if not mark:
            return head, ()
        rest = self._encode(after)
        shown = tuple((*[0] * view.tokens, *rest) for view in views)
        return (head, shown) if apart else ((*head, *shown[0]), ())

    def _images(
        self, rendered: Rendered, prefix: tuple[int, ...], branches: tuple[Branch, ...], in_branches: bool
    ) -> tuple[int, ...]:
        before, mark, _ = rendered.prefix.partition(IMAGE_MARK)
        if not mark:
            return ()
        if not in_branches:
            return (len(self._encode(before)),)
        lengths = [len(prefix), *(len(branch.ids) for branch in branches)]
        return tuple(accumulate(lengths))[:-1]

    def _branch(self, key: str, rendered: Rendered, index: int, prefix_length: int, lead: tuple[int, ...]) -> Branch:
        name = ("chosen", "rejected")[index] if len(rendered.branches) == 2 else "answer"
        characters = sum(len(span.text) for span in rendered.branches[index])
        if characters > self._most_characters and self.too_long == "drop":
            raise DoesNotFit(key, f"{name}_too_long", f"{name} has {characters} characters")
        ids = list(lead)
        loss = [False] * len(lead)
        for span in rendered.branches[index]:
            tokens = self._encode(span.text[: self._most_characters])
            ids += tokens
            loss += [span.loss] * len(tokens)
        room = self.sequence_length - prefix_length
        if room < 1:
            raise DoesNotFit(key, "prompt_too_long", f"prompt takes {prefix_length} tokens of {self.sequence_length}")
        if len(ids) > room and self.too_long == "drop":
            raise DoesNotFit(
                key, f"{name}_too_long", f"prompt and {name} take {prefix_length + len(ids)} of {self.sequence_length}"
            )
        if not any(loss[:room]):
            raise DoesNotFit(key, "no_answer_tokens", "no token of an answer is left to learn from")
        return Branch(tuple(ids[:room]), tuple(loss[:room]))
