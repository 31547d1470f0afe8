# The two commands of the README are `make demo` and `make test`; both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Many tests wait for processes: two at a time keep two cores busy. One file is one worker's.
TEST_WORKERS ?= 2
PYTEST_ARGS ?=

.PHONY: help setup demo test lint faults soak gpu-test protos bench gpu-bench wheel install-systemd clean

help: ## this text
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

# Set-up is a stamp: it runs again only when the dependencies change.
setup: $(VENV)/.stamp ## create .venv with everything for demo, tests and benchmarks

$(VENV)/.stamp: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else "facelane needs Python 3.11 to 3.13; run: make PYTHON=python3.12 " + "$(MAKECMDGOALS)")'
	@echo "setting up $(VENV) (about 2 GB, a few minutes) ..."
	@$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[server,cli,bridge,onnx,nvidia,evaluate,demo]' --group dev
	@touch $@

demo: setup ## faces recognised from a synthetic camera, live on this terminal
	@$(BIN)/python -m facelane_bridge.demo

test: setup lint ## lint, then all tests with branch coverage
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --cov --cov-report=term $(PYTEST_ARGS)

lint: setup ## ruff, mypy --strict (packages and benchmarks), the import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

SEEDS ?= 3
FRAMES ?= 100000

faults: setup ## every fault under every traffic alone, SEEDS=3 seeds each (about ten minutes)
	@FACELANE_FAULT_SEEDS=$(SEEDS) $(BIN)/python -m pytest tests/faults $(PYTEST_ARGS)

soak: setup ## FRAMES=100000 frames under random faults, an outcome for each
	@for pools in plain spares pairs threads; do \
		$(BIN)/python -m tests.faults.soak --frames $$(($(FRAMES) / 4)) --pools $$pools || exit; \
	done

# MPS has one daemon and one server a card: its tests take turns, beside the others.
gpu-test: setup ## the tests that need an NVIDIA card (about two minutes)
	@$(BIN)/python -m pytest tests/gpu -k mps $(PYTEST_ARGS) & mps=$$!; \
	$(BIN)/python -m pytest tests/gpu -n 6 -k "not mps" $(PYTEST_ARGS); rest=$$?; \
	wait $$mps && exit $$rest

protos: ## regenerate clients/facelane/v1 (and lint with buf when it is installed)
	@protos/generate.sh

bench: setup ## the benchmarks that run on a CPU; results in bench/results
	@$(BIN)/python -m bench

gpu-bench: setup ## the benchmarks that need an NVIDIA card (about twelve minutes)
	@$(BIN)/python -m bench isolation decode streams:720p streams:720p-nvjpeg leak

wheel: setup ## build the wheel into dist/
	@$(BIN)/python -m pip wheel -q --no-deps -w dist .

install-systemd: ## units, users and example settings; DESTDIR=, PREFIX=, VENV= as usual
	@deploy/systemd/install.sh

clean: ## remove what was built, the environment included
	rm -rf $(VENV) .venv-protos dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
