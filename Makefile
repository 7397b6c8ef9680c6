# Everything that a fresh machine needs: Rust, a C++ compiler, Python 3 with pip (once, to fetch libtorch), make.

.DEFAULT_GOAL := help
.PHONY: help setup setup-onnx quickstart quickstart-text build dist test lint bench peers gpu gpus docs book clean

# Where cargo builds.
TARGET := $${CARGO_TARGET_DIR:-target}
# A Python with torch, diffusers and peft, for `make peers`.
PYTHON ?= python3
# Which model it steps: sd1, sdxl, z_image, flux or sd3.
MODEL ?= sd1

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

setup: ## Find or fetch libtorch (once; clones share it)
	@sh tools/setup-libtorch.sh

setup-onnx: ## Find or fetch ONNX Runtime, which taggers need (once; clones share it)
	@sh tools/setup-onnxruntime.sh

# Cargo chooses features of shared crates by all packages that it is told of (hence --workspace, never -p), and by those of tests
# where an example is among what it builds (hence the example in `build`): so every target here finds what another has compiled.
build: setup ## Build the command: target/release/lora, and lora-trainer, which it becomes to train
	cargo build --release --workspace --bin lora --bin lora-trainer --example quickstart

dist: setup ## Make an archive that trains on a machine without Rust and Python: out/dist; tools/dist/prove.sh tries it
	@sh tools/dist/make.sh

quickstart: setup ## Train a LoRA on the pictures in the repository
	cargo build --release --workspace --example quickstart
	"$(TARGET)/release/examples/quickstart"

quickstart-text: setup ## Teach a small language model a voice (fetches a base of 93 MB once)
	@sh tools/fetch-smollm2.sh
	cargo build --release --workspace --example llm
	"$(TARGET)/release/examples/llm"

test: setup setup-onnx ## Run all tests
	cargo test --workspace --all-targets
	cargo test --workspace --doc

lint: setup ## Check format, lints and documentation, warnings as errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --quiet

bench: setup ## Run the benches (criterion)
	cargo bench --workspace --bench adapters --bench training --bench data --bench texts

peers: setup ## Training steps beside diffusers + PEFT, as a table; PYTHON=… is one that has them, MODEL=sdxl, z_image, flux or sd3 others
	cargo build --release --workspace --bin training_step
	$(PYTHON) tools/bench/side_by_side.py "$(TARGET)/release/training_step" --model $(MODEL)

gpu: setup ## On a machine with a GPU: the tests of whole runs and the benches, on CUDA
	cargo test -p lora-train-torch
	NVIDIA_TF32_OVERRIDE=0 LORA_TEST_DEVICE=cuda cargo test --workspace --test session --test data --test plugins --test low_memory --test step_operations
	LORA_BENCH_FULL=1 cargo bench --workspace --bench training

gpus: setup build ## On a machine with several GPUs: ranks against one process, and pictures a second by number of ranks
	cargo test -p lora-train-torch --test group
	NVIDIA_TF32_OVERRIDE=0 LORA_TEST_DEVICE=cuda cargo test --workspace --test ranks
	python3 tools/bench/ranks.py lora="$(TARGET)/release/lora" device=cuda ranks=1,2

docs: setup ## Build the API documentation into target/doc
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

book: ## Build the documentation for users into out/book (needs mdbook: cargo install mdbook)
	@command -v mdbook >/dev/null || { echo "make book: mdbook is not installed; cargo install mdbook" >&2; exit 1; }
	mdbook build

clean: ## Remove what was built and drawn
	cargo clean
	rm -rf out
