# shellcheck shell=bash disable=SC2034
# In a container by apptainer (singularity): each task starts the image (docs/cluster.md says how to make one).
# shellcheck source=launch/env/bare.sh
source "$PIVOT_ROOT/launch/env/bare.sh"

PIVOT_IMAGE=${PIVOT_IMAGE:?the container to run in: pivot.sif from apptainer build}
PIVOT_CACHE=${PIVOT_CACHE:-$HOME/.cache/pivot-image} # what libraries keep between jobs; every node must see it
mkdir -p "$PIVOT_CACHE"
PIVOT_WRAP=(
    apptainer exec --nv
    # The checkout lies over the image's own code too: what runs is what the job's folder says of it. PIVOT_MOUNTS: data and
    # checkpoints, as A,B
    --bind "$PIVOT_ROOT:/opt/pivot/src,$PIVOT_CACHE:/cache,$PIVOT_ROOT,$PWD${PIVOT_MOUNTS:+,$PIVOT_MOUNTS}"
    --pwd "$PWD" # paths in the config mean the same in and out of it
    "$PIVOT_IMAGE"
)
