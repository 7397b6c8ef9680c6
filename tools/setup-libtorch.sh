#!/bin/sh
# Finds or fetches libtorch and points the link `.libtorch` (which .cargo/config.toml names) at it.
#
#   LIBTORCH=/path               use this libtorch (the folder with lib/ and include/)
#   LIBTORCH_USE_PYTORCH=1       use the torch of the active Python
#   neither                      unpack the pinned PyPI wheel once into the user's cache folder; clones share it
#
# On a machine with an NVIDIA GPU all CUDA libraries come along; elsewhere only the two that loading needs.
set -eu
cd "$(dirname "$0")/.."

VERSION=2.11.0
CUDA_RUNTIME=nvidia-cuda-runtime==13.0.96
CUDA_CUPTI=nvidia-cuda-cupti==13.0.85
# Headers alone, for the few calls of CUDA that libtorch does not wrap.
CUDA_CRT=nvidia-cuda-crt==13.0.88
CUDA_CCCL=nvidia-cuda-cccl==13.0.85

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

version_of() { # libtorch folder -> version without build suffix ("2.11.0")
    if [ -f "$1/build-version" ]; then cut -d+ -f1 "$1/build-version"
    elif [ -f "$1/version.py" ]; then sed -n "s/^__version__ = '\([0-9.]*\).*/\1/p" "$1/version.py"
    else echo unknown; fi
}

link() { # libtorch folder, where it came from
    [ -f "$1/lib/libtorch_cpu.so" ] || fail "$2: $1/lib/libtorch_cpu.so is missing; expected a libtorch $VERSION"
    found=$(version_of "$1")
    [ "$found" = "$VERSION" ] || fail "$2: found libtorch $found in $1, this project needs $VERSION; unset it to use the pinned one"
    if [ "$(readlink .libtorch 2>/dev/null || true)" != "$1" ]; then
        rm -f .libtorch
        ln -s "$1" .libtorch
    fi
    printf 'setup: libtorch %s (%s)\n' "$found" "$2"
}

if [ -n "${LIBTORCH_USE_PYTORCH:-}" ]; then
    folder=$(python3 -c 'import importlib.util as u, os; s = u.find_spec("torch"); print(os.path.dirname(s.origin) if s else "")')
    [ -n "$folder" ] || fail 'LIBTORCH_USE_PYTORCH is set, but the active python3 has no torch; install torch '"$VERSION"' or unset it'
    link "$folder" "LIBTORCH_USE_PYTORCH"
    exit 0
fi
if [ -n "${LIBTORCH:-}" ]; then
    link "$LIBTORCH" "LIBTORCH"
    exit 0
fi

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || [ "$(uname -s)-$(uname -m)" = Linux-aarch64 ] ||
    fail "no pinned libtorch for $(uname -s) $(uname -m): install torch $VERSION and set LIBTORCH_USE_PYTORCH=1"
flavour=cpu
if [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null 2>&1; then flavour=cuda; fi
cache="${XDG_CACHE_HOME:-$HOME/.cache}/lora"
target="$cache/libtorch-$VERSION-$flavour"
if [ "$flavour" = cuda ]; then wheels="torch==$VERSION $CUDA_CRT $CUDA_CCCL"
else wheels="--no-deps torch==$VERSION $CUDA_RUNTIME $CUDA_CUPTI $CUDA_CRT"; fi
# The marker says what is in there, so that a copy of an earlier version of this script is not taken for this one's.
complete() { [ "$(cat "$target/complete" 2>/dev/null || true)" = "$wheels" ]; }
if ! complete; then
    command -v python3 >/dev/null || fail 'python3 is missing: it is needed once, to fetch libtorch (or set LIBTORCH)'
    python3 -m pip --version >/dev/null 2>&1 || fail 'pip is missing (python3 -m pip): it is needed once, to fetch libtorch (or set LIBTORCH)'
    mkdir -p "$cache"
    partial=$(mktemp -d "$cache/partial.XXXXXX")
    trap 'rm -rf "$partial"' EXIT
    printf 'setup: fetching libtorch %s (%s) into %s, once\n' "$VERSION" "$flavour" "$target"
    pip="python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-compile --target $partial"
    $pip $wheels || fail "pip could not fetch $wheels"
    echo "$wheels" > "$partial/complete"
    # Another clone may have finished first: then its copy serves.
    complete || rm -rf "$target"
    mv -T "$partial" "$target" 2>/dev/null || complete || fail "could not move libtorch to $target"
fi
link "$target/torch" "$target"
