# `make quickstart` and `make test` need Python >= 3.11, make and git; they install the rest into
# .venv.
PYTHON ?= python3
BIN := .venv/bin
export PIP_RETRIES ?= 10

.PHONY: quickstart test test-all gitops e2e e2e-faults e2e-clean lint crds chart clean

quickstart: .venv/installed
	$(BIN)/modelchain pack digits --to runs/digits
	$(BIN)/modelchain run -f examples/quickstart.yaml --root runs/quickstart --data runs/digits
	$(BIN)/modelchain report --root runs/quickstart -o runs/quickstart/report.html

# Every level, each with its time; of sweeps a sample, by a seed that is printed.
test: lint
	@.ci/levels

# The same with nothing sampled: hours.
test-all: lint
	@MODELCHAIN_SWEEPS=all .ci/levels

# A real Flux, built once (8 minutes of CPU), which applies chains from a repository. Part of
# `make test-all`.
gitops: .venv/installed
	@.ci/timed "Flux" $(BIN)/pytest tests/flux

# A node of its own, on which pods really train; needs Linux, root and 30 GB. See CONTRIBUTING.md.
e2e: .venv/installed
	@.ci/timed "packages, programs, images" $(BIN)/python tests/e2e/prepare.py
	@.ci/timed "pods that train" $(BIN)/pytest tests/e2e

e2e-faults: .venv/installed
	@.ci/timed "packages, programs, images" $(BIN)/python tests/e2e/prepare.py
	@MODELCHAIN_SWEEPS=all .ci/timed "all faults" $(BIN)/pytest tests/e2e/test_stage_faults.py

# What a run that was killed has left, and everything kept for the next one.
e2e-clean: .venv/installed
	$(BIN)/python tests/e2e/prepare.py --clean

lint: .venv/installed
	@.ci/timed "ruff" $(BIN)/ruff check .
	@.ci/timed "ruff format" $(BIN)/ruff format --check .
	@.ci/timed "mypy" $(BIN)/mypy

# After a change of the API's types; a test says when they are not current.
crds: .venv/installed
	$(BIN)/python -m modelchain.cli.crds crds

# After a change of the chart, of crds/ or of the operator's configuration file; a test says when it
# is not current.
chart: crds
	$(BIN)/python charts/generate.py

# A copy of torch is large: everything at once, at the versions of constraints.txt.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) \
	    and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@.ci/timed "install" $(BIN)/pip install --quiet --disable-pip-version-check \
	    -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs
