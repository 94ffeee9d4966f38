"""Each message that the page on troubleshooting quotes is one that the code still gives."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from pivot_megatron.config.keys import all_keys
from tests.docs.commands import ROOT, blocks

PAGE = ROOT / "docs" / "troubleshooting.md"
ANYTHING = "\0"
MESSAGES = [line for language, content in blocks(PAGE) if language == "text" for line in content.splitlines()]


@cache
def texts() -> tuple[str, ...]:
    """Every string of the package, with ANYTHING where an f-string puts a value in; and the Makefile's."""
    trees = (ast.parse(path.read_text()) for path in (ROOT / "pivot_megatron").rglob("*.py"))
    return (
        *(text for tree in trees for text in strings(tree)),
        (ROOT / "Makefile").read_text().replace("$(FOUND)", ANYTHING),
    )


def strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else ANYTHING for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def is_given(message: str) -> bool:
    """Whether one text has all of its words in order, where `…` stands for anything."""
    parts = [re.escape(part) for part in re.split(r"\s*…\s*", message.removesuffix("…")) if part]
    return any(re.search(r"[\s\S]*?".join(parts), text) for text in texts())


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_ours(message: str) -> None:
    assert len(re.sub(r"…|\W", "", message)) >= 8, "too little to find it by"
    assert is_given(message)


def test_one_that_is_not_ours_is_found() -> None:
    assert not is_given("layout: tensor … y pipeline … needs a multiple of") and is_given(MESSAGES[0])


def test_keys_that_are_named_are_keys() -> None:
    known = {key.path for key in all_keys()}
    roots = {path.split(".")[0] for path in known}
    text = re.sub(r"^```.*?^```$", "", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`'?([a-z_0-9]+(?:\.[a-z_0-9]+)+)(?:[=:][^`]*)?`", text):
        if name.split(".")[0] in roots and not name.endswith((".jsonl", ".json", ".yaml")):
            assert name in known, name
