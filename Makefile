# make run | test | check | docs. Needs make and Python 3.11 or newer; everything else goes into .venv.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# PYTHON=/path/to/python chooses the interpreter; otherwise the first that is new enough.
PYTHON ?=
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help run test check docs

help:
	@echo 'make run                   set up, then cluster the digits inside scikit-learn'
	@echo 'make run ARGS="..."        the same with settings, for example'
	@echo '                             ARGS="DIR"  (a folder of images)'
	@echo '                             ARGS="--help"'
	@echo 'make test [ARGS="..."]     set up, then all tests; ARGS go to pytest'
	@echo 'make check                 set up, then lint, format, types, layers'
	@echo 'make docs                  set up, then the pages of docs/ as a site in site/'
	@echo 'PYTHON=python3.12 make ... use this interpreter for .venv'

run: $(READY)
	@echo '==> train.py $(ARGS)'
	@$(BIN)/python train.py $(ARGS)

# One worker a core, a file at a time. Tests start processes of their own too; more threads than
# cores starve each other. ARGS="-n 0 -k NAME" runs in one process.
test: export OMP_NUM_THREADS := 1
test: export HF_HUB_OFFLINE := 1
test: export WANDB_MODE := offline
test: $(READY)
	@echo '==> pytest $(ARGS)'
	@$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

check: $(READY)
	@echo '==> ruff check'
	@$(BIN)/ruff check .
	@echo '==> ruff format --check'
	@$(BIN)/ruff format --check .
	@echo '==> mypy'
	@$(BIN)/mypy
	@echo '==> lint-imports'
	@$(BIN)/lint-imports
	@echo '==> check: everything is in order'

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(READY)
	@echo '==> mkdocs'
	@$(BIN)/python -m pip install -qq --editable '.[docs]'
	@$(BIN)/python -m mkdocs build --strict --quiet
	@echo '==> docs: open site/index.html'

# torch first: the rest then takes the torch that is there. Twice quiet: errors only.
$(READY): pyproject.toml
	@python=''; \
	for each in $(or $(strip $(PYTHON)),python3 python3.14 python3.13 python3.12 python3.11); do \
	    if "$$each" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        python="$$each"; break; \
	    fi; \
	done; \
	if [ -z "$$python" ]; then \
	    found=$$( ($(or $(strip $(PYTHON)),python3) --version 2>/dev/null || echo 'not there') | head -n 1); \
	    echo "error: Python 3.11 or newer is needed, $(or $(strip $(PYTHON)),python3) is $$found;" \
	        'install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)' >&2; \
	    exit 1; \
	fi; \
	echo "==> set-up 1 of 3: $(VENV), with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV) || { \
	    echo 'error: no virtual environment could be made; Debian and Ubuntu need the package' \
	        'python3-venv. Then run make again.' >&2; \
	    exit 1; \
	}
	@echo '==> set-up 2 of 3: torch and torchvision (takes minutes the first time)'
	@$(BIN)/python -m pip install -qq torch torchvision
	@echo '==> set-up 3 of 3: everything else (takes a minute or two the first time)'
	@$(BIN)/python -m pip install -qq --editable '.[dev]'
	@touch $(READY)
	@echo '==> set-up: ready in $(VENV); it is done again only when pyproject.toml changes'
