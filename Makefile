# `make demo` and `make test` are all a fresh machine needs: each makes .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench clean

demo: $(STAMP)
	$(BIN)/diffusers-offload demo $(ARGS)

# The simulated device stays registered in a process, so its tests have one of their own.
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)
	$(if $(ARGS),,$(BIN)/python -m pytest -n auto --dist worksteal tests/simulated)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)
	$(BIN)/python benchmarks/transformer_forward.py --case all $(ARGS)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo-output
