# make demo    the example model through ONNX Runtime, set-up included
# make test    everything that this machine can test, set-up included; says what it skipped and why
# make build   the plugin: build/libmoe_infer.so
# make lint    ruff, mypy --strict, clang-format; make format puts right what they can
# make test-gpu   everything that needs an NVIDIA GPU, into benchmarks/results/gpu_tests.json
#
# MOE_INFER_WITH_TORCH=1     the tests that export from PyTorch too (installs it)
# MOE_INFER_REQUIRE_ALL=1    a skip of anything but a GPU test is a failure
# MOE_INFER_GPU_ARCHS=90a    GPU code for these alone (see meson.options)
# TEST_JOBS=2                processes that share the tests; 0: none but pytest's own, as a debugger wants it
# GPU_REPORT_ARGS=...        of tools/gpu_report.py, such as --only layer

PYTHON ?= python3
VENV ?= .venv
VENV_GPU ?= .venv-gpu
# Each imports PyTorch: more than four are rather a matter of memory than of time.
TEST_JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# The package itself is used from this tree; the plugin is compiled by tools/build_native.py.
EDITABLE := MOE_INFER_BUILD=0
OUR_CPP = $(shell find ops tests/native -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
# Wheels of TensorRT's bindings that go with .tensorrt/lib; there are none for Python 3.13 and newer.
BINDINGS := tensorrt-cu12-bindings==10.6.0

ifeq ($(MOE_INFER_REQUIRE_ALL),1)
IF_POSSIBLE :=
else
IF_POSSIBLE := --if-possible
endif
ifeq ($(MOE_INFER_WITH_TORCH),1)
TORCH := $(VENV)/.torch
endif

.PHONY: demo test test-gpu build lint format clean

demo: $(VENV)/.cpu
	$(BIN)/python examples/demo.py

test: $(VENV)/.test $(TORCH)
	$(BIN)/python tools/build_native.py --with-libraries $(IF_POSSIBLE)
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS)

build: $(VENV)/.build
	$(BIN)/python tools/build_native.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(OUR_CPP)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(OUR_CPP)

# The GPU wheels of ONNX Runtime and the CPU ones exclude each other, hence a virtual environment of its own.
test-gpu: $(VENV_GPU)/.gpu
	$(VENV_GPU)/bin/python tools/build_native.py
	$(VENV_GPU)/bin/python tools/gpu_report.py $(GPU_REPORT_ARGS)

clean:
	rm -rf build dist *.egg-info

# --- Virtual environments: each stamp is a set of packages that is installed.

$(VENV)/bin/pip:
	sh tools/make_venv.sh $(PYTHON) $(VENV)

$(VENV)/.cpu: pyproject.toml setup.py VERSION | $(VENV)/bin/pip
	@echo "installing moe-infer[cpu] into $(VENV)"
	$(EDITABLE) $(BIN)/python $(PIP_INSTALL) -e '.[cpu]'
	@touch $@

$(VENV)/.build: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/python $(PIP_INSTALL) 'setuptools>=77' 'meson>=1.1' 'ninja>=1.11'
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.cpu $(VENV)/.build
	@echo "installing the test packages into $(VENV)"
	$(EDITABLE) $(BIN)/python $(PIP_INSTALL) -e '.[cpu,test]'
	$(BIN)/python $(PIP_INSTALL) --no-deps $(BINDINGS) || echo "no $(BINDINGS) for this Python"
	@touch $@

$(VENV)/.torch: pyproject.toml $(VENV)/.cpu
	@echo "installing PyTorch and transformers, whose models the tests export, into $(VENV): large"
	$(EDITABLE) $(BIN)/python $(PIP_INSTALL) -e '.[cpu,torch]' 'transformers>=5'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.cpu
	@echo "installing the linters into $(VENV)"
	$(EDITABLE) $(BIN)/python $(PIP_INSTALL) -e '.[cpu,dev]'
	@touch $@

$(VENV_GPU)/.gpu: pyproject.toml setup.py VERSION
	sh tools/make_venv.sh $(PYTHON) $(VENV_GPU)
	$(EDITABLE) $(VENV_GPU)/bin/python $(PIP_INSTALL) -e '.[gpu,test,torch]' 'transformers>=5' 'setuptools>=77' 'meson>=1.1' 'ninja>=1.11'
	@touch $@
