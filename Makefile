# `make quickstart` and `make test` work on a fresh machine: both make the virtual environment first.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
bin := $(VENV)/bin

OUT ?= runs/gpu

.PHONY: quickstart test test-long gpu docker-check slurm-check lint format setup clean

quickstart: setup
	PATH="$(abspath $(bin)):$$PATH" bash examples/quickstart/run.sh $(RUN)

test: setup
	$(bin)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# Those that seldom show more than the others: more random cases, layouts, kernels and benchmarks.
# CI runs a part of them, on one Python.
test-long: setup
	$(bin)/python -m pytest -n 2 --dist worksteal -m long $(PYTEST_ARGS)

# On a machine with an NVIDIA GPU, with the Python at hand: tests, training, then benchmarks of the
# kernels, into $(OUT); each also where one before it failed. The tests are two processes, as what
# they do most is to compile. Estimated for one H100, on the cautious side, 8.6 minutes: tests 3.3
# (compiling some 250 kernels 2.2 in two processes, FlexAttention 0.5); training 3.7 (its Python
# starts 5 times, 0.3 each; kernels compile 0.7; steps 0.5, those of a million tokens 0.5, of which
# half to pin the host's memory; data 0.3; sequence axis 0.3); "lengths" 1; calibration of the cost
# model, which writes $(OUT)/cluster.yaml, 0.6.
gpu_pytest = PYTHONPATH=. $(PYTHON) -m pytest -rA
newer = documents or ranges or band or kinds
benchmark = PYTHONPATH=. $(PYTHON) tools/benchmarks/attention.py --device cuda --dtype bfloat16 \
    --heads 16 --repeats 10 --longest-dense 32768
gpu:
	mkdir -p $(OUT)
	status=0; \
	$(gpu_pytest) tests/attention/triton/test_gpu.py -k "$(newer)" \
	    --junit-xml $(OUT)/tests-newer.xml >$(OUT)/tests-newer.txt 2>&1 & newer=$$!; \
	$(gpu_pytest) tests/attention/triton/test_gpu.py tests/chunked/test_kernels_gpu.py \
	    tests/chunked/test_offload_gpu.py -k "not ($(newer))" \
	    --junit-xml $(OUT)/tests.xml || status=1; \
	wait $$newer || status=1; cat $(OUT)/tests-newer.txt; \
	PYTHONPATH=. $(PYTHON) tools/benchmarks/training.py --device cuda \
	    --output $(OUT)/training || status=1; \
	$(benchmark) --patterns A --head-dims 128 --kv-heads 16 --documents 16 \
	    --lengths 2048 8192 16384 32768 131072 --output $(OUT)/lengths || status=1; \
	PYTHONPATH=. $(PYTHON) tools/calibrate_device.py --device cuda --ranks 1 --seconds 0.03 \
	    --output $(OUT)/cluster.yaml || status=1; \
	exit $$status

# The Dockerfile's steps, carried out without Docker in a fresh environment.
docker-check:
	$(PYTHON) tests/docker/check_dockerfile.py

# The job scripts of examples/slurm in every case, under a SLURM of two nodes on this machine, which
# has to be installed (it says how): a quarter of an hour.
slurm-check: setup
	$(bin)/python -m tests.slurm.check

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
	PYTHONWARNINGS=ignore $(bin)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv* build *.egg-info
