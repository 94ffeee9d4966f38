#!/usr/bin/env bash
# The same few steps at several layouts, a job each: launch/bench_layouts.sh [sbatch options --] RUN.yaml LAYOUT.yaml ...
# They go into a new folder below runs/bench-layouts; the last job writes their speeds into its table.txt, and
# `pivot bench runs FOLDER/*/` prints them again.
# PIVOT_STEPS: steps of each (20, of which the first five are not counted).
set -euo pipefail

export PIVOT_ROOT=${PIVOT_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
# shellcheck source=launch/options.sh
source "$PIVOT_ROOT/launch/options.sh"
if [[ $# -lt 2 ]]; then
    echo "bench_layouts.sh: expected [sbatch options --] RUN.yaml LAYOUT.yaml ..., found $# files" >&2
    exit 2
fi
run=$(realpath "$1")
shift
folder=runs/bench-layouts/$(date +%Y%m%d-%H%M%S) # of its own: a run that is finished would not be made again
mkdir -p "$folder"
ids=() outs=()
for layout in "$@"; do
    name=$(basename "$layout" .yaml)
    printf 'base: [%s, %s]\n' "$run" "$(realpath "$layout")" >"$folder/$name.yaml"
    steps=(batch.epochs=null "batch.steps=${PIVOT_STEPS:-20}" "checkpoints.every=${PIVOT_STEPS:-20}")
    id=$(sbatch --parsable --job-name="bench-$name" "${options[@]}" "$PIVOT_ROOT/launch/pivot_dpo.sh" "$folder/$name.yaml" \
        "${steps[@]}" "out=$folder/$name")
    echo "$id $layout"
    ids+=("$id")
    outs+=("$folder/$name")
done
# shellcheck source=launch/env/bare.sh
source "${PIVOT_ENV:-$PIVOT_ROOT/launch/env/bare.sh}"
dependency=$(IFS=:; echo "afterany:${ids[*]}")
sbatch --parsable --job-name=bench-table "${options[@]}" --nodes=1 --ntasks=1 --dependency="$dependency" --output="$folder/table.txt" \
    --wrap="$(printf '%q ' srun "${PIVOT_SRUN[@]}" "${PIVOT_WRAP[@]}" "${PIVOT[@]}" bench runs "${outs[@]}")"
