# Every target sets up what it needs: python3.11 (or newer), make and a package registry are enough.
SHELL  := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN    := .venv/bin
READY  := .venv/.ready
ARGS   ?=
PAGES  ?=
JOBS   ?= 2
SCRIPTS ?= $(filter-out bench/_%,$(wildcard bench/*.py))
LINTED := mbnb tests .ci setup.py $(if $(wildcard bench/*.py),bench)

.DEFAULT_GOAL := help
.PHONY: help setup setup-browser train test test-slow lab pages export clean-pages readme lint prepare bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY)  ## the environment in .venv: the package, every extra but [track], what development needs

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3.11 and no python3 on the PATH: install Python 3.11 or newer, or run make PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(f"Python {sys.version.split()[0]} at {sys.executable} is too old: mbnb needs 3.11; run make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	"$(PYTHON)" -m venv .venv
	PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet -e '.[all,dev]'
	@bash .ci/hooks
	@touch $@

setup-browser: setup  ## Chromium and fonts for the browser tests (Debian, Ubuntu; only if there is none)
	@bash .ci/browser

train: setup  ## one run of nbs/train.ipynb by papermill: make train ARGS="-p model sasrec -p dataset ml-100k"
	$(BIN)/mbnb train $(ARGS)

test: setup  ## every page and tests/, two at a time: make test ARGS="-k sequences"
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests $(ARGS)

test-slow: setup  ## the same with the long ones
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --slow tests $(ARGS)

lab: setup  ## JupyterLab on the pages, the index first
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb $(ARGS)

pages: export  ## runs the pages and stores their small outputs: make pages PAGES="00_events evaluators/01_ranks"
	$(BIN)/python .ci/pages.py $(PAGES)

export: setup  ## nbs/ -> mbnb/
	$(BIN)/nbdev-export

clean-pages: setup  ## strips metadata from the pages, keeps their outputs
	$(BIN)/nbdev-clean

readme: setup  ## nbs/index.ipynb -> README.md
	$(BIN)/python .ci/readme.py

lint: setup  ## ruff
	$(BIN)/ruff check $(LINTED)

prepare: setup  ## before a commit: export, clean, README, test
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python .ci/readme.py
	$(MAKE) test

bench: setup  ## side-by-side measurements, JSON lines: make bench SCRIPTS=bench/evaluate.py
	@set -e; for script in $(SCRIPTS); do echo "# $$script" >&2; $(BIN)/python $$script $(ARGS); done

clean:  ## removes build leftovers and caches; keeps .venv and runs/
	rm -rf build dist site .pytest_cache .ruff_cache *.egg-info
	find mbnb nbs tests bench .ci -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
