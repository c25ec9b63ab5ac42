# The commands of this repository. CI calls these and nothing else.

CARGO ?= cargo
PYTHON ?= python3
PORT ?= 3000
MODEL ?= smollm2
SECONDS ?= 60
TARGETS ?=
BIN := $(or $(CARGO_TARGET_DIR),target)/release

.DEFAULT_GOAL := help
.PHONY: help build model serve test fmt-check clippy tidy check fuzz bench-decode bench-start bench-streams nvcc kernels gpu-kit

help: ## Show the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

build: ## Build the four programs (release)
	$(CARGO) build --release --locked

model: ## Fetch SmolLM2-135M-Instruct (93 MB) into ~/.cache/quartet
	@$(PYTHON) scripts/fetch_smollm2.py > /dev/null

serve: build ## Build, fetch SmolLM2-135M-Instruct and serve it (PORT=3000, MODEL=path or Hub id)
	@$(PYTHON) scripts/fetch_smollm2.py > /dev/null
	@printf '\nOnce it says Connected, try:\n\n  %s\n\n' \
	  "curl -s localhost:$(PORT)/v1/chat/completions -H 'Content-Type: application/json' -d '{\"model\": \"tgi\", \"messages\": [{\"role\": \"user\", \"content\": \"What is gravity?\"}], \"max_tokens\": 64}'"
	@model='$(MODEL)'; [ "$$model" != smollm2 ] || model="$$($(PYTHON) scripts/fetch_smollm2.py)"; \
	  exec $(BIN)/launcher --model-id "$$model" --port $(PORT)

test: build model ## Run every test, the end-to-end tests on the real model included
	$(CARGO) test --release --locked --workspace

fmt-check:
	$(CARGO) fmt --all --check

clippy:
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

tidy: ## Check the invariants of ARCHITECTURE.md
	$(CARGO) xtask tidy

check: fmt-check tidy clippy ## Formatting, invariants and lints

fuzz: ## Fuzz what reads files and requests, guided by coverage (SECONDS=60 of each, TARGETS=all)
	$(PYTHON) fuzz/run.py --seconds $(SECONDS) $(TARGETS)

nvcc: target/nvcc/nvidia/cu13/bin/nvcc ## Install the CUDA compiler from PyPI into target/nvcc (270 MB); builds after it have CUDA kernels

target/nvcc/nvidia/cu13/bin/nvcc:
	@sh scripts/install_nvcc.sh target/nvcc
	@touch shard/kernels/build.rs # cargo does not see that there is a compiler now

kernels: nvcc ## Compile every CUDA kernel for every architecture
	$(CARGO) build --release --locked -p kernels

gpu-kit: nvcc ## Pack programs, tests and benches for a machine with a GPU into gpu-kit/ (run gpu-kit/run.sh there)
	CARGO='$(CARGO)' sh scripts/gpu_kit.sh

bench-decode: build model ## Decode speed on the CPU, beside llama.cpp's where its Python package is installed
	$(PYTHON) scripts/bench_decode.py --bin $(BIN)

bench-start: build model ## Time from the launcher's start to /health 200, and peak memory
	$(PYTHON) scripts/bench_start.py --bin $(BIN)

bench-streams: build ## Tokens per second over 64 HTTP streams on the tiny model
	$(CARGO) build --release --locked -p integration-tests --examples
	$(BIN)/examples/stream_load
