#!/usr/bin/env bash
# The project in an environment of its own. Both Dockerfiles run this; so can you, inside an image, from the project's folder:
#
#   docker/install.sh dependencies VENV image [EXTRAS]   what the project needs, on top of python3's own torch, which stays as it is
#   docker/install.sh dependencies VENV index [EXTRAS]   the same with torch from pip's index
#   docker/install.sh project VENV                       this folder, editable: what is changed or mounted here is what runs
#   docker/install.sh check VENV                         that nothing to be kept was replaced, that every module imports and commands answer
#
# EXTRAS are the project's, joined by commas (remote,tracking). PYTHON picks another Python than python3. Versions are those of
# constraints.txt, but for what the image has compiled against its torch and its CUDA. `dependencies` reads pyproject.toml and
# constraints.txt alone, so that an image's layer of them outlives changes of the code.
set -euo pipefail

usage() {
    sed -n 's/^#   //p' "${BASH_SOURCE[0]}" >&2
    exit 2
}
[[ $# -ge 2 ]] || usage
step=$1 venv=$(realpath -m "$2") torch=${3:-} extras=${4:-}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
packages=docker/packages.py
record=$venv/kept.json # where torch is the image's

# NVIDIA's images name a file here, of versions that fit their own packages and not ours.
export PIP_CONSTRAINT='' PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
pip() { "${PYTHON:-python3}" -m pip --python "$venv/bin/python" "$@"; }

dependencies() {
    local python=${PYTHON:-python3} system=()
    [[ $torch == image || $torch == index ]] || usage
    if [[ $torch == image ]]; then system=(--system-site-packages); fi
    if [[ -e $venv ]]; then
        echo "install.sh: expected to make $venv, found it there; remove it or name another" >&2
        exit 2
    fi
    "$python" -m venv --without-pip "${system[@]}" "$venv"
    if [[ $torch == image ]]; then "$python" $packages record "$record"; fi
    "$python" $packages requirements pyproject.toml "$extras" >"$venv/requirements.txt"
    "$python" $packages constraints constraints.txt "${system[@]:+$record}" >"$venv/constraints.txt"
    pip install --only-binary :all: -r "$venv/requirements.txt" -c "$venv/constraints.txt"
    if [[ ! -e $venv/bin/torchrun ]]; then # the image's would start the image's Python, which has no pivot
        printf '#!/bin/sh\nexec "%s/bin/python" -m torch.distributed.run "$@"\n' "$venv" >"$venv/bin/torchrun"
        chmod +x "$venv/bin/torchrun"
    fi
}

project() {
    # The builder's version is pinned too: by the one variable for pip below 25.3, by the other from there on.
    PIP_CONSTRAINT=$venv/constraints.txt PIP_BUILD_CONSTRAINT=$venv/constraints.txt pip install --no-deps --editable .
    "$venv/bin/python" -m compileall -q pivot_megatron # whoever runs it may not write where it lies
}

check() {
    if [[ -e $record ]]; then "$venv/bin/python" $packages compare "$record"; fi
    "$venv/bin/python" $packages imports
    "$venv/bin/pivot" doctor
    "$venv/bin/pivot" check configs/run/*.yaml
}

case $step in
dependencies | project | check) "$step" ;;
*) echo "install.sh: expected dependencies, project or check, found $step" >&2 && exit 2 ;;
esac
