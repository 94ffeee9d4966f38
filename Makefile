# The environment is made by whichever target needs it first, and again when the versions it is made of change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DALI := $(VENV)/.installed-dali
SITE := $(VENV)/.installed-site
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VERSION = import sys; print("%d.%d" % sys.version_info[:2])
FOUND = $(shell $(PYTHON) -c '$(VERSION)' 2>/dev/null || echo none)

.PHONY: help environment demo test test-slow test-long check docs site constraints clean

help:
	@echo 'make demo         the whole recipe, small, on this machine'
	@echo 'make test         the tests that take seconds'
	@echo 'make test-slow    the tests that take minutes'
	@echo 'make test-long    fifty kills, two thousand steps, jobs that SLURM queues again'
	@echo 'make check        lint, format, types, import rules, scripts, Dockerfiles'
	@echo 'make docs         write docs/configuration.md from the schema, and what docs/plan.md prints, in minutes'
	@echo 'make site         build the documentation into site/, to be read without a network'
	@echo 'make constraints  write the versions of this environment into constraints.txt'
	@echo 'make clean        remove the environment and what tools left behind'
	@echo 'PYTHON=python3.12 before or after any of these picks the Python (3.11 or 3.12)'

environment: $(STAMP)

demo: $(STAMP)
	$(BIN)/pivot demo

test: $(STAMP)
	$(BIN)/pytest -m "not slow and not long"

test-slow: $(DALI)
	$(BIN)/pytest -m slow

test-long: $(STAMP)
	$(BIN)/pytest -m long

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/shellcheck -x launch/*.sh launch/env/*.sh docker/*.sh tools/*.sh .ci/run
	$(BIN)/hadolint docker/*.Dockerfile

docs: $(STAMP)
	$(BIN)/python -m pivot_megatron.config.document > docs/configuration.md.part
	mv docs/configuration.md.part docs/configuration.md
	$(BIN)/python -m pivot_megatron.plan.document docs/plan.md

# What material says of a later mkdocs is no matter of ours: the version is pinned.
site: export NO_MKDOCS_2_WARNING := 1
site: $(SITE)
	$(BIN)/mkdocs build --strict
	@echo site/index.html

constraints: $(DALI) $(SITE)
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,dali,tracking,docs]'
	$(BIN)/python tools/constraints.py constraints.txt
	touch $(STAMP) $(DALI) $(SITE)

# An environment of another Python, or one whose making was cut short, is made anew.
$(STAMP): pyproject.toml constraints.txt
	$(if $(filter 3.11 3.12,$(FOUND)),,$(error expected Python 3.11 or 3.12 as $(PYTHON), found $(FOUND): name another, as in: make $(or $(MAKECMDGOALS),environment) PYTHON=python3.12))
	@test "$$($(BIN)/python -c 'import pip; $(VERSION)' 2>/dev/null)" = $(FOUND) || $(PYTHON) -m venv --clear $(VENV)
	@echo 'installing into $(VENV) with Python $(FOUND): some minutes the first time'
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

# Beside torch as it stands: DALI brings 600 MB of its own, which only the slow tests need.
$(DALI): $(STAMP)
	@echo 'installing NVIDIA DALI into $(VENV)'
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,dali]'
	@touch $@

$(SITE): $(STAMP)
	@echo 'installing mkdocs into $(VENV)'
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,docs]'
	@touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
