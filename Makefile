# `make run` sets up and runs a whole night; `make test` sets up and passes the tests; `make` lists the targets.

# The environment is .venv. Another Python, as in `make test PYTHON=python3.12`, has one of its own beside it.
ifdef PYTHON
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
else
PYTHON := python3
VENV := .venv
endif
BIN := $(VENV)/bin
INSTALL := $(BIN)/python infra/install.py

.DEFAULT_GOAL := help
.PHONY: help run check test bench screenshots lock clean

help:
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' Makefile

run: $(VENV)/run.stamp ## sets up, starts the local stack and runs a whole night
	@echo "Everything is set up in $(VENV): a night begins."
	@$(BIN)/nightly up
	@$(BIN)/nightly run digits-mlp

# What one runs before each commit: all but the tests that start a process, or compute for long.
check: $(VENV)/test.stamp ## sets up and runs what is checked before each commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/unit -m 'not process and not slow' -n 2 --quiet

# Three processes: whole nights, which mostly wait, beside everything else. One thread each, or torch's threads fight.
# Which tests stay together in one of them, tests/distribution.py says.
test: $(VENV)/test.stamp ## sets up and runs everything that must pass; PYTHON=python3.12 in another Python
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 20

bench: $(VENV)/bench.stamp ## measures; ONLY=search one suite
	$(BIN)/python -m tests.benchmarks --only $(or $(ONLY),all)

screenshots: $(VENV)/test.stamp ## takes the README's pictures anew
	NIGHTLY_PICTURES=tests/browser/pictures $(BIN)/pytest tests/browser

# What a plain user needs is in requirements.lock. What only tests or benchmarks need lies beside them.
INSTALLED_FROM := pyproject.toml requirements.lock infra/cuda.lock infra/install.py

$(VENV)/run.stamp: $(INSTALLED_FROM) | $(BIN)/pip
	@echo "Installing the locked packages into $(VENV) (some minutes, where they must be downloaded)"
	@$(INSTALL) requirements.lock
	@touch $@

$(VENV)/test.stamp: $(INSTALLED_FROM) tests/requirements.lock | $(BIN)/pip
	@echo "Installing the locked packages and the test tools into $(VENV) (some minutes, where they must be downloaded)"
	@$(INSTALL) requirements.lock tests/requirements.lock
	@touch $@ $(VENV)/run.stamp

$(VENV)/bench.stamp: $(INSTALLED_FROM) tests/benchmarks/requirements.lock | $(BIN)/pip
	@echo "Installing the locked packages and what the benchmarks compare with into $(VENV)"
	@$(INSTALL) requirements.lock tests/benchmarks/requirements.lock
	@touch $@ $(VENV)/run.stamp

# pip is what venv makes last, so an interrupted venv is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Nightly Tuner needs Python 3.11 or later, found " + sys.version.split()[0] + ": make .venv with another, /path/to/python3.11 -m venv .venv")'
	@$(PYTHON) -m venv $(VENV)

# Makes the locks anew from the ranges in pyproject.toml, for every Python and platform at once. Hashes are those of all
# files of a version; torch has that of the build which pip takes on this machine, too. What torch's CUDA builds alone
# need has a lock of its own, because which build a machine takes is the machine's affair.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --upgrade
BACKEND := sed -n 's/^requires = \["\(.*\)"\]/\1/p' pyproject.toml
CUDA := ^(cuda-|nvidia-[^m]|triton==)
BEYOND := awk 'NR == FNR { have[$$1]; next } /^[a-z]/ { beyond = !($$1 in have) } beyond'

lock: $(VENV)/test.stamp ## makes the lock files anew
	{ $(BACKEND); echo editables; } | $(COMPILE) pyproject.toml - --output-file $(VENV)/all.lock
	$(COMPILE) --extra test --constraint $(VENV)/all.lock pyproject.toml --output-file $(VENV)/test.lock
	$(COMPILE) --extra bench --constraint $(VENV)/all.lock pyproject.toml --output-file $(VENV)/bench.lock
	rm -rf $(VENV)/torch
	$(BIN)/pip download --quiet --no-deps --dest $(VENV)/torch "$$(grep -o '^torch==[^ ]*' $(VENV)/all.lock)"
	hash="$$($(BIN)/pip hash $(VENV)/torch/* | tail -1)"; grep -q -e "$$hash" $(VENV)/all.lock || \
		awk -v hash="$$hash" '{ print } /^torch==/ { print "    " hash " \\" }' $(VENV)/all.lock > $(VENV)/with.lock && \
		mv $(VENV)/with.lock $(VENV)/all.lock
	awk '/^[a-z]/ { cuda = /$(CUDA)/ } !cuda' $(VENV)/all.lock > requirements.lock
	awk '/^[a-z]/ { cuda = /$(CUDA)/ } cuda' $(VENV)/all.lock > infra/cuda.lock
	$(BEYOND) $(VENV)/all.lock $(VENV)/test.lock > tests/requirements.lock
	$(BEYOND) $(VENV)/all.lock $(VENV)/bench.lock > tests/benchmarks/requirements.lock

clean: ## deletes the environment
	rm -rf $(VENV)
