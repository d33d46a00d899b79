# Everything a fresh Debian machine needs, as root: `make demo`, `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find fz_core -name '*.pyx' -o -name '*.pxd') $(wildcard fz_core/ice/*.py fz_core/turn/*.py)
PEERS ?=

.PHONY: demo demo-smoke test test-fast test-system lint bench interop system-packages build clean help

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' Makefile

demo: build ## a private web page through client, relay and gateway, in network namespaces
	$(BIN)/python -m fz_core.lab.demo

demo-smoke: build ## the same with a small file
	$(BIN)/python -m fz_core.lab.demo --megabytes 5

test: build $(VENV)/systemd-resolved ## every test
	$(BIN)/python -m pytest

test-fast: build ## tests that need neither root nor peer programs
	$(BIN)/python -m pytest -m "not root"

test-system: build ## the fault lab: seconds a tunnel is out, per event; mixes with the official programs in PEERS=<folder>
	$(BIN)/python -m fz_core.lab.faults $(if $(PEERS),--peers $(PEERS))

lint: build ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: build ## every benchmark, JSON on stdout; also the official programs in PEERS=<folder>
	$(BIN)/python -m tests.bench $(if $(PEERS),--peers $(PEERS))

interop: build ## whole systems with the official programs in PEERS=<folder>
	$(BIN)/python -m tests.interop $(if $(PEERS),--peers $(PEERS))

system-packages: ## what the programs and tests need from Debian
	@missing=$$(for p in $$(cat system-packages.txt); do \
	  dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  echo "installing" $$missing; \
	  apt-get update -qq && \
	  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	fi

# Only unpacked, for a test: installed, it would take over the machine's resolv.conf.
$(VENV)/systemd-resolved: | $(VENV)/.installed
	cd $(VENV) && { apt-get download -qq systemd-resolved || { apt-get update -qq && apt-get download -qq systemd-resolved; }; }
	cd $(VENV) && dpkg -x systemd-resolved_*.deb systemd-resolved
	rm $(VENV)/systemd-resolved_*.deb

build: system-packages $(VENV)/.built ## virtual environment and extension modules

$(VENV)/.installed: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --use-pep517 --require-hashes -r requirements.lock
	@touch $@

# The programs and their metadata; what the compiler was told may have changed, so nothing compiled is kept.
$(VENV)/.registered: $(VENV)/.installed setup.py pyproject.toml
	rm -rf build
	FZ_BUILD_ONLY=none $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.built: $(VENV)/.registered $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

clean: ## remove everything built
	rm -rf $(VENV) build dist *.egg-info
	find fz_core -name '*.so' -delete -o -name '*.c' -delete
