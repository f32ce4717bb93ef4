# Everything happens in .venv, which the first command makes. PYTHON=/path/to/python3.12 chooses its Python.

VENV = .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Files that say what has been installed; older than pyproject.toml means again.
RUN = $(VENV)/.installed-run
DEV = $(VENV)/.installed-dev

# For make soak and make soak-outage; an empty SEED draws one and prints it.
SECONDS =
SEED =
DATABASE = sqlite

.PHONY: help run test test-pythons soak soak-outage check format lint types layers lengths clean

help:
	@echo "make run            broker, worker, beat and dashboard with the example application; Ctrl-C stops all"
	@echo "make test           all tests (PYTEST_ARGS='tests/unit -k cron' for some)"
	@echo "make test-pythons   the tests without servers on every other supported Python found here"
	@echo "make soak           kills processes under load for 3 minutes and counts (SECONDS=, SEED=, DATABASE=postgresql)"
	@echo "make soak-outage    broker and database away for 5 minutes (SECONDS=)"
	@echo "make check          format, lint, types, layers, lengths"
	@echo "make format         formats the code and fixes what the linter can fix"
	@echo "make clean          removes .venv, caches and builds; keeps the data of 'make run' in .llmtasks"

run: $(RUN)
	LLMTASKS_IMPORTS=examples.ragapp.tasks $(BIN)/llmtasks dev --procfile examples/ragapp/Procfile

# Tests wait for servers and clocks more than they compute: two cores carry four processes.
test: $(DEV)
	$(BIN)/python -m pytest -n 4 --dist loadfile $(PYTEST_ARGS)

test-pythons:
	@sh .ci/test-pythons

soak: $(DEV)
	$(BIN)/python -m tests.soak --seconds $(or $(SECONDS),180) $(if $(SEED),--seed $(SEED)) --database $(DATABASE)

soak-outage: $(DEV)
	OUTAGE_SECONDS=$(or $(SECONDS),300) $(BIN)/python -m pytest tests/faults/test_outage.py $(PYTEST_ARGS)

check: lint types layers lengths

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(DEV)
	$(BIN)/mypy
	$(BIN)/mypy tests/typing
	$(BIN)/pyright
	$(BIN)/pyright -p tests/typing

layers: $(DEV)
	$(BIN)/lint-imports

lengths:
	@find llmtasks -name '*.py' -exec awk \
		'FNR == 301 { print FILENAME ": more than 300 lines; split it"; bad = 1 } END { exit bad }' {} +

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(RUN): pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): about a minute, only now."
	$(PIP) -e '.[flower,examples]'
	@touch $(RUN)

# What tests need includes what the example needs.
$(DEV): pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): a minute or two, only now."
	$(PIP) -e '.[dev]'
	@touch $(RUN) $(DEV)

$(BIN)/python:
	@sh .ci/find-python | { read -r python && "$$python" -m venv $(VENV); }

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage* build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
