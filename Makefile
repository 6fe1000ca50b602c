# Everything runs in .venv, which needs python3 >= 3.11 and a package index; nothing else is installed.
# pip's own settings are honoured: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, pip.conf.

PYTHON ?= python3
JOBS ?= 2
MARKS ?= not gpu and not hub
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --timeout=300
STRUCTURE := tests/test_layers.py tests/test_exports.py tests/test_readme_map.py tests/test_sizes.py \
	tests/test_errors_documented.py
SAELENS := .venv-saelens
BENCHMARKS = $(sort $(wildcard benchmarks/[a-z0-9]*.py))

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-full test-saelens check format bench dist clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "PYTHON=python3.12 picks the interpreter. Without a GPU, point PIP_EXTRA_INDEX_URL at an index of CPU builds"
	@echo "of torch and the install is some gigabytes smaller. ARGS='-k gate' reaches pytest or the demo; JOBS=4 runs"
	@echo "the tests in four processes (each needs 2 GB)."

demo: $(VENV)/.demo ## Steer a real model and show what changed.
	$(BIN)/saeguard demo $(ARGS)

test: $(VENV)/.model ## Run the tests, on tiny random models and on the demo model.
	$(PYTEST) -n $(JOBS) $(ARGS)

test-full: $(VENV)/.model ## All tests, real model and all random cases; MARKS picks.
	SAEGUARD_FULL=1 $(PYTEST) --timeout=1800 -n $(JOBS) -m "$(MARKS)" $(ARGS)

check: $(VENV)/.dev ## Lint, format, types, layers, exports, README map, sizes.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST) $(STRUCTURE)

format: $(VENV)/.dev ## Rewrite the code and the README's map as `check` wants them.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python tests/readme_map.py --write
	$(BIN)/python tests/readme_families.py --write
	$(BIN)/python -W ignore tests/engine_table.py --write

test-saelens: $(SAELENS)/.made ## Tests beside sae-lens, TransformerLens 3 and torchao, in an environment of their own.
	PYTHONPATH=. $(SAELENS)/bin/python -m pytest -p no:cacheprovider -c /dev/null --rootdir . tests/saelens tests/test_quantised.py $(ARGS)

bench: $(VENV)/.demo ## Run every benchmark behind a claim of the README.
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python -m $$(echo $${script%.py} | tr / .); done

dist: $(VENV)/.dev ## Build the sdist and the wheel.
	$(BIN)/python -m build

clean: ## Remove .venv and everything that was built or cached here.
	rm -rf $(VENV) $(SAELENS) build dist .pytest_cache .ruff_cache .hypothesis
	find saeguard tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "saeguard needs Python 3.11 or newer, and $(PYTHON) is `$(PYTHON) -V 2>&1`. Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make a virtual environment. On Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# sae-lens pins transformer-lens < 4 and brings a hundred packages, so it gets few pins. torchao is imported by
# transformers wherever it is, which takes seconds and prints warnings.
$(SAELENS)/.made: tests/saelens/requirements.txt
	$(PYTHON) -m venv $(SAELENS)
	$(SAELENS)/bin/python -m pip install --quiet -r tests/saelens/requirements.txt
	@touch $@

# A stamp is as old as the install it stands for, so an edited pyproject.toml or constraints.txt installs again.
$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) --editable '.[demo,dev]'
	@touch $(VENV)/.demo $@

# The tests need no network: the models that some of them run on are fetched here, once per cache.
$(VENV)/.model: $(VENV)/.dev
	$(BIN)/saeguard models --fetch smollm2-135m-instruct
	$(BIN)/saeguard models --fetch all-minilm-l6-v2
	@touch $@
