# `make` lists the targets. Each does its own set-up: git, make and Python 3.10+ are all it takes.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 20

UV := uv==0.13.9
# with WHEELHOUSE=folder, everything comes from there; --isolated ignores the indexes in pip's settings, --offline in uv's
LOCAL = $(if $(WHEELHOUSE),$(1) --no-index --find-links .venv/wheels)
# uv reads the lock and installs it in parallel; the stamp is written last, so an interrupted install starts again.
.venv/installed: requirements.lock pyproject.toml
	$(if $(WHEELHOUSE),$(CHECK))
	$(PYTHON) -m venv .venv
	$(if $(WHEELHOUSE),$(JOIN))
	.venv/bin/pip install --quiet --disable-pip-version-check $(call LOCAL,--isolated) $(UV)
	.venv/bin/uv pip sync --quiet --compile-bytecode --python .venv/bin/python $(call LOCAL,--offline) \
	  --require-hashes requirements.lock
	.venv/bin/uv pip install --quiet --python .venv/bin/python $(call LOCAL,--offline) --no-deps \
	  --no-build-isolation --editable .
	rm -rf .venv/wheels
	touch $@

setup: .venv/installed ## build .venv from requirements.lock; WHEELHOUSE=folder needs no network

# With WHEELHOUSE: refuse a file that is missing or damaged, one line each, and wheels for another Python or lock.
MADE_FOR = $$($(PYTHON) --version | cut -d. -f-2), requirements.lock $$(sha256sum < requirements.lock | cut -c-12)
define CHECK
@bad=$$(cd "$(WHEELHOUSE)" && LC_ALL=C sha256sum --check --strict --quiet SHA256SUMS 2>/dev/null) \
  || { echo "$${bad:-SHA256SUMS is missing or damaged}" | sed 's|: FAILED open or read$$| is missing|; s|: FAILED$$| is damaged|; \
    s|.*|$(WHEELHOUSE)/&: copy it again from where make wheelhouse ran|' >&2; exit 2; }
@made=$$(cat "$(WHEELHOUSE)/MADE_FOR"); [ "$$made" = "$(MADE_FOR)" ] \
  || { echo "$(WHEELHOUSE) is for $$made, and this is $(MADE_FOR):" \
    "make it again with this lock and this Python, or name another Python by PYTHON=" >&2; exit 2; }
endef
# A part is a piece of one tar.
define JOIN
rm -rf .venv/wheels
@if [ -e "$(WHEELHOUSE)/part-0000" ]; then mkdir .venv/wheels && cat "$(WHEELHOUSE)"/part-* | tar -xC .venv/wheels; \
  else ln -s "$$(realpath "$(WHEELHOUSE)")" .venv/wheels; fi
endef

# FOLDER appears when it is complete. Markers that tell 3.x.y from 3.x.z are cut out, so that the wheels are for any 3.x.y.
wheelhouse: FOLDER = $(patsubst %/,%,$(or $(WHEELHOUSE),wheelhouse))
wheelhouse: NEW = $(FOLDER).new
wheelhouse: GET = TMPDIR="$$(realpath "$(NEW)")" "$(NEW)/pip/bin/pip" download --disable-pip-version-check --no-deps \
  --dest "$(NEW)/wheels"
wheelhouse: ## download what setup needs into WHEELHOUSE=folder, for this Python 3.x; PART_MB=48 cuts it into parts
	@[ ! -e "$(FOLDER)" ] || { echo "$(FOLDER) exists: delete it, or name another folder by WHEELHOUSE=" >&2; exit 2; }
	rm -rf "$(NEW)"
	$(PYTHON) -m venv "$(NEW)/pip"
	$(GET) $(UV)
	sed -E "s/python_full_version [<>=!]+ '[0-9]+\.[0-9]+\.[0-9]+' and //" requirements.lock \
	  | $(GET) --require-hashes --requirement /dev/stdin
	$(if $(PART_MB),$(CUT))
	echo "$(MADE_FOR)" > "$(NEW)/wheels/MADE_FOR"
	cd "$(NEW)/wheels" && sha256sum * > ../SHA256SUMS && mv ../SHA256SUMS .
	mv "$(NEW)/wheels" "$(FOLDER)"
	rm -rf "$(NEW)"
define CUT
tar -C "$(NEW)/wheels" -cf "$(NEW)/tar" .
rm "$(NEW)/wheels"/*
split --bytes $(PART_MB)MB --numeric-suffixes --suffix-length 4 "$(NEW)/tar" "$(NEW)/wheels/part-"
rm "$(NEW)/tar"
endef

LOCK = uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-header --no-emit-index-url \
  --no-emit-find-links pyproject.toml
lock: .venv/installed ## resolve pyproject.toml again into requirements.lock and requirements-serve.lock
	$(LOCK) --all-extras --output-file requirements.lock
	$(LOCK) --extra serve --no-annotate --constraint requirements.lock --output-file requirements-serve.lock

repro: .venv/installed ## run the whole pipeline on ingest.source; what is up to date is not run again
	barlow scan
	barlow recommend --auto
	dvc repro
	barlow summary

system: # what some tests need besides Python; they skip where this cannot install it
	@(command -v ip && command -v chromium && ls /usr/lib/postgresql/*/bin/initdb) >/dev/null 2>&1 || [ "$$(id -u)" != 0 ] \
	  || (apt-get update -qq && apt-get install -qq -y chromium iproute2 postgresql >/dev/null) || true

test: .venv/installed system ## check, then run every test
	$(MAKE) --no-print-directory check
	python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

TRAINING = tests/training tests/test_pretrain.py tests/test_extract.py tests/test_evaluate.py tests/test_finetune.py \
  tests/test_export.py
float32: .venv/installed system ## the tests that train, as on a processor without bf16
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
	  $(TRAINING)

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
	python benchmarks/microbatch.py
	python benchmarks/precision.py
	python benchmarks/serve.py

seeds: .venv/installed ## the headline figures for three seeds, on the shards of the last repro (about 10 minutes)
	python benchmarks/seeds.py

peers: .venv/installed ## our recipe beside lightly's and solo-learn's, three seeds each: make peers DATA="folder digits" MINUTES=6
	[ -e .venv-peers/lightly ] || uv pip install --quiet --python .venv/bin/python --target .venv-peers --no-deps \
	  lightly==1.6.0 lightly-utils==0.0.2 lightning-utilities==0.15.3
	python benchmarks/peers.py --data $(or $(DATA),digits) --minutes $(or $(MINUTES),6)

gpu: .venv/installed ## everything that wants a GPU, in one run that goes on where it stopped: make gpu CIFAR=archive MINUTES=10
	python benchmarks/gpu.py --minutes $(or $(MINUTES),30) $(if $(CIFAR),--cifar $(CIFAR)) $(if $(PHOTOS),--photos $(PHOTOS))

record: .venv/installed ## keep the figures of the last repro as those that README.md shows
	python benchmarks/record.py

PRESET ?= cpu
claims: .venv/installed ## the paper's claims, one figure each in the report; CLAIM=batch_size, PRESET=gpu, JOBS=4 (cpu: about an hour)
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
	rm -rf .venv .venv-peers .cache .mypy_cache .ruff_cache .pytest_cache data/raw data/shards data/*.parquet \
	  data/.*.parquet data/quarantine* data/features models/*.onnx models/*.safetensors models/resume models/reduced models/triton models/weights models/index \
	  reports/pretrain reports/data_docs reports/*.html reports/*.csv

.PHONY: help system setup lock repro test float32 soak check bench seeds peers gpu record claims serve flows clean wheelhouse
