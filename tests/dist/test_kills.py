"""kill -9 at fifty random moments, of steps, saves, reference passes and index writes: every rerun goes on exactly.

`python -m tests.dist.test_kills` prints where each kill fell.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pivot_megatron.config.schema import Layout
from pivot_megatron.data.index import read_index
from pivot_megatron.data.storage import LocalFolder
from pivot_megatron.errors import UserError
from pivot_megatron.train.run_folder import read_metrics
from tests.dist.runs import config_tree, make_world, train_at, write_config

KILLS = {"train": 40, "index": 10}
STEPS = 12
EXACT = ("step", "loss", "grad_norm", "keys", "reward_margin", "chosen_logps")

# Children are forked of a process that has imported everything: a start takes no ten seconds, so kills fall into the work.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pivot_megatron.train.trainer", "pivot_megatron.data_prep.indexing", "tests.dist.test_kills"])


def train_job(config: Path) -> None:
    os.environ.pop("RANK", None)
    train_at(config, Layout())


def index_job(shards: Path) -> None:
    from pivot_megatron.data_prep.indexing import index_folder

    index_folder(shards, workers=0, check=False)


def seconds_of(job: Callable[[Path], None], argument: Path) -> float:
    began = time.monotonic()
    process = CONTEXT.Process(target=job, args=(argument,))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    return time.monotonic() - began


def killed_at(job: Callable[[Path], None], argument: Path, seconds: float) -> bool:
    """Whether it was: it may have come to its end."""
    process = CONTEXT.Process(target=job, args=(argument,))
    process.start()
    process.join(seconds)
    killed = process.is_alive()
    process.kill()
    process.join()
    assert killed or process.exitcode == 0
    return killed


def exact(run: Path) -> list[dict[str, Any]]:
    return [{name: line[name] for name in EXACT} for line in read_metrics(run)]


def where(run: Path, world: Path) -> str:
    """What a killed run was at, by what it left behind."""
    if list((world / "pairs").glob("*.parts")):
        return "in the reference pass"
    if list((run / "checkpoints").glob(".*")):
        return "in a save"
    return "between saves" if (run / "metrics.jsonl").exists() else "before the first step"


def killed_runs(world: Path, folder: Path, kills: int, draw: random.Random) -> Counter[str]:
    """Runs that are killed until each came to its end, until `kills` were counted. What they wrote is checked at every kill."""
    config = write_config(folder / "run.yaml", settings(world, folder / "run"))
    seconds = seconds_of(train_job, config)
    whole = exact(folder / "run")
    assert [line["step"] for line in whole] == list(range(1, STEPS + 1))
    fell: Counter[str] = Counter()
    while sum(fell.values()) < kills:
        shutil.rmtree(folder / "run")
        for made in (world / "pairs").glob("reference-*"):
            made.unlink() if made.is_file() else shutil.rmtree(made)
        while killed_at(train_job, config, draw.uniform(0.05, seconds)):
            fell[where(folder / "run", world)] += 1
            if (folder / "run" / "metrics.jsonl").exists():
                assert exact(folder / "run") == whole[: len(read_metrics(folder / "run"))]
        assert exact(folder / "run") == whole
        assert not list((folder / "run" / "checkpoints").glob(".*"))
        assert not list((world / "pairs").glob("*.part*"))
    return fell


def settings(world: Path, out: Path) -> dict[str, Any]:
    """A checkpoint every other step: half of the kills fall into one."""
    tree = config_tree(world, out)
    return tree | {"batch": {**tree["batch"], "steps": STEPS}, "checkpoints": {"every": 2, "keep": 2}}


def killed_indexing(world: Path, kills: int, draw: random.Random) -> int:
    """An index is whole or absent, and made again the same. Returns how many kills came before it was there."""
    shards = world / "pairs"
    seconds = seconds_of(index_job, shards)
    whole = (shards / "index.json").read_bytes(), (shards / "index.parquet").read_bytes()
    early = killed = 0
    while killed < kills:
        for name in ("index.json", "index.parquet"):
            (shards / name).unlink(missing_ok=True)
        if not killed_at(index_job, shards, draw.uniform(0.0, seconds)):
            continue
        killed += 1
        try:
            read_index(LocalFolder(shards))
        except UserError:
            early += 1
        index_job(shards)
        assert ((shards / "index.json").read_bytes(), (shards / "index.parquet").read_bytes()) == whole
    return early


@pytest.mark.long
def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    world, draw = make_world(tmp_path / "world"), random.Random(1)
    fell = killed_runs(world, tmp_path, KILLS["train"], draw)
    assert {"in a save", "between saves"} <= fell.keys()
    killed_indexing(world, KILLS["index"], draw)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        world, draw = make_world(Path(folder) / "world"), random.Random(1)
        for place, count in killed_runs(world, Path(folder), KILLS["train"], draw).most_common():
            print(f"{count:>3} {place}")
        early = killed_indexing(world, KILLS["index"], draw)
        print(f"{KILLS['index']:>3} in the writing of an index, {early} of them before it was there")
    print("every rerun ended with the same metrics, bit for bit, and the same index")


if __name__ == "__main__":
    sys.exit(main())
