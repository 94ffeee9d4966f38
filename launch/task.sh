#!/usr/bin/env bash
# What each task of srun runs: launch/task.sh COMMAND..., told of the others as torchrun tells its processes.
set -euo pipefail

if [[ $PIVOT_TASKS == node ]]; then # the command starts this node's processes itself
    export NNODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID
    exec "$@" --processes "$PIVOT_PROCESSES"
fi
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$PIVOT_PROCESSES
exec "$@"
