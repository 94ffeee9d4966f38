"""docs/plan.md is what its commands print."""

from __future__ import annotations

from pathlib import Path

import pytest

from pivot_megatron.plan.document import Block, blocks

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
BLOCKS = blocks(PAGE.read_text(encoding="utf-8"))
QUICK = [block for block in BLOCKS if "--layout own" in block.commands[0]]
SAY = "docs/plan.md is behind what its commands print; write it again with `make docs`"


def test_every_block_of_the_page_is_found() -> None:
    assert len(BLOCKS) == 5 and sum(block.hours for block in BLOCKS) == 1
    assert PAGE.read_text(encoding="utf-8").count("```text\n") + 1 == len(BLOCKS) and len(QUICK) == 1


@pytest.mark.parametrize("block", QUICK, ids=lambda block: block.commands[0])
def test_the_page_has_what_a_command_prints(block: Block) -> None:
    assert block.made() == block.text, SAY


@pytest.mark.slow
@pytest.mark.parametrize("block", [one for one in BLOCKS if one not in QUICK], ids=lambda block: block.commands[0])
def test_the_page_has_what_all_its_commands_print(block: Block) -> None:
    assert block.made() == block.text, SAY


def test_blocks_follow_their_commands() -> None:
    page = (
        "```\npivot plan a\n```\n\nIn part:\n\n<!-- printed: One, Two -->\n```text\nOne\n```\n"
        "```\npivot plan b\npivot plan c\n```\n\n<!-- hours -->\n| old |\n\n"
        "```\npivot plan d\n```\n\n```text\nnot marked\n```\n"
    )
    one, two = blocks(page)
    assert (one.commands, one.heads, one.text) == (("pivot plan a",), ("One", "Two"), "One\n")
    assert (two.commands, two.hours, two.text) == (("pivot plan b", "pivot plan c"), True, "| old |\n")
