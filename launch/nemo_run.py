"""A run through NeMo-Run: here, or on SLURM from a machine that reaches it over ssh.

python launch/nemo_run.py RUN.yaml [key=value ...] --processes 2
python launch/nemo_run.py RUN.yaml --slurm --account A --nodes 4 --processes 8 --host login.example --job-dir /scratch/me/nemo
pip install 'pivot-megatron[nemo]' gives nemo-run. What the run itself is stands in its YAML, as for every other launcher.
"""

from __future__ import annotations

import argparse
import getpass
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.remove(str(Path(__file__).parent))  # or this file would be the module of its name

import nemo_run


def main() -> None:
    args = arguments()
    command = ["pivot", "train", args.config, *args.overrides, "--processes", str(args.processes)]
    script = nemo_run.Script(inline=f"{NODE if args.slurm else ''}exec {shlex.join(command)}\n")
    executor = slurm(args) if args.slurm else nemo_run.LocalExecutor()
    with nemo_run.Experiment(Path(args.config).stem) as experiment:
        experiment.add(script, executor=executor, name="train")
        if args.dry_run:
            experiment.dryrun()
        else:
            experiment.run(detach=args.slurm)


# One task a node starts its processes itself: torchrun would die of the signal that tells a run to save.
JOB = "export MASTER_ADDR=${head_node_ip%% *} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))"
NODE = "export NNODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID\n"


def slurm(args: argparse.Namespace) -> Any:
    """Five minutes before its time is up a run is told to save, and the same submission goes on."""
    user = args.user or getpass.getuser()
    tunnel = (
        nemo_run.SSHTunnel(host=args.host, user=user, job_dir=args.job_dir)
        if args.host
        else nemo_run.LocalTunnel(job_dir=args.job_dir)
    )
    return nemo_run.SlurmExecutor(
        account=args.account,
        partition=args.partition,
        nodes=args.nodes,
        ntasks_per_node=1,
        gpus_per_node=args.processes,
        time=args.time,
        exclusive=True,
        signal="USR1@300",
        container_image=args.image,
        container_mounts=args.mount,
        tunnel=tunnel,
        setup_lines=JOB,
        packager=nemo_run.GitArchivePackager(),
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--processes", type=int, default=1, help="on each node: one a GPU (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started")
    parser.add_argument("--slurm", action="store_true", help="submit to SLURM; without it, run here")
    parser.add_argument("--account")
    parser.add_argument("--partition")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--time", default="04:00:00")
    parser.add_argument("--host", help="log in there; without it, SLURM's commands are used here")
    parser.add_argument("--user", help="on that host (default: the same name)")
    parser.add_argument("--job-dir", help="a folder that all nodes see, for scripts, code and logs")
    parser.add_argument("--image", help="container, with pyxis")
    parser.add_argument(
        "--mount", action="append", default=[], metavar="A:B", help="into the container; as often as needed"
    )
    args = parser.parse_args()
    if args.slurm and not (args.account and args.job_dir):
        parser.error("--slurm needs --account and --job-dir")
    return args


if __name__ == "__main__":
    main()
