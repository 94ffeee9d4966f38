"""The commands that README.md and docs/ show, as a shell would take them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SHELL = ("", "bash", "console", "sh")

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`((?:pivot|make) [^`\n]+)`(?!`)")
_OPTIONAL = re.compile(r"(?<=\s)\[([^\]]*)\]")
_ENDS = ("&&", "||", ";", "|", "&")


@dataclass(frozen=True)
class Command:
    """One command: `words` as a program gets them, after variables that its block set; `text` is how the ledger names it."""

    page: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def program(self) -> str:
        return next(word for word in self.words if not re.match(r"[A-Z_]+=", word))


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, content) of every fenced block."""
    for match in _FENCE.finditer(page.read_text()):
        yield match.group(1), match.group(2)


def shell_blocks() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for language, content in blocks(page):
            if language in SHELL:
                yield page, content


def documented() -> list[Command]:
    """Every command once, in the order of the pages."""
    found: dict[str, Command] = {}
    for page, content in shell_blocks():
        for command in commands_of(page, content):
            found.setdefault(command.text, command)
    return list(found.values())


def commands_of(page: Path, content: str) -> Iterator[Command]:
    variables: dict[str, str] = {}
    for line in re.sub(r"\\\n\s*", " ", content).splitlines():
        for words in _commands(_spelled_out(line)):
            if len(words) == 1 and (set_here := re.match(r"([A-Z_]+)=(.*)$", words[0])):
                variables[set_here.group(1)] = set_here.group(2)
                continue
            yield Command(page.name, tuple(_substituted(word, variables) for word in words))


def inline_commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of what stands in the text as `pivot …` or `make …`: often a part of a command."""
    for page in PAGES:
        for match in _INLINE.finditer(_FENCE.sub("", page.read_text())):
            yield page.name, shlex.split(_spelled_out(match.group(1)).replace("…", ""), comments=True)


def _spelled_out(line: str) -> str:
    """A line of usage with every option given: `[--count 300]` without its brackets, of `a | b` the first."""
    return _OPTIONAL.sub(
        lambda match: "" if "..." in match.group(1) and "--" not in match.group(1) else match.group(1).split("|")[0],
        line,
    )


def _commands(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in _ENDS:
            words.append(word)
        elif words:
            yield words
            words = []


def _substituted(word: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$([A-Z_]+)", lambda match: variables.get(match.group(1), match.group(0)), word)
