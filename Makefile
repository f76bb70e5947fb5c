# The two commands of a fresh clone: `make demo` and `make test`. README shows the same as plain commands.

PYTHON ?= python3
VENV ?= .venv
# make demo CORPUS=folder trains on your own text
CORPUS ?=
# Linux without an NVIDIA driver takes the CPU build of torch; make TORCH_REQUIREMENTS= leaves the choice to pip
ifeq ($(shell uname -s)-$(wildcard /proc/driver/nvidia/version),Linux-)
TORCH_REQUIREMENTS ?= requirements-cpu.txt
DEV_REQUIREMENTS ?= requirements-dev-cpu.txt
endif

PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# what pip says of retries is shown only where it fails: that an index cannot be reached is no fault if another has the package
AND_SAY_WHY = 2>$(VENV)/pip.log || { cat $(VENV)/pip.log >&2; exit 1; }

.PHONY: demo test test-all test-distributed lint options setup clean

demo: $(VENV)/.installed
	$(VENV)/bin/python utils.py demo $(if $(CORPUS),--corpus "$(CORPUS)")

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

# all of `make test`, then what it leaves out: the same proofs over large grids
test-all: test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "exhaustive and not gpu"

# runs that Accelerate starts or DeepSpeed shares out, which the other tests do without
test-distributed: $(VENV)/.installed-dev requirements-distributed.txt
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation -r requirements-distributed.txt $(AND_SAY_WHY)
	$(VENV)/bin/python -m pytest -m "not gpu" tests/distributed

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# the page of all options of train.py, from their declarations
options: $(VENV)/.installed
	$(VENV)/bin/python -m training.options_page

setup: $(VENV)/.installed
	$(VENV)/bin/python utils.py setup

$(VENV)/.installed: requirements.txt $(TORCH_REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "installing into $(VENV): $(if $(TORCH_REQUIREMENTS),torch for the CPU (0.2 GB to download),torch as pip chooses it (up to 3 GB to download)), then the rest (0.2 GB)"
	@$(PYTHON) -m venv $(VENV)
	@$(if $(TORCH_REQUIREMENTS),$(PIP) --retries 1 --no-deps -r $(TORCH_REQUIREMENTS) $(AND_SAY_WHY))
	@$(PIP) -r requirements.txt $(AND_SAY_WHY)
	@$(VENV)/bin/python -c "from importlib.metadata import version; found = version('torch'); print('installed torch', found + ('' if '+cpu' in found or not '$(TORCH_REQUIREMENTS)' else ': the index of CPU builds gave none, so it is PyPI\047s, with CUDA'))"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt $(DEV_REQUIREMENTS)
	@echo "installing what the tests need (0.6 GB to download)"
	@$(PIP) -r requirements-dev.txt $(addprefix -r ,$(DEV_REQUIREMENTS)) $(AND_SAY_WHY)
	@touch $@

clean:
	rm -rf demo .pytest_cache .ruff_cache
