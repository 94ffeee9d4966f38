#!/usr/bin/env bash
# README's first commands as a newcomer meets them: tools/clean_clone.sh [TARGET...]   (demo and test, where none is named)
#
# A clone of HEAD in an empty folder, an empty HOME, no settings but those of proxies and of pip's index, and, started as root,
# a user who may write nothing else. What is not committed is not there. Takes what the targets take: half an hour for both, and
# 2 GB below TMPDIR, which are removed unless a target failed. PYTHON picks another Python than python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -eq 0 ]]; then set -- demo test; fi
python=$(command -v "${PYTHON:-python3}")
folder=$(mktemp -d)
mkdir "$folder/home" "$folder/tmp"
git clone --quiet --no-hardlinks "file://$PWD" "$folder/clone"

as_newcomer=()
if [[ $EUID -eq 0 ]]; then
    chown -R nobody "$folder"
    as_newcomer=(setpriv --reuid=nobody --regid=nogroup --clear-groups)
fi
kept=() # an index behind a proxy is still that index
for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY SSL_CERT_FILE \
    PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_CERT; do
    if [[ -n ${!name:-} ]]; then kept+=("$name=${!name}"); fi
done

cd "$folder/clone"
for target in "$@"; do
    start=$SECONDS
    if ! "${as_newcomer[@]}" env -i HOME="$folder/home" TMPDIR="$folder/tmp" PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 "${kept[@]}" \
        make "$target" PYTHON="$python"; then
        echo "clean_clone.sh: make $target failed after $((SECONDS - start)) s; see $folder" >&2
        exit 1
    fi
    echo "clean_clone.sh: make $target passed in $((SECONDS - start)) s"
done
rm -rf "$folder"
