# Everything below sets itself up in .venv; nothing outside this folder and the cache is touched.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# Two at a time, a thread each; the tests of a file stay together.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile

.PHONY: demo test test-full check faults mutants bench bench-peers clean

# torch first and by its exact version: an unpinned torch can bring several GB of CUDA libraries.
$(VENV)/.base: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q torch==2.13.0
	$(PIP) install -q -c constraints.txt -e .
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) install -q -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) install -q -c constraints.txt -e '.[dev,demo]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/loratune demo $(ARGS)

test: $(VENV)/.dev
	$(PYTEST) -m "not full"

test-full: $(VENV)/.dev
	$(PYTEST)

# Every crash point, 200 runs killed, every byte flipped: some ten minutes. Figures go to bench/results/faults.jsonl.
faults: $(VENV)/.dev
	rm -f bench/results/faults.jsonl
	LORATUNE_FAULTS=full LORATUNE_FAULTS_FIGURES=bench/results/faults.jsonl $(BIN)/python -m pytest -q tests/faults

# 300 small faults in the code, each to be noticed by the tests of its area: hours; goes on where it was interrupted.
mutants: $(VENV)/.dev
	$(BIN)/python tests/faults/mutants.py $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check src tests examples bench
	$(BIN)/ruff format --check src tests examples bench
	$(BIN)/pyright
	$(PYTEST) -m "not slow and not model and not full"

bench: $(VENV)/.dev
	$(BIN)/python bench/run.py --only "$(ONLY)" $(if $(REPEATS),--repeats $(REPEATS))

# TRL, torchtune and LitGPT, for the benchmark, each in an environment of its own
bench-peers: $(VENV)/.dev
	$(PYTHON) -m venv bench/.venv-trl
	bench/.venv-trl/bin/pip install -q torch==2.13.0
	bench/.venv-trl/bin/pip install -q -c constraints.txt -e '.[demo]' peft trl==1.16.0
	$(PYTHON) -m venv bench/.venv-torchtune
	bench/.venv-torchtune/bin/pip install -q torch==2.13.0 torchtune==0.6.1 torchao==0.9.0
	$(PYTHON) -m venv bench/.venv-litgpt
	bench/.venv-litgpt/bin/pip install -q torch==2.13.0 litgpt==0.5.13
	$(BIN)/python bench/work.py bench/.llama_rows.json

clean:
	rm -rf $(VENV) build dist src/*.egg-info
