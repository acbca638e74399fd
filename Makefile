# Two commands: `make run` renders a picture with a LoRA on the embedded tiny model, `make test` checks everything.
VENV := .venv
PY := $(VENV)/bin/python
# The first interpreter that is new enough; diffusers and transformers need Python 3.11.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Small enough to take a second on a laptop; the LoRA is the one that the tiny model brings along.
RUN_INPUT := {"input": {"prompt": "a lighthouse at dusk", "width": 512, "height": 512, "num_inference_steps": 8, \
	"seed": 7, "loras": [{"path": "tiny-example", "scale": 0.8}]}}

.PHONY: help run test lint types pytest wheels clean

help:
	@echo "make run    set up .venv, render one LoRA request on the tiny model, save it under output/"
	@echo "make test   set up .venv, then lint, types and tests"
	@echo "make wheels fetch what a GPU machine without a network lacks for python -m bench.gpu into wheels/"
	@echo "make clean  remove .venv, caches and output/"

$(PY):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (set PYTHON=/path/to/python3.11)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Stamps make the second run install nothing.
$(VENV)/.run: requirements.txt | $(PY)
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(PY) -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

run: $(VENV)/.run
	MODEL_ID=tiny LORA_CACHE_DIR=.cache/loras $(PY) handler.py --test_input '$(RUN_INPUT)'

test: lint types pytest

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev
	$(VENV)/bin/mypy

pytest: $(VENV)/.dev
	$(PY) -m pytest -n 2 --dist loadfile

# For the Python of the GPU machine, not for this one's: make wheels WHEELS_PYTHON=3.11
WHEELS_PYTHON ?= 3.12
wheels: | $(PY)
	rm -rf wheels
	$(PY) -m pip download --disable-pip-version-check --no-deps --only-binary=:all: --dest wheels \
		--implementation cp --python-version $(WHEELS_PYTHON) \
		--platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
		--constraint requirements.txt --requirement bench/gpu/wheels.txt
	@du -sh wheels

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .cache output wheels
