#!/usr/bin/env bash
#SBATCH --job-name=pivot
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=pivot-%j.out
#SBATCH --signal=USR1@300
#
# One run on a cluster: sbatch [--nodes=4 --gpus-per-node=8 --time=24:00:00 ...] launch/pivot_dpo.sh RUN.yaml [key=value ...]
# Without SLURM it is launch/local.sh: the same run, on this machine.
#
# Submit it from the project's folder, or say where that is with PIVOT_ROOT. PIVOT_ENV names the file of the cluster's facts
# (launch/env/bare.sh). Hyper-parameters stand in the run's YAML and nowhere here.
#
# Five minutes before its time is up, when it is preempted, and after `scancel --signal=USR1 JOB`, the run saves and the job
# queues itself again; so it does after a failure, until PIVOT_RETRIES in a row came no further than the same checkpoint.
# A mistake in the config ends it, and so does a rule of the run's own (faults.most_skipped, data.max_bad_share).
# PIVOT_SWEEP=FILE with --array=0-N: task n runs with the overrides on line n of FILE, each in quotes where it has spaces.
set -euo pipefail

export PIVOT_ROOT=${PIVOT_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}}
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    exec "$PIVOT_ROOT/launch/local.sh" "$@"
fi
if [[ $# -lt 1 ]]; then
    echo "pivot_dpo.sh: expected RUN.yaml [key=value ...], found nothing" >&2
    exit 2
fi
if [[ ! -e $PIVOT_ROOT/launch/task.sh ]]; then
    echo "pivot_dpo.sh: expected the project in $PIVOT_ROOT, found no launch/task.sh; submit from its folder or set PIVOT_ROOT" >&2
    exit 2
fi
PIVOT_ENV=${PIVOT_ENV:-$PIVOT_ROOT/launch/env/bare.sh}
# shellcheck source=launch/env/bare.sh
source "$PIVOT_ENV"

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
log() { echo "pivot_dpo.sh: job $job: $*"; }

# What this task of an array changes in the run.
if [[ -n ${PIVOT_SWEEP:-} ]]; then
    line=$(sed -n "$((${SLURM_ARRAY_TASK_ID:?PIVOT_SWEEP needs sbatch --array} + 1))p" "$PIVOT_SWEEP")
    if [[ -z $line ]]; then
        log "expected overrides on line $((SLURM_ARRAY_TASK_ID + 1)) of $PIVOT_SWEEP, found none" >&2
        exit 2
    fi
    mapfile -t overrides < <(xargs -n 1 <<<"$line") # quoted as on a command line
    set -- "$@" "${overrides[@]}"
fi

one_task=(srun --nodes=1 --ntasks=1 "${PIVOT_SRUN[@]}" "${PIVOT_WRAP[@]}" "${PIVOT[@]}")
code=0
out=$("${one_task[@]}" show "$@" --key out) || code=$? # it has said what is wrong
if ((code)); then
    exit "$code"
fi
if [[ -n ${PIVOT_SWEEP:-} && " ${overrides[*]}" != *" out="* ]]; then
    out=$out/sweep-$SLURM_ARRAY_TASK_ID
    set -- "$@" "out=$out"
fi

# The first node's address by the cluster's own book: a node's name need not be one that resolves.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 20000))
export MASTER_ADDR MASTER_PORT PIVOT_TASKS PIVOT_PROCESSES

failures=$out/launch/failures.txt
if [[ ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
    rm -f "$failures" # another job's
fi
snapshot=$out/launch/$job-${SLURM_RESTART_COUNT:-0}
mkdir -p "$snapshot"
printf '%q ' "$0" "$@" >"$snapshot/command.txt"
cp "$PIVOT_ENV" "$snapshot/env.sh"
scontrol show job "$SLURM_JOB_ID" >"$snapshot/job.txt"
if git -C "$PIVOT_ROOT" rev-parse HEAD >"$snapshot/commit.txt" 2>/dev/null; then
    git -C "$PIVOT_ROOT" diff HEAD >"$snapshot/uncommitted.diff"
fi

tasks=$PIVOT_PROCESSES
if [[ $PIVOT_TASKS == node ]]; then tasks=1; fi
log "$SLURM_NNODES nodes x $PIVOT_PROCESSES processes, $out, start ${SLURM_RESTART_COUNT:-0}"

# SLURM may signal this shell along with the tasks: it waits for them, whatever comes.
trap ':' TERM USR1
srun --kill-on-bad-exit=1 --ntasks-per-node="$tasks" --ntasks=$((SLURM_NNODES * tasks)) "${PIVOT_SRUN[@]}" \
    "${PIVOT_WRAP[@]}" "$PIVOT_ROOT/launch/task.sh" "${PIVOT[@]}" train "$@" &
code=0
wait $! || code=$?
while kill -0 $! 2>/dev/null; do # a signal ended the wait, not the tasks
    code=0
    wait $! || code=$?
done

again() {
    if ! scontrol show job "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
        log "$*; cancelled, so it is not queued again"
        exit "$code"
    fi
    log "$*; queued again"
    scontrol requeue "$job"
    sleep 60 # until SLURM ends this shell
}

newest=$({ find "$out/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null || true; } | sort | tail -n 1)
if [[ $code == 0 && -e $out/requeue.json ]]; then
    rm -f "$failures"
    again "stopped and saved: $(tr -d '\n' <"$out/requeue.json")"
elif [[ $code == 0 ]]; then
    log "finished"
elif [[ $code == 2 ]]; then
    log "the config or its input is wrong: not queued again" >&2
elif [[ $code == 3 ]]; then
    log "stopped by its own rule, at which it would stop again: not queued again" >&2
else
    echo "${newest:-nothing saved}" >>"$failures"
    alike=$(grep -cFx "${newest:-nothing saved}" "$failures")
    if ((alike < PIVOT_RETRIES)); then
        again "failed with $code after ${newest:-no checkpoint}"
    fi
    log "failed with $code, $alike times after ${newest:-no checkpoint}: not queued again" >&2
fi
exit "$code"
