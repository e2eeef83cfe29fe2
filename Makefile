# Two commands for a fresh machine: `make demo` and `make test`. Both create the environment first.
PYTHON ?= python3
VENV ?= .venv
ORACLES ?= .venv-oracles
BIN = $(VENV)/bin
READY = $(VENV)/.ready

MUTANTS ?= .venv-mutants

.PHONY: demo test lint oracles mutants models planted seeds tofu paper why clean

demo: $(READY)  ## the main job on the built-in example: under 5 minutes on 2 cores
	$(BIN)/stillknows demo --out runs/demo

test: $(READY)  ## all tests
	$(BIN)/python -m pytest -n 2

# the libraries, and transformers where it imports them, warn of what will go from torch: no error here
oracles: $(ORACLES)/.ready  ## formats against the libraries that they are named after, in an environment of its own
	$(ORACLES)/bin/python -W ignore -c 'import hqq, llmcompressor, torchao'
	$(ORACLES)/bin/python -m pytest -W default -m oracle

mutants: $(MUTANTS)/.ready  ## docs/testing.md: whether the tests notice small faults, about an hour; MODULES=stats: of one
	$(MUTANTS)/bin/python -m perf.mutants $(MODULES) --write

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

models: $(READY)  ## docs/models.md: every causal architecture against its own forward pass, about 10 minutes
	$(BIN)/python -m perf.families --write

planted: $(READY)  ## docs/planted-truth.md: models that hide on purpose, audited; an hour or more
	$(BIN)/python -m perf.planted_truth --docs docs
	$(BIN)/python -m perf.known_outcomes --docs docs

seeds: $(READY)  ## docs/demo-seeds.md: the demo over five seeds, about 25 minutes
	$(BIN)/python examples/demo_seeds.py

tofu: $(READY)  ## docs/tofu.md: a model trained on TOFU, unlearned and audited; TOFU=folder with its JSON files
	$(BIN)/python examples/tofu_from_scratch.py --data $(TOFU)

paper: $(READY)  ## docs/quantization_attack.md: the experiment of arXiv 2410.16454 in small, about two hours
	$(BIN)/python examples/quantization_attack.py

why: $(READY)  ## docs/why.md: ways to keep weights, rates and formats, about 70 minutes
	$(BIN)/python examples/why.py

$(READY): EXTRA = dev
$(ORACLES)/.ready: EXTRA = oracles
$(MUTANTS)/.ready: EXTRA = mutants
$(READY) $(ORACLES)/.ready $(MUTANTS)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stillknows needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA)]'
	@touch $@

clean:
	rm -rf $(VENV) $(ORACLES) $(MUTANTS) runs
