# Each of demo, test, bench, targets, docs, lint, sanitize and release first sets up all that it needs:
# Python 3.10 or newer is enough, and a C++ compiler adds the native CPU kernels. ARGS is passed on to
# the program run:
#   make test ARGS="-k mbconv"
PYTHON ?= python3
VENV := .venv
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# A folder is newer once a file in it is gone.
CSRC_FOLDERS := $(shell find csrc -type d)
BUILD := setup.py $(wildcard build_support/*.py) moat_kernels/source_hashes.py
TEST_CSRC := $(shell find tests/support -name '*.cpp' -o -name '*.h' -o -name '*.cuh')
REQUIREMENTS := $(VENV)/.requirements-installed
PEERS := $(VENV)/.peers-installed
EXAMPLES := $(VENV)/.examples-installed
DOCS := $(VENV)/.docs-installed
PACKAGE := $(VENV)/.package-installed
EXTENSION := moat_kernels/_C.abi3.so
BUILD_LOG := build/extension.log

# pip and the kernels' build find ninja there.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help demo test bench targets gpu oldest lint sanitize release committed clean

help:
	@echo "make demo | test | bench | targets | gpu | docs | oldest | lint | sanitize | release |" \
	      "clean (ARGS=... is passed on)"

demo: $(EXTENSION)
	$(VENV)/bin/python examples/train_classifier.py --blocks both $(ARGS)

# Files are shared out among as many processes as there are cores; ARGS="-n 0" is one process.
test: $(EXTENSION) $(PEERS) $(EXAMPLES)
	$(VENV)/bin/python -m pytest -n logical --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(EXTENSION) $(PEERS)
	@mkdir -p build
	$(VENV)/bin/python -m pytest benchmarks --benchmark-only \
	  --benchmark-json build/benchmarks.json $(ARGS)

# The targets and what this machine reaches of them; measures what `make bench` has not.
targets: $(EXTENSION) $(PEERS)
	$(VENV)/bin/python benchmarks/targets.py $(ARGS)

# Everything that a GPU can tell, in the Python that is there: see docs/gpu.md.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

# The site in build/site; its warnings, broken links among them, are errors.
.PHONY: docs
docs: $(DOCS)
	$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env \
	  --builder html --conf-dir docs --doctree-dir build/doctrees . build/site $(ARGS)
	@echo "The first page is build/site/index.html"

# The oldest Triton and the headers of the oldest PyTorch that are supported, into build/oldest: 300 MB
# of downloads. `make test` runs what needs them where they lie there.
oldest: $(REQUIREMENTS)
	$(VENV)/bin/python tests/support/oldest.py

lint: $(REQUIREMENTS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC) $(TEST_CSRC)
	$(VENV)/bin/mypy

# The native kernels' tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer:
# two builds of their own and some minutes.
sanitize: $(PACKAGE)
	$(VENV)/bin/python tests/sanitize.py address $(ARGS)
	$(VENV)/bin/python tests/sanitize.py thread $(ARGS)

# The source release and the wheel in dist/, tried in a bare environment: some minutes. Of what is
# committed only; with ARGS=--uncommitted the same is tried of a tree with changes. With
# ARGS=--keep-library the wheel's library is the $(EXTENSION) of `make test`: newer than $(PACKAGE).
release: committed $(PACKAGE)
	$(VENV)/bin/python tests/release.py $(ARGS)

committed:
	@$(PYTHON) tests/release.py --check $(ARGS)

# Where the kernels cannot be built this makes no file, so the next run tries, and tells, again.
$(EXTENSION): $(PACKAGE) $(CSRC) $(CSRC_FOLDERS) $(BUILD)
	@echo "Building the native CPU kernels (up to some minutes; log: $(BUILD_LOG))"
	@mkdir -p $(dir $(BUILD_LOG))
	@$(VENV)/bin/python setup.py build_ext --inplace > $(BUILD_LOG) || { cat $(BUILD_LOG); exit 1; }
	@if [ -f $@ ]; then touch $@; fi

$(PACKAGE): $(REQUIREMENTS) pyproject.toml setup.py
	@echo "Installing moat_kernels into $(VENV) in editable mode (seconds)"
	@MOAT_KERNELS_SKIP_EXT=1 $(VENV)/bin/pip install -q --no-build-isolation --no-deps -e .
	@touch $@

$(REQUIREMENTS): requirements-dev.txt | $(VENV)/bin/python
	@echo "Installing the packages of requirements-dev.txt into $(VENV) (a minute or two)"
	@$(VENV)/bin/pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(PEERS): requirements-peers.txt $(REQUIREMENTS)
	@echo "Installing other people's models (requirements-peers.txt) into $(VENV) (seconds)"
	@$(VENV)/bin/pip install -q --disable-pip-version-check --no-deps -r requirements-peers.txt
	@touch $@

# Where they cannot be installed this makes no file, and the tests that need them skip.
$(EXAMPLES): requirements-examples.txt $(REQUIREMENTS)
	@echo "Installing pictures with labels (requirements-examples.txt) into $(VENV) (seconds)"
	@if $(VENV)/bin/pip install -q --disable-pip-version-check --no-deps \
	  -r requirements-examples.txt; then touch $@; fi

$(DOCS): requirements-docs.txt $(REQUIREMENTS)
	@echo "Installing what builds the pages (requirements-docs.txt) into $(VENV) (seconds)"
	@$(VENV)/bin/pip install -q --disable-pip-version-check -r requirements-docs.txt
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "moat_kernels needs Python 3.10 or newer, as 'python3' or by 'make PYTHON=...'," \
	       "but $(PYTHON) is: $$($(PYTHON) --version 2>&1)"; exit 1; }
	@echo "Creating the virtual environment $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot create virtual environments (on Debian and Ubuntu: package" \
	       "python3-venv)"; exit 1; }

clean:
	rm -rf $(VENV) build dist *.egg-info $(EXTENSION) moat_kernels/_build_record.json
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
