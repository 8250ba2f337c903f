# Two commands: `make demo` and `make test`. Each makes .venv first if there is none yet.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-cluster

demo: $(READY)
	$(BIN)/orpo-ray demo

# One thread: on small shared machines two threads of torch get in each other's way.
test: export OMP_NUM_THREADS = 1
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

# As root, with Debian's iproute2, openssh-server, rsync, nftables and curl.
test-cluster: $(READY)
	$(BIN)/pytest -m cluster tests/cluster

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $(READY)
