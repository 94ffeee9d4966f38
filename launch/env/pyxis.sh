# shellcheck shell=bash disable=SC2034
# In a container by pyxis and enroot: srun itself starts each task inside the image.
# shellcheck source=launch/env/bare.sh
source "$PIVOT_ROOT/launch/env/bare.sh"

PIVOT_IMAGE=${PIVOT_IMAGE:?the container to run in: an image such as registry/pivot:tag, or a .sqsh file}
PIVOT_SRUN=(
    --container-image="$PIVOT_IMAGE"
    --container-mounts="$PIVOT_ROOT:$PIVOT_ROOT,$PWD:$PWD${PIVOT_MOUNTS:+,$PIVOT_MOUNTS}" # PIVOT_MOUNTS: where data and checkpoints lie, as A:A,B:B
    --container-workdir="$PWD" # paths in the config mean the same in and out of it
    --no-container-mount-home
)
