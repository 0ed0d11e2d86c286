# make check   every invariant by every engine (see `vapama check --help`)
# make test    formatting, lint, types, import contracts, spelling, tests
# make lint    the same without the tests
# make lock    requirements.lock anew from pyproject.toml; keeps the pins that still fit,
#              UV_FLAGS=--upgrade takes the newest versions
# make clean   remove the environment and everything that tools left
#
# PYTHON is the Python to set up with, VENV where; PYTEST_ARGS and CHECK_ARGS are passed on.

PYTHON ?= python3
VENV ?= .venv
UV ?= uv
UV_FLAGS ?=
PYTEST_ARGS ?=
CHECK_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
CODE := spec impl proofs fuzz oracles bugs bench tests vapama

MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.PHONY: check test lint lock clean

check: $(READY)
	@$(BIN)/vapama check $(CHECK_ARGS)

test: lint
	@$(BIN)/pytest $(PYTEST_ARGS)

lint: $(READY)
	@echo "ruff check"; $(BIN)/ruff check --quiet .
	@echo "ruff format"; $(BIN)/ruff format --check --quiet .
	@echo "mypy"; $(BIN)/mypy --no-error-summary
	@echo "lint-imports"; $(BIN)/lint-imports --no-logo
	@echo "codespell"; $(BIN)/codespell
