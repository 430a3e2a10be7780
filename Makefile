# `make` lists the targets. Each does its own set-up: git, make and Python 3.10+ are all it takes.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# uv reads the lock and installs it in parallel; the stamp is written last, so an interrupted install starts again.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear .venv
	.venv/bin/pip install --quiet --disable-pip-version-check uv==0.13.9
	.venv/bin/uv pip sync --quiet --python .venv/bin/python --require-hashes requirements.lock
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
	touch $@

setup: .venv/installed ## build .venv from requirements.lock

lock: .venv/installed ## resolve pyproject.toml again into requirements.lock
	uv pip compile --quiet --universal --all-extras --generate-hashes --no-header --no-emit-index-url --no-emit-find-links pyproject.toml --output-file requirements.lock

clean: ## remove what the stages wrote and the environment
	rm -rf .venv .cache data/* models/*.onnx models/*.safetensors

.PHONY: help setup lock clean
