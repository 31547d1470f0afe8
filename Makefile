# The two commands of the README are `make demo` and `make test`; both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Many tests wait for processes: three at a time keep two cores busy. One file is one worker's.
TEST_WORKERS ?= 3
PYTEST_ARGS ?=
# The tests start hundreds of processes: what they import is compiled once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup rules console screenshots demo models-report test test-rest test-all test-busy lint fuzz fuzz-cameras faults soak door soak-cameras gpu-test protos bench gpu-bench wheel docs release deb install-systemd clean

help: ## this text
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

# Set-up is a stamp: it runs again only when the dependencies change.
setup: $(VENV)/.stamp ## create .venv with everything for demo, tests and benchmarks

$(VENV)/.stamp: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else "facelane needs Python 3.11 to 3.13; run: make PYTHON=python3.12 " + "$(MAKECMDGOALS)")'
	@echo "setting up $(VENV) (about 2 GB, a few minutes) ..."
	@$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[server,cli,bridge,events,console,fleet,onnx,nvidia,evaluate,postgres,otel,demo]' --group dev
	@touch $@

WEB ?=

demo: setup ## faces recognised from a synthetic camera, live on this terminal; WEB=1: and in the web console
	@$(BIN)/python -m facelane_bridge.demo $(if $(WEB),--web)

PYTEST = $(BIN)/python -m pytest -n $(TEST_WORKERS)
# A file is one worker's, so that what its tests share is made once; those that wait come first.
BY_FILE = --dist loadfile --no-loadscope-reorder
COVERED = --cov --cov-report=term --cov-fail-under=90

# What takes seconds; mypy keeps a core busy for a minute, and is `make lint`'s alone.
rules: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

test: rules ## ruff, the import rules, all tests but the slow ones with branch coverage (its budget: six minutes on two cores)
	@$(PYTEST) $(BY_FILE) -m "not slow" $(COVERED) $(PYTEST_ARGS)

TIME ?= 86400
SEEDS ?= 3
# Every six hours another part of the slow tests comes first.
TURN ?= $(shell expr $$(date +%s) / 21600)

test-rest: setup ## what `make test` leaves out, as far as TIME=600 seconds go; what comes first changes (TURN=)
	@FACELANE_FAULT_SEEDS=$(SEEDS) $(PYTEST) --dist worksteal --deal $(TURN) -m slow --within $(TIME) $(PYTEST_ARGS)

# A real systemd is booted where that can be: it takes root and Debian's tools (CONTRIBUTING.md).
BOOT = $(shell test "$$(id -u)" = 0 && command -v debootstrap >/dev/null && command -v systemd-nspawn >/dev/null && echo 1)

test-all: setup lint ## every test: all faults, traffics and SEEDS=3 seeds, a booted systemd (half an hour)
	@FACELANE_FAULT_SEEDS=$(SEEDS) FACELANE_BOOT_TEST=$(BOOT) $(PYTEST) --dist loadscope $(COVERED) $(PYTEST_ARGS)

RUNS ?= 10

# One core belongs to a neighbour who never rests; the tests must hold all the same.
test-busy: setup ## `make test` RUNS=10 times beside a busy neighbour on every second core
	@$(BIN)/python -m tests.busy --runs $(RUNS) -- $(PYTEST) $(BY_FILE) -m "not slow" -q $(PYTEST_ARGS)

lint: rules ## ruff, the import rules, mypy --strict (packages and benchmarks)
	@$(BIN)/mypy

SECONDS ?= 300

fuzz: setup ## coverage-guided fuzzing of parsers, SECONDS=300 each (half an hour)
	@$(BIN)/python -m pip install -q -c constraints.txt --group fuzz
	@$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

FRAMES ?= 100000

faults: setup ## every fault under every traffic, SEEDS=3 seeds each (about twenty minutes)
	@FACELANE_FAULT_SEEDS=$(SEEDS) $(BIN)/python -m pytest tests/faults $(PYTEST_ARGS)

soak: setup ## FRAMES=100000 frames under random faults, an outcome for each
	@for pools in plain spares pairs threads; do \
		$(BIN)/python -m tests.faults.soak --frames $$(($(FRAMES) / 4)) --pools $$pools || exit; \
	done

DOORS ?= 200

door: setup ## examples/door.py under DOORS=200 seeds of faults (half an hour)
	@$(BIN)/python -m tests.faults.door --seeds $(DOORS)

HOURS ?= 24
SCALE ?= 30

soak-cameras: setup ## HOURS=24 of a fleet of misbehaving cameras, SCALE=30 times as fast
	@$(BIN)/python -m tests.soak_cameras --hours $(HOURS) --scale $(SCALE)

INPUTS ?= 5000000

fuzz-cameras: setup ## INPUTS=5000000 streams of nonsense to the MJPEG splitter (about ten minutes)
	@$(BIN)/python -m bench.camera_fuzz --inputs $(INPUTS)

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

DATA =
OUT = build/models-report
models-report: setup ## a starter model on pictures of your own: DATA=FOLDER (subject/picture.jpg, or live/ and spoof/kind/, or boxes.json), OUT=FOLDER
	@test -n "$(DATA)" || { echo "say which pictures: make models-report DATA=FOLDER, which holds subject/picture.jpg, or live/ and spoof/kind/, or boxes.json"; exit 2; }
	@model=recognizer; [ ! -d "$(DATA)/live" ] || model=liveness; [ ! -f "$(DATA)/boxes.json" ] || model=detector; \
	$(BIN)/facelane-server models evaluate facelane-$$model --detector facelane-detector \
	    --data "$(DATA)" --out "$(OUT)"

console: setup ## build the console's page into clients/facelane_console/static (needs node and npm)
	@cd clients/facelane_console/web && npm ci --no-audit --no-fund --silent && npm run --silent build
	@$(BIN)/python clients/facelane_console/web/hash.py

screenshots: setup ## the documentation's pictures of the console, as its tests see it (needs Chromium)
	@FACELANE_FIGURES=1 $(BIN)/python -m pytest -q tests/browser/test_figures.py $(PYTEST_ARGS)

wheel: setup ## build the wheel into dist/
	@$(BIN)/python -m pip wheel -q --no-deps -w dist .

docs: setup ## the documentation as a site in build/site; a dead link ends it
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q && echo "docs: build/site/index.html"

release: setup ## checks, then wheel, sdist, SBOM and SHA256SUMS in dist/
	@$(BIN)/python deploy/release.py

deb: ## build the Debian package into dist/ (EXTRAS=, TORCH_INDEX=, PYTHON=: deploy/debian/build.sh)
	@deploy/debian/build.sh

install-systemd: ## units, users and example settings; DESTDIR=, PREFIX=, VENV= as usual
	@deploy/systemd/install.sh

clean: ## remove what was built, the environment included
	rm -rf $(VENV) .venv-protos dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
