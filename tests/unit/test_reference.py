"""Files of reference log-probs: what was written comes back, and what does not fit the run is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pivot_megatron.data.reference import (
    Facts,
    ReferenceFile,
    Row,
    images_digest,
    is_made_with,
    join,
    pass_seconds,
    write_rows,
)
from pivot_megatron.data.tokens import Branch, Tokenized
from pivot_megatron.data.views import View
from pivot_megatron.errors import RunError, UserError

FACTS = Facts({"encoder": "e1", "llm": "l1"}, {"template": "plain"}, "s1", 64)


def sample(key: str, first: int) -> Tokenized:
    branches = (Branch((first, 2), (True, True)), Branch((3,), (True,)))
    return Tokenized(key, (5, 0, 0, 6), branches, (1,), (View.of_patches(1, 2),))


SAMPLES = [sample("a", 7), sample("b", 8), sample("c", 9)]
PICTURE, ANOTHER = (images_digest([name]) for name in (b"picture", b"another"))
ROWS = [Row(s.key, s.digest, PICTURE, (-1.5 * s.branches[0].ids[0], -0.25), (-0.125,)) for s in SAMPLES]


def written(folder: Path, rows: list[Row] = ROWS, facts: Facts = FACTS) -> Path:
    path = folder / facts.name
    write_rows(path, rows, facts, seconds=2.0)
    return path


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    found = ReferenceFile(written(tmp_path), FACTS, ["a", "b", "c"])
    assert found.logprobs(1, SAMPLES[1]).tolist() == [-12.0, -0.25, -0.125]
    assert found.logprobs(1, SAMPLES[1]).dtype == torch.float32


def test_parts_join_in_order(tmp_path: Path) -> None:
    parts = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    write_rows(parts[0], ROWS[:2], FACTS, seconds=1.5)
    write_rows(parts[1], ROWS[2:], FACTS, seconds=0.5)
    assert is_made_with(parts[0], FACTS) and not is_made_with(parts[0], replace(FACTS, sequence_length=65))
    assert not is_made_with(tmp_path / "none.parquet", FACTS)
    join(parts, tmp_path / FACTS.name, FACTS)
    assert pass_seconds(tmp_path / FACTS.name) == 2.0
    assert ReferenceFile(tmp_path / FACTS.name, FACTS, ["a", "b", "c"]).logprobs(2, SAMPLES[2])[0] == -13.5


def test_what_makes_other_logprobs_has_another_file() -> None:
    """And what only decides which samples have any has not: other shards, another length."""
    assert replace(FACTS, model={"encoder": "e2", "llm": "l1"}).name != FACTS.name
    assert replace(FACTS, data={"template": "qwen_1_5"}).name != FACTS.name
    assert replace(FACTS, shards="s2", sequence_length=65).name == FACTS.name


@pytest.mark.parametrize(
    ("name", "other"),
    [("shards", replace(FACTS, shards="other")), ("template", replace(FACTS, data={"template": "other"}))],
)
def test_made_from_something_else(tmp_path: Path, name: str, other: Facts) -> None:
    path = written(tmp_path)
    with pytest.raises(UserError, match=f"stale: made with {name} .*, this run has other; delete it"):
        ReferenceFile(path, other, ["a", "b", "c"])


def test_incomplete(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"incomplete: expected 3 samples.*found 2"):
        ReferenceFile(written(tmp_path, ROWS[:2]), FACTS, ["a", "b", "c"])
    with pytest.raises(UserError, match="incomplete"):
        ReferenceFile(written(tmp_path), FACTS, ["a", "c", "b"])


def test_cut_off(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a whole file of reference log-probs"):
        ReferenceFile(path, FACTS, ["a", "b", "c"])


def test_other_tokens(tmp_path: Path) -> None:
    found = ReferenceFile(written(tmp_path), FACTS, ["a", "b", "c"])
    for other in (
        sample("b", 7),
        replace(SAMPLES[1], prefix=(5, 0, 0, 7)),
        replace(SAMPLES[1], images=(0,)),
        replace(SAMPLES[1], branches=(Branch((8, 2), (False, True)), SAMPLES[1].branches[1])),
    ):
        with pytest.raises(RunError, match="stale: sample b has other tokens"):
            found.logprobs(1, other)


def test_another_image(tmp_path: Path) -> None:
    """Seen by ranks that read images: to its index, a tar that was written anew at the same size is the one that it was."""
    found = ReferenceFile(written(tmp_path), FACTS, ["a", "b", "c"])
    assert found.logprobs(1, SAMPLES[1], PICTURE).tolist() == found.logprobs(1, SAMPLES[1], None).tolist()
    with pytest.raises(RunError, match="sample b has another image than when it was made, so its tar was changed"):
        found.logprobs(1, SAMPLES[1], ANOTHER)


def test_a_sample_that_did_not_fit(tmp_path: Path) -> None:
    """Is said before a run that may need it begins, and of no other run."""
    rows = [ROWS[0], Row("b", bytes(16), bytes(16), None, None), ROWS[2]]
    path = written(tmp_path, rows)
    found = ReferenceFile(path, FACTS, ["a", "b", "c"])
    assert found.logprobs(2, SAMPLES[2])[0] == -13.5
    with pytest.raises(RunError, match="stale: sample b was left out when it was made"):
        found.logprobs(1, SAMPLES[1])
    every = np.arange(3)
    for length, wanted in ((64, every), (32, every), (65, every[::2])):
        found.require_room(wanted, length)
    with pytest.raises(UserError) as told:
        found.require_room(every, 65)
    assert str(told.value) == (
        f"{path}: made at a sequence_length of 64, which left out 1 of this run's 3 samples; this run has 65: delete it and run "
        "`pivot reference` again, or restore sequence_length"
    )
