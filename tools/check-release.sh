#!/bin/sh
# What a release needs and every change keeps: packages without a warning, licences, documentation as docs.rs builds it,
# dependencies that the minimum Rust version compiles.
set -eu
cd "$(dirname "$0")/.."

# Tests travel with a package as they are; their golden files stay in the repository.
echo "packages"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
cargo package --workspace --exclude lora-benches --exclude lora-examples --exclude lora-example-candle --exclude lora-tools \
    --locked --no-verify --allow-dirty >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
if grep -q '^warning' "$log"; then
    cat "$log" >&2
    echo "check-release: cargo package warns" >&2
    exit 1
fi

echo "licences and sources"
command -v cargo-deny >/dev/null || cargo install --quiet --locked --version 0.20.2 cargo-deny
cargo deny --offline --log-level error check --hide-inclusion-graph licenses bans sources

echo "minimum Rust version of dependencies"
cargo metadata --locked --format-version 1 | python3 -c '
import json, sys
packages = json.load(sys.stdin)["packages"]
number = lambda text: tuple(int(part) for part in (text.split(".") + ["0"])[:2])
ours = next(p["rust_version"] for p in packages if p["name"].startswith("lora-"))
later = [p for p in packages if p.get("rust_version") and number(p["rust_version"]) > number(ours)]
sys.exit("\n".join("{name} {version} needs Rust {rust_version}".format(**p) for p in later) or 0)'

# docs.rs has no libtorch: its documentation is built with the feature `doc-only`.
echo "documentation without libtorch"
LIBTORCH=/nonexistent RUSTDOCFLAGS="-D warnings" cargo doc --locked --quiet --no-deps --target-dir target/docs-rs \
    -p lora-train-torch -p lora-train-models -p lora-train --features lora-train/doc-only
