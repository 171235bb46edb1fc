# Each target does all of its own set-up: `git clone`, then `make demo`.
# A machine without a GPU can point pip at PyTorch's CPU wheels through pip's own settings (PIP_EXTRA_INDEX_URL).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := train parquet sklearn export tensorboard lightning bench docs dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-compile compile-launches lint bench pictures kernel-report tutorial docs package lock hub gpu clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1|/' | column -t -s '|'

# The stamp records which requirements the environment was made from, so an edit of either file renews it.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ltloss needs Python 3.10 or newer, this is " + sys.version.split()[0])'
	@echo "Setting up $(VENV) (once; PyTorch is a large download) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) -e '.[$(shell echo $(EXTRAS) | tr ' ' ,)]'
	@touch $@

demo: $(VENV)/.installed  ## train five losses on long-tailed digits, print the table, classify the test images
	@$(BIN)/python examples/demo.py

test: $(VENV)/.installed  ## run every test, in two processes
	@$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(VENV)/.installed  ## what one runs while working: leaves out the slow ones
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not compile and not browser"

test-compile: $(VENV)/.installed  ## compile every kernel ahead of time and hold their limits (`make test` compiles a part)
	@$(BIN)/python -m pytest -n 2 -m compile --hypothesis-profile nightly

compile-launches: $(VENV)/.installed  ## compile every launch of the tests of the kernels as it was specialised (no GPU needed)
	@PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.kernel_report.launches

lint: $(VENV)/.installed  ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.installed  ## measure loss and whole step against the peers, write benchmarks/results/*.csv and what shows them
	@$(BIN)/python -m benchmarks.loss_cpu
	@$(BIN)/python -m benchmarks.step
	@$(BIN)/python -m benchmarks.pictures

pictures: $(VENV)/.installed  ## renew tables and picture of README.md and docs from benchmarks/results, without measuring
	@PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.pictures

kernel-report: $(VENV)/.installed  ## compile every kernel for sm_80, sm_90 and sm_100 (no GPU needed), write the table
	@PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.kernel_report
	@PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.pictures

tutorial: $(VENV)/.installed  ## run docs/tutorial.ipynb, store what it prints
	@$(BIN)/python docs/hooks/notebook.py

docs: $(VENV)/.installed  ## write the site to build/site, to be read from disk
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open build/site/index.html"

package: $(VENV)/.installed  ## build wheel and sdist, run README and examples from them in empty environments
	@$(PIP) build
	@$(BIN)/python .ci/clean_environment.py

lock: $(VENV)/.installed  ## renew requirements.lock: the versions of constraints.txt and all that they need, with hashes
	@$(PIP) uv
	@$(BIN)/uv pip compile pyproject.toml $(addprefix --extra=,$(EXTRAS)) --constraint constraints.txt --output-file requirements.lock \
	  --universal --python-version 3.10 --generate-hashes --no-annotate --custom-compile-command 'make lock' --quiet

hub: $(VENV)/.installed  ## write the loss head as a kernel for the Hugging Face hub, load it from its folder, check its values
	@$(PIP) -e '.[hub]'
	@$(BIN)/python kernels/hub/build.py

# A machine with a GPU has its PyTorch already: nothing is installed, and 9 minutes are enough.
gpu:  ## check and measure on this machine's GPU, write benchmarks/results/<device>.csv
	@PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.loss_gpu

clean:  ## remove everything that the other targets made
	rm -rf $(VENV) build demo runs .mypy_cache .ruff_cache .pytest_cache .benchmarks .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
