# make check    every invariant by every engine (`vapama check --help` has the options)
# make test     formatting, lint, types, imports, spelling, then the tests
# make lint     the same without the tests
# make bench    what a translation costs, beside other tools; installs those that PyPI has, and
#               leaves out what else is missing (Debian's libkdumpfile-dev, gcc), with the reason
# make lock     the lock files anew from pyproject.toml: keeps the pins that still fit;
#               with UV_FLAGS=--upgrade it takes the newest versions
# make clean    remove the environment and all that the tools leave behind
#
# The first of these sets up an environment, which later ones use again. PYTHON is the Python to
# make it with and VENV its folder. CHECK_ARGS, PYTEST_ARGS and BENCH_ARGS are passed on.

PYTHON ?= python3
VENV ?= .venv
UV ?= uv
# As many processes as there are processors.
PYTEST_ARGS ?= -n auto
LOCK = $(UV) pip compile pyproject.toml --quiet --no-config --universal --fork-strategy fewest \
    --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers

.PHONY: check test lint bench lock clean

check: $(READY)
	@$(BIN)/vapama check $(CHECK_ARGS)

test: lint
	@echo "pytest"
	@$(BIN)/pytest $(PYTEST_ARGS)

lint: $(READY)
	@echo "ruff check"
	@$(BIN)/ruff check --quiet .
	@echo "ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "mypy"
	@$(BIN)/mypy --no-error-summary
	@echo "lint-imports"
	@report=$$($(BIN)/lint-imports --no-logo) || { echo "$$report"; exit 1; }
	@echo "codespell"
	@$(BIN)/codespell

bench: $(PEERS)
	@$(BIN)/python bench/run.py $(BENCH_ARGS)

$(PEERS): $(READY) requirements-bench.lock
	@echo "installing what is measured"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes \
	    -r requirements-bench.lock
	@touch $@

$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	    echo "There is no $(PYTHON) here: name a Python, as in make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "vapama needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version):" \
	        "name another, as in make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) has no venv module: install it (Debian's package is python3-venv)," \
	        "or name another Python, as in make PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes \
	    -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps \
	    --editable .
	@touch $@

lock:
	@command -v $(UV) >/dev/null || { \
	    echo "make lock needs uv: pip install uv, or say where it is, as in make lock UV=/path" >&2; \
	    exit 1; }
	@$(LOCK) --output-file requirements.lock --extra atheris --extra unicorn --extra test \
	    --group build $(UV_FLAGS)
	@$(LOCK) --output-file requirements-bench.lock --extra bench --constraint requirements.lock \
	    $(UV_FLAGS)

clean:
	@rm -rf .venv build vapama.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	    .import_linter_cache .coverage
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
