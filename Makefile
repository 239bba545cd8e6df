# Every target sets up .venv by itself; the stamp files make a second call quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST_STAMP := $(VENV)/.installed-test
DEV_STAMP := $(VENV)/.installed-dev
# One thread a process: two test processes on two cores are faster than one process with two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check bench quality docs clean

help:
	@echo "make demo       pre-train SimCLR on the built-in sample for a few minutes and show what it learned"
	@echo "make test       all tests but the slow ones (under 10 minutes on 2 cores)"
	@echo "make test-slow  all tests"
	@echo "make check      ruff and mypy"
	@echo "make bench      speed beside the peers, under 30 minutes (benchmarks/results.md)"
	@echo "make quality    what is learned, beside lightly, over an hour (benchmarks/results/quality.md)"
	@echo "make docs       draw the pictures in docs/ again"
	@echo "make clean      remove .venv and caches"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(TEST_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[test]"
	@touch $@

$(DEV_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@ $(TEST_STAMP)

# Without further arguments `train` runs the tiny recipe on the built-in sample and ends with its scores
# and the next command.
demo: $(TEST_STAMP)
	$(BIN)/hf-ssl train simclr

test: $(TEST_STAMP)
	$(PYTEST) -m "not slow"

test-slow: $(TEST_STAMP)
	$(PYTEST)

check: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(TEST_STAMP)
	$(BIN)/python -m pip install --quiet -e ".[benchmark]"
	$(BIN)/python benchmarks/speed.py

quality: $(TEST_STAMP)
	$(BIN)/python -m pip install --quiet -e ".[benchmark]"
	$(BIN)/python benchmarks/quality.py

docs: $(TEST_STAMP)
	@for script in $(wildcard docs/draw_*.py); do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
	find hf_ssl tests -name __pycache__ -prune -exec rm -rf {} +
