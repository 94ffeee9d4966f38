"""A real SLURM of two nodes on this machine, of Debian's packages: controller, two node daemons, munge, all below one folder.

By hand: python -m tests.slurm.cluster FOLDER COMMAND... runs COMMAND with the cluster up.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
NODES = ("n1", "n2")


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if _path_of(name) is None]


def _path_of(name: str) -> str | None:
    """Daemons lie where a user's PATH may not lead."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass
class Cluster:
    """`environment`: with which SLURM's own commands, run from anywhere, speak to this cluster."""

    folder: Path
    environment: Mapping[str, str]
    daemons: dict[str, subprocess.Popen[bytes]]

    def run(self, *command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Such as PENDING, RUNNING, COMPLETED, FAILED; of a job that ended long ago too."""
        told = self.run("scontrol", "show", "job", job)
        return dict(part.split("=", 1) for part in told.split() if "=" in part)["JobState"]

    def field(self, job: str, name: str) -> str:
        told = self.run("scontrol", "show", "job", job)
        return dict(part.split("=", 1) for part in told.split() if "=" in part)[name]

    def start_node(self, name: str) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        command = [_path_of("slurmd") or "slurmd", "-D", "-N", name]
        self.daemons[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def kill_node(self, name: str) -> None:
        """As a power cut would: its daemon and every process of its jobs, with SIGKILL."""
        self.daemons.pop(name).kill()
        spool = str(self.folder / f"spool-{name}")
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes()
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            of_node = f"SLURMD_NODENAME={name}\0".encode() in environment and str(self.folder).encode() in environment
            if of_node or (b"slurmstepd" in command and spool.encode() in environment):
                subprocess.run(["kill", "-9", process.name], check=False)


@contextmanager
def cluster(folder: Path, cores: int = 2) -> Iterator[Cluster]:
    """Up and idle, with partitions `low` (preempted, 60 seconds to end) and `high`. Stopped, with all its jobs, at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    (folder / "slurm.conf").write_text(_configuration(folder, cores))
    with ExitStack() as stack:
        made = Cluster(folder, environment, {})
        stack.callback(_stop, made.daemons)
        _start_munge(folder, made)
        log = (folder / "slurmctld.out").open("ab")
        command = [_path_of("slurmctld") or "slurmctld", "-D", "-c"]
        made.daemons["slurmctld"] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        for name in NODES:
            (folder / f"spool-{name}").mkdir(exist_ok=True)
            made.start_node(name)
        wait_for(lambda: _idle(made), 60, f"the cluster in {folder} to be idle")
        stack.callback(_cancel_all, made)
        yield made


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.2)


def _idle(made: Cluster) -> bool:
    try:
        return made.run("sinfo", "-h", "-N", "-p", "low", "-o", "%t").split() == ["idle"] * len(NODES)
    except RuntimeError:
        return False


def _cancel_all(made: Cluster) -> None:
    subprocess.run(["scancel", "--user", getpass.getuser()], env=made.environment, check=False)
    time.sleep(1)
    subprocess.run(
        ["scancel", "--signal=KILL", "--full", "--user", getpass.getuser()], env=made.environment, check=False
    )


def _stop(daemons: dict[str, subprocess.Popen[bytes]]) -> None:
    for daemon in reversed(daemons.values()):
        daemon.terminate()
    for daemon in daemons.values():
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _start_munge(folder: Path, made: Cluster) -> None:
    home = folder / "munge"
    home.mkdir(mode=0o711, exist_ok=True)
    key = home / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    files = [f"--{name}-file={home / name}" for name in ("key", "log", "pid", "seed")]
    command = [_path_of("munged") or "munged", "--foreground", "--force", f"--socket={home / 'socket'}", *files]
    out = (home / "out").open("ab")
    made.daemons["munged"] = subprocess.Popen(command, stdout=out, stderr=out)
    wait_for((home / "socket").exists, 20, f"munge in {home}")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]


def _configuration(folder: Path, cores: int) -> str:
    controller, *ports = _free_ports(1 + len(NODES))
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cores} RealMemory=1000 State=UNKNOWN"
        for name, port in zip(NODES, ports, strict=True)
    )
    return f"""ClusterName=pivot
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
JobRequeue=1
ReturnToService=2
SlurmdTimeout=15
SlurmctldTimeout=10
KillWait=10
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def main(arguments: Sequence[str]) -> int:
    folder, *command = arguments
    with cluster(Path(folder).absolute()) as made:
        return subprocess.run(command or ["sinfo"], env=made.environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
