# `make run` sets up and runs a whole night; `make test` sets up and passes the tests; `make bench` measures.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: run check test bench screenshots lock clean

run: .venv/run.stamp
	$(BIN)/nightly up
	$(BIN)/nightly run digits-mlp

# What one runs before each commit: all but the tests that start a process, or compute for long.
check: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/unit -m 'not process and not slow' -n 2 --quiet

# Three processes: whole nights, which mostly wait, beside everything else. One thread each, or torch's threads fight.
# Which tests stay together in one of them, tests/distribution.py says.
test: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 20

# Every measurement, or one suite of it: make bench ONLY=search.
bench: .venv/bench.stamp
	$(BIN)/python -m tests.benchmarks --only $(or $(ONLY),all)

# The README's pictures, taken anew by the tests of what a browser shows.
screenshots: .venv/test.stamp
	NIGHTLY_PICTURES=tests/browser/pictures $(BIN)/pytest tests/browser

# The lock is used as constraints, so that one file serves both and a plain user installs no test tools.
.venv/run.stamp: pyproject.toml requirements.lock | .venv
	@echo "Installing the locked packages into .venv (some minutes, where they must be downloaded)"
	@$(PIP) install --quiet --constraint requirements.lock --editable .
	@touch $@

.venv/test.stamp: pyproject.toml requirements.lock | .venv
	@echo "Installing the locked packages and the test tools into .venv (some minutes, where they must be downloaded)"
	@$(PIP) install --quiet --constraint requirements.lock --editable '.[test]'
	@touch $@ .venv/run.stamp

.venv/bench.stamp: pyproject.toml requirements.lock | .venv
	@echo "Installing the locked packages and what the benchmarks compare with into .venv"
	@$(PIP) install --quiet --constraint requirements.lock --editable '.[bench]'
	@touch $@ .venv/run.stamp

.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Nightly Tuner needs Python 3.11 or later, found " + sys.version.split()[0] + ": name another with make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv

# Refreshes requirements.lock from the ranges in pyproject.toml. The local part of a version (+cpu, +cu130)
# is cut off: which build of torch a machine takes is the machine's affair.
lock: .venv/test.stamp
	$(BIN)/pip-compile --quiet --upgrade --all-extras --strip-extras --no-header --no-emit-index-url --no-emit-find-links \
		--no-emit-trusted-host --no-emit-options --output-file requirements.lock pyproject.toml
	sed -i.bak 's/^\([a-z0-9_.-]*==[^+ ]*\)+[a-z0-9.]*/\1/' requirements.lock && rm requirements.lock.bak

clean:
	rm -rf .venv
