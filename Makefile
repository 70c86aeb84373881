# What people and CI run. Everything stands on `make setup`, which a second time takes a moment.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
LOCK = $(BIN)/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header \
  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host

.PHONY: help setup demo test matrix soak parity check lane wheel protos lock bars bench clean

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

setup:  ## what is missing on this machine (Debian packages, .venv, .venv/bin/nsmctl)
	@PYTHON=$(PYTHON) .ci/setup

demo: setup  ## two clusters and a flat network between them on this machine, checks; all taken down again
	@$(BIN)/nsmctl lab run labs/two-clusters.yaml
	@$(BIN)/python -m bench.wire --quick

test: setup  ## every test but those of matrix; as root, because wires need namespaces
	@rm -f out/times.json
	@$(BIN)/python -P -m pytest

matrix: setup  ## what takes long: tests marked so, every Python of this machine, a fresh Debian 12
	@command -v debootstrap >/dev/null || apt-get -qq -o DPkg::Lock::Timeout=300 install --yes debootstrap
	@[ -x /usr/lib/postgresql/15/bin/postgres ] || .ci/postgresql
	@VWIRE_MATRIX=1 $(BIN)/python -P -m pytest -m long
	@VWIRE_MATRIX=1 $(BIN)/python -P -m pytest tests/e2e/install

soak: setup  ## a lab that is broken in every way for HOURS (1), by SEED (1): what must hold holds, what is held is flat
	@$(BIN)/nsmctl chaos run chaos --seed $(or $(SEED),1) --minutes $$(awk 'BEGIN {print $(or $(HOURS),1) * 60}')

parity: setup  ## what upstream shows by example: each one's lab is run, and docs/parity.md written from that
	@$(BIN)/python docs/parity.py

check: setup  ## what CI asks before the tests: style, types, import rules, generated code, docs, manifests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python protos/generate.py --check
	@$(BIN)/python docs/check.py
	@$(BIN)/python deploy/kubernetes/check.py

lane: setup  ## a shell, or ARGS, in a kernel with WireGuard, netem, VRF, VLAN; built once (minutes)
	@$(BIN)/python -m tests.lane $(ARGS)

wheel: setup  ## dist/vwire-*.whl, for pip and pipx
	@rm -rf build *.egg-info
	@$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --no-index -w dist .
	@rm -rf build *.egg-info

protos: setup  ## nsm/proto from protos/*.proto
	@$(BIN)/python protos/generate.py

lock: setup  ## requirements.lock and the image's part of it, newest versions that pyproject.toml allows
	@$(BIN)/python -m pip install --quiet pip-tools
	@$(LOCK) --upgrade --extra dev --output-file requirements.lock pyproject.toml
	@$(LOCK) --build-deps-for wheel --constraint requirements.lock \
	  --output-file deploy/requirements.lock pyproject.toml

bars:  ## how the times the last test run waited compare with their bars
	@$(BIN)/python tests/support/bars.py out/times.json

bench: setup  ## what wires cost, against the same by hand and against floors; QUICK=1: in a minute
	@$(BIN)/python -m bench $(if $(QUICK),--quick)

clean:  ## remove .venv, caches and what tests wrote
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@rm -rf out build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
