# Two commands: `make demo` and `make test`. Each makes .venv first if there is none yet. `make test-long` has the tests
# that `make test` leaves out for the time they take.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MOTO := .moto

.PHONY: demo test test-long test-cluster

demo: $(READY)
	$(BIN)/orpo-ray demo

# One thread: on small shared machines two threads of torch get in each other's way. Two processes share the first tests;
# those that run and time whole commands come one at a time, whatever became of the others.
test: export OMP_NUM_THREADS = 1
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile tests/unit tests/parity tests/invariance; first=$$?; \
	$(BIN)/pytest tests/cli tests/faults && exit $$first

test-long: export OMP_NUM_THREADS = 1
test-long: $(READY)
	$(BIN)/pytest -m long tests/cli tests/faults

# As root, with Debian's iproute2, openssh-server, rsync, nftables, sshfs and curl.
test-cluster: export OMP_NUM_THREADS = 1
test-cluster: $(READY) $(MOTO)/.ready
	$(BIN)/pytest -m cluster tests/cluster

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $(READY)

# A real S3-compatible server; its packages want an older python-dateutil than ours.
$(MOTO)/.ready:
	$(PYTHON) -m venv $(MOTO)
	$(MOTO)/bin/pip install --quiet --disable-pip-version-check 'moto[server]==5.2.5'
	touch $(MOTO)/.ready
