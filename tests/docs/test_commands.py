"""Every command of README.md and docs/ can be given, and is run: in a tiny world, by another test, or for a reason not."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from pivot_megatron.cli import _parse, _parser, main
from pivot_megatron.config.load import load_config, read_tree
from pivot_megatron.errors import UserError
from pivot_megatron.recipe.comparison import variants
from pivot_megatron.recipe.schedule import load_schedule
from tests.docs.commands import PAGES, ROOT, Command, commands_of, documented, inline_commands, shell_blocks
from tests.docs.ledger import ELSEWHERE, NOT_RUN, NOT_RUN_PROGRAMS, RUNS, VERBS, Run
from tests.docs.world import make_world, put

COMMANDS = documented()
OPTIONS_OF = {"tools/gpu_check.py": "tests/gpu/check.py"}
"""Scripts whose options another file declares."""
ANY_RUN = Path("configs/run/2_dpo.yaml")
"""What stands for a page's RUN.yaml."""


def of(*programs: str) -> list[Command]:
    return [command for command in COMMANDS if command.program in programs]


@pytest.mark.parametrize("command", of("pivot"), ids=lambda command: command.text[:100])
def test_a_command_parses_and_its_keys_are_real(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    require_sound(list(command.words[1:]))


def require_sound(words: list[str]) -> None:
    """As the program itself would find it, from the project's folder: raises what it would."""
    args = _parse(words)
    if hasattr(args, "schedule"):
        load_schedule(args.schedule, args.overrides)
    elif hasattr(args, "changes"):
        variants([existing(file) for file in args.configs], args.changes)
    elif hasattr(args, "configs"):
        for file in (found for pattern in args.configs for found in expanded(str(pattern))):
            (load_schedule if "phases" in read_tree(Path(file)) else load_config)(Path(file))
    elif hasattr(args, "config"):
        load_config(existing(args.config), args.overrides)


def expanded(word: str) -> list[str]:
    """As a shell does: the files that a pattern fits, or the word."""
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


def existing(file: Path) -> Path:
    return ANY_RUN if file.name == "RUN.yaml" else file


@pytest.mark.parametrize(
    "words",
    ["train configs/run/2_dpo.yaml --proceses 2", "train configs/run/2_dpo.yaml layout.tenser=2", "prob linear A"],
)
def test_a_command_that_is_none_is_found(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, UserError)):
        require_sound(words.split())


def test_what_stands_in_the_text_has_verbs_and_options_that_exist() -> None:
    targets = make_targets()
    for page, (program, *words) in inline_commands():
        if program == "make":
            assert words[0] in targets, f"{page}: make {words[0]}"
            continue
        parser, rest = _parser(), list(words)
        while rest and (verbs := subcommands(parser)) and rest[0] not in ("VERB", "NAME"):
            assert rest[0] in verbs, f"{page}: pivot {' '.join(words)}"
            parser = verbs[rest.pop(0)]
        known = {option for action in parser._actions for option in action.option_strings}
        assert {word for word in rest if word.startswith("--")} <= known, f"{page}: pivot {' '.join(words)}"


