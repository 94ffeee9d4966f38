"""What the images are made of, and that an image's own packages stay as they are."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from tests.package.dockerfile import instructions

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = [ROOT / "docker" / name for name in ("gpu.Dockerfile", "cpu.Dockerfile")]


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


packages = script("docker/packages.py")


def installed(folder: Path, name: str, version: str) -> metadata.Distribution:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return metadata.Distribution.at(info)


def test_what_is_compiled_against_torch_or_cuda_is_kept_and_the_first_of_a_name_counts(tmp_path: Path) -> None:
    names = ("Torch", "nvidia_dali", "transformer_engine", "flash-attn", "apex", "triton", "pillow", "apexpy", "numpy")
    found = packages.kept(
        [*(installed(tmp_path / "a", name, "1") for name in names), installed(tmp_path / "b", "torch", "2")]
    )
    assert list(found) == ["apex", "flash-attn", "nvidia-dali", "torch", "transformer-engine", "triton"]
    assert set(found.values()) == {("1", str(tmp_path / "a"))}


def test_requirements_are_the_projects_words() -> None:
    project = {"project": {"dependencies": ["a>=1", "b; python_version < '3'"], "optional-dependencies": {"x": ["c"]}}}
    assert packages.requirements(project, []) == ["a>=1", "b; python_version < '3'"]
    assert packages.requirements(project, ["x"]) == ["a>=1", "b; python_version < '3'", "c"]
    with pytest.raises(packages.Wrong, match="extras: expected some of x, found z"):
        packages.requirements(project, ["x", "z"])


def test_constraints_are_ours_but_for_what_is_kept() -> None:
    lines = ["# why", "torch==2.13.0", 'numpy==1; python_version == "3.11"', "nvidia_dali==2", "pillow==13"]
    places = {"nvidia-dali": ("9", "/p"), "torch": ("2.12.0a0+nv", "/p")}
    assert packages.constraints(lines, {}) == lines[1:]
    assert packages.constraints(lines, places) == [lines[2], lines[4], "nvidia-dali==9", "torch==2.12.0a0+nv"]


def test_each_difference_is_told() -> None:
    before = {"a": ("1", "/p"), "b": ("1", "/p"), "c": ("1", "/p"), "d": ("1", "/p")}
    after = {"a": ("1", "/p"), "b": ("2", "/p"), "c": ("1", "/q"), "e": ("1", "/q")}
    assert packages.differences(before, before) == []
    assert packages.differences(before, after) == [
        "b: expected 1 in /p, found 2 in /p",
        "c: expected 1 in /p, found 1 in /q",
        "d: expected 1 in /p, found none",
        "e: expected none, found 1 in /q",
    ]


def run(*words: object, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [str(word) for word in words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | settings)


def test_a_python_without_a_torch_to_keep_is_refused(tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare")
    python = tmp_path / "bare/bin/python"
    done = run(ROOT / "docker/install.sh", "dependencies", tmp_path / "new", "image", PYTHON=str(python))
    assert done.returncode == 2 and "expected the image's torch to keep, found none" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_install_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    for words in ((), ("dependencies", tmp_path / "new", "elsewhere")):
        done = run(ROOT / "docker/install.sh", *words)
        assert done.returncode == 2 and "docker/install.sh dependencies VENV image" in done.stderr
    done = run(ROOT / "docker/install.sh", "remove", tmp_path)
    assert done.returncode == 2 and done.stderr == "install.sh: expected dependencies, project or check, found remove\n"
    (tmp_path / "file").write_text("mine")
    done = run(ROOT / "docker/install.sh", "dependencies", tmp_path, "index")
    assert done.returncode == 2 and f"expected to make {tmp_path}, found it there" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"
    done = run(sys.executable, ROOT / "docker/packages.py", "requirements", ROOT / "pyproject.toml", "none")
    assert done.returncode == 2 and done.stderr.startswith("packages.py: extras: expected some of dev, ")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_what_an_image_copies_is_there_and_not_ignored(dockerfile: Path) -> None:
    """A source that .dockerignore leaves out fails only once Docker is there to say so."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in lines if line.startswith("!")]
    assert "*" in lines
    sources = {
        source for name, argument in instructions(dockerfile) if name == "COPY" for source in shlex.split(argument)[:-1]
    }
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == name or source.startswith(name + "/") for name in allowed), source
    for name in allowed:
        assert any(fnmatch(source, name + "*") for source in sources), f"nothing copies {name}"


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_runs_as_no_root_and_starts_what_it_is_told(dockerfile: Path) -> None:
    found = list(instructions(dockerfile))
    assert [argument for name, argument in found if name == "USER"] == ["${UID}"]
    assert not [name for name, _ in found if name in ("ENTRYPOINT", "ADD")]
    code = [argument for name, argument in found if name == "COPY"].index("pivot_megatron pivot_megatron")
    steps = [argument for name, argument in found if name in ("RUN", "COPY")]
    dependencies = next(place for place, step in enumerate(steps) if "install.sh dependencies" in step)
    assert dependencies < steps.index([a for n, a in found if n == "COPY"][code])


def test_both_images_are_one_but_for_where_torch_is_from() -> None:
    """From the code on, which is what a change of one would forget in the other."""

    def tail(dockerfile: Path) -> list[str]:
        text = dockerfile.read_text().partition("COPY LICENSE")[2]
        return [line for line in text.splitlines() if line and not line.startswith("#") and "TRITON" not in line]

    gpu, cpu = map(tail, DOCKERFILES)
    assert [line.rstrip(" \\") for line in gpu] == [line.rstrip(" \\") for line in cpu]


@pytest.mark.parametrize("container", ["pyxis", "apptainer"])
def test_clusters_mount_the_checkout_and_the_cache_where_the_image_has_them(container: str, tmp_path: Path) -> None:
    places = dict(instructions(DOCKERFILES[0]))
    code = next(argument for name, argument in instructions(DOCKERFILES[0]) if name == "WORKDIR")
    facts = ROOT / f"launch/env/{container}.sh"
    shown = 'source "$0"; printf "%s\\n" "${PIVOT_SRUN[@]}" "${PIVOT_WRAP[@]}"'
    settings = {"PIVOT_ROOT": str(ROOT), "HOME": str(tmp_path), "PIVOT_MOUNTS": "/data"}
    done = run("bash", "-euc", shown, facts, **settings)
    assert done.returncode != 0 and "the container to run in" in done.stderr
    done = run("bash", "-euc", shown, facts, **settings, PIVOT_IMAGE="here")
    assert done.returncode == 0, done.stderr
    cache = tmp_path / ".cache/pivot-image"
    assert cache.is_dir() and re.search(rf"[= ]?{ROOT}:{code},{cache}:{places['VOLUME']},.*,/data$", done.stdout, re.M)
