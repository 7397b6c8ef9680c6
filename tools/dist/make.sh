#!/bin/sh
# One folder and archive that run on a machine with neither Rust nor Python nor a compiler: both programs, the libraries that they
# need, and what the quickstart reads. `make dist` calls it; tools/dist/prove.sh runs the result with nothing else around it.
#
#   tools/dist/make.sh            out/dist/lora-VERSION-SYSTEM-cpu and its .tar.xz
#   PROFILE=dev                   of the programs that `cargo build` makes without --release
#   ARCHIVE=no                    the folder alone
#
# Linux. libtorch is the one that `make setup` found, without its CUDA half, which is seven times as large.
set -eu
cd "$(dirname "$0")/../.."

fail() { printf 'dist: %s\n' "$*" >&2; exit 1; }

[ "$(uname -s)" = Linux ] || fail "archives are made on Linux"
PROFILE=${PROFILE:-release}
built=$PROFILE
[ "$PROFILE" != dev ] || built=debug
target="${CARGO_TARGET_DIR:-target}/$built"
libtorch=$(readlink -f "${LIBTORCH:-.libtorch}")
[ -f "$libtorch/lib/libtorch_cpu.so" ] || fail "there is no libtorch; run make setup"

# The example is there for the same features as in the Makefile's other targets. The programs are to find `lib` beside them alone.
LORA_RELOCATABLE=1 cargo build --profile "$PROFILE" --workspace --bin lora --bin lora-trainer --example quickstart

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)
name="lora-$version-linux-$(uname -m)-cpu"
folder="out/dist/$name"
rm -rf "$folder"
mkdir -p "$folder/lib" "$folder/examples" "$folder/assets/emoji-64"
cp "$target/lora" "$target/lora-trainer" LICENSE "$folder/"
strip "$folder/lora" "$folder/lora-trainer"

# All that is loaded with the program, but for the C library, which is the system's.
LD_LIBRARY_PATH="$libtorch/lib" ldd "$folder/lora-trainer" | while read -r library arrow path _; do
    case "$library" in
        ld-linux*|libc.so*|libm.so*|libdl.so*|librt.so*|libpthread.so*|libutil.so*|linux-vdso*|/*) continue ;;
    esac
    [ "$arrow" = "=>" ] && [ -f "$path" ] || fail "$library is needed and was not found"
    cp -L "$path" "$folder/lib/$library"
done
[ -f "$folder/lib/libtorch_cpu.so" ] || fail "the programs do not load libtorch"

for text in LICENSE NOTICE; do
    found=$(find "$libtorch"/../torch-*.dist-info "$libtorch" -maxdepth 2 -name "$text" 2>/dev/null | head -n 1)
    [ -z "$found" ] || cp "$found" "$folder/$text-libtorch"
done
number=$(sed -n 's/^pub const LIBTORCH: &str = "\(.*\)";$/\1/p' crates/lora-torch/src/lib.rs)
sed "s/@LIBTORCH@/$number/" tools/dist/README.txt > "$folder/README.txt"
cp examples/quickstart.toml "$folder/examples/"
cp -R assets/quickstart "$folder/assets/"
cp assets/emoji-64/*.safetensors assets/emoji-64/*.md "$folder/assets/emoji-64/"

glibc=$(objdump -T "$folder/lora" "$folder/lora-trainer" "$folder"/lib/* | grep -o 'GLIBC_[0-9.]*' | sort -V | tail -n 1)
printf 'dist: %s, %s, needs %s or later\n' "$folder" "$(du -sh "$folder" | cut -f 1)" "$glibc"
[ "${ARCHIVE:-yes}" = yes ] || exit 0
tar -C out/dist -c "$name" | xz -T0 > "$folder.tar.xz"
printf 'dist: %s, %s\n' "$folder.tar.xz" "$(du -h "$folder.tar.xz" | cut -f 1)"
