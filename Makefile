# make test   every test that this machine can run, and the linter
# make demo   attention on structured input and on a real model: dense, and with tiles skipped
# Both set themselves up in .venv, once; again only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
TEST_READY := $(VENV)/.test-ready
DEMO_READY := $(VENV)/.demo-ready
MODEL ?=
TESTS ?= tests

.PHONY: test demo lint clean

test: $(TEST_READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest $(TESTS)

lint: $(TEST_READY)
	$(VENV)/bin/ruff check .

demo: $(DEMO_READY)
	$(VENV)/bin/python -m cute_sparse.demo $(if $(MODEL),--model "$(MODEL)")

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
