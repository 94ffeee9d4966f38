"""What this machine has for training, what is missing, what that costs and what to install."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from pivot_megatron.errors import UserError

PROJECT = "pivot-megatron"

# A 1.5B head with a So400m encoder is about 2 G parameters, and a checkpoint holds 14 bytes for each: weights in bf16,
# master weights and two moments in fp32. Two stay and a third is being written.
_DISK = 90 * 2**30
# Two processes of the tests, each with torch, megatron-core and transformers loaded.
_MEMORY = 6 * 2**30
# Containers often get 64 MiB; NCCL takes tens of MiB for each pair of GPUs of a machine.
_SHARED_MEMORY = 2**30


@dataclass(frozen=True)
class Finding:
    """`found` is what there is, in words. `cost` says what is lost and what to do; where `ok` it is empty, or why not."""

    name: str
    found: str
    ok: bool
    cost: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """Look at this machine and the environment of this process; starts nothing and changes nothing."""
    return [_python(), *_torch_and_gpus(), _megatron_core(), *_packages(), *_kernels(), *_machine(Path.cwd())]


def as_text(findings: Sequence[Finding]) -> str:
    """A line a finding, and under it what that costs."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{'ok' if finding.ok else '--'}  {finding.name:<{width}}  {finding.found}")
        if finding.cost:
            lines.append(f"    {'':<{width}}  {finding.cost}")
    return "\n".join(lines)


def _finding(name: str, found: str, ok: bool, cost: str) -> Finding:
    return Finding(name, found, ok, "" if ok else cost)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    version = "{}.{}.{}".format(*sys.version_info)
    cost = "only 3.11 and 3.12 are tested, each with its own megatron-core; make the environment again with one of them"
    return _finding("python", version, sys.version_info[:2] in ((3, 11), (3, 12)), cost)


