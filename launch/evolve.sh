#!/usr/bin/env bash
# Runs in a row, a job each: launch/evolve.sh [sbatch options --] SCHEDULE.yaml [key=value ...]
#                        or: launch/evolve.sh [sbatch options --] RUN.yaml RUN.yaml ...
# Each begins when the one before it has finished; where one fails for good, those after it are taken from the queue.
# After each phase of a schedule a job on one node exports and probes its encoder, and fails where it has fallen too far.
# Prints the jobs' ids. A run takes its encoder from the one before by `model.encoder.checkpoint: OUT_OF_THAT_RUN`; a schedule's
# runs do so by themselves. A schedule's job that is submitted again goes on where it was.
set -euo pipefail

export PIVOT_ROOT=${PIVOT_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
# shellcheck source=launch/options.sh
source "$PIVOT_ROOT/launch/options.sh"
if [[ $# -lt 1 ]]; then
    echo "evolve.sh: expected [sbatch options --] SCHEDULE.yaml, or RUN.yaml ..., found nothing" >&2
    exit 2
fi
before=()
submit() { # NAME SCRIPT ARGUMENTS...
    local name=$1 id
    shift
    id=$(sbatch --parsable --job-name="$name" "${before[@]}" "${options[@]}" "$@")
    echo "$id $name"
    before=(--dependency="afterok:$id" --kill-on-invalid-dep=yes)
}

if [[ -e $1 ]] && grep -q '^phases:' "$1"; then
    # shellcheck source=launch/env/bare.sh
    source "${PIVOT_ENV:-$PIVOT_ROOT/launch/env/bare.sh}"
    phases=$("${PIVOT_WRAP[@]}" "${PIVOT[@]}" evolve "$@" --runs) # it says what is wrong
    while IFS=$'\t' read -r name run; do
        submit "$name" "$PIVOT_ROOT/launch/pivot_dpo.sh" "$run"
        submit "$name-judge" --nodes=1 "$PIVOT_ROOT/launch/once.sh" evolve "$@" --judge "$name"
    done <<<"$phases"
    exit
fi
for run in "$@"; do
    if [[ ! -e $run ]]; then
        echo "evolve.sh: $run: no such file" >&2
        exit 2
    fi
done
for run in "$@"; do
    submit "$(basename "$run" .yaml)" "$PIVOT_ROOT/launch/pivot_dpo.sh" "$run"
done
