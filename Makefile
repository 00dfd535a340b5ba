PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: install demo test test-fast check fix

install: $(STAMP)

# The stubs' metadata asks for TensorRT itself, which type checking does not need.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all,dev,tensorrt-rtx]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps tensorrt-stubs
	touch $@

demo: $(STAMP)
	$(BIN)/fcos-deploy demo -o runs/demo

test: $(STAMP)
	FCOS_DEPLOY_REQUIRE=pytorch,onnxruntime,openvino $(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' -q

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
