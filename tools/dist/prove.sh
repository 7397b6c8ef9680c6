#!/bin/sh
# Runs what `make dist` made where there is nothing else: a root folder with the C library and no other program, not even a shell.
#
#   tools/dist/prove.sh FOLDER|ARCHIVE [KEY=VALUE …]      settings of the run, such as epochs=1
#
# It trains the quickstart there and looks at what it left. Linux; needs no rights of root where user namespaces are allowed.
set -eu

fail() { printf 'prove: %s\n' "$*" >&2; exit 1; }

[ $# -ge 1 ] || fail "usage: tools/dist/prove.sh FOLDER|ARCHIVE [KEY=VALUE …]"
made=$1
shift
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root/lora" "$root/proc" "$root/tmp"
if [ -d "$made" ]; then cp -R "$made/." "$root/lora/"
else tar -C "$root/lora" --strip-components=1 -xf "$made"; fi

# The loader and the C library, each where programs look for it.
interpreter=$(ldd "$root/lora/lora" | sed -n 's/^[[:space:]]*\(\/[^ ]*ld-linux[^ ]*\).*/\1/p')
[ -n "$interpreter" ] || fail "no loader was found"
for library in "$interpreter" $(ldd /bin/sh "$root/lora/lora" | sed -n 's/.*=> \(\/[^ ]*\/lib\(c\|m\)\.so[^ ]*\).*/\1/p' | sort -u); do
    mkdir -p "$root$(dirname "$library")"
    cp -L "$library" "$root$library"
done
beside=$(dirname "$(ldd "$root/lora/lora" | sed -n 's/.*=> \(\/[^ ]*\/libc\.so[^ ]*\).*/\1/p')")
for library in libdl.so.2 librt.so.1 libpthread.so.0 libutil.so.1; do
    [ ! -f "$beside/$library" ] || cp -L "$beside/$library" "$root$beside/$library"
done

# Paths of the quickstart's configuration are relative to where a command is called, which is / in there.
ln -s lora/examples lora/assets "$root/"

run() { # a command of the folder
    printf '\n$ lora %s\n' "$*"
    # `sh` is gone once it has become the program.
    unshare --map-root-user --mount --pid --fork env -i PATH="$PATH" sh -c \
        'mount -t proc proc "$0/proc" && exec env -i LORA_LOG=info "$(command -v chroot)" "$0" /lora/lora "$@"' "$root" "$@"
}

run --version
run info assets/emoji-64/emoji-64.safetensors
settings=$#
while [ "$settings" -gt 0 ]; do
    set -- "$@" --set "$1"
    shift
    settings=$((settings - 1))
done
run train examples/quickstart.toml "$@"
run info out/quickstart/black_ink.safetensors
run doctor
printf '\nprove: it runs with the C library and nothing else\n'
