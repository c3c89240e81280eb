# `make help` lists the targets. Every target installs what it needs first; nothing is installed twice.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TRITON := .triton
OTHER_KFP := .venv-kfp
OTHER_ENGINES := .venv-bench
JOB ?= manifests/examples/cartpole.yaml
DOCKER ?= docker
REGISTRY ?= ghcr.io/bluewhale-rl
TAG ?= 0.1.0

.DEFAULT_GOAL := help
.PHONY: help install run open-bandit slates test bench reproduce lint format crds images lock clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed $(TRITON)/.installed .make/system .make/spark-classes ## Set up .venv and .triton, and what is missing from apt

run: install ## Set up, then run the example job (or JOB=path/to/job.yaml)
	$(BIN)/bluewhale run $(JOB)

test: install $(OTHER_KFP)/.installed ## Set up, then run the whole test suite
	BLUEWHALE_OTHER_KFP=$(CURDIR)/$(OTHER_KFP)/bin/python $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

open-bandit: install ## Fetch real data, run manifests/examples/open-bandit.yaml on it, compare with what was really got
	PYTHONPATH=$(CURDIR) $(BIN)/python scripts/open_bandit.py prepare
	$(BIN)/bluewhale run manifests/examples/open-bandit.yaml || test $$? -eq 3  # 3: the gate stopped the policy
	PYTHONPATH=$(CURDIR) $(BIN)/python scripts/open_bandit.py compare

slates: install ## Log random slates of RecSim's, run manifests/examples/slates.yaml on them, compare with the truth
	PYTHONPATH=$(CURDIR) $(BIN)/python scripts/slates.py prepare
	$(BIN)/bluewhale run manifests/examples/slates.yaml || test $$? -eq 3  # 3: the gate stopped the policy
	PYTHONPATH=$(CURDIR) $(BIN)/python scripts/slates.py compare

bench: install $(OTHER_ENGINES)/.installed ## Measure timeline, normalization and training against bare jobs and other engines (ROWS, NORMALIZATION_ROWS, REPEATS)
	PYTHONPATH=$(CURDIR) $(BIN)/python benchmarks/timeline.py --rows $(or $(ROWS),1000000) --repeats $(or $(REPEATS),3) \
	  --against duckdb polars --python $(OTHER_ENGINES)/bin/python
	PYTHONPATH=$(CURDIR) $(BIN)/python benchmarks/timeline.py --rows $(or $(ROWS),1000000) --repeats 1 --skew 0.05
	PYTHONPATH=$(CURDIR) $(BIN)/python benchmarks/timeline.py --repeats $(or $(REPEATS),3) --format json --ours bare timeline
	PYTHONPATH=$(CURDIR) $(BIN)/python benchmarks/normalization.py --rows $(or $(NORMALIZATION_ROWS),50000) --repeats 1
	PYTHONPATH=$(CURDIR) $(BIN)/python benchmarks/catalogue.py --repeats $(or $(REPEATS),20)
	PYTHONPATH=$(CURDIR) $(BIN)/python benchmarks/training.py --repeats $(or $(REPEATS),20) \
	  --against d3rlpy tianshou torchrl --python $(OTHER_ENGINES)/bin/python

reproduce: install ## Train every algorithm where the truth is known, over SEEDS seeds, and print what the policies earn
	$(BIN)/bluewhale reproduce --seeds $(or $(SEEDS),10)

lint: $(VENV)/.installed ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

crds: $(VENV)/.installed ## Write manifests/crd from the types in contracts/
	$(BIN)/python -m bluewhale_operator.crd

images: ## Build the container images (REGISTRY, TAG, DOCKER=podman)
	for target in operator spark training serving; do \
	  $(DOCKER) build --file manifests/images/Dockerfile --target $$target --tag $(REGISTRY)/$$target:$(TAG) . || exit 1; \
	done

lock: $(VENV)/.installed ## Write constraints.txt from what is installed
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean: ## Remove runs, environments and caches
	rm -rf $(VENV) $(OTHER_KFP) $(OTHER_ENGINES) $(TRITON) .make runs data *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis spark-warehouse
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Java for Spark, Prometheus for the canary, Redis for a test.
.make/system: scripts/system-packages.sh
	@bash scripts/system-packages.sh
	@mkdir -p .make && touch $@

# torch comes first and by its exact version, so that no other requirement pulls in another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "BlueWhale needs Python 3.11: install it, or name it with make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# A quarter to a third of what a stage on little data takes is Java loading Spark's classes.
.make/spark-classes: $(VENV)/.installed scripts/spark_classes.py | .make/system
	@echo "Keep Spark's classes, so that later starts are faster"
	@PYTHONPATH='$(CURDIR)' $(BIN)/python scripts/spark_classes.py 2> .make/spark-classes.log || { cat .make/spark-classes.log; exit 1; }
	@touch $@

# The compiled pipeline must be readable by the minor release before, too.
$(OTHER_KFP)/.installed:
	$(PYTHON) -m venv $(OTHER_KFP)
	$(OTHER_KFP)/bin/pip install --quiet --disable-pip-version-check 'kfp==2.16.*'
	@touch $@

# What the timeline and training are compared with; torch comes first, as above.
$(OTHER_ENGINES)/.installed: Makefile
	test -x $(OTHER_ENGINES)/bin/python || $(PYTHON) -m venv $(OTHER_ENGINES)
	$(OTHER_ENGINES)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(OTHER_ENGINES)/bin/pip install --quiet --disable-pip-version-check duckdb==2.0.1 polars==2.1.0 \
	  torch==2.13.0 d3rlpy==2.8.1 tianshou==2.0.1 torchrl==0.14.1
	@touch $@

# The Triton server itself comes in the wheel of pytriton. The wheel wants numpy 1, and Triton's Python backend is built
# against it: so neither goes into .venv, and the models that Triton runs get a small environment of their own.
$(TRITON)/.installed: serving/requirements-triton.txt | $(VENV)/.installed
	rm -rf $(TRITON)/server $(TRITON)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(TRITON)/server nvidia-pytriton==0.7.0
	$(PYTHON) -m venv $(TRITON)/python
	$(TRITON)/python/bin/pip install --quiet --disable-pip-version-check --requirement serving/requirements-triton.txt
	@touch $@
