# shellcheck shell=bash
# Sourced with a script's own arguments: takes sbatch's from before `--`, where there is one, into `options`.
options=()
for argument in "$@"; do
    if [[ $argument == -- ]]; then
        while [[ $1 != -- ]]; do
            options+=("$1")
            shift
        done
        shift
        break
    fi
done
