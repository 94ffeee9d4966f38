#!/usr/bin/env bash
# One run on this machine: launch/local.sh RUN.yaml [key=value ...] [--processes N]
# The same config that launch/pivot_dpo.sh takes to a cluster.
set -euo pipefail

export PIVOT_ROOT=${PIVOT_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
# shellcheck source=launch/env/bare.sh
source "${PIVOT_ENV:-$PIVOT_ROOT/launch/env/bare.sh}"
exec "${PIVOT_WRAP[@]}" "${PIVOT[@]}" train "$@"
