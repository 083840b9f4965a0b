# Tasks of the template. `make help` lists them.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory --no-builtin-rules
.DEFAULT_GOAL := help

PYTHON ?= python3
PROJECT := {{cookiecutter.project_slug}}
LOCKS := requirements/dev.txt $(PROJECT)/requirements/dev.txt $(PROJECT)/requirements/torch.txt
BIN := .venv/bin
DEMO ?= build/demo
PORT ?= 8080

# Keep caches out of the template's folder: cookiecutter would copy them into every project.
export PYTHONPYCACHEPREFIX := $(CURDIR)/build/pycache
export RUFF_CACHE_DIR := $(CURDIR)/build/ruff
export MYPY_CACHE_DIR := $(CURDIR)/build/mypy
unexport PYTHONDONTWRITEBYTECODE

# uv does not read pip's variables: pass them on, so that a closed network is configured once.
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifdef PIP_EXTRA_INDEX_URL
export UV_INDEX ?= $(PIP_EXTRA_INDEX_URL)
endif
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
TORCH_FROM = $(if $(UV_FIND_LINKS)$(UV_INDEX)$(UV_DEFAULT_INDEX),,--torch-backend cpu)
UV := $(or $(shell command -v uv),.uv/bin/uv)
UV_BELOW = $(if $(filter /%,$(UV)),$(UV),../$(UV))# relative to the project's folder

.PHONY: setup
setup: .venv/.ready ## Install the template's environment into .venv: the project's packages and cookiecutter

.venv/.ready: $(LOCKS) $(PROJECT)/pyproject.toml  # the project's Makefile requires the latter too
	@$(if $(filter .uv/%,$(UV)),$(MAKE) $(UV))
	@echo "Installing the template's environment (minutes the first time, seconds from uv's cache) …"
	@$(UV) venv --quiet --allow-existing --python "$(PYTHON)" .venv
	@VIRTUAL_ENV=.venv $(UV) pip sync --quiet $(TORCH_FROM) $(LOCKS)
	@touch $@

.uv/bin/uv: $(PROJECT)/requirements/uv.txt
	@$(PYTHON) $(PROJECT)/src/project/doctor.py python
	@echo "Installing uv …"
	@$(PYTHON) -m venv .uv || { echo "error: python's venv module is missing. Debian, Ubuntu, WSL: sudo apt install python3-venv" >&2; rm -rf .uv; exit 2; }
	@.uv/bin/python -m pip install --quiet --require-hashes --requirement $(PROJECT)/requirements/uv.txt
	@touch $@

.PHONY: demo
demo: setup ## Generate a project, run levels 0 and 1, serve a model and get a prediction
	@.venv/bin/python -c 'import socket; socket.create_server(("127.0.0.1", $(PORT)))' 2>/dev/null || { \
		echo "error: port $(PORT) is in use; the demo needs it to serve a model. Use another port: make demo PORT=8081" >&2; exit 2; }
	@[ ! -e "$(DEMO)" ] || { echo "error: $(DEMO) already exists and may contain your work." \
		"Delete it (rm -r $(DEMO)), or use another folder: make demo DEMO=build/demo-2" >&2; exit 2; }
	@echo "1/7  Generating a project with the default answers into $(DEMO)/"
	@mkdir -p "$(DEMO)"
	@$(BIN)/cookiecutter --no-input --output-dir "$(DEMO)" . >/dev/null
	@$(MAKE) demo-in-project PROJECT="$$(echo "$(DEMO)"/*)"

IS_UP = import urllib.request; urllib.request.urlopen('http://127.0.0.1:$(PORT)/health')
.PHONY: demo-in-project
demo-in-project demo-containers: IN = $(MAKE) -C "$(PROJECT)" UV='$(abspath $(UV))' PORT=$(PORT)
demo-in-project:
	@echo "2/7  Installing its packages: make setup"
	@$(IN) setup
	@echo "3/7  Level 0, the four notebooks: make level0"
	@$(IN) level0
	@echo "4/7  Level 1, the pipeline: make level1"
	@$(IN) level1
	@$(MAKE) demo-containers PROJECT="$(PROJECT)"
	@echo "6/7  A worse model on purpose, which the gate must reject: make level1 SET=\"hyperparameters.epochs=1\""
	@$(IN) level1 SET="hyperparameters.epochs=1"
	@echo "7/7  Serving the champion and predicting a test image: make serve, make predict ROW=1"
	@(cd "$(PROJECT)" && exec .venv/bin/python -m predictor.server --registry registry --port $(PORT)) & server=$$!; \
		trap 'kill $$server && wait $$server || true' EXIT; \
		for _ in {1..60}; do $(BIN)/python -c "$(IS_UP)" 2>/dev/null && break; sleep 0.5; done; \
		$(BIN)/python -c "$(IS_UP)" || exit 2; \
		$(IN) predict ROW=1
	@echo
	@echo "The server has stopped. The project is in $(PROJECT), its reports in $$(ls -d "$(PROJECT)"/runs/*/data.html | xargs dirname)."
	@echo "Next: cd $(PROJECT) && make notebook     or your own project: $(BIN)/cookiecutter --output-dir .. ."

.PHONY: demo-containers
demo-containers:
	@if ! docker info >/dev/null 2>&1; then \
		echo "5/7  Skipped, because Docker is not running: the same in containers, make level1 RUNNER=docker"; \
	else \
		echo "5/7  The same pipeline, each step in a container: make level1 RUNNER=docker"; \
		$(IN) level1 RUNNER=docker || echo "The demo continues without containers."; \
	fi

.PHONY: test
test: setup lint ## Lint, then test the template and the projects that it generates
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: test-quick
test-quick: setup ## Run the tests that take seconds
	@$(BIN)/python -m pytest --numprocesses 2 -m "not heavy"

.PHONY: bench
bench: setup ## Measure, and write docs/benchmarks.md; ONLY=server measures one part
	@$(BIN)/python -m tests.bench $(ONLY)

.PHONY: lint
lint: setup ## Check style and types of the template and of the project; changes nothing
	@$(BIN)/ruff check hooks tests
	@$(BIN)/ruff format --check hooks tests
	@# The project's hooks, on the template's files: project.yaml is a Jinja template here, and docs show conflict markers.
	@SKIP=settings,notebook-sync,merge-conflicts,ruff,ruff-format,mypy $(BIN)/pre-commit run --all-files \
		--config '$(PROJECT)/.pre-commit-config.yaml'
	@cd '$(PROJECT)' && export PYTHONPATH=src:. && bin=../$(BIN) && $$bin/ruff check && \
		$$bin/ruff format --check && $$bin/mypy && $$bin/python -m level_0_manual.notebooks check

.PHONY: format
format: setup ## Format code and notebooks
	@$(BIN)/ruff check --fix hooks tests
	@$(BIN)/ruff format hooks tests
	@PYTHONPATH=src:. $(MAKE) -C '$(PROJECT)' format VENV=../.venv UV='$(UV_BELOW)'

.PHONY: lock
lock: | $(UV) ## Update all lock files
	@$(MAKE) -C '$(PROJECT)' lock UV='$(UV_BELOW)'
	@$(UV) pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --upgrade \
		--constraint '$(PROJECT)/requirements/dev.txt' requirements/dev.in --output-file requirements/dev.txt

.PHONY: clean
clean: ## Delete everything that can be rebuilt
	@rm -rf .venv .uv build
	@find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help
help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
