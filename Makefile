# Two commands do everything: `make testbed-run` and `make test`. Both set this machine up first.
SHELL := /bin/bash
.DEFAULT_GOAL := help
EXPERIMENT ?= two-sites
PYTHON3 ?= python3
export DRY_RUN
unexport PYTHONDONTWRITEBYTECODE
# make itself always says 2; the last line names the command's own status.
status = rc=$$?; [ $$rc = 0 ] || echo "exit status $$rc"; exit $$rc

.PHONY: help setup testbed-run test test-fast test-peers bench lint lock clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## install all that is missing (DRY_RUN=1 says what); the others call it
	@$(PYTHON3) scripts/setup.py all; $(status)

testbed-run: ## run an experiment: EXPERIMENT=two-sites (default), hello, matrix, claim or a file
	@scripts/testbed-run "$(EXPERIMENT)"; $(status)

test: ## lint, types, import rules and all tests, set-up included
	@scripts/test; $(status)

test-fast: ## the tests that need neither root nor SGLang, under 2 minutes
	@scripts/test-fast; $(status)

test-peers: ## SGLang's own disaggregation tests against prfaas and mooncake_tcp
	@scripts/test-peers; $(status)

bench: ## every timing, beside its peers, into results/
	@scripts/bench; $(status)

lint: ## ruff, mypy, import-linter
	@scripts/lint; $(status)

lock: ## resolve pyproject.toml into requirements/*.lock again
	@$(PYTHON3) scripts/setup.py light && scripts/lock; $(status)

clean: ## remove what a killed run left: namespaces, guests, servers, raised sysctls
	@.venv/bin/prfaas-testbed clean; $(status)
