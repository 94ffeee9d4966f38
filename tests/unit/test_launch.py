import socket
import sys
from pathlib import Path

import pytest

from pivot_megatron import cli
from pivot_megatron.cli import runs
from pivot_megatron.config.schema import Layout
from pivot_megatron.errors import RuleError, RunError, UserError
from pivot_megatron.runtime import launch as launching
from pivot_megatron.runtime.distributed import initialize
from pivot_megatron.runtime.launch import Nodes, launch


def test_a_users_mistake_is_one_line_and_its_own_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(2, ["check", str(tmp_path / "none.yaml")]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "no such file" in lines[0]


def test_success_is_zero(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(2, ["--help"]) == 0
    assert capfd.readouterr().out.count("usage: pivot") == 1


def test_nodes_are_told_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert Nodes.from_environment() == Nodes()
    monkeypatch.setenv("NNODES", "2")
    with pytest.raises(
        UserError, match=r"NNODES: expected .* found NNODES='2', NODE_RANK='', MASTER_ADDR='', MASTER_PORT=''"
    ):
        Nodes.from_environment()
    for name, value in (("NODE_RANK", "1"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    assert Nodes.from_environment() == Nodes(2, 1, ("h", 29500))
    monkeypatch.setenv("NODE_RANK", "2")
    with pytest.raises(UserError, match="NODE_RANK='2'"):
        Nodes.from_environment()


def stand_in(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """Processes that run `words`, with their global rank as `rank`, instead of a verb."""
    popen = launching.subprocess.Popen
    code = f"import os, sys, time\nrank = int(os.environ['RANK'])\n{words}"
    monkeypatch.setattr(launching.subprocess, "Popen", lambda _, **rest: popen([sys.executable, "-c", code], **rest))


@pytest.mark.parametrize("ruled", [0, 1])
def test_the_code_of_a_run_that_a_rule_ended_is_handed_on(
    ruled: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where another process, which only lost that one, is gone before it."""
    stand_in(
        monkeypatch,
        f"if rank != {ruled}: sys.exit(1)\ntime.sleep(0.5)\nprint('pivot: the rule', file=sys.stderr)\nsys.exit(3)",
    )
    assert launch(2, []) == 3
    assert capfd.readouterr().err.count("pivot: the rule") == 1


def test_what_a_rule_says_to_all_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "print('pivot: the rule', file=sys.stderr); sys.exit(3)")
    assert launch(2, []) == 3
    assert capfd.readouterr().err.count("pivot: the rule") == 1


def test_a_killed_process_has_its_rank_among_all_nodes_and_its_host(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("NNODES", "3"), ("NODE_RANK", "2"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    stand_in(monkeypatch, "if rank == 5: os.kill(os.getpid(), 9)\ntime.sleep(60)")
    monkeypatch.setattr(launching, "_SECONDS_TO_FOLLOW", 0.1)
    assert launch(2, []) == 1
    assert f"pivot: process 5 on {socket.gethostname()} was killed by SIGKILL" in capfd.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_never_joins_is_one_line(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from the first process, whose store waits for the other, and from another that finds nobody there."""
    port = launching._free_port()
    facts = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in facts.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RunError) as caught:
        initialize(Layout(), seed=1, timeout_seconds=2)
    said = str(caught.value)
    assert f"expected 2 processes to meet at 127.0.0.1:{port} within 2 s" in said and "did all nodes start?" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(("error", "code"), [(UserError, 2), (RunError, 1), (RuleError, 3)])
def test_a_verb_ends_with_the_code_of_its_error(
    error: type[Exception], code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise error("why")

    monkeypatch.setattr(runs, "_doctor", fail)
    assert cli.main(["doctor"]) == code
    assert capfd.readouterr().err == "pivot: why\n"
