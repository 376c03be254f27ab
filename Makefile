# Two commands do all the set-up: `make train` and `make test`. Each makes .venv, or reuses it.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# For example PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" for PyTorch without CUDA.
PIP_FLAGS ?=
# For train and reproduce: a preset, flags, or both; for evaluate: flags. ARGS="--help" lists them.
ARGS ?=
# For evaluate and demo: a model's folder or Hub name.
MODEL ?= outputs/ddpm-fashion-mnist-quick

# Threads that spin while they wait hold up whatever else the machine does, and each other.
export OMP_WAIT_POLICY ?= PASSIVE

BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint $(CONSTRAINTS)

.PHONY: train evaluate reproduce demo bench docs tour test test-full test-rest coverage lint format test-oldest test-newest clean

train: $(VENV)/.train
	$(BIN)/ddpm train $(ARGS)

evaluate: $(VENV)/.metrics
	$(BIN)/ddpm evaluate $(MODEL) $(ARGS)

# Training and sampling beside stock diffusers, with the threads that PyTorch takes by itself.
bench: $(VENV)/.train
	$(BIN)/python benchmarks/speed.py $(ARGS)

# Trains, measures and documents the model of models/ anew; says first what that will take.
reproduce: $(VENV)/.metrics
	$(BIN)/python benchmarks/reproduce.py $(ARGS)

demo: $(VENV)/.demo
	$(BIN)/python demo/app.py $(MODEL) $(ARGS)

# The documentation as a site that needs no network. A warning is an error.
docs: $(VENV)/.docs
	rm -rf build/docs
	$(BIN)/python -m sphinx -q -W --keep-going -n docs build/docs
	@echo "The documentation is in build/docs: open build/docs/index.html."

# Runs the notebook and keeps its outputs in it.
tour: $(VENV)/.docs
	$(BIN)/python docs/make_tour.py

# The tests that take minutes together: every module, the maths, pipelines, pages, one real process of each command.
test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not full"

# All of them: every crash point, real processes in every combination, the browser, the site, the notebook.
test-full: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto --dist worksteal

# What test-full has beyond test.
test-rest: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m full

# Lines of the package that `make test` runs.
coverage: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not full" --cov=ddpm_from_scratch --cov-report=term

lint: $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The oldest versions that pyproject.toml allows, in an environment of its own.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# The newest versions that pip finds.
test-newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=/dev/null

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist src/*.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) --editable ".[train]"
	touch $@

$(VENV)/.metrics: $(VENV)/.train
	$(INSTALL) --editable ".[train,metrics]"
	touch $@

$(VENV)/.demo: $(VENV)/.train
	$(INSTALL) --editable ".[train,demo]"
	touch $@

$(VENV)/.docs: $(VENV)/.train
	$(INSTALL) --editable ".[train,docs]"
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(INSTALL) --editable ".[train,test]"
	touch $@

$(VENV)/.lint: $(VENV)/.train
	$(INSTALL) --editable ".[train,lint]"
	touch $@
