#!/bin/sh
# Finds or fetches ONNX Runtime, which taggers need, into the user's cache folder, where `lora` looks for it.
#
#   ORT_DYLIB_PATH=/path         use this library (libonnxruntime.so, or the folder with it): nothing is fetched
#   neither                      unpack the pinned PyPI wheel once; it computes on the CPU
set -eu

VERSION=1.32.0
# Of the wheels for Python 3.11; the library in them needs no Python.
SHA256_x86_64=5a34fc4dfeb5a7b4a74c95dcba1e773d722abda720b474edf1b0c419dc6d163d
SHA256_aarch64=2303372a85299b6757b0e11e1cbf13e410ddf7e10c37f4b37e99d1c90e7daf7c

fail() { printf 'setup-onnx: %s\n' "$*" >&2; exit 1; }
sum() { python3 -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"; }

if [ -n "${ORT_DYLIB_PATH:-}" ]; then
    [ -e "$ORT_DYLIB_PATH" ] || fail "ORT_DYLIB_PATH: there is no $ORT_DYLIB_PATH"
    printf 'setup-onnx: %s (ORT_DYLIB_PATH)\n' "$ORT_DYLIB_PATH"
    exit 0
fi
case "$(uname -s)-$(uname -m)" in
    Linux-x86_64) machine=x86_64 expected=$SHA256_x86_64 ;;
    Linux-aarch64) machine=aarch64 expected=$SHA256_aarch64 ;;
    *) fail "no pinned ONNX Runtime for $(uname -s) $(uname -m): pip install onnxruntime==$VERSION, and set ORT_DYLIB_PATH to its folder onnxruntime/capi" ;;
esac
cache="${XDG_CACHE_HOME:-$HOME/.cache}/lora"
target="$cache/onnxruntime-$VERSION"
if [ ! -f "$target/libonnxruntime.so" ]; then
    command -v python3 >/dev/null || fail 'python3 is missing: it is needed once, to fetch ONNX Runtime (or set ORT_DYLIB_PATH)'
    python3 -m pip --version >/dev/null 2>&1 || fail 'pip is missing (python3 -m pip): it is needed once, to fetch ONNX Runtime (or set ORT_DYLIB_PATH)'
    mkdir -p "$cache"
    partial=$(mktemp -d "$cache/partial.XXXXXX")
    trap 'rm -rf "$partial"' EXIT
    printf 'setup-onnx: fetching onnxruntime %s (28 MB) into %s, once\n' "$VERSION" "$target"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
        --python-version 3.11 --abi cp311 --platform "manylinux_2_28_$machine" --platform "manylinux_2_27_$machine" \
        --dest "$partial" "onnxruntime==$VERSION" || fail "pip could not fetch onnxruntime $VERSION"
    [ "$(sum "$partial"/onnxruntime-*.whl)" = "$expected" ] || fail "onnxruntime $VERSION is another file than expected"
    python3 -m zipfile -e "$partial"/onnxruntime-*.whl "$partial/wheel"
    mkdir "$partial/library"
    cp "$partial/wheel/onnxruntime/LICENSE" "$partial/wheel/onnxruntime/ThirdPartyNotices.txt" "$partial/library/"
    cp "$partial/wheel/onnxruntime/capi/libonnxruntime.so.$VERSION" "$partial/library/libonnxruntime.so"
    # Another clone may have finished first: then its copy serves.
    mv -T "$partial/library" "$target" 2>/dev/null || [ -f "$target/libonnxruntime.so" ] || fail "could not move it to $target"
fi
ln -sfn "$target" "$cache/onnxruntime"
printf 'setup-onnx: onnxruntime %s (%s)\n' "$VERSION" "$target"
