# The two commands that matter: `make demo` shows what opweave does, `make test` proves it. Each makes the
# environment first when it is missing; all they need is Python 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
RUN := $(BIN)/python -W ignore::SyntaxWarning

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check conformance bench gpu clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "opweave needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(VENV)/.installed ## compile two real networks, execute them, write pictures to out/demo/
	$(RUN) -m benchmarks.demo --out out/demo

test: $(VENV)/.installed ## run the tests (minutes)
	$(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal -m "not slow" -q

test-slow: $(VENV)/.installed ## run the slow tests too (tens of minutes)
	$(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal -q

check: $(VENV)/.installed ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

conformance: $(VENV)/.installed ## run ONNX's operator conformance cases
	$(RUN) -m benchmarks.conformance

bench: $(VENV)/.installed ## quick benchmarks; each also runs alone, see docs/benchmarks.md
	$(RUN) -m benchmarks.bench_residency --quick
	$(RUN) -m benchmarks.bench_address --quick
	$(RUN) -m benchmarks.bench_peak --quick
	$(RUN) -m benchmarks.bench_latency --quick
	$(RUN) -m benchmarks.bench_joint --quick
	$(RUN) -m benchmarks.bench_scaling --quick
	$(RUN) -m benchmarks.bench_backend --quick
	$(RUN) -m benchmarks.bench_memory_limit --quick
	$(RUN) -m benchmarks.bench_partition --quick
	$(RUN) -m benchmarks.bench_experts --quick
	$(RUN) -m benchmarks.bench_overlap --quick
	$(RUN) -m benchmarks.bench_overlap_solve --quick
	$(RUN) -m benchmarks.bench_torch_scheduler --quick
	$(RUN) -m benchmarks.bench_virtual_link --quick
	$(RUN) -m benchmarks.kernels --quick

gpu: $(VENV)/.installed ## check and measure on a GPU, nine minutes, results in out/gpu/
	$(RUN) -m benchmarks.gpu --out out/gpu

clean: ## remove the environment and everything made
	rm -rf $(VENV) out dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
