"""The whole recipe, small: checkpoints and data made on the spot, four training runs, exports, and what became of it.

Every phase is done once. A rerun goes on at the first that is not finished, and training at its newest checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pivot_megatron.config.schema import Tracking
from pivot_megatron.errors import UserError
from pivot_megatron.recipe.demo_folder import Demo
from pivot_megatron.recipe.demo_scale import DemoScale


def run_demo(out: Path, processes: int, tracking: Tracking, scale: DemoScale | None = None) -> None:
    """Everything, or what is still to do in `out`; then the report, and its table on stdout.

    Raises UserError if `out` holds a demo of other settings, RunError if a run fails.
    """
    demo = Demo(out, processes, scale or DemoScale.full())
    _require_same_settings(demo)
    finished = out / "report.json"
    if not finished.exists() or tracking.asked:
        # Here and not at the top: a finished demo only prints its table again, and needs no torch for that.
        from pivot_megatron.recipe.demo_page import write_report
        from pivot_megatron.recipe.demo_phases import work

        write_report(demo, work(demo), finished, tracking)
    print(json.loads(finished.read_text())["table"])
    print(
        "\nin per cent; blind: the most frequent answer to a question, without the image; init: the untrained encoder;"
    )
    print("changed: against the folders the run began from (a key bias or an unseen word may stay as it was)")
    print(f"\nreport           {out / 'report.html'}\nevolved encoder  {demo.export('dpo', 'encoder')}")


def _require_same_settings(demo: Demo) -> None:
    if demo.processes < 1:
        raise UserError(f"--processes: expected at least 1, found {demo.processes}")
    file, wanted = demo.out / "settings.json", asdict(demo.scale)
    if not file.exists():
        if demo.out.exists() and any(demo.out.iterdir()):
            raise UserError(f"{demo.out}: expected an empty folder or an earlier demo's, found files; choose another")
        demo.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(wanted, indent=2) + "\n")
    elif json.loads(file.read_text()) != wanted:
        raise UserError(f"{demo.out}: holds a demo of other settings; choose another folder with --out, or remove it")
