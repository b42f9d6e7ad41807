# Januslens. `make` or `make help` lists what there is.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SETUP  := $(VENV)/.setup-done

# Stubs are generated in an environment of their own; protos/requirements.txt says why.
STUBS_VENV  := .cache/stubs-venv
STUBS_BIN   := $(STUBS_VENV)/bin
STUBS_SETUP := $(STUBS_VENV)/.setup-done
STUBS       := client/januslens/v1
FRESH_STUBS := build/stubs
CHECKOV_VENV  := .cache/checkov-venv
CHECKOV_SETUP := $(CHECKOV_VENV)/.setup-done
CHECKOV       := $(CHECKOV_VENV)/bin/checkov --quiet --compact --skip-download \
	--config-file deploy/checkov.yaml
PROTOS      := $(wildcard protos/januslens/v1/*.proto)

# The pages' program is built by Node, and committed: only who changes it needs Node and npm.
VIEWER       := client/viewer
VIEWER_SETUP := $(VIEWER)/node_modules/.package-lock.json
ASSETS       := client/januslens/viewer/assets
FRESH_ASSETS := build/viewer
NPM          := $(shell command -v npm)

# The audit's own dependencies are none of the project's.
AUDIT_VENV  := .cache/audit-venv
AUDIT_BIN   := $(AUDIT_VENV)/bin
AUDIT_SETUP := $(AUDIT_VENV)/.setup-done

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test soak audit bench check check-deploy check-image check-stubs stubs viewer check-viewer notebook rebuild-demo clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' \
		| awk -F '\t' '{ printf "  make %-14s %s\n", $$1, $$2 }'

setup: $(SETUP) ## Make .venv with everything the project needs (PYTHON=... chooses the interpreter)

demo: $(SETUP) ## Start the server, trace and gradient-lens the running example, stop the server
	@$(BIN)/python server/quickstart.py

test: $(SETUP) $(if $(NPM),$(VIEWER_SETUP)) ## Run the tests
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

bench: $(SETUP) ## Measure the goals of docs/performance.md: some minutes, on an idle machine
	$(BIN)/python -m tests.benchmarks

soak: $(SETUP) ## Run what takes minutes, one after the other: killed servers and clients, load
	$(BIN)/pytest -m soak -s

audit: $(SETUP) $(AUDIT_SETUP) ## Look for known vulnerabilities in what is installed; needs the network
	$(BIN)/python -m pip install --quiet --dry-run --only-binary :all: \
		$$($(BIN)/python -m tests.support.dependencies)
	@mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable > build/installed.txt
	$(AUDIT_BIN)/pip-audit --strict --vulnerability-service osv --no-deps --disable-pip \
		--requirement build/installed.txt

check: $(SETUP) check-stubs check-viewer ## Lint, check formatting, types, imports, the contract and its stubs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code

check-deploy: $(SETUP) $(CHECKOV_SETUP) ## Scan the rendered manifests and the Dockerfile
	@rm -rf build/manifests
	$(BIN)/python -m tests.deploy.render build/manifests
	$(CHECKOV) --framework kubernetes --directory build/manifests
	$(CHECKOV) --framework dockerfile --file deploy/Dockerfile

check-image: $(SETUP) ## Run the image's build steps in a fresh environment and start what they install
	$(BIN)/python -m tests.deploy.build_steps

stubs: $(STUBS_SETUP) ## Generate the Python stubs from protos/ anew
	@rm -f $(STUBS)/*_pb2*.py $(STUBS)/*_pb2*.pyi
	$(call generate,client)

check-stubs: $(STUBS_SETUP)
	@rm -rf $(FRESH_STUBS) && mkdir -p $(FRESH_STUBS)
	@$(call generate,$(FRESH_STUBS))
	@diff -r -x __init__.py -x __pycache__ $(FRESH_STUBS)/januslens/v1 $(STUBS) \
		|| { echo "The stubs differ from protos/: run 'make stubs' and commit the result." >&2; exit 1; }

viewer: $(VIEWER_SETUP) ## Build the pages' program anew from client/viewer/
	npm --prefix $(VIEWER) run --silent format
	npm --prefix $(VIEWER) run --silent build

ifdef NPM
check-viewer: $(VIEWER_SETUP)
	npm --prefix $(VIEWER) run --silent check
	@rm -rf $(FRESH_ASSETS)
	@npm --prefix $(VIEWER) run --silent build -- $(abspath $(FRESH_ASSETS))
	@diff -rq $(FRESH_ASSETS) $(ASSETS) \
		|| { echo "The pages' program differs from client/viewer/: run 'make viewer' and commit." >&2; exit 1; }
else
check-viewer:
	@echo "no npm: the pages' program is taken as it is, unchecked" >&2
endif

notebook: $(SETUP) ## Execute docs/notebooks/ anew and save what it shows
	$(BIN)/python -m tests.notebooks.execution

rebuild-demo: $(SETUP) ## Train the embedded model anew in build/demo and check that it behaves the same
	$(BIN)/python -m demo_training.train --out build/demo
	$(BIN)/python -m demo_training.evaluate build/demo

clean: ## Remove the environments, caches and build products
	rm -rf $(VENV) $(VIEWER)/node_modules .cache build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find client server tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Messages for every file; the service's stub for the one file that has a service.
define generate
$(STUBS_BIN)/python -m grpc_tools.protoc --proto_path=protos \
	--plugin=protoc-gen-mypy=$(STUBS_BIN)/protoc-gen-mypy \
	--python_out=$(1) --mypy_out=quiet:$(1) $(PROTOS)
$(STUBS_BIN)/python -m grpc_tools.protoc --proto_path=protos \
	--plugin=protoc-gen-mypy_grpc=$(STUBS_BIN)/protoc-gen-mypy_grpc \
	--grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) protos/januslens/v1/service.proto
endef

$(SETUP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[server,cli,ui,analysis,otel,dev]'
	@touch $@

$(VIEWER_SETUP): $(VIEWER)/package-lock.json
	npm --prefix $(VIEWER) ci --silent
	@touch $@

$(CHECKOV_SETUP): deploy/requirements.txt
	$(PYTHON) -m venv $(CHECKOV_VENV)
	$(CHECKOV_VENV)/bin/python -m pip install --quiet --requirement $<
	@touch $@

$(STUBS_SETUP): protos/requirements.txt
	$(PYTHON) -m venv $(STUBS_VENV)
	$(STUBS_BIN)/python -m pip install --quiet --requirement $<
	@touch $@

$(AUDIT_SETUP):
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_BIN)/python -m pip install --quiet 'pip-audit>=2.9,<3'
	@touch $@
