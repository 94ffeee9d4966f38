"""Chat templates: a sample to the text of its prefix and branches, with the spans that carry loss marked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pivot_megatron.data.sample import IMAGE_MARK, Pair, Sample, Turn
from pivot_megatron.errors import UserError

SYSTEM = "You are a helpful assistant."
# What `qwen_1_5` writes, for those who load an export: content is text, or LLaVA's list of text and images.
QWEN_1_5_JINJA = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
    "{%- for part in message['content'] if part['type'] == 'image' %}{{- '<image>\\n' }}{%- endfor %}"
    "{%- for part in message['content'] if part['type'] == 'text' %}{{- part['text'] }}{%- endfor %}"
    "{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Span:
    text: str
    loss: bool


@dataclass(frozen=True)
class Rendered:
    """`prefix` is shared by all branches; a branch is read after it. Texts may hold IMAGE_MARK in the prefix alone."""

    prefix: str
    branches: tuple[tuple[Span, ...], ...]


class ChatTokenizer(Protocol):
    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], **options: Any) -> Any: ...


Template = Callable[[Sequence[Turn]], list[Span]]


def qwen_1_5(turns: Sequence[Turn]) -> list[Span]:
    """ChatML as Qwen1.5 and Qwen2.5 write it; loss on an answer and its end mark."""
    spans = [Span(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n", False)]
    for turn in turns:
        if turn.role == "user":
            spans.append(Span(f"<|im_start|>user\n{turn.text}<|im_end|>\n<|im_start|>assistant\n", False))
        else:
            spans += [Span(f"{turn.text}<|im_end|>", True), Span("\n", False)]
    return spans


def plain(turns: Sequence[Turn]) -> list[Span]:
    """`<image>{caption}\\n`: what the human turn says beside the image is left out, as in LLaVA's alignment stage."""
    spans = []
    for turn in turns:
        if turn.role == "user":
            spans.append(Span(IMAGE_MARK if IMAGE_MARK in turn.text else "", False))
        else:
            spans.append(Span(f"{turn.text}\n", True))
    return spans


def from_tokenizer(tokenizer: ChatTokenizer) -> Template:
    """The tokenizer's own Jinja template: what an assistant turn adds to the text so far carries its loss."""

    def render(turns: Sequence[Turn]) -> list[Span]:
        spans: list[Span] = []
        done = ""
        for i, turn in enumerate(turns):
            messages = [{"role": t.role, "content": t.text} for t in turns[: i + 1]]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=turn.role == "user")
            if not text.startswith(done):
                raise UserError(
                    "data.template: the tokenizer's chat template rewrites earlier turns, so answers cannot be told apart; "
                    "use qwen_1_5"
                )
            added = text.removeprefix(done)
            if turn.role == "user":
                spans.append(Span(added, False))
            else:
                tail = added[len(added.rstrip("\n")) :]
                spans += [Span(added.removesuffix(tail), True), Span(tail, False)]
            done = text
        return spans

    return render


def _with_image_mark(turns: Sequence[Turn], has_image: bool) -> tuple[Turn, ...]:
    """A sample with an image and no mark gets one in front of its first turn."""
    if has_image and IMAGE_MARK not in turns[0].text:
        return (Turn(turns[0].role, f"{IMAGE_MARK}\n{turns[0].text}"), *turns[1:])
    return tuple(turns)


def render(sample: Sample, template: Template) -> Rendered:
    """Two branches for a pair, chosen and rejected; one for a conversation."""
    has_image = sample.image is not None
    if isinstance(sample, Pair):
        question = _with_image_mark((Turn("user", sample.question),), has_image)
        spans = [template((*question, Turn("assistant", answer))) for answer in (sample.chosen, sample.rejected)]
    else:
        spans = [template(_with_image_mark(sample.turns, has_image))]
    answer_at = next(i for i, span in enumerate(spans[0]) if span.loss)
    prefix = "".join(span.text for span in spans[0][:answer_at])
    return Rendered(prefix, tuple(_trimmed(branch[answer_at:]) for branch in spans))


def _trimmed(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Without what follows the last answer: nothing is predicted there."""
    last = max(i for i, span in enumerate(spans) if span.loss)
    return tuple(spans[: last + 1])