def subcommands(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return groups[0].choices if groups else {}


def make_targets() -> set[str]:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(phony.split())


def test_make_has_the_targets_that_it_lists_and_the_pages_name() -> None:
    makefile = (ROOT / "Makefile").read_text()
    listed = set(re.findall(r"^\t@echo 'make ([\w-]+) ", makefile, re.MULTILINE))
    assert make_targets() - {"help", "environment"} == listed
    assert {target for target in make_targets() if re.search(rf"^{target}:", makefile, re.MULTILINE)} == make_targets()
    assert {command.words[1] for command in of("make")} <= make_targets()


def test_scripts_are_sound_and_what_they_hand_on_is_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    scripts = [
        word for command in COMMANDS for word in command.words if word.startswith("launch/") and word.endswith(".sh")
    ]
    for script in {*scripts, *(str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.sh"))}:
        subprocess.run(["bash", "-n", script], check=True)
    for command in of("sbatch"):
        require_sound(["train", *command.words[command.words.index("launch/pivot_dpo.sh") + 1 :]])
    for command in of("launch/evolve.sh"):
        require_sound(["evolve", *command.words[command.words.index("--") + 1 :]])
    for command in of("torchrun"):
        given = get_args_parser().parse_args(command.words[1:])
        assert given.module and given.training_script == "pivot_megatron.cli"
        require_sound(given.training_script_args)


def test_programs_of_our_own_have_the_options_they_are_given() -> None:
    for command in of("python"):
        words = command.words[1:]
        if words[0] == "-m":
            found = ROOT / (words[1].replace(".", "/") + ".py")
            assert found.exists() or words[1] == "venv", command.text
            continue
        source = (ROOT / OPTIONS_OF.get(words[0], words[0])).read_text()
        assert all(f'"{word}"' in source for word in words if word.startswith("--")), command.text


def test_extras_that_pip_is_asked_for_are_ours() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = "".join(page.read_text() for page in PAGES)
    assert {
        extra for found in re.findall(r"'(?:pivot-megatron|\.)\[([\w,]+)\]'", text) for extra in found.split(",")
    } <= set(extras)


def test_every_command_is_run_or_said_not_to_be() -> None:
    wanted = {command.text for command in COMMANDS if command.program not in NOT_RUN_PROGRAMS}
    listed = [*(run.text for run in RUNS), *ELSEWHERE, *NOT_RUN]
    assert sorted(wanted - set(listed)) == [], "documented, and neither run nor listed: add it to tests/docs/ledger.py"
    assert sorted(set(listed) - wanted) == [], "listed, and no longer documented"
    assert len(listed) == len(set(listed))


def test_every_verb_is_run() -> None:
    """Those that the pages name in their text alone too; where another test does it, its file calls that verb."""
    for verb in verbs(_parser()):
        if any(f"{run.text} ".startswith(f"{verb} ") for run in RUNS):
            continue
        places = {place for text, place in (ELSEWHERE | VERBS).items() if f"{text} ".startswith(f"{verb} ")}
        assert places, f"{verb}: run by no test; add it to tests/docs/ledger.py"
        called = ", ".join(f'"{word}"' for word in verb.split()[1:])
        for place in places:
            assert f"[{called}, " in (ROOT / place.partition("::")[0]).read_text(), f"{place} does not call {verb}"


def verbs(parser: argparse.ArgumentParser, above: str = "pivot") -> Iterator[str]:
    """Of `parser` those that do something, and are not for programs alone."""
    below = subcommands(parser)
    if not below:
        yield above
    for name, one in below.items():
        if name != "layout-run":  # which `pivot bench layouts` starts
            yield from verbs(one, f"{above} {name}")


@pytest.mark.parametrize("place", sorted({*ELSEWHERE.values(), *VERBS.values()}))
def test_what_is_run_elsewhere_is_there(place: str) -> None:
    file, name = place.split("::")
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_new_command_is_noticed() -> None:
    page, _ = next(iter(shell_blocks()))
    (one,) = commands_of(page, "A=x\npivot train $A \\\n    --processes 2   # not this\n")
    assert one.words == ("pivot", "train", "x", "--processes", "2")
    two = list(commands_of(page, "pivot a B [B ...] [--c 3] [--d | --e] && pivot f 'g=[1, 2]'\n"))
    assert [command.words for command in two] == [("pivot", "a", "B", "--c", "3", "--d"), ("pivot", "f", "g=[1, 2]")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("documented"))


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.text[:80])
def test_it_runs(run: Run, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the ledger, each from what those before it have left."""
    monkeypatch.chdir(world)
    program, *words = [
        found for word in shlex.split(f"{put(run.text, run.put)} {run.more}") for found in expanded(word)
    ]
    if program == "pivot" and words[0] not in ("train", "reference"):
        code, said = main(words), capsys.readouterr()
        assert code == 0, said.out + said.err
        return
    command = [sys.executable, *(["-m", "pivot_megatron.cli"] if program == "pivot" else []), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
