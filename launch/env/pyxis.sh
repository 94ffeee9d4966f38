# shellcheck shell=bash disable=SC2034
# In a container by pyxis and enroot: srun itself starts each task inside the image (docs/cluster.md says how to make one).
# shellcheck source=launch/env/bare.sh
source "$PIVOT_ROOT/launch/env/bare.sh"

PIVOT_IMAGE=${PIVOT_IMAGE:?the container to run in: pivot.sqsh from enroot import, or an image of a registry such as host#pivot-megatron:gpu}
PIVOT_CACHE=${PIVOT_CACHE:-$HOME/.cache/pivot-image} # what libraries keep between jobs; every node must see it
mkdir -p "$PIVOT_CACHE"
PIVOT_SRUN=(
    --container-image="$PIVOT_IMAGE"
    # The checkout lies over the image's own code too: what runs is what the job's folder says of it. PIVOT_MOUNTS: data and
    # checkpoints, as A:A,B:B
    --container-mounts="$PIVOT_ROOT:/opt/pivot/src,$PIVOT_CACHE:/cache,$PIVOT_ROOT:$PIVOT_ROOT,$PWD:$PWD${PIVOT_MOUNTS:+,$PIVOT_MOUNTS}"
    --container-workdir="$PWD" # paths in the config mean the same in and out of it
    --no-container-mount-home
)