def _torch_and_gpus() -> Iterator[Finding]:
    version = _version("torch")
    if version is None:
        yield Finding("torch", "none", False, "nothing runs; pip install -e . -c constraints.txt")
        return
    import torch  # takes a second or two, which the other findings need not wait for

    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield _finding(
        "torch",
        f"{version} ({build})",
        bool(torch.version.cuda) or not driver,
        "this machine has an NVIDIA driver that a CPU build cannot use; pip install a CUDA build of the same version",
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _gpu(index, torch.cuda.get_device_properties(index))
    else:
        yield Finding("gpu", "none", False, _no_gpu(driver, bool(torch.version.cuda)))


def _no_gpu(driver: bool, cuda_build: bool) -> str:
    if driver and cuda_build:
        return "training runs on the CPU: the driver shows no GPU to torch; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    return "training runs on the CPU: the demo and the tests, not models of real size; use a machine with NVIDIA GPUs"


def _gpu(index: int, properties: Any) -> Finding:
    capability = (properties.major, properties.minor)
    found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        cost = "no bf16 on its tensor cores: slow; set precision.compute: fp32, or use an Ampere GPU or newer"
    else:
        cost = "no FP8: leave precision.fp8 at null, or use a Hopper GPU or newer"
    return _finding(f"gpu {index}", found, capability >= (8, 9), cost)


def _megatron_core() -> Finding:
    found, wanted = _version("megatron-core"), pinned("megatron-core")
    cost = "nothing trains" if found is None else f"checkpoints and results are tested with {wanted} on this Python"
    return _finding(
        "megatron-core",
        found or "none",
        found is not None and found == (wanted or found),
        f"{cost}; pip install megatron-core=={wanted}",
    )


def pinned(package: str) -> str | None:
    """The version that the installed project requires exactly on this Python; None where it names none."""
    try:
        texts = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        return None
    for requirement in map(Requirement, texts):
        holds = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == package and holds:
            return next((spec.version for spec in requirement.specifier if spec.operator == "=="), None)
    return None


def _packages() -> Iterator[Finding]:
    engine = _engine()
    yield engine
    yield _apex(engine.ok)
    flash = _package(("flash-attn", "flash-attn-3"), "flash_attn")
    cost = "nothing: attention over packs on a GPU runs on transformer-engine's kernels, or on torch's own"
    yield Finding("flash-attn", flash or "none", True, "" if flash else cost)
    dali = _package(("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110"), "nvidia.dali")
    cost = "data.image_backend: dali needs it (pip install 'pivot-megatron[dali]'); no need to install it for another"
    yield Finding("dali", dali or "none", True, "" if dali else cost)
    transformers = _package(("transformers",), "transformers")
    cost = "no checkpoint is read; pip install -e . -c constraints.txt"
    yield _finding("transformers", transformers or "none", transformers is not None, cost)


def _engine() -> Finding:
    """Where there is a GPU it is imported, for one that was built for another torch or CUDA is found and does not load."""
    found = _package(("transformer-engine", "transformer-engine-torch"), "transformer_engine")
    cost = "no FP8, megatron-core's local layers; pip install -e '.[te]' on a CUDA machine"
    if why := _engine_fails():
        cost = f"{cost}, again for this torch and CUDA, or uninstall it ({why})"
        return Finding("transformer-engine", f"{found or 'version unknown'}, does not load", False, cost)
    return _finding("transformer-engine", found or "none", found is not None, cost)


def _engine_fails() -> str | None:
    if _version("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():  # nothing would use it
        return None
    from pivot_megatron.runtime.engine import engine_fault

    return engine_fault()


def _apex(engine: bool) -> Finding:
    """NVIDIA's, and which of its two parts there are that a run would use: the fused Adam, and the weight-gradient kernel."""
    found = _package(("apex",), "apex")
    if found is not None and not _holds("apex", "optimizers"):
        cost = "PyPI's `apex` is another project, of no use here; uninstall it: pip uninstall apex"
        return Finding("apex", f"{found}, not NVIDIA's", engine, cost)
    if engine:
        cost = (
            "" if found else "not needed: transformer-engine brings a fused Adam and its own weight-gradient products"
        )
        return Finding("apex", found or "none", True, cost)
    if found is None:
        cost = (
            "no fused Adam, and weight gradients added up apart from their products: slower steps; pip install -e '.[te]', "
            "which brings both"
        )
        return Finding("apex", "none", False, cost)
    cost = (
        "built without fused_weight_gradient_mlp_cuda: weight gradients are added up apart from their products; build it with "
        "its C++ and CUDA extensions, or pip install -e '.[te]'"
    )
    return _finding("apex", found, _importable("fused_weight_gradient_mlp_cuda"), cost)


def _holds(package: str, part: str) -> bool:
    """Looks for a module within a package without running either."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    return any(Path(folder, name).exists() for folder in folders for name in (part, f"{part}.py"))


def _kernels() -> Iterator[Finding]:
    """What a run in bf16 would compute with, where there is anything to run it."""
    if _version("torch") is None or _version("megatron-core") is None:
        return
    from pivot_megatron.config.schema import Precision
    from pivot_megatron.runtime.kernels import kernels_in_use

    try:
        found = kernels_in_use(Precision())
    except UserError as error:
        yield Finding("kernels", "none for bf16", False, str(error))
    else:
        yield Finding("layers", found.layers, True, "")
        yield Finding("attention", found.attention, True, "")
        yield Finding("adam", found.optimizer, True, "")
        yield Finding("weight gradients", f"added up {found.gradient_accumulation}", True, "")
        cost = "no fused cross entropy is used: megatron-core's rounds its gradient to bf16, and logits are never whole here"
        yield Finding("log-probs", "this project's own, in tiles of tokens by vocabulary", True, cost)


def _package(distributions: Sequence[str], module: str) -> str | None:
    """Version of the first of `distributions` that is installed. Built from source, one may carry no metadata."""
    version = next(filter(None, map(_version, distributions)), None)
    return version or ("version unknown" if _importable(module) else None)


def _importable(module: str) -> bool:
    """Looks for the module without running it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _machine(folder: Path) -> Iterator[Finding]:
    cores = usable_cores()
    yield _finding(
        "cores", f"{cores:g}", cores >= 2, "two processes share one core: the tests and the demo take longer"
    )
    memory = usable_memory()
    cost = "the tests and the demo may be killed; give the container or the machine more"
    yield _finding("memory", _gib(memory), memory >= _MEMORY, cost)
    disk = shutil.disk_usage(folder)
    cost = "a run with a 1.5B head keeps checkpoints of about 27 GiB; set out: to a larger disk or checkpoints.keep: 1"
    yield _finding("disk", f"{_gib(disk.free)} free in {folder}", disk.free >= _DISK, cost)
    shared = Path("/dev/shm")
    size = shutil.disk_usage(shared).total if shared.is_dir() else 0
    cost = "NCCL between GPUs of one machine fails or crawls; start the container with --shm-size=8g or --ipc=host"
    yield _finding("/dev/shm", _gib(size) if size else "none", size >= _SHARED_MEMORY, cost)


def usable_cores() -> float:
    """Cores this process may use: its affinity, and a container's quota where that is less."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read_words("/sys/fs/cgroup/cpu.max")  # cgroup v2: quota and period in microseconds
    if len(quota) == 2 and all(word.isdecimal() for word in quota):
        return min(affinity, round(int(quota[0]) / int(quota[1]), 1))
    return affinity


def usable_memory() -> int:
    """Bytes of memory: the machine's, or a container's limit where that is less."""
    total = int(psutil.virtual_memory().total)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # cgroup v2, v1
        limit = _read_words(path)
        if limit and limit[0].isdecimal():
            return min(total, int(limit[0]))
    return total


def _read_words(path: str) -> list[str]:
    try:
        return Path(path).read_text().split()
    except OSError:
        return []


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
