# make demo      install into .venv and fine-tune the shipped model
# make demo-rl   the same by reward
# make demo-clients   four clients at once, each as good as alone
# make test      install, lint, type-check, test
# make bench     the tables of speeds
# make torture   the kill test with 500 kills, a quarter of an hour; TORTURE_KILLS and TORTURE_SEED choose others
# make test-sdk-matrix   three generations of the official SDK against one server
# make test-cookbook     recipes of the official cookbook against a server
# make audit     known vulnerabilities of the pinned versions, from PyPI's database (make test has a list of its own)

PYTHON ?= python3
VENV   ?= .venv
PIP     = $(VENV)/bin/pip --disable-pip-version-check --quiet
PIN     = --constraint .ci/constraints.txt

SDKS     = 0.38.0 0.25.0 0.24.1
COOKBOOK = .venv-cookbook

.PHONY: demo demo-rl demo-clients test lint torture bench test-sdk-matrix test-cookbook audit clean

demo: $(VENV)/.installed
	$(VENV)/bin/tickwork demo

demo-rl: $(VENV)/.installed
	$(VENV)/bin/tickwork demo rl

demo-clients: $(VENV)/.installed
	$(VENV)/bin/tickwork demo clients

test: lint
	$(VENV)/bin/python -m pytest
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/interpreter

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

torture: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -s --maxfail 1 tests/torture.py

bench: $(VENV)/.installed-test
	$(VENV)/bin/python -m bench
	$(VENV)/bin/python -m bench clients --invariant
	$(VENV)/bin/python -m bench kernels
	$(VENV)/bin/python -m bench server
	$(VENV)/bin/python -m bench durability
	$(VENV)/bin/python -m bench load

test-sdk-matrix: $(VENV)/.installed-test $(SDKS:%=.venv-sdk-%/.installed)
	$(VENV)/bin/python -m pytest tests/matrix.py

test-cookbook: $(VENV)/.installed-test $(COOKBOOK)/.installed
	$(VENV)/bin/python -m pytest tests/cookbook.py

# Fails as well where the database can not be reached: an audit that saw nothing says nothing.
audit: .venv-audit/.installed
	.venv-audit/bin/pip-audit --strict --disable-pip --no-deps --requirement .ci/constraints.txt

clean:
	rm -rf $(VENV) .venv-sdk-* .venv-audit $(COOKBOOK) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/pip pyproject.toml .ci/constraints.txt
	$(PIP) install $(PIN) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/bin/pip pyproject.toml .ci/constraints.txt
	$(PIP) install $(PIN) --editable '.[test]'
	touch $@ $(VENV)/.installed

.venv-sdk-%/.installed:
	$(PYTHON) -m venv .venv-sdk-$*
	.venv-sdk-$*/bin/pip --disable-pip-version-check --quiet install tinker==$*
	touch $@

.venv-audit/.installed:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip --disable-pip-version-check --quiet install pip-audit
	touch $@

$(COOKBOOK)/.installed: .ci/cookbook.txt .ci/constraints.txt
	$(PYTHON) -m venv $(COOKBOOK)
	$(COOKBOOK)/bin/pip --disable-pip-version-check --quiet install $(PIN) --requirement .ci/cookbook.txt
	$(COOKBOOK)/bin/pip --disable-pip-version-check --quiet install --no-deps tinker-cookbook==0.6.1
	touch $@
