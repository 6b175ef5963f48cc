# make demo | test | test-fast | lint | install: each makes the virtual environment .venv first, with the tested versions.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest --timeout 900
WORKERS ?= 2
# facenet-pytorch runs with today's torch, numpy and Pillow, but its metadata forbids them
FACENET := facenet-pytorch==2.6.0

.PHONY: help install demo test test-fast lint clean

help:
	@echo "make install  virtual environment in $(VENV), package in editable mode"
	@echo "make demo     all four trained tasks on drawn faces, style mixing, a short training: one page, a few minutes"
	@echo "make test     the whole test suite; ARGS=... adds options of pytest, WORKERS=2 sets the processes"
	@echo "make test-fast  without the slow tests, in two minutes"
	@echo "make lint     ruff and mypy"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, set PYTHON=") if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(FACENET)
	touch $@

demo: install
	$(BIN)/psp-demo out=demo

test: install
	$(PYTEST) -n $(WORKERS) -m "not serial" $(ARGS)
	$(PYTEST) -m serial $(ARGS)

test-fast: install
	$(PYTEST) -n $(WORKERS) -m "not serial and not slow" $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist demo demo_* .pytest_cache .mypy_cache .ruff_cache
