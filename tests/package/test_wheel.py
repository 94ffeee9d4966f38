"""The sdist, the wheel made of it, and the wheel installed away from any checkout."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import pivot_megatron

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NAME = f"pivot_megatron-{pivot_megatron.__version__}"


def done(*words: object, folder: Path) -> str:
    """Raises AssertionError with what a command that failed has said."""
    command = [str(word) for word in words]
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=outside)
    assert ran.returncode == 0, f"{' '.join(command)}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def files(*names: str) -> set[str]:
    """Of the checkout below `names`, without what Python leaves there."""
    found = (path for name in names for path in (ROOT / name).rglob("*"))
    return {str(path.relative_to(ROOT)) for path in found if path.is_file() and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    done(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, folder=ROOT)
    (file,) = folder.iterdir()
    with tarfile.open(file) as tar:
        tar.extractall(folder, filter="data")
    return folder / NAME


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        sdist,
        folder=folder,
    )
    (file,) = folder.iterdir()
    return file


def test_the_sdist_has_what_a_checkout_has(sdist: Path) -> None:
    found = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    folders = ("configs", "docker", "docs", "launch", "pivot_megatron", "tests", "tools")
    assert files(*folders) <= found
    tops = {name for name in found if "/" not in name}
    asked = subprocess.run(["git", "ls-files"], check=True, capture_output=True, text=True, cwd=ROOT)
    tracked = {name for name in asked.stdout.splitlines() if "/" not in name}
    assert {"LICENSE", "Makefile", "mkdocs.yml", "pyproject.toml"} <= tracked <= tops
    assert {name.partition("/")[0] for name in found} - tops - set(folders) == {".ci"}
    assert not [name for name in found if name.endswith((".pyc", ".part"))]


def test_the_wheel_has_the_package_and_its_data_alone(wheel: Path) -> None:
    assert wheel.name == f"{NAME}-py3-none-any.whl"
    found = set(zipfile.ZipFile(wheel).namelist())
    about = {name for name in found if name.startswith(f"{NAME}.dist-info/")}
    configs = {f"pivot_megatron/{name}" for name in files("configs")}
    assert found - about == files("pivot_megatron") | configs
    assert {name.partition("/")[2] for name in about} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE"
    }  # fmt: skip


def test_metadata_say_what_it_is(wheel: Path) -> None:
    about = metadata_of(wheel)
    assert (about["Name"], about["Version"]) == ("pivot-megatron", pivot_megatron.__version__)
    assert about["License-Expression"] == "Apache-2.0" and about.get_all("License-File") == ["LICENSE", "NOTICE"]
    assert about["Description-Content-Type"] == "text/markdown"
    assert about.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert about["Requires-Python"] == "<3.13,>=3.11" and not about.get_all("Project-URL")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert about.get_all("Provides-Extra") == sorted(extras)
    assert any(line.startswith("Programming Language :: Python :: 3.12") for line in about.get_all("Classifier") or [])


def metadata_of(wheel: Path) -> Message:
    return email.message_from_string(zipfile.ZipFile(wheel).read(f"{NAME}.dist-info/METADATA").decode())


@pytest.fixture(scope="module")
def pivot(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pivot` of an environment that has the wheel, and of this one the packages but not the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    (own,) = folder.glob("lib/*/site-packages")
    parents = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "parents.pth").write_text("\n".join(sorted(parents)) + "\n")  # whose own .pth files are not read
    python = folder / "bin/python"
    command = ("install", "-q", "--no-deps", "--no-index", "--ignore-installed", wheel)
    done(python, "-m", "pip", *command, folder=folder)
    assert done(python, "-c", "import pivot_megatron as p; print(p.__file__)", folder=folder).startswith(str(own))
    return folder / "bin/pivot"


def test_it_runs_outside_the_checkout(pivot: Path, tmp_path: Path) -> None:
    assert pivot_megatron.__version__ in done(pivot, "--version", folder=tmp_path)
    assert "megatron-core" in done(pivot, "doctor", folder=tmp_path)
    (configs,) = pivot.parent.parent.glob("lib/*/site-packages/pivot_megatron/configs")
    runs = sorted((configs / "run").glob("*.yaml"))
    assert len(runs) == len(list((ROOT / "configs/run").glob("*.yaml")))
    said = done(pivot, "check", *runs, folder=tmp_path)
    assert len(said.splitlines()) == len(runs) and all(": ok" in line for line in said.splitlines())


def test_what_it_ships_is_found_where_it_is_installed(pivot: Path, tmp_path: Path) -> None:
    code = "from pivot_megatron.config.shipped import shipped_config; print(shipped_config('demo/2_dpo.yaml'))"
    assert done(pivot.parent / "python", "-c", code, folder=tmp_path).startswith(str(pivot.parent.parent))
    done(pivot, "data", "synthetic", "--count", 4, "--out", "shards", folder=tmp_path)
    done(pivot, "data", "inspect", "shards", "--sheet", "page.html", folder=tmp_path)
    assert "</html>" in (tmp_path / "page.html").read_text()
