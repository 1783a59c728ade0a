# Each target makes its own virtual environment where there is none: nothing has to be installed first.
#   make quickstart   train a small chat model with GaLore and talk to it
#   make test         run the tests
#   make test-gpu     run the tests of what only a graphics card can show
#   make test-compat  run the tests on other Pythons and releases, oldest to newest (ONLY=oldest,newest for some of them)
#   make test-newest  run some tests on the newest release of everything but torch
#   make lint         ruff and mypy
#   make dist         sdist and wheel, as they would be published, in dist/
#   make docs         the docs as a site, in site/
#   make notebooks    execute the notebooks in place, for the outputs that are committed

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# As many test processes as cores, each with one thread: torch's own threads would fight over them.
# One that has run out of tests takes some of another: those that plan recipes of 7B models take long. Bytecode is
# written, whatever the machine says: tests start hundreds of processes, each of which would compile anew.
WORKERS ?= auto

.PHONY: quickstart notebooks docs test test-gpu test-compat test-newest lint format dist clean

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Installing torch, transformers and what else is needed into $(VENV): minutes, in silence."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[quickstart]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/hf-galore quickstart
	@echo "To talk to it: $(BIN)/hf-galore chat hf-galore-quickstart"

notebooks: $(VENV)/installed-dev
	$(BIN)/python -m tests.support.notebooks

# A warning, of a link that leads nowhere or the like, is an error. (The variable is for a theme's advertisement.)
docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

test: $(VENV)/installed-dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu"

# Away from this checkout, in an environment each below .compat; docs/versions.md has what came of it (WRITE=1 puts it there).
test-compat: $(VENV)/installed-dev
	$(BIN)/python -m tests.compat --workers $(WORKERS) $(if $(ONLY),--only $(ONLY)) $(if $(WRITE),--write)

test-newest: $(VENV)/installed-dev
	$(BIN)/python -m tests.compat --workers $(WORKERS) --only newest --tests quick

# One process: a card of 24 GB has room for one.
test-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/gpu --durations 10

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# With what is in the environment, so with the hatchling of constraints.txt; the wheel is made of the sdist.
dist: $(VENV)/installed-dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) .compat .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist site
