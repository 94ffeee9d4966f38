"""The parser of `pivot VERB`."""

from __future__ import annotations

import argparse
from typing import Any, Protocol

from pivot_megatron import __version__

Groups = Any
"""What argparse's add_subparsers gives, which has no public type."""


class Verb(Protocol):
    """Adds a verb to `group` (of the program itself, unless told otherwise); `run` takes its arguments and returns the exit
    code."""

    def __call__(self, name: str, run: Any, text: str, group: Groups = None) -> argparse.ArgumentParser: ...


def new_parser() -> tuple[argparse.ArgumentParser, Verb, Groups]:
    """The program's parser, what adds verbs to it, and its own group of them."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(prog="pivot", description="Evolve vision encoders by preference training.")
    parser.add_argument("--version", action="version", version=f"pivot-megatron {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Any, text: str, group: Groups = None) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = (group or verbs).add_parser(name, help=text, description=text, parents=[common])
        made.set_defaults(run=run)
        return made

    return parser, verb, verbs
