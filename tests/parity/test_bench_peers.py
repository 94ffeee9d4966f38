"""`pivot bench peers`, as it is called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pivot_megatron.bench.peer_environment import default_cache, peer_python
from pivot_megatron.errors import UserError


@pytest.mark.slow
def test_both_sides_are_run_and_agree(tmp_path: Path) -> None:
    try:
        peer_python(default_cache())
    except UserError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "pivot_megatron.cli"]
    command += ["bench", "peers", "--shape", "tiny", "--rounds", "1", "--steps", "2", "--json"]
    command += ["--out", str(tmp_path / "peers")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "peers" / "peers.json").read_text())
    assert all(set(one) == {"pivot", "trl"} for one in found["rounds"]) and len(found["rounds"]) == 1
    assert all(found["summary"]["pairs_a_second"][side]["median"] > 0 for side in ("pivot", "trl"))
    assert found["differences"] and max(found["differences"].values()) < 1e-4
    assert (tmp_path / "peers" / "peers.png").read_bytes().startswith(b"\x89PNG")
