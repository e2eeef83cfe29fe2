# Two commands for a fresh machine: `make demo` and `make test`. Both create the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test lint seeds tofu clean

demo: $(READY)  ## the main job on the built-in example: under 5 minutes on 2 cores
	$(BIN)/stillknows demo --out runs/demo

test: $(READY)  ## all tests
	$(BIN)/python -m pytest -n 2

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

seeds: $(READY)  ## docs/demo-seeds.md: the demo over five seeds, about 25 minutes
	$(BIN)/python examples/demo_seeds.py

tofu: $(READY)  ## docs/tofu.md: a model trained on TOFU, unlearned and audited; TOFU=folder with its JSON files
	$(BIN)/python examples/tofu_from_scratch.py --data $(TOFU)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stillknows needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

clean:
	rm -rf $(VENV) runs
