#!/usr/bin/env bash
#SBATCH --job-name=pivot-once
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --open-mode=append
#SBATCH --output=pivot-%j.out
#
# One task on one node, where a command needs no others: sbatch launch/once.sh evolve SCHEDULE.yaml --judge PHASE
# The cluster's facts are those of launch/pivot_dpo.sh.
set -euo pipefail

export PIVOT_ROOT=${PIVOT_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}}
# shellcheck source=launch/env/bare.sh
source "${PIVOT_ENV:-$PIVOT_ROOT/launch/env/bare.sh}"
exec srun --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" "${PIVOT_SRUN[@]}" "${PIVOT_WRAP[@]}" "${PIVOT[@]}" "$@"
