#!/bin/bash
# Put the pieces of pack.sh together where the GPU is: unpack.sh FOLDER [SITE]
#
# Collects FOLDER's pieces beside SITE (default /tmp/site), call by call if they come one by one;
# with the last of them, SITE is laid: put it on PYTHONPATH.
set -euo pipefail
folder=$1
site=${2:-/tmp/site}
python=${PYTHON:-/opt/torch/.venv/bin/python3}
[ -x "$python" ] || python=python3
pieces=$site.pieces
mkdir -p "$pieces"
cp "$folder"/kit.[0-9]* "$folder/SHA256SUMS" "$pieces/"
cd "$pieces"
if ! sha256sum --check --quiet SHA256SUMS 2>/dev/null; then
    echo "$(ls kit.[0-9]* | wc -l) of $(wc -l <SHA256SUMS) pieces are here, or one is damaged"
    exit 0
fi
rm -rf "$site"
mkdir -p "$site"
# Python brings lzma and tarfile; xz may be missing.
cat kit.[0-9]* | "$python" -c '
import lzma, sys, tarfile
with lzma.open(sys.stdin.buffer) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
    archive.extractall(sys.argv[1], filter="data")
' "$site"
# vLLM imports Numba for one kind of speculation alone: without one that fits NumPy, names do.
if ! PYTHONPATH=$site "$python" -c 'import numba' 2>/dev/null; then
    echo "numba cannot be imported; a stand-in takes its place"
    mkdir -p "$site/numba"
    cat >"$site/numba/__init__.py" <<'STUB'
"""Decorators that leave functions as they are."""

__version__ = "0"
prange = range


def jit(*arguments, **options):
    if len(arguments) == 1 and callable(arguments[0]):
        return arguments[0]
    return lambda function: function


njit = vectorize = guvectorize = jit


def __getattr__(name):
    return jit
STUB
fi
echo "laid $site, $(du -sm "$site" | cut -f1) MiB"
