# `make quickstart` and `make test` work on a fresh machine: both make the virtual environment first.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
bin := $(VENV)/bin

OUT ?= runs/gpu

.PHONY: quickstart test gpu docker-check lint format setup clean

quickstart: setup
	PATH="$(abspath $(bin)):$$PATH" bash examples/quickstart/run.sh $(RUN)

test: setup
	$(bin)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# On a machine with an NVIDIA GPU, with the Python at hand: tests, then benchmarks into $(OUT).
gpu:
	PYTHONPATH=. $(PYTHON) -m pytest tests/attention/triton/test_gpu.py
	for head_dim in 64 128; do \
	    PYTHONPATH=. $(PYTHON) tools/benchmarks/attention.py --device cuda --dtype bfloat16 \
	        --heads 16 --head-dim $$head_dim --lengths 2048 8192 32768 131072 524288 \
	        --longest-dense 32768 --output $(OUT)/d$$head_dim || exit 1; \
	done

# The Dockerfile's steps, carried out without Docker in a fresh environment.
docker-check:
	$(PYTHON) tests/docker/check_dockerfile.py

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
