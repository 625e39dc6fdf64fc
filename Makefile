# Each target that needs Python makes .venv first, once. `make help` lists the targets.
#
# TORCH says which torch to install; the default is the one coati is developed on. Examples:
#   make install TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"    (CPU only)
#   make install TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"  (CUDA 13.0)
TORCH ?= torch==2.13.0
# and test-newest installs
TORCH_NEWEST ?= torch

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
DOCS := .venv-docs
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest
QUICK := not slow and not gpu and not slurm
# files are shared out to so many processes in their order: the longest aren't last. On two cores a third one works while
# the runs of the other two wait for each other
SHARED_OUT := -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: help install quickstart test test-slurm trl test-vllm test-newest test-all docs mutation bench bench-gpu lint format typecheck clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

install: $(READY)  ## Make .venv with everything (again when the requirements change)

quickstart: $(READY)  ## Train a small model by SFT, reward model and PPO on two CPU processes
	OMP_NUM_THREADS=1 $(PY) examples/quickstart/run.py

test: $(READY)  ## Run the tests, without the slow ones and those for a GPU or SLURM
	$(PYTEST) $(SHARED_OUT) -m "$(QUICK)"

test-slurm: $(READY)  ## Run the SLURM tests on two nodes on this machine (as root on Debian: installs slurm-wlm)
	tools/install_slurm.sh
	$(PYTEST) -m "slurm and not slow" tests/slurm

trl: $(READY)  ## Make three environments with TRL 1.12, 1.16 and 0.11 (10 minutes), for tests and benchmarks
	tools/install_trl.sh $(PY) $(TORCH)

test-vllm: $(READY)  ## Make .venv-vllm (4 GB) and test vLLM as the rollout engine and the server
	tools/install_vllm.sh $(PY) $(TORCH)
	OMP_NUM_THREADS=2 .venv-vllm/bin/python -m pytest tests/rollout/test_vllm.py tests/serve/test_vllm.py

test-newest: $(READY)  ## Make .venv-newest with the newest packages that setup.py allows, and run the tests of `make test` there
	tools/install_newest.sh $(PY) $(TORCH_NEWEST)
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(SHARED_OUT) -m "$(QUICK)"

test-all: $(READY)  ## Run all tests; those for a GPU skip themselves where there is none
	$(PYTEST)

docs: $(DOCS)/.ready  ## Build the documentation in site/: open site/index.html, no server or network needed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

mutation: $(READY)  ## Change the losses and masks in small ways and list what no test notices (docs/mutation.md)
	$(PY) tools/mutate.py

TRAINING := sft-fixed reward-fixed ranks ppo-fixed ppo-shared ppo-log-normal
FAMILY := sft-log-normal reward-log-normal dpo-fixed dpo-vocabulary dpo-prompts dpo-log-normal grpo-fixed grpo-log-normal
WITH_MEMORY := sft-log-normal reward-log-normal ppo-fixed

bench: $(READY)  ## Measure coati beside its peers and write benchmarks/results (on an idle machine)
	$(PY) benchmarks/generation.py --save
	$(PY) benchmarks/training.py --cases $(TRAINING) --save training
	$(PY) benchmarks/training.py --cases $(FAMILY) --save family
	$(PY) benchmarks/training.py --model '{"vocab_size": 32000}' --cases $(WITH_MEMORY) --save memory
	$(PY) benchmarks/scaling.py --save
	$(PY) benchmarks/report.py

bench-gpu: $(READY)  ## Measure training and decoding on a GPU, beside its own matrix rate and bandwidth
	$(PY) benchmarks/gpu.py --save

lint: $(READY)  ## Check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(READY)  ## Repair style and formatting
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

typecheck: $(READY)  ## Check the type hints
	$(VENV)/bin/mypy

clean:  ## Remove what the targets above made, .venv and runs/ excepted
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

.venv: $(READY)

$(READY): setup.py requirements.txt requirements-colossalai.txt
	tools/install.sh $(VENV) $(TORCH)
	touch $@

$(DOCS)/.ready: requirements-docs.txt
	tools/install_docs.sh $(DOCS)
	touch $@
