# Everything a newcomer needs: `make run` localizes a cat in a video, `make test` proves the parts. Both set up what is missing.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: setup run test test-long lint bench clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch .venv/ready

run: setup
	$(BIN)/sightline demo --out out

test: setup
	$(BIN)/python -m pytest

test-long: setup
	$(BIN)/python -m pytest -m long

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/sightline bench

clean:
	rm -rf .venv out build *.egg-info
