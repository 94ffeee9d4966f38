"""Chat templates and tokenization against the tokenizer's own template, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from pivot_megatron.convert.tiny_checkpoints import make_tokenizer
from pivot_megatron.data.chat import Span, from_tokenizer, plain, qwen_1_5, render
from pivot_megatron.data.sample import BadSample, Conversation, Pair, Turn
from pivot_megatron.data.tokens import DoesNotFit, SampleTokenizer, template_by_name
from pivot_megatron.data.views import View
from pivot_megatron.errors import UserError

IMAGE = b"jpeg"
IMAGE_TOKENS = 5


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(["what is in the picture", "there are two red circles", "the word is KAT"] * 3, 330)


def pair(
    question: str = "What is it?", image: bytes | None = IMAGE, chosen: str = "A cat.", rejected: str = "A dog."
) -> Pair:
    return Pair("k", image, question, chosen, rejected, {})


def make(
    tokenizer: Any, template: str = "qwen_1_5", length: int = 200, branches: int = 2, too_long: Any = "drop"
) -> SampleTokenizer:
    return SampleTokenizer(
        tokenizer,
        template_by_name(template, tokenizer),
        View.of_patches(1, IMAGE_TOKENS),
        length,
        branches,
        too_long,  # type: ignore[arg-type]
    )


def test_qwen_template_is_the_tokenizers_own(tokenizer: Any) -> None:
    """Written out here and by Qwen's Jinja template: the same text, two turns long."""
    turns = [Turn("user", "Hi"), Turn("assistant", "Yes."), Turn("user", "And?"), Turn("assistant", "No.")]
    messages = [{"role": t.role, "content": t.text} for t in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ours, theirs = qwen_1_5(turns), from_tokenizer(tokenizer)(turns)
    assert "".join(s.text for s in ours) == "".join(s.text for s in theirs) == text
    assert [s.text for s in ours if s.loss] == [s.text for s in theirs if s.loss] == ["Yes.<|im_end|>", "No.<|im_end|>"]


def test_plain_template_keeps_the_image_and_the_caption() -> None:
    spans = plain([Turn("user", "<image>\nDescribe it."), Turn("assistant", "A cat.")])
    assert spans == [Span("<image>", False), Span("A cat.\n", True)]


@pytest.mark.parametrize("question", ["What is it?", "<image>\nWhat is it?"])
def test_image_mark_is_added_once(question: str) -> None:
    rendered = render(pair(question), qwen_1_5)
    assert rendered.prefix.count("<image>\nWhat is it?") == 1
    assert [[s.text for s in b] for b in rendered.branches] == [["A cat.<|im_end|>"], ["A dog.<|im_end|>"]]


def test_tokens_of_a_pair(tokenizer: Any) -> None:
    tokens = make(tokenizer)(pair())
    (at,) = tokens.images
    before, after = tokens.prefix[:at], tokens.prefix[at + IMAGE_TOKENS :]
    assert tokenizer.decode(before) == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert tokenizer.decode(after) == "\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(b.ids) for b in tokens.branches] == ["A cat.<|im_end|>", "A dog.<|im_end|>"]
    assert all(all(b.loss) for b in tokens.branches)


def test_text_only_pair_has_no_image(tokenizer: Any) -> None:
    tokens = make(tokenizer)(pair(image=None))
    assert tokens.images == ()
    assert tokenizer.decode(tokens.prefix).endswith("user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n")


def test_conversation_learns_every_answer(tokenizer: Any) -> None:
    turns = (Turn("user", "One?"), Turn("assistant", "Yes."), Turn("user", "Two?"), Turn("assistant", "No."))
    tokens = make(tokenizer, branches=1)(Conversation("k", IMAGE, turns, {}))
    (branch,) = tokens.branches
    learned = [i for i, loss in zip(branch.ids, branch.loss) if loss]
    assert tokenizer.decode(learned) == "Yes.<|im_end|>No.<|im_end|>"
    assert tokenizer.decode(branch.ids).startswith("Yes.<|im_end|>\n<|im_start|>user\nTwo?")


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (pair(chosen="word " * 80), "chosen_too_long"),
        (pair(rejected="word " * 80), "rejected_too_long"),
        (pair(question="word " * 80), "prompt_too_long"),
    ],
)
def test_too_long_is_named(tokenizer: Any, sample: Pair, reason: str) -> None:
    with pytest.raises(DoesNotFit) as caught:
        make(tokenizer, length=120)(sample)
    assert (caught.value.key, caught.value.reason) == ("k", reason)


def test_the_control_drops_what_dpo_drops(tokenizer: Any) -> None:
    with pytest.raises(DoesNotFit, match="rejected_too_long"):
        make(tokenizer, length=120, branches=1)(pair(rejected="word " * 80))


def test_truncation_cuts_the_answer_and_nothing_else(tokenizer: Any) -> None:
    long = pair(chosen="word " * 80)
    whole = make(tokenizer, length=2000, branches=1)(long)
    cut = make(tokenizer, length=120, branches=1, too_long="truncate")(long)
    assert cut.prefix == whole.prefix
    assert len(cut.prefix) + len(cut.branches[0].ids) == 120
    assert cut.branches[0].ids == whole.branches[0].ids[: len(cut.branches[0].ids)]


def test_a_length_that_would_cut_image_tokens_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="an image alone takes 5 tokens"):
        make(tokenizer, length=5)


def test_dpo_needs_pairs(tokenizer: Any) -> None:
    turns = (Turn("user", "One?"), Turn("assistant", "Yes."))
    with pytest.raises(BadSample, match="not_a_pair"):
        make(tokenizer)(Conversation("k", None, turns, {}))


def test_nothing_before_the_answer_is_refused(tokenizer: Any) -> None:
    """Text-only captions under the plain template: there would be no token to predict the first one from."""
    turns = (Turn("user", "One?"), Turn("assistant", "Yes."))
    with pytest.raises(BadSample, match="empty_prompt"):
        make(tokenizer, template="plain", branches=1)(Conversation("k", None, turns, {}))
