# `make quickstart` and `make test` work on a fresh machine: both make the virtual environment first.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
bin := $(VENV)/bin

.PHONY: quickstart test lint format setup clean

quickstart: setup
	PATH="$(abspath $(bin)):$$PATH" bash examples/quickstart/run.sh $(RUN)

test: setup
	$(bin)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

lint: setup
	$(bin)/ruff check .
	$(bin)/ruff format --check .

format: setup
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --upgrade pip
	$(bin)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv* build *.egg-info
