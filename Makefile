# `make` lists the commands; each sets up what it needs in .venv and runs.
# On the command line, as in `make serve PORT=9000`, or as the service's own variables.
HOST   = $(or $(SKRD4AD_HOST),127.0.0.1)
PORT   = $(or $(SKRD4AD_PORT),8000)
MODELS = $(or $(SKRD4AD_MODELS),models)
PYTHON = python3
# The two runtimes exclude each other, so one is chosen by whether an NVIDIA driver answers.
RUNTIME := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

.DEFAULT_GOAL := help
.PHONY: help serve install test test-slow coverage mutants lint format demo demo-model bench bench-peers soak overload bombs constraints sbom audit clean

help:  ## this list
	@sed -n 's/^\([a-z -]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

.venv/bin/uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv

uv_pip = .venv/bin/uv pip $(1) --quiet --python .venv/bin/python
install = $(call uv_pip,install) --constraints constraints.txt --editable
# Both wheels write the same folder: the other one leaves before this one comes.
OTHER_RUNTIME = $(if $(filter gpu,$(RUNTIME)),onnxruntime openvino openvino-telemetry,onnxruntime-gpu)
leave_other_runtime = @$(call uv_pip,uninstall) $(OTHER_RUNTIME) 2>/dev/null || true; rm -f .venv/runtime-* .venv/development-*

.venv/runtime-$(RUNTIME): .venv/bin/uv pyproject.toml constraints.txt
	@echo "installing the service ($(RUNTIME) runtime) into .venv"
	$(leave_other_runtime)
	$(install) '.[$(RUNTIME)]'
	@touch $@

.venv/development-$(RUNTIME): .venv/bin/uv pyproject.toml constraints.txt
	@echo "installing service, training and test tools ($(RUNTIME) runtime) into .venv: about 6 GB with torch"
	$(leave_other_runtime)
	$(install) '.[$(RUNTIME),training,dev]'
	@touch $@ .venv/runtime-$(RUNTIME)

serve: .venv/runtime-$(RUNTIME)  ## start the service [HOST=127.0.0.1] [PORT=8000] [MODELS=models] [RUNTIME=cpu|gpu]
	.venv/bin/python -m service serve --host $(HOST) --port $(PORT) --models $(MODELS)

install: .venv/development-$(RUNTIME)  ## install training and test tools as well (torch: about 6 GB)

test: lint  ## install everything, check format, lint and types, run all tests
	.venv/bin/python -m pytest

test-slow: .venv/development-$(RUNTIME)  ## what takes over an hour: hundreds of kills, the API fuzzed, thousands of damaged pictures
	.venv/bin/python -m pytest -m slow

COVERAGE = .venv/bin/coverage
coverage: .venv/development-$(RUNTIME)  ## run all tests, and tell which lines and branches none of them reaches
	$(COVERAGE) erase
	$(COVERAGE) run -m pytest
	$(COVERAGE) combine --quiet
	$(COVERAGE) report --include 'service/*' --fail-under 95
	$(COVERAGE) report --include 'training/*' --fail-under 90

MUTMUT = VIRTUAL_ENV=.venv .venv/bin/uv run --no-project --with mutmut==3.8.1 mutmut
mutants: .venv/development-$(RUNTIME)  ## look for changes of calibration, batcher and image that no test notices (an hour)
	$(MUTMUT) run
	$(MUTMUT) results

lint: .venv/development-$(RUNTIME)  ## check format, lint and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/development-$(RUNTIME)  ## format the code
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

TRAINING = .venv/bin/python -m training
TEACHER = models/teachers/resnet18_tiny-imagenet.safetensors
TEACHER_FLAGS = --backbone resnet18 --teacher-weights $(TEACHER) \
  --teacher-licence 'ImageNet terms: non-commercial research'

demo: .venv/development-$(RUNTIME)  ## draw data, train, export, evaluate, serve, calibrate, inspect
	rm -rf runs/demo
	@echo "== 1 of 4: draw good and bad parts"
	$(TRAINING) synthetic --out runs/demo/data --train 160 --test-normal 30 --test-per-defect 4 --size 256
	@echo "== 2 of 4: train on the good ones alone (a few minutes)"
	$(TRAINING) train --data runs/demo/data --name plate --models runs/demo/models $(TEACHER_FLAGS) \
	  --embedding-planes 256 --image-size 128 --epochs 30 --precision bfloat16
	@echo "== 3 of 4: export one checked graph"
	$(TRAINING) export --name plate --models runs/demo/models
	@echo "== 4 of 4: evaluate it, start the service, calibrate and inspect over HTTP"
	$(TRAINING) rehearse --bundle runs/demo/models/plate/1 --data runs/demo/data \
	  --pictures runs/demo/pictures --json runs/demo/result.json
	@echo "== done; serve it with: make serve MODELS=runs/demo/models"

