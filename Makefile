# Every target sets itself up: its environment is made once, and again when pyproject.toml changes.
PY ?= python3
TORCH ?= torch==2.13.0
OLDEST ?= transformers==5.21.0

export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-slow test-oldest quality clean

demo: .venv/.ready
	.venv/bin/python examples/demo.py

test: .venv/.ready
	.venv/bin/pytest -m "not slow"

test-slow: .venv/.ready test-oldest
	.venv/bin/pytest -m slow

test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/pytest -m core

quality: .venv/.ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info hqt_output .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ready: WHAT = -e ".[test,quality]"
.venv-oldest/.ready: WHAT = -e ".[test]" $(OLDEST)
.venv/.ready .venv-oldest/.ready: pyproject.toml
	$(PY) -m venv $(@D)
	$(@D)/bin/pip install -q $(TORCH)
	$(@D)/bin/pip install -q $(WHAT)
	touch $@
