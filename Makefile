# flatmin_nb: `make run` trains Entropy-SGD beside its baselines, `make test` passes every check. Nothing has to be
# installed first: each target makes what it needs, and a target whose inputs have not changed does nothing.
# `make -B test` and `make -B run` do it again all the same.

SHELL := /bin/bash
.SHELLFLAGS := -e -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help install run test lab docs figures diary clean

PYTHON ?=                    # the interpreter that .venv is made with; empty: the first of CANDIDATES that will do
CANDIDATES := python3 python3.13 python3.12 python3.11
BIN := .venv/bin
# the Pythons that the versions of constraints.txt were checked on
PINNED := sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
SUITABLE := import ensurepip, venv, sys; $(PINNED)

NOTEBOOK := 02_entropy_sgd
PACKAGE := $(shell find flatmin_nb -name '*.py')
INPUTS := $(shell find nbs flatmin_nb tests benchmarks house results .github .ci \
            -name '.ipynb_checkpoints' -prune -o -name '__pycache__' -prune -o -name nbdev.yml -o -type f -print 2>/dev/null) \
          $(wildcard *.ini *.py *.toml *.yml *.md *.txt *.in LICENSE Makefile Dockerfile .gitignore .dockerignore)

help:
	@echo "make run    Entropy-SGD and its baselines on real images: runs/$(NOTEBOOK).ipynb and a summary"
	@echo "make test   every check: clean and exported notebooks, the notebooks themselves, the site's pages, tests/ (half an hour)"
	@echo "make lab    Jupyter Lab, on the tour (OPTIONS=--no-browser: any options of Jupyter Lab)"
	@echo "make docs   the site, in _docs/ (needs Quarto)"
	@echo "make figures  the committed outputs of pages that are stale, the pictures and the README's table (PAGES=--all, or names)"
	@echo "make diary  a new entry of the lab diary, from its template: make diary TITLE='What does the warm-up change?'"
	@echo "make clean  takes away what make made, but for runs/"
	@echo "PYTHON=/path/to/python3.12 names the Python of .venv; make -B TARGET does it again though nothing has changed"

# ---- the environment -------------------------------------------------------------------------------------------------

.venv/made.stamp:
	@if [ ! -w . ] || [ -e .venv -a ! -w .venv ]; then \
	  echo "flatmin_nb is installed into .venv of its own folder, and $(CURDIR) cannot be written: copy or clone it to a folder of your own" >&2; exit 1; \
	fi
	@if ! $(BIN)/python -c 'import pip, sys; $(PINNED)' 2>/dev/null; then \
	  found=; for candidate in $(or $(strip $(PYTHON)),$(CANDIDATES)); do \
	    if "$$candidate" -c '$(SUITABLE)' >/dev/null 2>&1; then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "flatmin_nb needs Python 3.11, 3.12 or 3.13 with its venv module; tried in vain: $(or $(strip $(PYTHON)),$(CANDIDATES)); install one (Debian: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; \
	  fi; \
	  "$$found" -m venv --clear .venv >.venv.part 2>&1 || { echo "$$found could not make .venv: $$(tail -n 1 .venv.part)" >&2; rm -f .venv.part; exit 1; }; \
	  rm -f .venv.part; \
	fi
	@touch $@

.venv/installed.stamp: .venv/made.stamp settings.ini setup.py constraints.txt
	@$(BIN)/python house/install.py
	@touch $@

install: .venv/installed.stamp

# ---- make run --------------------------------------------------------------------------------------------------------

# papermill writes under another name and the finished notebook appears at once, so a run that failed or was killed never
# looks like a finished one; flock makes a second `make run` wait for one that is still at work; and nets as small as
# these are faster on one thread, several times so on a busy machine
FLOCK := $(shell command -v flock)
PAPERMILL := $(BIN)/papermill nbs/$(NOTEBOOK).ipynb runs/$(NOTEBOOK).part.ipynb -p L 20 -p out runs/$(NOTEBOOK) -p overwrite True
runs/$(NOTEBOOK).ipynb: nbs/$(NOTEBOOK).ipynb $(wildcard results/*.csv) $(PACKAGE) .venv/installed.stamp
	@mkdir -p runs/$(NOTEBOOK)
	@$(if $(FLOCK),flock --nonblock runs/.lock true || echo "waiting for another run into runs/$(NOTEBOOK) to end")
	@rm -f $@
	@echo "OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PAPERMILL)"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(if $(FLOCK),flock runs/.lock) $(PAPERMILL) \
	  || { echo "the run stopped: how far it came stands in runs/$(NOTEBOOK).part.ipynb" >&2; exit 1; }
	@mv runs/$(NOTEBOOK).part.ipynb $@

runs/$(NOTEBOOK)/summary.txt: runs/$(NOTEBOOK).ipynb
	@$(BIN)/python house/summary.py runs/$(NOTEBOOK) $< > $@.part && mv $@.part $@

run: runs/$(NOTEBOOK)/summary.txt
	@cat $<

# ---- make test -------------------------------------------------------------------------------------------------------

# FLATMIN_DATA decides whether the tests on real data run, so each of its values has a stamp of its own
TESTED := .venv/tested$(shell echo "$(FLATMIN_DATA)" | cksum | cut -d' ' -f1).stamp

# the list of the inputs is an input too: a notebook taken away is a change
$(shell [ ! -d .venv ] || echo "$(sort $(INPUTS))" 2>/dev/null | cmp --silent - .venv/inputs.txt || echo "$(sort $(INPUTS))" > .venv/inputs.txt)

$(TESTED): $(INPUTS) $(wildcard .venv/inputs.txt) .venv/installed.stamp
	@$(BIN)/python house/check.py
	@touch $@

test: $(TESTED)

# ---- reading and publishing ------------------------------------------------------------------------------------------

# the address that is printed leads to the tour, too; a port that is taken is not the end: Jupyter tries the next ones; it asks nobody for news or updates
OPTIONS :=                   # of Jupyter Lab, as --no-browser or --port=8899
LAB := $(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/00_tour.ipynb \
       --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate
lab: .venv/installed.stamp
	@if [ "$$(id -u)" = 0 ] && [[ "$(OPTIONS)" != *--allow-root* ]]; then \
	  echo "make lab: Jupyter Lab gives whoever reaches it your rights, so it refuses to run as root: be another user, or, in a container, make lab OPTIONS=--allow-root" >&2; exit 1; \
	fi
	@$(LAB) $(OPTIONS)

_docs/index.html: $(INPUTS) .venv/installed.stamp
	@command -v quarto >/dev/null || { echo "make docs needs Quarto 1.9.38 on the PATH: https://quarto.org/docs/download/ (the container of the Dockerfile has it)" >&2; exit 1; }
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_docs
	@touch $@

docs: _docs/index.html

PAGES :=                     # for make figures: --all, or names as in PAGES='02_entropy_sgd lab/curvature', stale or not
figures: .venv/installed.stamp
	@$(BIN)/python house/figures.py $(PAGES)

# the title reaches Python through the environment, as it was given: neither make nor the shell reads it
diary: override export TITLE := $(value TITLE)
diary: .venv/installed.stamp
	@$(BIN)/python house/diary.py "$$TITLE"

clean:
	rm -rf .venv _docs _proc build flatmin_nb.egg-info nbs/nbdev.yml .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
