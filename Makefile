# make demo: fetches a model, exports it, fits a patch, and shows how the patch changes the model's behaviour.
# make test: runs every test.
# make test-edge: runs the tests of the edge half again, without the host half and with the oldest ONNX Runtime.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EDGE_VENV := .venv-edge
EDGE_BIN := $(EDGE_VENV)/bin
OLDEST_RUNTIME := onnxruntime==1.24.1
BUILD := build/demo
BASE := smollm2-135m-instruct

.PHONY: demo test test-edge lint clean
.DELETE_ON_ERROR:

demo: $(BUILD)/model/patch_slots.json $(BUILD)/pirate.safetensors
	$(BIN)/python demo/edge.py $(BUILD)/model $(BUILD)/pirate.safetensors demo/pirate.txt

test: $(VENV)/.installed
	$(BIN)/pytest

test-edge: $(EDGE_VENV)/.installed
	$(EDGE_BIN)/python -c "import sys, importlib.util as u; \
	    sys.exit(', '.join(n for n in ('torch', 'transformers', 'onnx', 'optimum') if u.find_spec(n)) or None)"
	$(EDGE_BIN)/python -m pytest runtime_tests/runtime

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build $(VENV) $(EDGE_VENV)

# torch is installed first and with its exact version, so that no other package installs another build of it.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu,export,report,test]'
	touch $@

$(EDGE_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(EDGE_VENV)
	$(EDGE_BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu,test-edge]' $(OLDEST_RUNTIME)
	touch $@

# `fetch` prints the folder. If it made the folder before, it finds it again.
$(BUILD)/source: $(VENV)/.installed
	mkdir -p $(BUILD)
	$(BIN)/tp-export fetch $(BASE) > $@

$(BUILD)/model/patch_slots.json: | $(BUILD)/source
	$(BIN)/tp-export model "$$(cat $(BUILD)/source)" $(BUILD)/model --overwrite

$(BUILD)/pirate.safetensors: demo/pirate.txt demo/held-out.txt | $(BUILD)/source
	$(BIN)/tp-export patch "$$(cat $(BUILD)/source)" $@ --prompt-file demo/pirate.txt --held-out demo/held-out.txt --limit 48
