# SPDX-License-Identifier: Apache-2.0
# `make` lists what there is. Each NeMo version has an environment of its own; an install that was cut short is redone.

# A tested NeMo is one that has a file of pins; the range is in pyproject.toml.
TESTED_NEMO := $(patsubst requirements/constraints-%.txt,%,$(sort $(wildcard requirements/constraints-*.txt)))
NEMO ?= $(lastword $(TESTED_NEMO))
ifneq ($(words $(NEMO)) $(filter-out $(TESTED_NEMO),$(NEMO)),1 )
$(error NEMO=$(NEMO) is not a tested version; use one of: $(TESTED_NEMO))
endif

# The pins were tested on Python 3.11: take it where there is one.
PYTHON_BOOTSTRAP ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
# NEWEST=1 takes the newest packages that NeMo and this project allow, in place of the pins.
NEWEST ?=
VENV ?= .venv/nemo-$(NEMO)$(if $(NEWEST),-newest)
PYTHON := $(VENV)/bin/python
CONSTRAINTS := requirements/constraints-$(NEMO).txt
TESTS ?= tests
# One thread for each of several test processes: the tests' tensors are too small to share among threads.
JOBS ?= $(shell nproc)
PYTEST_ARGS ?=
# RANDOM=1 lets Hypothesis try new examples; with CI set it tries the same ones in each run.
export RANDOM_EXAMPLES := $(RANDOM)
BENCH ?=
GPU_CHECK ?=
SOURCES := $(wildcard src nemo examples tests benchmarks docs .ci setup.py)

# The stamps are named after what they stand for: other pins, another packaging or another place mean another stamp.
REQUIREMENTS := $(CONSTRAINTS) requirements/test.txt
REQUIREMENTS_STAMP := $(VENV)/.requirements-$(shell cat $(REQUIREMENTS) | cksum | cut -d' ' -f1)
PROJECT_STAMP := $(VENV)/.project-$(shell { cat $(REQUIREMENTS) setup.py; sed "/^\[tool.ruff\]/,\$$d" pyproject.toml; pwd; } | cksum | cut -d' ' -f1)
UNFINISHED := $(VENV).unfinished
AUDIT_VENV := .venv/audit
WORKFLOWS_VENV := .venv/workflows
RELEASE_VENV := .venv/release
DOCS_VENV := .venv/docs
DOCS_STAMP := $(DOCS_VENV)/.requirements-$(shell cksum < requirements/docs.txt | cut -d' ' -f1)
SITE := docs/_build
TUTORIAL := tutorials/asr/Streaming_SSL_Pretraining.ipynb
OWN_VENV := $(filter file,$(origin VENV))
PIP_QUIET := $(if $(CI),--quiet)

export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Without its .pyc files NeMo takes half a minute to import, in every process anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test coverage pretrain bench gpu-check lint format audit release docs clean

help: ## list the targets
	@echo "Targets, each with NEMO= one of $(TESTED_NEMO) (now $(NEMO)):"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'
	@echo "The environment is $(VENV) (VENV=... for another), made with $(PYTHON_BOOTSTRAP) (PYTHON_BOOTSTRAP=...)."

venv: $(PROJECT_STAMP) ## make the environment: NeMo, everything for tests and demo, this project (editable)

test: $(PROJECT_STAMP) ## run the tests (TESTS=path, PYTEST_ARGS=... to narrow them)
	@echo "== Running the tests with NeMo $(NEMO)"
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(JOBS) --dist worksteal $(TESTS) $(PYTEST_ARGS)

coverage: $(PROJECT_STAMP) ## run the tests and measure branch coverage: coverage.xml
	@echo "== Measuring the branch coverage of the tests with NeMo $(NEMO)"
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(JOBS) --dist worksteal $(TESTS) $(PYTEST_ARGS) \
		--cov --cov-report=term:skip-covered --cov-report=xml

pretrain: $(PROJECT_STAMP) ## pre-train the demo model (CONFIG=..., MANIFEST=..., VAL_MANIFEST=...)
	@echo "== Pre-training the demo model with NeMo $(NEMO)"
	$(PYTHON) examples/asr/speech_pretraining/pretrain_demo.py $(if $(CONFIG),--config "$(CONFIG)") \
		$(if $(MANIFEST),--manifest "$(MANIFEST)") $(if $(VAL_MANIFEST),--validation-manifest "$(VAL_MANIFEST)")

bench: $(PROJECT_STAMP) ## time the training step against stock NeMo, half an hour (BENCH=... for the script's arguments)
	@echo "== Timing a training step and its parts with NeMo $(NEMO)"
	$(PYTHON) benchmarks/training_step.py $(BENCH)

gpu-check: $(PROJECT_STAMP) ## on a machine with a GPU: its tests, benchmarks and a report (GPU_CHECK=... for arguments)
	@echo "== Checking what needs a GPU with NeMo $(NEMO)"
	$(PYTHON) .ci/gpu_check.py $(GPU_CHECK)

