# Every target works from any directory (`make -C PATH`), in a path with spaces, and offline once set up.
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-deploy demo-authenticated test test-flower test-killing faults simulate hostile soak screenshots lint bench clean

PYTHON_IN_VENV := .venv/bin/python
PYTEST_ARGS ?=
# Whole files, in the order in which they are collected: the longest first, see tests/conftest.py. Of most tests one more
# at once than there are cores, for some always wait; of the deployments, many processes each, no more than cores.
CORES := $(shell getconf _NPROCESSORS_ONLN)
PYTEST_AT_ONCE = $(PYTHON_IN_VENV) -m pytest --maxprocesses 4 --dist loadfile --no-loadscope-reorder
BENCH_ARGS ?=
FAULT_ARGS ?=
HOSTILE_ARGS ?=
SOAK_ARGS ?=
SIMULATE_ARGS ?=
BENCHMARKS := split_overhead round_overhead secagg stage_cost ledger budget_show example_gradients codecs throughput wan memory

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: ## Make .venv and install the pinned dependencies; quick when nothing changed
	@scripts/setup

demo: setup ## Fine-tune a small model over 4 simulated clients and a trunk server, on real text (under 4 minutes)
	@exec $(PYTHON_IN_VENV) -m trunkline demo

demo-deploy: setup ## The same through a real SuperLink and 4 SuperNodes (4 minutes)
	@exec $(PYTHON_IN_VENV) -m trunkline demo --deploy

demo-authenticated: setup ## A deployment in which everybody proves who they are, and strangers are turned away (2 minutes)
	@exec deploy/authenticated/run

test: setup ## Run the tests but for those of whole deployments, on up to 4 cores at once (about 12 minutes on 2)
	@exec env OMP_NUM_THREADS=1 $(PYTEST_AT_ONCE) -n $(shell expr $(CORES) + 1) $(PYTEST_ARGS)

test-flower: setup ## Run the tests through Flower's real programs, and of a trunk of several (11 minutes on 2)
	@exec env OMP_NUM_THREADS=1 $(PYTEST_AT_ONCE) -n $(CORES) -m "(deployment or simulation) and not screenshots" $(PYTEST_ARGS)

test-killing: setup ## Kill sites of real deployments in the middle of a round (about 6 minutes on 2 cores)
	@exec env OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest -m killing $(PYTEST_ARGS)

faults: setup ## Kill orchestrator, trunk and site at every durable write and message, on SQLite and on PostgreSQL
	@exec env OMP_NUM_THREADS=1 scripts/with-postgres $(PYTHON_IN_VENV) -m tests.faults.matrix $(FAULT_ARGS)

simulate: setup ## Play whole runs in virtual time, a weather of faults from each seed (SIMULATE_ARGS="--seeds 10000")
	@exec env OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m tests.simulation $(SIMULATE_ARGS)

hostile: setup ## Attack a live trunk while honest clients train, and fuzz 100,000 frames (some 20 minutes on 2 cores)
	@exec env OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m tests.hostile $(HOSTILE_ARGS)

soak: setup ## Runs of 20 clients for 30 minutes, killed at random and resumed, then 10,000 seeds of `simulate` (80 minutes)
	@env OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m tests.soak $(SOAK_ARGS)
	@exec env OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m tests.simulation $(if $(SIMULATE_ARGS),$(SIMULATE_ARGS),--seeds 10000)

screenshots: setup ## Make docs/dashboard.png and docs/report.png anew, from a real run (needs chromium, chromium-driver)
	@exec env OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest -m screenshots tests/trunkline/pages/test_screenshots.py

lint: setup ## Check style, types and the generated stubs
	@exec scripts/lint

bench: setup ## Run the benchmarks, an hour and more; exits 1 when a target falls short
	@failed=; for name in $(BENCHMARKS); do $(PYTHON_IN_VENV) -m benchmarks.$$name $(BENCH_ARGS) || failed="$$failed $$name"; done; \
	test -z "$$failed" || { echo "benchmarks that failed or fell short:$$failed" >&2; exit 1; }

clean: ## Remove .venv, caches and build leftovers; runs and adapters in ~/.trunkline stay
	@rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
