"""The GPU check itself, on whatever machine: what becomes of parts that pass, fail, crash, hang or cannot run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu import check
from tests.gpu.check import Result, exit_code, run_part, table
from tests.gpu.parts import PARTS, Part, environment_of, part_by_name
from tests.gpu.rows import Row, held, told

ROWS = [told("a figure", 1.5), held("a limit", 0.1, 0.2)]


def stand_in(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """A part is a process that is given a name and a file; here it is `words`, with the file as `out`."""
    popen = check.subprocess.Popen

    def start(command: list[str], **options: object) -> object:
        return popen([sys.executable, "-c", f"out = {command[-1]!r}\n{words}"], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(check.subprocess, "Popen", start)


def wrote(rows: list[Row]) -> str:
    lines = "".join(json.dumps(row.as_dict()) + "\n" for row in rows)
    return f"open(out, 'w').write({lines!r})"


@pytest.mark.parametrize(
    ("words", "outcome", "detail", "rows"),
    [
        (wrote(ROWS), "passed", "1 limits held, 2 rows", 2),
        (wrote([*ROWS, held("far", 0.3, 0.2)]), "failed", "1 of 3 rows, the first: far: 0.3 (at most 0.2)", 3),
        (wrote([held("nan", float("nan"), 0.2)]), "failed", "1 of 1 rows, the first: nan: nan (at most 0.2)", 1),
        (wrote(ROWS) + "\nraise ValueError('broken')", "crashed", "exit code 1: ValueError: broken", 2),
        (wrote(ROWS) + "\nimport os; os.kill(os.getpid(), 11)", "crashed", "exit code -11: it said nothing", 2),
        (wrote(ROWS) + "\nprint('needs a thing'); exit(3)", "cannot run", "needs a thing", 2),
        (wrote(ROWS) + "\nimport time; time.sleep(60)", "out of time", "ended after 10 s, 2 rows", 2),
    ],
    ids=["passes", "is past a limit", "is not a number", "raises", "is killed", "lacks something", "hangs"],
)
def test_what_becomes_of_a_part_that(
    words: str, outcome: str, detail: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, words)
    result = run_part(Part("build", "", "none", 10 if outcome == "out of time" else 120), tmp_path)
    assert (result.outcome, result.detail, len(result.rows)) == (outcome, detail, rows)
    assert exit_code([result]) == {"passed": 0, "cannot run": 3}.get(outcome, 1)
    assert f"| build | {outcome} |" in table([result])


def test_a_part_that_needs_cuda_says_so(tmp_path: Path) -> None:
    result = run_part(part_by_name("build"), tmp_path, cuda=False)
    assert (result.outcome, result.detail) == ("cannot run", "needs CUDA")
    passed = Result("dali", "passed", 1.0, "", ())
    assert [exit_code(found) for found in ([passed], [passed, result])] == [0, 3]


def test_parts_have_modules_and_limits_of_their_own() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    for part in PARTS:
        assert Path(check.ROOT, "tests", "gpu", f"{part.module}.py").exists() and 0 < part.seconds < 600
    assert environment_of(part_by_name("parity"))["NVIDIA_TF32_OVERRIDE"] == "0"


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(check.torch.cuda, "is_available", lambda: False)
    yield


@pytest.mark.slow
def test_without_a_gpu_what_needs_none_runs_small(
    tmp_path: Path, without_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every part that can, so that no machine time is lost to a mistake in what they share."""
    assert check.main(["--out", str(tmp_path)]) == 3
    found = {result["part"]: result for result in json.loads((tmp_path / "results.json").read_text())}
    cannot = {name: result["detail"] for name, result in found.items() if result["outcome"] == "cannot run"}
    assert cannot.pop("dali", "expected NVIDIA DALI").find("expected NVIDIA DALI") >= 0
    assert cannot.keys() == {"build", "attention", "parity-local", "fp8"} and "needs a CUDA device" in cannot["fp8"]
    assert all(result["outcome"] in ("passed", "cannot run") for result in found.values()), capsys.readouterr().out
    names = {row["name"] for row in found["parity"]["rows"]}
    assert {"fp32: loss of step 1", "fp32: gradient norm of step 2"} < names
    assert any("MFU" in row["name"] for row in found["sizes"]["rows"])
    assert "| build | cannot run |" in (tmp_path / "table.md").read_text()
