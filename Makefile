# Two commands for a newcomer: `make run` localizes objects in a video, `make test` proves the parts. Both set up what is missing.
PYTHON ?= python3
BIN := .venv/bin
# A test process that dies ends the run: pytest-xdist (3.8) may wait forever once it has replaced one.
TWO := -n 2 --dist loadfile --max-worker-restart 0
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
.PHONY: setup run test test-long test-gpu test-caps lint bench clean

setup: .venv/tested-with

# What running needs, and the page of --web (3 MB besides what is there): no PyTorch.
.venv/runs-with: pyproject.toml constraints.txt
	@echo 'Making .venv and installing what running needs: about a minute ...'
	@$(PYTHON) -m venv .venv
	@$(PIP) --editable '.[web]'
	@touch $@

# What testing needs besides.
.venv/tested-with: .venv/runs-with
	@echo 'Installing what testing needs besides: some minutes ...'
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps grad-cam
	touch $@

run: .venv/runs-with
	$(BIN)/sightline demo --out out
	@echo 'To have sightline without $(BIN)/ before it: source $(BIN)/activate'

# Two processes share the files of tests: many of them wait for a camera, a server or a browser.
test: setup
	$(BIN)/python -m pytest $(TWO)

test-long: setup
	$(BIN)/python -m pytest -m long

# On a machine with PyTorch for CUDA, or with TensorRT: nothing is installed, and OpenVINO and PyAV are not needed.
test-gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m pytest -m gpu -rs tests/engines/test_gpu.py tests/engines/test_torch_reference_gpu.py

# The engine tests as processors with fewer instructions compute: oneDNN, which computes for OpenVINO, obeys the cap. Left out is
# what is slow and does not compute with it (downloads, TensorRT), or is the same promise at full width.
test-caps: setup
	for cap in AVX2 AVX512_CORE_VNNI; do \
		ONEDNN_MAX_CPU_ISA=$$cap $(BIN)/python -m pytest $(TWO) tests/engines tests/calib/precision tests/test_cli_engines.py \
			--ignore-glob '*/test_tensorrt*.py' --ignore tests/engines/test_downloads.py --ignore tests/engines/test_torch_cuda.py \
			-k 'not full_width and not float64' || exit 1; \
	done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/vulture

bench: setup
	$(BIN)/sightline bench

clean:
	rm -rf .venv out build *.egg-info
