"""The steps of both Dockerfiles, run here: on a Python that has a torch of its own as NVIDIA's images do, and on a bare one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.package.dockerfile import Build, instructions, outer_environment
from tests.package.image import VERSION, make_image, make_python

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "docker/cpu.Dockerfile"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("image"))


def require_index(folder: Path) -> None:
    """Skips where pip cannot fetch even one small file, so that whatever else fails is a fault of ours."""
    command = [sys.executable, "-m", "pip", "download", "--no-cache-dir", "--no-deps", "-d", str(folder), "packaging"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs a package index: {done.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def build(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("build")
    require_index(folder)
    theirs = folder / "constraint.txt"
    theirs.write_text("pillow==1.0\n")  # as NVIDIA's images name a file of their own
    environment = outer_environment(image.parent) | {"PIP_CONSTRAINT": str(theirs), "PIP_NO_CACHE_DIR": "0"}
    build = Build(folder / "root", ROOT, environment, {})
    build.run(ROOT / "docker/gpu.Dockerfile")
    return build


@pytest.fixture(scope="module")
def cpu_build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("cpu-build")
    require_index(folder)
    python = make_python(folder / "base")
    environment = outer_environment(python.parent) | {"PIP_NO_CACHE_DIR": "0"}
    build = Build(folder / "root", ROOT, environment, {"TORCH_INDEX": torch_index()})
    build.run(CPU)
    return build


def torch_index() -> str:
    """The one that the Dockerfile names; where it is not reached, that of pip's settings. Skips where there are none of those."""
    (named,) = (argument.partition("=")[2] for _, argument in instructions(CPU) if argument.startswith("TORCH_INDEX="))
    try:
        urllib.request.urlopen(named, timeout=10).close()
        return named
    except OSError:
        if not {"PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"} & set(os.environ):
            pytest.skip(f"needs an index of torch's CPU builds: {named} is not reached")
        return os.environ.get("PIP_EXTRA_INDEX_URL", "")


def asked(build: Build, code: str) -> str:
    return build.shell(f"/opt/pivot/venv/bin/python -c '{code}'").strip()


def test_torch_is_the_images_own_and_the_rest_is_pinned(build: Build, image: Path) -> None:
    venv = build.root / "opt/pivot/venv"
    kept = json.loads((venv / "kept.json").read_text())
    assert kept["torch"][0] == VERSION and kept["tensorrt"][0] == "9.9"
    origin = asked(build, "import torch; print(torch.__file__)")
    assert Path(origin).is_relative_to(image.parent.parent) and not list(venv.glob("lib/*/site-packages/torch*"))
    found = versions(build)
    assert found["torch"] == VERSION and found["pillow"] == pinned("pillow")
    assert {"wandb", "s3fs", "megatron-core", "pivot-megatron"} <= set(found) and "pytest" not in found


_VERSIONS = """
from importlib.metadata import distributions
for one in distributions(): print(one.metadata["Name"] + "==" + one.version)
"""


def versions(build: Build) -> dict[str, str]:
    return dict(line.split("==") for line in asked(build, _VERSIONS).splitlines())


def pinned(name: str) -> str:
    """The one version that both Pythons have."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    (version,) = (line.partition("==")[2] for line in lines if line.startswith(f"{name}=="))
    return version


def test_what_runs_is_the_folder_that_a_checkout_may_be_mounted_on(build: Build) -> None:
    require_answers(build)


def require_answers(build: Build) -> None:
    source = build.root / "opt/pivot/src"
    assert (
        asked(build, "import pivot_megatron; print(pivot_megatron.__file__)") == f"{source}/pivot_megatron/__init__.py"
    )
    checked = build.said[-1]
    assert "megatron-core" in checked and "configs/run/2_dpo.yaml: ok" in checked


def test_the_cpu_image_has_torch_from_an_index_and_all_of_it_pinned(cpu_build: Build) -> None:
    venv = cpu_build.root / "opt/pivot/venv"
    origin = asked(cpu_build, "import torch; print(torch.__file__)")
    assert Path(origin).is_relative_to(venv) and not (venv / "kept.json").exists()
    found = versions(cpu_build)
    assert found["torch"].partition("+")[0] == pinned("torch") and found["pillow"] == pinned("pillow")
    assert {"megatron-core", "pivot-megatron"} <= set(found) and not {"wandb", "s3fs", "pytest"} & set(found)
    require_answers(cpu_build)


def test_torchrun_starts_the_environments_python(build: Build) -> None:
    said = build.shell("torchrun --no-python --nproc-per-node 1 pivot --version")
    assert said.startswith("pivot") and asked(build, 'import shutil; print(shutil.which("torchrun"))').startswith(
        str(build.root)
    )


def test_a_torch_put_before_the_images_ends_the_build(build: Build) -> None:
    info = next(build.root.glob("opt/pivot/venv/lib/*/site-packages")) / "torch-2.13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
    done = subprocess.run(
        [ROOT / "docker/install.sh", "check", build.root / "opt/pivot/venv"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"the image's packages changed: torch: expected {VERSION} in " in done.stderr
