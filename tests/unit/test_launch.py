from pathlib import Path

import pytest

from pivot_megatron.runtime.launch import launch


def test_a_users_mistake_is_one_line_and_its_own_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(2, ["check", str(tmp_path / "none.yaml")]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "no such file" in lines[0]


def test_success_is_zero(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(2, ["--help"]) == 0
    assert capfd.readouterr().out.count("usage: pivot") == 1
