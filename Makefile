# Each target does all its own set-up on a fresh clone: Python >= 3.10, a C++ compiler and a package index are enough.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/demo
export SDL_VIDEODRIVER ?= dummy

.PHONY: setup demo test check sanitize mutants docs bench gpu clean

setup: .venv/ready

.venv/ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch triton numpy setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[model,test,check]"
	touch $@

demo: setup
	$(BIN)/python -m sae_diffusion.demo --out $(OUT)

# In a random order, which SEED gives again.
SEED ?= $(shell date +%s)
test: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --randomly-seed=$(SEED)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The C++ of the CPU library under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; in `test` too.
sanitize: setup
	$(BIN)/python tests/campaign/sanitize.py

# Every listed one-line fault must fail a test; about an hour on two cores.
mutants: setup
	$(BIN)/python tests/campaign/mutants.py --jobs 2

# site/, from docs/ and the docstrings; a broken link is an error.
docs: setup .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/docs: .venv/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt "sae-kernels[docs]"
	touch $@

bench: setup
	$(BIN)/python -m benchmarks --budget 500
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only --benchmark-autosave

# On a machine as found: no virtual environment, nothing installed. GPU_BUDGET_S seconds, results in GPU_OUT.
gpu:
	$(PYTHON) -m benchmarks.gpu

clean:
	rm -rf .venv build site *.egg-info
