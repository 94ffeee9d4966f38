"""The demo from its first phase to its report, at the smallest scale, broken off twice."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.html_page import whole_page

PROGRAM = """
import sys
from pathlib import Path
import pivot_megatron.cli as cli
import pivot_megatron.recipe.demo as demo
from pivot_megatron.recipe.demo_scale import DemoScale

demo.DemoScale.full = staticmethod(DemoScale.smallest)
sys.exit(cli.main(["demo", "--out", sys.argv[1], "--processes", "2"]))
"""


def start(out: Path) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(out)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str], there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not there():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def break_off(process: subprocess.Popen[str], how: signal.Signals) -> str:
    """Send the signal to that process alone; returns its stderr. No process that it started may live on."""
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    process.send_signal(how)
    errors = process.communicate(timeout=60)[1]
    assert not psutil.wait_procs(children, timeout=20)[1]
    return errors


@pytest.mark.slow
def test_demo_goes_on_after_ctrl_c_and_kill(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    process = start(out)
    wait_for(process, (out / "runs" / "align" / "config.yaml").exists)
    errors = break_off(process, signal.SIGINT)
    assert process.returncode == 1
    assert "Traceback" not in errors and errors.splitlines()[-1].startswith("pivot: interrupted")

    process = start(out)
    wait_for(process, (out / "runs" / "pretrain" / "config.yaml").exists)
    break_off(process, signal.SIGKILL)
    aligned = (out / "phases" / "align.json").read_text()

    process = start(out)
    table, errors = process.communicate(timeout=480)
    assert process.returncode == 0, errors
    assert "Warning" not in errors and "Traceback" not in errors
    assert (out / "phases" / "align.json").read_text() == aligned

    report = json.loads((out / "report.json").read_text())
    assert [one["model"] for one in report["answers"]["models"]] == ["base", "sft", "dpo"]
    for one in (report["linear"]["scenes"], report["segmentation"]):
        assert [score["encoder"] for score in one["scores"]] == ["base", "sft", "dpo", "init"]
    assert len(report["differences"]) == 2 * 3 + 2 * 4 and all(one["interval"]["low"] is not None for one in report["differences"])
    exports = report["exports"]
    assert len(exports) == 7 and all(check["loaded"] and check["max_difference"] < 1e-3 for check in exports)
    kept = {check["name"]: (check["changed_tensors"], check["unchanged_tensors"]) for check in exports}
    dropped, whole = kept["dpo encoder"], kept["dpo encoder, old last layer"]
    assert whole[0] == dropped[0] and whole[1] > dropped[1]  # last layer, norm and head, none of which trained
    assert report["table"] in table and report["versions"]["megatron-core"] and len(report["seconds"]) == 13

    page = whole_page(out / "report.html")
    figures = [Path(out, "gradcam", sample["figure"]) for sample in report["gradcam"]["samples"]]
    drawn = {base64.b64decode(one.split(",")[1]) for one in page.addresses}
    assert len(figures) == 2 and {figure.read_bytes() for figure in figures} <= drawn
    assert len(page.addresses) == 9 + 1 + 2  # examples, maps, gradients
    for sample in report["gradcam"]["samples"]:
        assert [seen["encoder"] for seen in sample["seen"]] == ["base", "sft", "dpo"]
    for part in ("Differences", "Linear probe of scenes: accuracy", "Segmentation: maps", "Training", "Exports", "Time"):
        assert f" {part} " in page.text, part

    process = start(out)
    again, errors = process.communicate(timeout=60)
    assert (again, errors, process.returncode) == (table, "", 0)
