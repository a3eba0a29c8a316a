# make demo      install into .venv and fine-tune the shipped model
# make demo-rl   the same by reward
# make test      install, lint, type-check, test
# make bench     the tables of speeds

PYTHON ?= python3
VENV   ?= .venv
PIP     = $(VENV)/bin/pip --disable-pip-version-check --quiet
PIN     = --constraint .ci/constraints.txt

.PHONY: demo demo-rl test lint bench clean

demo: $(VENV)/.installed
	$(VENV)/bin/tickwork demo

demo-rl: $(VENV)/.installed
	$(VENV)/bin/tickwork demo rl

test: lint
	$(VENV)/bin/python -m pytest
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/interpreter

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

bench: $(VENV)/.installed-test
	$(VENV)/bin/python -m bench
	$(VENV)/bin/python -m bench kernels

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/pip pyproject.toml .ci/constraints.txt
	$(PIP) install $(PIN) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/bin/pip pyproject.toml .ci/constraints.txt
	$(PIP) install $(PIN) --editable '.[test]'
	touch $@ $(VENV)/.installed
