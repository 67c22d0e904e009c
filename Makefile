# make demo         the whole job on the shipped model: calibrate, save policies, compare; prints where results are
# make test         the fast tests and the doctests
# make test-all     the slow tests too
# make test-oldest  the fast tests with the oldest versions pyproject.toml allows, in .venv-oldest
# make test-quantised  the tests of quantised models, in .venv-quantised: torchao and bitsandbytes are large and talkative
# make test-lmms    the plug-in of lmms-eval, its own command, in .venv-lmms: its pins are not ours, and it is large;
#                   and videos as such: processors need torchvision for them, which is there
# make lint         ruff, mypy, and which package may import which; make format repairs what ruff can
# make bench        pruned prefills against plain decoders on inputs already that short, parts of calls, memory, requests a
#                   second, growth; writes runs/bench (under 15 minutes)
# make docs         the documentation as a site, warnings as errors, in site/; python3 -m http.server -d site shows it
# make build        wheel and source archive in dist/
# make clean        removes what tools left behind; results in runs/ and the environments stay
#
# The first target also sets up .venv. Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
WORKERS ?= 2
CONSTRAINTS = constraints.txt
EXTRAS = dev

# One thread a worker: the test models are too small for more to help.
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal

export PIP_DISABLE_PIP_VERSION_CHECK = 1

# What .venv holds is compiled once, whatever the environment says: tests start many processes, and each that compiled
# torch and transformers anew would take 15 seconds more.
unexport PYTHONDONTWRITEBYTECODE

# A command, and where there is no terminal a line every few seconds: pip says nothing while it unpacks large packages.
EVERY = 10
define TELLING
{ [ -t 1 ] || while sleep $(EVERY) >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do echo "still at it: $(2)"; done & } ; telling=$$!; \
trap 'kill $$telling 2>/dev/null' EXIT; trap 'exit 130' INT; trap 'exit 143' TERM; \
$(1)
endef

.PHONY: help venv demo bench test test-all test-oldest test-quantised test-lmms lint format docs build clean

help:
	@sed -n '/^# /s/^# //p;/^$$/q' Makefile

venv: .venv/.installed

demo: .venv/.installed
	PYTHONUNBUFFERED=1 .venv/bin/catp demo

bench: .venv/.installed
	OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.bench

test: .venv/.installed
	$(call PYTEST,.venv)

test-all: .venv/.installed
	$(call PYTEST,.venv) -m ''

test-oldest: .venv-oldest/.installed
	$(call PYTEST,.venv-oldest)

test-quantised: .venv-quantised/.installed
	OMP_NUM_THREADS=1 .venv-quantised/bin/python -m pytest -q -m '' tests/models/test_quantised.py

test-lmms: .venv-lmms/.installed
	OMP_NUM_THREADS=1 .venv-lmms/bin/python -m pytest -q -m '' tests/integrations/test_lmms_eval.py \
	    tests/data/test_video_models.py

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/mypy examples/easy_vqa
	.venv/bin/lint-imports --no-cache

format: .venv/.installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: .venv/.installed
	OMP_NUM_THREADS=1 .venv/bin/python -m website

# build/ of an earlier run would be packed again, deleted modules included.
build: .venv/.installed
	rm -rf build dist
	.venv/bin/python -m build --no-isolation

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path "./.venv*" -prune -o -name __pycache__ -prune -exec rm -rf {} +

# An environment that works is kept, with its Python: one made over another by a different Python would be broken.
define CREATE
command -v "$(PYTHON)" >/dev/null || { \
    echo "There is no '$(PYTHON)' here." >&2; \
    echo "Name a Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
    exit 1; }; \
"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
    echo "catp-lightning needs Python 3.11 or newer; '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1)." >&2; \
    echo "Name another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; \
    exit 1; }; \
echo "Setting up $(@D), once: first torch (unpacking takes a minute), then the rest; together about five minutes."; \
"$(PYTHON)" -m venv --clear $(@D)
endef

# The stamp is written last: an interrupted set-up starts again, and keeps what is installed already.
# Not compiled: Python compiles what it imports, and all of every package would take a minute or two of CPU.
# torch first and alone: a pinned version without local tag takes a CPU build where one is offered.
.venv-oldest/.installed: CONSTRAINTS = constraints-oldest.txt
.venv-quantised/.installed: EXTRAS = dev,quantised
.venv-lmms/.installed: CONSTRAINTS = constraints-lmms.txt
.venv-lmms/.installed: EXTRAS = dev,lmms
.venv/.installed .venv-quantised/.installed: constraints.txt
.venv-oldest/.installed: constraints-oldest.txt
.venv-lmms/.installed: constraints-lmms.txt
.venv/.installed .venv-oldest/.installed .venv-quantised/.installed .venv-lmms/.installed: pyproject.toml setup.py
	@$(call TELLING,$(@D)/bin/python -m pip --version >/dev/null 2>&1 || { $(CREATE); },making $(@D))
	@echo "Installing torch."
	@$(call TELLING,$(@D)/bin/python -m pip install --no-compile -c $(CONSTRAINTS) "$$(grep '^torch==' $(CONSTRAINTS))",torch)
	@echo "Installing the rest."
	@$(call TELLING,$(@D)/bin/python -m pip install --no-compile -c $(CONSTRAINTS) -e '.[$(EXTRAS)]',the rest)
	@touch $@
	@echo "$(@D) is ready."
