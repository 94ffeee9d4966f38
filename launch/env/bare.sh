# shellcheck shell=bash disable=SC2034
# A cluster's facts, for jobs that run straight on its nodes. Copy this file, name your cluster, and give it with PIVOT_ENV=launch/env/NAME.sh.

# What starts the trainer on a node. Load modules or activate an environment above it where your cluster wants that.
PIVOT=(pivot)

# One task of srun a GPU (`gpu`), or one a node that starts its processes itself (`node`), which containers and some sites prefer.
PIVOT_TASKS=gpu

# Processes on each node: one a GPU.
PIVOT_PROCESSES=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}

# Further options of srun, and what a task's command line begins with: a container's, for example (pyxis.sh, apptainer.sh).
PIVOT_SRUN=()
PIVOT_WRAP=()

# After a failure a job starts again from its newest checkpoint; it gives up when so many in a row came no further.
PIVOT_RETRIES=3

# What NCCL should know of the network; your site's documentation names the interfaces.
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
