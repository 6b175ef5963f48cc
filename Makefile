# make demo | test | test-fast | test-processors | lint | docs | install: each first makes the virtual environment .venv,
# with the tested versions (CONSTRAINTS=FILE takes others). make gpu-check uses the machine's own Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest --timeout 900
WORKERS ?= 2
CONSTRAINTS ?= constraints.txt
# facenet-pytorch runs with today's torch, numpy and Pillow, but its metadata forbids them
FACENET := facenet-pytorch==2.6.0

# the tests of what depends on the processor's instructions: golden values, ops, resume, determinism
PROCESSOR_TESTS := tests/parity $(addprefix tests/ops/test_,frozen_conv.py library.py training_ops.py winograd.py) \
	tests/integration/test_resume.py tests/integration/test_determinism.py
CPUINFO := /proc/cpuinfo

.PHONY: help install demo test test-fast test-processors results results-training gpu-check lint docs clean

help:
	@echo "make install  virtual environment in $(VENV), package in editable mode"
	@echo "make demo     the trained networks on drawn faces, style mixing, a short training: one page, a few minutes"
	@echo "make test     the whole test suite; ARGS=... adds options of pytest, WORKERS=2 sets the processes"
	@echo "make test-fast  the tests without the slow ones, in two minutes"
	@echo "make test-processors  some tests as on other processors: with AVX2 only, and with AVX512 without AMX"
	@echo "make results  measures the shipped networks again and writes docs/results.md, in about 20 minutes"
	@echo "make results-training  trains and measures the ablation and other encoders; takes hours and continues"
	@echo "make gpu-check  on a machine with a GPU: builds and checks the CUDA kernels, writes gpu_check/report.md"
	@echo "make lint     ruff and mypy"
	@echo "make docs     the documentation as a site: site/index.html"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, set PYTHON=") if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(FACENET)
	touch $@

demo: install
	$(BIN)/psp-demo out=demo

test: install
	$(PYTEST) -n $(WORKERS) -m "not serial" $(ARGS)
	$(PYTEST) -m serial $(ARGS)

test-fast: install
	$(PYTEST) -n $(WORKERS) -m "not serial and not slow" $(ARGS)

# STRICT, because the tests compare bit for bit
test-processors: install
	@if grep -qw avx2 $(CPUINFO) 2>/dev/null; then \
	  echo "as a processor with AVX2 only"; \
	  ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2,STRICT \
	    $(PYTEST) $(PROCESSOR_TESTS); \
	else echo "AVX2 only: skipped, this processor has no AVX2"; fi
	@if grep -qw amx_tile $(CPUINFO) 2>/dev/null; then \
	  echo "as a processor with AVX512 without AMX"; \
	  ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 ATEN_CPU_CAPABILITY=avx512 MKL_CBWR=AVX512,STRICT \
	    $(PYTEST) $(PROCESSOR_TESTS); \
	else echo "AVX512 without AMX: skipped, this processor has no AMX, make test used all that it has"; fi

results: install
	$(BIN)/python -m benchmarks.toyfaces.results

results-training: install
	$(BIN)/python -m benchmarks.toyfaces.results --training

# without the virtual environment: it needs the Python whose PyTorch has CUDA
gpu-check:
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu_check

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the variable turns off an advertisement of the theme's successor
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean

clean:
	rm -rf $(VENV) build dist site demo demo_* .pytest_cache .mypy_cache .ruff_cache
