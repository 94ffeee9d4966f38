#!/usr/bin/env bash
# Runs in a row, a job each: launch/evolve.sh [sbatch options --] RUN.yaml RUN.yaml ...
# Each begins when the one before it has finished; where one fails for good, those after it are taken from the queue.
# Prints the jobs' ids. A run takes its encoder from the one before by `model.encoder.checkpoint: OUT_OF_THAT_RUN`.
set -euo pipefail

export PIVOT_ROOT=${PIVOT_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
# shellcheck source=launch/options.sh
source "$PIVOT_ROOT/launch/options.sh"
if [[ $# -lt 1 ]]; then
    echo "evolve.sh: expected [sbatch options --] RUN.yaml ..., found no run" >&2
    exit 2
fi
for run in "$@"; do
    if [[ ! -e $run ]]; then
        echo "evolve.sh: $run: no such file" >&2
        exit 2
    fi
done
before=()
for run in "$@"; do
    id=$(sbatch --parsable --job-name="$(basename "$run" .yaml)" "${before[@]}" "${options[@]}" "$PIVOT_ROOT/launch/pivot_dpo.sh" "$run")
    echo "$id $run"
    before=(--dependency="afterok:$id" --kill-on-invalid-dep=yes)
done
