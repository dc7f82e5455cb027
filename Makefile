# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && exit; done; echo python3)
PROFILE ?= embedded

BIN := .venv/bin
WORKERS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
READY := .venv/.installed
export PYTHONUNBUFFERED = 1

.PHONY: help figures figures-all test test-quick test-faults lab docs readme check clean
.NOTPARALLEL:  # the targets use every core themselves

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

figures: $(READY)  ## Figures 1 to 9 and Table 1 for ResNet18, one run of each network, beside the committed ones; ARGS="--archs resnet50" ...
	$(BIN)/pcl-reproduce --reduced --profile $(PROFILE) $(ARGS)

figures-all: $(READY)  ## every figure and table, five architectures, three runs of each network, of ResNet18 five: six hours of training on two cores, by --dry-run
	$(BIN)/pcl-reproduce --profile $(PROFILE) --html $(ARGS)

# Workers x threads = cores: two processes of two threads each crawl on two cores.
test: $(READY)  ## run the chapters and the index as tests, then pytest; WORKERS=2 (a gigabyte each) ARGS="-k erf"
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --file_re '^(index|[0-9]|data|methods|runs|train|reproduce)' --n_workers $(WORKERS) --do_print --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(WORKERS) --dist worksteal $(ARGS)

test-quick: $(READY)  ## the tests that take less than ten seconds each; WORKERS=2 ARGS="-k erf"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(WORKERS) --dist worksteal -m 'not slow and not faults' $(ARGS)

test-faults: $(READY)  ## kills, full disks, damaged files: nothing may be lost; a quarter of an hour
	$(BIN)/python -m pytest tests/test_faults.py -m faults

lab: $(READY)  ## open JupyterLab in nbs
	$(BIN)/jupyter lab --ServerApp.root_dir=. --FileContentsManager.preferred_dir=nbs

docs: $(READY)  ## the notebooks as a site with search, in _docs; open _docs/index.html
	$(BIN)/python tools/docs.py

readme: $(READY)  ## render nbs/index.ipynb as README.md
	$(BIN)/python tools/readme.py

check: $(READY)  ## clean and export the notebooks, lint the package; fails where that changes a committed file
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/ruff check nbs pcl_nb
	git diff --exit-code -- nbs pcl_nb

clean:  ## remove caches and build leftovers; trained runs, results and .venv stay
	rm -rf build dist *.egg-info _docs _proc results/smoke figures/smoke runs/executed .pytest_cache .hypothesis
	find nbs pcl_nb tests tools \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# An install that was cut short can leave packages that pip takes for complete: the next one starts afresh.
$(READY): settings.ini pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  "Python 3.11 or newer is needed, this is %d.%d: make PYTHON=/path/to/python3.11" % v[:2])'
	@if [ -e .venv-unfinished ]; then rm -rf .venv; fi
	@touch .venv-unfinished
	$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@mv .venv-unfinished $@
