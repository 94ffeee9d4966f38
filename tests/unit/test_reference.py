"""Files of reference log-probs: what was written comes back, and what does not fit the run is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pivot_megatron.config.schema import Component, Encoder, Model
from pivot_megatron.convert.fingerprint import model_fingerprint
from pivot_megatron.data.reference import (
    Facts,
    ReferenceFile,
    Row,
    is_made_with,
    join,
    pass_seconds,
    write_rows,
)
from pivot_megatron.data.tokens import Branch, Tokenized
from pivot_megatron.data.views import View
from pivot_megatron.errors import RunError, UserError

FACTS = Facts({"encoder": "e1", "llm": "l1"}, {"shards": "s1", "template": "plain"})


def sample(key: str, first: int) -> Tokenized:
    branches = (Branch((first, 2), (True, True)), Branch((3,), (True,)))
    return Tokenized(key, (5, 0, 0, 6), branches, (1,), (View.of_patches(1, 2),))


SAMPLES = [sample("a", 7), sample("b", 8), sample("c", 9)]
ROWS = [Row(s.key, s.digest, (-1.5 * s.branches[0].ids[0], -0.25), (-0.125,)) for s in SAMPLES]


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
    assert is_made_with(parts[0], FACTS) and not is_made_with(parts[0], replace(FACTS, data={}))
    assert not is_made_with(tmp_path / "none.parquet", FACTS)
    join(parts, tmp_path / FACTS.name, FACTS)
    assert pass_seconds(tmp_path / FACTS.name) == 2.0
    assert ReferenceFile(tmp_path / FACTS.name, FACTS, ["a", "b", "c"]).logprobs(2, SAMPLES[2])[0] == -13.5


def test_another_model_has_another_file() -> None:
    assert replace(FACTS, model={"encoder": "e2", "llm": "l1"}).name != FACTS.name == replace(FACTS, data={}).name


@pytest.mark.parametrize("name", ["shards", "template"])
def test_made_from_something_else(tmp_path: Path, name: str) -> None:
    path = written(tmp_path)
    with pytest.raises(UserError, match=f"stale: made with {name} .*, this run has other; delete it"):
        ReferenceFile(path, replace(FACTS, data={**FACTS.data, name: "other"}), ["a", "b", "c"])


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


def test_a_sample_that_did_not_fit(tmp_path: Path) -> None:
    rows = [ROWS[0], Row("b", bytes(16), None, None), ROWS[2]]
    found = ReferenceFile(written(tmp_path, rows), FACTS, ["a", "b", "c"])
    assert found.logprobs(2, SAMPLES[2])[0] == -13.5
    with pytest.raises(RunError, match="stale: sample b"):
        found.logprobs(1, SAMPLES[1])


def test_weights_have_names(tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    folder.mkdir()
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "model.safetensors").write_bytes(b"weights")

    def names(seed: int = 1) -> dict[str, str]:
        model = Model(Encoder(fresh=folder), Component(hf=folder))
        return model_fingerprint(model, seed)

    first = names()
    assert first == names() and first["encoder"] != names(seed=2)["encoder"] and first["llm"] == names(seed=2)["llm"]
    (folder / "model.safetensors").write_bytes(b"Weights")
    assert first["llm"] != names()["llm"] and first["encoder"] == names()["encoder"]
