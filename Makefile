# make demo, make test: each makes its own virtual environment in .venv and needs nothing but Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
EXTRAS := torch,jax,consumers,test,dev

.PHONY: demo test test-slow test-llama test-mlx lint bench clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute or two)"
	@# torch first and pinned: a later version would pull gigabytes of CUDA libraries
	$(PIP) install -q -c constraints.txt torch==2.13.0 scikit-build-core
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

demo: $(VENV)/ready
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python bench/demo.py demo-output

test: $(VENV)/ready lint
	@# one thread each: two workers with two threads on two cores wait for each other
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -q -m slow

test-llama: $(VENV)/ready
	@# llama.cpp is compiled here: several minutes
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" $(PIP) install -q -c constraints.txt 'llama-cpp-python==0.3.36'
	$(BIN)/python -m pytest -q -m llama

test-mlx: $(VENV)/ready
	$(PIP) install -q -c constraints.txt 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
	$(BIN)/python -m pytest -q -m mlx

lint: $(VENV)/ready
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python bench/convert.py --size 2b

clean:
	rm -rf $(VENV) build demo-output .pytest_cache .mypy_cache .ruff_cache
