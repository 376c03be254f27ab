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

BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint $(CONSTRAINTS)

.PHONY: train evaluate reproduce demo bench docs tour test test-full lint format test-oldest clean

train: $(VENV)/.train
	$(BIN)/accelerate launch --num_machines 1 --mixed_precision no --dynamo_backend no training/train.py $(ARGS)

evaluate: $(VENV)/.metrics
	$(BIN)/accelerate launch --num_machines 1 --mixed_precision no --dynamo_backend no training/evaluate.py $(MODEL) $(ARGS)

# Training and sampling beside stock diffusers, with the threads that PyTorch takes by itself.
bench: $(VENV)/.train
	$(BIN)/python benchmarks/speed.py $(ARGS)

# Trains, measures and documents the model of models/ anew; says first what that will take.
reproduce: $(VENV)/.metrics
	$(BIN)/python training/reproduce.py $(ARGS)

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

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto

# With every crash point and more random kills.
test-full: $(VENV)/.test
	FULL_TESTS=1 $(BIN)/python -m pytest -q -n auto

lint: $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The oldest versions that pyproject.toml allows, in an environment of its own.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

clean:
	rm -rf .venv .venv-oldest build dist src/*.egg-info

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
