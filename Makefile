# Each target makes .venv by itself; the second time it is there.
PYTHON ?= python3
BIN := .venv/bin
SPHINX ?=

.PHONY: demo test lint bench docs clean

demo: .venv/.ready
	$(BIN)/python examples/char_language_model.py
	$(BIN)/python examples/blackbox_regression.py

test: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.bench
	$(BIN)/python benchmarks/figures.py

docs: .venv/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html $(SPHINX) docs docs/_build/html
	@echo docs/_build/html/index.html

.venv/.bench: .venv/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[mujoco]"
	@touch $@

.venv/.docs: .venv/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

.venv/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv build dist docs/_build docs/generated *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
