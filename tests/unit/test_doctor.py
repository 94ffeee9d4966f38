"""What `pivot doctor` finds, on this machine and on machines made up for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pivot_megatron.cli import main
from pivot_megatron.runtime import attention, doctor, engine
from pivot_megatron.runtime.doctor import Finding, as_text, examine


def by_name() -> dict[str, Finding]:
    return {finding.name: finding for finding in examine()}


def test_every_part_is_looked_at_and_a_missing_one_says_what_to_do() -> None:
    found = by_name()
    assert {"python", "torch", "megatron-core", "transformer-engine", "apex", "flash-attn", "dali"} <= set(found)
    assert {"transformers", "cores", "memory", "disk", "/dev/shm"} <= set(found)
    assert any(name.startswith("gpu") for name in found)
    for finding in found.values():
        assert finding.found and "\n" not in finding.found + finding.cost
        assert finding.ok or len(finding.cost) > 20
    assert found["python"].ok and found["torch"].found.startswith("2.")


def test_megatron_core_is_held_against_the_version_pinned_for_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    pin = doctor.pinned("megatron-core")
    assert pin == doctor.metadata.version("megatron-core")
    assert doctor.pinned("pytest") is None and doctor.pinned("nothing-like-it") is None
    assert by_name()["megatron-core"] == Finding("megatron-core", pin, True, "")
    monkeypatch.setattr(doctor, "_version", lambda package: "0.1.0")
    other = doctor._megatron_core()
    assert (other.found, other.ok) == ("0.1.0", False) and other.cost.endswith(f"pip install megatron-core=={pin}")
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert doctor._megatron_core().found == "none"


def test_a_pin_for_another_python_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ['some==1; python_version < "3"', 'some==2; extra == "dev"', "some>=2", 'some==3; python_version >= "3"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda package: [lines[0], lines[1], lines[3]])
    assert doctor.pinned("some") == "3"
    monkeypatch.setattr(doctor.metadata, "requires", lambda package: lines[:3])
    assert doctor.pinned("some") is None


def test_packages_that_are_there_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: "9.9")
    monkeypatch.setattr(doctor, "_holds", lambda package, part: True)
    monkeypatch.setattr(doctor, "_engine_fails", lambda: None)
    assert [(f.found, f.ok, f.cost) for f in doctor._packages()] == [("9.9", True, "")] * 5


def test_packages_that_are_missing_say_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(doctor, "_importable", lambda module: False)
    found = {finding.name: finding for finding in doctor._packages()}
    assert {finding.found for finding in found.values()} == {"none"}
    assert found["transformer-engine"].cost.startswith("no FP8, megatron-core's local layers; pip install")
    # Nothing in the project uses these two, so nobody should spend an hour on building them.
    assert found["flash-attn"].ok and found["dali"].ok and "no need" in found["dali"].cost
    assert [name for name, finding in found.items() if not finding.ok] == ["transformer-engine", "apex", "transformers"]


@pytest.mark.parametrize(
    ("installed", "parts", "engine", "found", "ok", "cost"),
    [
        (None, (), True, "none", True, "not needed: transformer-engine brings a fused Adam and its own"),
        (None, (), False, "none", False, "no fused Adam, and weight gradients added up apart"),
        ("0.1", ("optimizers", "kernel"), False, "0.1", True, ""),
        ("0.1", ("optimizers",), False, "0.1", False, "built without fused_weight_gradient_mlp_cuda"),
        ("0.1", ("optimizers",), True, "0.1", True, ""),
        ("0.9", (), False, "0.9, not NVIDIA's", False, "PyPI's `apex` is another project"),
        ("0.9", (), True, "0.9, not NVIDIA's", True, "PyPI's `apex` is another project"),
    ],
)
def test_apex_is_judged_by_the_parts_a_run_would_use(
    installed: str | None,
    parts: tuple[str, ...],
    engine: bool,
    found: str,
    ok: bool,
    cost: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "_package", lambda names, module: installed)
    monkeypatch.setattr(doctor, "_holds", lambda package, part: part in parts)
    monkeypatch.setattr(doctor, "_importable", lambda module: "kernel" in parts)
    told = doctor._apex(engine)
    assert (told.found, told.ok) == (found, ok) and told.cost.startswith(cost) and bool(told.cost) == bool(cost)


def test_a_part_of_a_package_is_found_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loud" / "optimizers").mkdir(parents=True)
    (tmp_path / "loud" / "__init__.py").write_text("raise RuntimeError('run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (
        doctor._holds("loud", "optimizers") and not doctor._holds("loud", "other") and not doctor._holds("nothing", "x")
    )


def test_an_engine_that_does_not_load_is_told_where_it_would_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_package", lambda names, module: "2.9")
    asked: list[str] = []

    def fails() -> str:
        asked.append("transformer_engine")
        return "te.so: undefined symbol: _ZN3c10"

    monkeypatch.setattr(engine, "engine_fault", fails)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # noqa: TID251
    assert doctor._engine() == Finding("transformer-engine", "2.9", True, "") and asked == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # noqa: TID251
    told = doctor._engine()
    assert (told.found, told.ok, asked) == ("2.9, does not load", False, ["transformer_engine"])
    assert told.cost.startswith("no FP8") and "te.so: undefined symbol: _ZN3c10" in told.cost
    monkeypatch.setattr(engine, "engine_fault", lambda: None)
    assert doctor._engine().ok


def test_what_a_run_would_compute_with_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.name: finding.found for finding in doctor._kernels()}
    if not torch.cuda.is_available():  # noqa: TID251
        assert found["layers"] == "megatron-core's own" and "torch's fused AdamW" in found["adam"]
        assert "segment by segment" in found["attention"] and "apart" in found["weight gradients"]
        assert found["log-probs"].startswith("this project's own")
    monkeypatch.setattr(attention, "current_platform", lambda: SimpleNamespace(is_cuda=True, transformer_engine=False))
    for module in ("transformer_engine", "flash_attn", "torch.nn.attention.varlen"):
        monkeypatch.setitem(sys.modules, module, None)
    (none,) = doctor._kernels()
    assert not none.ok and "install one of them" in none.cost
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert list(doctor._kernels()) == []


def test_a_gpu_is_judged_by_its_compute_capability() -> None:
    def gpu(major: int, minor: int) -> Finding:
        properties = SimpleNamespace(name="G", total_memory=80 * 2**30, major=major, minor=minor)
        return doctor._gpu(0, properties)

    assert gpu(9, 0) == Finding("gpu 0", "G, 80 GiB, compute capability 9.0", True, "")
    assert "no FP8" in gpu(8, 0).cost and "bf16" in gpu(7, 5).cost


def test_a_containers_limits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/sys/fs/cgroup/cpu.max": ["50000", "100000"], "/sys/fs/cgroup/memory.max": [str(2**30)]}
    monkeypatch.setattr(doctor, "_read_words", lambda path: files.get(path, []))
    assert (doctor.usable_cores(), doctor.usable_memory()) == (0.5, 2**30)
    machine = {finding.name: finding for finding in doctor._machine(Path.cwd())}
    assert not machine["cores"].ok and not machine["memory"].ok and machine["memory"].found == "1.0 GiB"
    files |= {"/sys/fs/cgroup/cpu.max": ["max", "100000"], "/sys/fs/cgroup/memory.max": ["max"]}
    assert doctor.usable_cores() >= 1 and doctor.usable_memory() > 2**30


def test_text_has_a_line_a_finding_and_one_for_a_cost() -> None:
    text = as_text([Finding("torch", "2.0", True, ""), Finding("gpu", "none", False, "slow; buy one")])
    assert text.splitlines() == ["ok  torch  2.0", "--  gpu    none", "           slow; buy one"]


def test_the_command_prints_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "megatron-core" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(set(row) == {"name", "found", "ok", "cost"} for row in rows)
