# make test   every test that this machine can run, and the linter
# make demo   attention on structured input and on a real model: dense, and with tiles skipped
# make gpu-check [PYTHON=python3] [OUT=folder]   everything that a GPU can tell; 9 minutes a call, repeat until done
# make report  tables and plots of what was measured
# They set themselves up in .venv, once; again only when pyproject.toml or constraints.txt change. gpu-check uses the
# PYTHON it is given instead, and then installs nothing.

PYTHON ?= python3
GIVEN_PYTHON := $(if $(filter command% environment%,$(origin PYTHON)),$(PYTHON))
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
TEST_READY := $(VENV)/.test-ready
DEMO_READY := $(VENV)/.demo-ready
BENCH_READY := $(VENV)/.bench-ready
OUT ?=
MODEL ?=
TESTS ?= tests
# A process a core, of which each imports PyTorch and the DSL; one that is done takes over what another has left.
IN_PARALLEL := -n auto --maxprocesses 8 --dist worksteal

.PHONY: test demo lint clean gpu-check report

test: $(TEST_READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest $(IN_PARALLEL) $(TESTS)

lint: $(TEST_READY)
	$(VENV)/bin/ruff check .

demo: $(DEMO_READY)
	$(VENV)/bin/python -m cute_sparse.demo $(if $(MODEL),--model "$(MODEL)")

gpu-check: $(if $(GIVEN_PYTHON),,$(BENCH_READY))
	$(or $(GIVEN_PYTHON),$(VENV)/bin/python) -m profiling.gpu_check $(if $(OUT),--out "$(OUT)")

report: $(BENCH_READY)
	$(VENV)/bin/python -m profiling.report

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(TEST_READY): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@

$(DEMO_READY): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -c constraints.txt -e '.[emulator,models]'
	touch $@

$(BENCH_READY): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -c constraints.txt -e '.[test,bench]'
	touch $@