demo-model: .venv/development-$(RUNTIME)  ## train the shipped models/demo anew, as its next version
	$(TRAINING) synthetic --out runs/demo-model --train 680 --test-normal 60 --test-per-defect 10 --seed 7
	$(TRAINING) train --data runs/demo-model --name demo --overwrite $(TEACHER_FLAGS) \
	  --embedding-planes 256 --epochs 20 --precision bfloat16
	$(TRAINING) export --name demo --weights float16

# What the service is measured beside: each in an environment of its own, with the service's pixels.
PEERS = litserve ray bentoml anomalib
WIDE = runs/bench/models/wide-resnet50/wide-resnet50/1

bench: .venv/development-$(RUNTIME) bench-peers  ## measure beside the peers, into bench/results (half an hour)
	.venv/bin/python -m bench.graphs --wide
	.venv/bin/python -m bench.engine --bundle models/demo/1 $(WIDE) --rounds 3 --out bench/results/engine
	.venv/bin/python -m bench.pixels --out bench/results/pixels
	.venv/bin/python -m bench.serving --out bench/results/serving

soak: MINUTES ?= 30
overload: MINUTES ?= 5
soak overload: .venv/development-$(RUNTIME)  ## measure a service over hours, or under ten times what it can do [MINUTES=30|5]
	.venv/bin/python -m bench.endurance $@ --minutes $(MINUTES) --out bench/results/$@

bombs: .venv/development-$(RUNTIME)  ## measure how soon what unpacks to far too much is refused
	.venv/bin/python -m bench.endurance $@ --out bench/results/$@

bench-peers: $(PEERS:%=runs/bench/env/%/installed)  ## install the peers to measure beside (7 GB)

runs/bench/env/%/installed: bench/peers/%.txt .venv/bin/uv
	@echo "installing $* into runs/bench/env/$*"
	.venv/bin/uv venv --quiet --clear --python .venv/bin/python runs/bench/env/$*
	.venv/bin/uv pip install --quiet --python runs/bench/env/$*/bin/python --requirements bench/peers/$*.txt
	.venv/bin/uv pip install --quiet --python runs/bench/env/$*/bin/python --no-deps --editable .
	@touch $@

PIN = .venv/bin/uv pip compile --quiet --upgrade --no-header --no-annotate --no-emit-index-url --python-version 3.11
# Peers decode and run the graph with the very versions that the service does.
SHARED = cykooz-resizer|numpy|onnxruntime|opencv-python-headless|pillow

# Every server parses HTTP with httptools on uvloop; BentoML takes them where they are there.
constraints: .venv/bin/uv  ## pin the newest versions that pyproject.toml allows
	$(PIN) --universal --extra cpu --extra gpu --extra training --extra dev pyproject.toml -o constraints.txt
	for peer in litserve 'ray[serve]' 'bentoml>=1.4 httptools uvloop' 'anomalib[openvino]'; do \
	  (printf '%s\n' $$peer; grep -E '^($(SHARED))==' constraints.txt) | $(PIN) - -o bench/peers/$${peer%%[[>]*}.txt; done

runs/supply/env-$(RUNTIME): .venv/bin/uv pyproject.toml constraints.txt
	.venv/bin/uv venv --quiet --clear --python .venv/bin/python $@
	.venv/bin/uv pip install --quiet --python $@/bin/python --constraints constraints.txt '.[$(RUNTIME)]'

sbom: runs/supply/env-$(RUNTIME)  ## write what the service consists of as CycloneDX: runs/supply/sbom-$(RUNTIME).json
	.venv/bin/uv tool run --quiet --from cyclonedx-bom cyclonedx-py environment --output-reproducible --of JSON -o runs/supply/sbom-$(RUNTIME).json $</bin/python

audit: runs/supply/env-$(RUNTIME)  ## look for known vulnerabilities of what the service consists of
	.venv/bin/uv pip freeze --quiet --python $</bin/python | grep -v '^skrd4ad' > runs/supply/requirements-$(RUNTIME).txt
	.venv/bin/uv tool run --quiet pip-audit --no-deps --disable-pip --requirement runs/supply/requirements-$(RUNTIME).txt

clean:  ## remove .venv and what tests and demos left
	rm -rf .venv runs state mutants .mypy_cache .pytest_cache .ruff_cache
