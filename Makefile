# `make` lists the targets. Each does its own set-up: git, make and Python 3.10+ are all it takes.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# uv reads the lock and installs it in parallel; the stamp is written last, so an interrupted install starts again.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check uv==0.13.9
	.venv/bin/uv pip sync --quiet --compile-bytecode --python .venv/bin/python --require-hashes requirements.lock
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
	touch $@

setup: .venv/installed ## build .venv from requirements.lock

LOCK = uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-header --no-emit-index-url \
  --no-emit-find-links pyproject.toml
lock: .venv/installed ## resolve pyproject.toml again into requirements.lock and requirements-serve.lock
	$(LOCK) --all-extras --output-file requirements.lock
	$(LOCK) --extra serve --no-annotate --constraint requirements.lock --output-file requirements-serve.lock

repro: .venv/installed ## run the whole pipeline on data.source; what is up to date is not run again
	barlow scan
	dvc repro
	barlow summary

system: # what some tests need besides Python; they skip where this cannot install it
	@(command -v ip && command -v chromium && ls /usr/lib/postgresql/*/bin/initdb) >/dev/null 2>&1 || [ "$$(id -u)" != 0 ] \
	  || (apt-get update -qq && apt-get install -qq -y chromium iproute2 postgresql >/dev/null) || true

test: .venv/installed system ## check, then run every test
	$(MAKE) --no-print-directory check
	python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

soak: .venv/installed system ## the longer proofs, which make test leaves out
	python -m pytest -m soak

check: .venv/installed ## format, lint and types; changes nothing
	ruff format --check
	ruff check
	mypy

bench: .venv/installed ## run benchmarks/, each a ratio to what a user would pick instead; IMAGES=folder of 32-px JPEGs
	python benchmarks/loss.py
	python benchmarks/views.py $(IMAGES)
	python benchmarks/step.py $(IMAGES)
	python benchmarks/precision.py
	python benchmarks/serve.py

seeds: .venv/installed ## the headline figures for three seeds, on the shards of the last repro (about 10 minutes)
	python benchmarks/seeds.py

gpu: .venv/installed ## everything that wants a GPU, in one run that goes on where it stopped: make gpu CIFAR=archive MINUTES=10
	python benchmarks/gpu.py --minutes $(or $(MINUTES),30) $(if $(CIFAR),--cifar $(CIFAR)) $(if $(PHOTOS),--photos $(PHOTOS))

record: .venv/installed ## keep the figures of the last repro as those that README.md shows
	python benchmarks/record.py

PRESET ?= cpu
claims: .venv/installed ## the paper's claims, a figure each in the report; CLAIM=batch_size, PRESET=gpu, JOBS=4 (cpu: about an hour)
	barlow claims $(CLAIM) --preset $(PRESET) --jobs $(or $(JOBS),1)
	[ ! -e models/encoder.onnx ] || dvc repro --single-item report

serve: .venv/installed ## serve models/encoder.onnx, and search in its training images: http://127.0.0.1:8000
	barlow index --keep
	barlow serve

PORT ?= 4200
flows: export PREFECT_API_URL := http://127.0.0.1:$(PORT)/api
flows: export PREFECT_HOME := $(CURDIR)/.prefect
flows: .venv/installed ## server, worker and deployments on this machine, until Ctrl-C: http://127.0.0.1:4200 (PORT=)
	bash flows/box.sh

clean: ## remove the environment and what the stages wrote; no image folder of yours is touched
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache data/raw data/shards data/*.parquet data/.*.parquet \
	  data/quarantine* data/features models/*.onnx models/*.safetensors models/resume models/reduced models/triton models/index \
	  reports/pretrain reports/data_docs reports/*.html reports/*.csv

.PHONY: help system setup lock repro test soak check bench seeds gpu record claims serve flows clean
