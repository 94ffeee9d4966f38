# shellcheck shell=bash disable=SC2034
# In a container by apptainer (singularity): each task starts the image.
# shellcheck source=launch/env/bare.sh
source "$PIVOT_ROOT/launch/env/bare.sh"

PIVOT_IMAGE=${PIVOT_IMAGE:?the container to run in: a .sif file}
PIVOT_WRAP=(
    apptainer exec --nv
    --bind "$PIVOT_ROOT,$PWD${PIVOT_MOUNTS:+,$PIVOT_MOUNTS}" # PIVOT_MOUNTS: where data and checkpoints lie, as A,B
    --pwd "$PWD" # paths in the config mean the same in and out of it
    "$PIVOT_IMAGE"
)