lint: $(PROJECT_STAMP) ## check format and style (ruff), types (mypy), imports, scripts and workflows
	@echo "== Checking the formatting of $(SOURCES)"
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m ruff check $(SOURCES)
	@echo "== Checking types"
	$(PYTHON) -m mypy
	@echo "== Checking which way the imports of the patch set point"
	$(PYTHON) .ci/import_contract.py
	@echo "== Checking that every file compiles and every script shows its help"
	$(PYTHON) .ci/check_scripts.py $(wildcard src nemo examples tests benchmarks docs .ci)
	@echo "== Checking the workflows"
	@test -x $(WORKFLOWS_VENV)/bin/check-jsonschema || { $(PYTHON_BOOTSTRAP) -m venv $(WORKFLOWS_VENV) && \
		$(WORKFLOWS_VENV)/bin/python -m pip install --quiet -r requirements/workflows.txt; } || \
		{ echo "lint: THE WORKFLOWS WERE NOT CHECKED: check-jsonschema cannot be installed here"; exit 0; }
	@test ! -x $(WORKFLOWS_VENV)/bin/check-jsonschema || \
		$(WORKFLOWS_VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(PROJECT_STAMP) ## format the sources
	$(PYTHON) -m ruff check --fix $(SOURCES)
	$(PYTHON) -m ruff format $(SOURCES)

audit: ## check the pinned packages for known vulnerabilities (prints a note if the service cannot be reached)
	@echo "== Checking $(CONSTRAINTS) for known vulnerabilities"
	@test -x $(AUDIT_VENV)/bin/pip-audit || { $(PYTHON_BOOTSTRAP) -m venv $(AUDIT_VENV) && \
		$(AUDIT_VENV)/bin/python -m pip install --quiet -r requirements/audit.txt; } || \
		{ echo "audit: NOTHING WAS CHECKED: pip-audit cannot be installed here"; exit 0; }
	@test ! -x $(AUDIT_VENV)/bin/pip-audit || $(AUDIT_VENV)/bin/python .ci/audit.py $(CONSTRAINTS)

release: $(PROJECT_STAMP) ## build sdist and wheel in dist/ and check them, see docs/releasing.md
	@echo "== Building sdist and wheel"
	@test -x $(RELEASE_VENV)/bin/twine || { $(PYTHON_BOOTSTRAP) -m venv $(RELEASE_VENV) && \
		$(RELEASE_VENV)/bin/python -m pip install --quiet -r requirements/release.txt; }
	rm -rf build dist src/*.egg-info
	$(RELEASE_VENV)/bin/python -m build --no-isolation --outdir dist .
	$(RELEASE_VENV)/bin/twine check --strict dist/*
	$(PYTHON) .ci/licences.py $(CONSTRAINTS) > dist/licences-$(NEMO).md

docs: docs/tutorial.ipynb $(DOCS_STAMP) ## build the site, docs/_build/html; the tutorial is run for it where it changed
	@echo "== Building the site in $(SITE)/html"
	rm -rf $(SITE) docs/api
	$(DOCS_VENV)/bin/sphinx-build -q -W --keep-going -b html docs $(SITE)/html
	@echo "== Checking public names and links"
	@$(DOCS_VENV)/bin/sphinx-build -q -b linkcheck docs $(SITE)/linkcheck > $(SITE)/linkcheck.txt 2>&1 || true
	$(DOCS_VENV)/bin/python .ci/check_site.py $(SITE)/html $(SITE)/linkcheck

clean: ## remove the environments and what builds and tests leave
	rm -rf .venv build dist src/*.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .coverage* coverage.xml $(SITE) docs/api docs/public_api.md docs/tutorial.ipynb
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# A mark stands beside the environment from the first step to the last: a half-made one is cleared, never repaired.
# An environment that the user names (VENV=...) is never cleared. Modules are compiled when first imported: compiling
# all of them takes a third of the install, and most are never used.
$(REQUIREMENTS_STAMP):
	@echo "== Making $(VENV) with NeMo $(NEMO), $$($(PYTHON_BOOTSTRAP) --version) (one to two minutes)"
	@$(PYTHON_BOOTSTRAP) -c 'import sys; sys.version_info[:2] == (3, 11) or print("Note: the pins were tested on Python 3.11 only")'
	@mkdir -p $(dir $(VENV))
	@rm -f $(VENV)/.requirements-* $(VENV)/.project-*
	@test ! -e $(UNFINISHED) || echo "== An earlier install did not finish: starting afresh"
	clear=$$(test ! -e $(UNFINISHED) || echo --clear); $(if $(OWN_VENV),touch $(UNFINISHED);) \
		$(PYTHON_BOOTSTRAP) -m venv $$clear $(VENV)
	$(PYTHON) -m pip install $(PIP_QUIET) --no-compile $(if $(NEWEST),,-c $(CONSTRAINTS)) "nemo_toolkit[asr]==$(NEMO)" \
		-r requirements/test.txt
	@touch $@
	@rm -f $(UNFINISHED)

$(PROJECT_STAMP): $(REQUIREMENTS_STAMP)
	@echo "== Installing this project into $(VENV) (editable)"
	@rm -f $(VENV)/.project-*
	$(PYTHON) -m pip install $(PIP_QUIET) --no-deps --no-build-isolation --editable .
	$(PYTHON) -m nemo_streaming_ssl
	@touch $@

docs/tutorial.ipynb: $(TUTORIAL) docs/run_tutorial.py $(shell find nemo examples -name '*.py' -o -name '*.yaml') | $(PROJECT_STAMP)
	@echo "== Running the tutorial with NeMo $(NEMO) (some minutes)"
	$(PYTHON) docs/run_tutorial.py

$(DOCS_STAMP): requirements/docs.txt
	@echo "== Making $(DOCS_VENV)"
	@rm -f $(DOCS_VENV)/.requirements-*
	$(PYTHON_BOOTSTRAP) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet -r requirements/docs.txt
	@touch $@
