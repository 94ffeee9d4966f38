#!/usr/bin/env bash
# README's first commands as a newcomer meets them: tools/clean_clone.sh [TARGET...]   (demo and test, where none is named)
#
# A clone of HEAD in an empty folder, an empty HOME, no settings but those of proxies and of pip's index, and, started as root,
# a user who may write nothing else. What is not committed is not there. Takes what the targets take: half an hour for both, and
# 2 GB below TMPDIR, which are removed unless a target failed. PYTHON picks another Python than the python3 of /usr/local/bin,
# /usr/bin or /bin.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -eq 0 ]]; then set -- demo test; fi
path=/usr/local/bin:/usr/bin:/bin
as_newcomer=()
if [[ $EUID -eq 0 ]]; then as_newcomer=(setpriv --reuid=nobody --regid=nogroup --clear-groups); fi
python=$(PATH=$path command -v "${PYTHON:-python3}" || true)
if ! "${as_newcomer[@]}" "${python:-false}" -c '' 2>/dev/null; then
    echo "clean_clone.sh: expected a Python that a newcomer may start as ${PYTHON:-python3} in $path, found ${python:-none};" \
        "name another, as in: PYTHON=/usr/bin/python3.11 tools/clean_clone.sh" >&2
    exit 2
fi
folder=$(mktemp -d)
mkdir "$folder/home" "$folder/tmp"
git clone --quiet --no-hardlinks "file://$PWD" "$folder/clone"

if [[ $EUID -eq 0 ]]; then chown -R nobody "$folder"; fi
kept=() # an index behind a proxy is still that index
for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY SSL_CERT_FILE \
    PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_CERT; do
    if [[ -n ${!name:-} ]]; then kept+=("$name=${!name}"); fi
done

cd "$folder/clone"
for target in "$@"; do
    start=$SECONDS
    if ! "${as_newcomer[@]}" env -i HOME="$folder/home" TMPDIR="$folder/tmp" PATH="$path" LANG=C.UTF-8 "${kept[@]}" \
        make "$target" PYTHON="$python"; then
        echo "clean_clone.sh: make $target failed after $((SECONDS - start)) s; see $folder" >&2
        exit 1
    fi
    echo "clean_clone.sh: make $target passed in $((SECONDS - start)) s"
done
rm -rf "$folder"
